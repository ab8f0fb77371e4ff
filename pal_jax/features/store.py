"""Vectors of texts on disk: append-only shards, read memory-mapped.

A folder holds

    store.json           encoder, version, width, dtype, format
    <id>.keys.npy        [N, 32] uint8, SHA-256 of each text in UTF-8
    <id>.vectors.npy     [N, D] float16 or float32

Nothing is ever changed in place: an append adds one pair of files, each
written under a temporary name, flushed and renamed, the keys last. So a
process killed at any moment leaves files that are ignored, several processes
may append at once, and a shard that a store has mapped stays as it is. <id> is
the hash of the keys. The folder is a cache: deleting a pair, or all of it, is
safe. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import uuid
import warnings
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np

from pal_jax.errors import InputError
from pal_jax.features import checks

FORMAT = 1
DTYPES = ('float16', 'float32')
KEY_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Spec:
  """What all vectors of a store have in common."""

  encoder: str  # Encoder.name
  version: str  # Encoder.version
  width: int  # D
  dtype: str  # 'float16' or 'float32'


@dataclasses.dataclass(frozen=True)
class _Shard:
  path: pathlib.Path  # of the vectors
  keys: np.ndarray  # [N, 32] uint8, memory-mapped
  vectors: np.ndarray  # [N, D], memory-mapped


def text_keys(texts: Sequence[str]) -> np.ndarray:
  """SHA-256 of each text: [N, 32] uint8. Texts are taken as they are."""
  digests = b''.join(hashlib.sha256(text.encode()).digest() for text in texts)
  return np.frombuffer(digests, np.uint8).reshape(-1, KEY_BYTES)


class FeatureStore:
  """The store in `folder`, as it was when this object was made.

  Raises:
    InputError: `folder` holds no store, or one of another format.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    self.spec = read_spec(self.folder)
    self._shards = [
      shard
      for path in sorted(self.folder.glob('*.keys.npy'))
      # Another process's or a killed one's file under way starts with a dot.
      if not path.name.startswith('.')
      and (shard := _open_shard(path, self.spec)) is not None
    ]
    self._build_index()

  @classmethod
  def open_or_create(
    cls, folder: str | os.PathLike, spec: Spec
  ) -> 'FeatureStore':
    """The store in `folder`, made if there is none yet.

    Raises:
      InputError: the folder holds vectors of another spec, or cannot be
        written.
    """
    folder = pathlib.Path(folder)
    if spec.dtype not in DTYPES:
      raise InputError(
        f'features.dtype is {spec.dtype!r}; expected one of {DTYPES}.'
      )
    if not (folder / 'store.json').exists():
      description = {'format': FORMAT, **dataclasses.asdict(spec)}
      text = json.dumps(description, indent=2) + '\n'
      try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / 'store.json', lambda file: file.write(text.encode()))
      except OSError as error:
        raise InputError(f'{_unwritable(folder)} ({error})') from error
    store = cls(folder)
    if store.spec != spec:
      raise InputError(
        f'{folder / "store.json"} describes {store.spec}; expected {spec}. '
        'Delete the folder, or set features.cache_dir to another one.'
      )
    return store

  def __len__(self) -> int:
    """Rows on disk; a text that two processes added counts twice."""
    return len(self._prefixes)

  def find(self, keys: np.ndarray) -> np.ndarray:
    """Positions of `keys` in the store.

    Args:
      keys: [N, 32] uint8, from `text_keys`.

    Returns:
      [N] int64, what `read` takes; -1 where a text is not in the store.
    """
    found = np.full(len(keys), -1, np.int64)
    if not len(self) or not len(keys):
      return found
    # Searching 8 of the 32 bytes keeps the index small. The whole key decides:
    # two texts that agree in 64 bits of their hashes cost a second encoding of
    # one of them, never a wrong vector.
    at = np.searchsorted(self._prefixes, _prefixes(keys))
    candidates = self._positions[np.minimum(at, len(self) - 1)]
    for shard, start, rows in self._by_shard(candidates):
      same = (shard.keys[candidates[rows] - start] == keys[rows]).all(axis=1)
      found[rows[same]] = candidates[rows[same]]
    return found

  def read(self, positions: np.ndarray) -> np.ndarray:
    """The vectors [N, D], in the store's dtype, at `positions` [N] of `find`.

    They are copied; no other row is touched. Not checked to be finite.
    """
    vectors = np.empty((len(positions), self.spec.width), self.spec.dtype)
    for shard, start, members in self._by_shard(positions):
      vectors[members] = shard.vectors[positions[members] - start]
    return vectors

  def locate(self, position: int) -> str:
    """File and row of a position, for messages."""
    i = int(np.searchsorted(self._ends, position, side='right'))
    start = self._ends[i] - len(self._shards[i].keys)
    return f'{self._shards[i].path}, row {position - start}'

  def check_writable(self) -> None:
    """Raises InputError if `append` would fail for want of permission."""
    if not os.access(self.folder, os.W_OK):
      raise InputError(_unwritable(self.folder))

  def append(self, texts: Sequence[str], vectors: np.ndarray) -> None:
    """Adds one shard.

    Args:
      texts: N distinct texts, none of them in the store.
      vectors: [N, D] of finite values; stored in the store's dtype.

    Raises:
      InputError: wrong shape, a value that is not finite in the store's
        dtype (names the row), or the disk refused (it may be full).
    """
    vectors = np.asarray(vectors)
    if vectors.shape != (len(texts), self.spec.width):
      raise InputError(
        f'encoder {self.spec.encoder} {self.spec.version}: {len(texts)} texts '
        f'gave vectors of shape {vectors.shape}; expected '
        f'{(len(texts), self.spec.width)}. Mend the encoder.'
      )
    if not len(texts):
      return
    vectors = checks.to_dtype(vectors, self.spec.dtype, texts)
    keys = text_keys(texts)
    # From the content, not at random: encoding the same texts again gives the
    # same files, and replaces a pair that was found corrupt.
    name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
    keys_path = self.folder / f'{name}.keys.npy'
    vectors_path = self.folder / f'{name}.vectors.npy'
    try:
      _write(vectors_path, lambda file: _save(file, vectors))
      _write(keys_path, lambda file: _save(file, keys))
    except OSError as error:
      raise InputError(
        f'{len(texts)} vectors could not be written to {self.folder} '
        f'({error}). Make room, or set features.cache_dir to another folder.'
      ) from error
    shard = _open_shard(keys_path, self.spec)
    if shard is not None:
      self._shards.append(shard)
      self._build_index()

  def _build_index(self) -> None:
    """Sorts 8-byte prefixes of all keys: 16 bytes of memory for each text."""
    self._ends = np.cumsum([len(s.keys) for s in self._shards], dtype=np.int64)
    parts = [_prefixes(shard.keys) for shard in self._shards]
    prefixes = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    # Stable, so that of a text added twice the first shard's vector is read.
    self._positions = np.argsort(prefixes, kind='stable')
    self._prefixes = prefixes[self._positions]

  def _by_shard(self, positions: np.ndarray):
    """Yields (shard, its first position, indices of `positions` in it)."""
    owner = np.searchsorted(self._ends, positions, side='right')
    order = np.argsort(owner, kind='stable')
    bounds = np.searchsorted(owner[order], np.arange(len(self._shards) + 1))
    for i, shard in enumerate(self._shards):
      members = order[bounds[i] : bounds[i + 1]]
      if len(members):
        yield shard, self._ends[i] - len(shard.keys), members


def _prefixes(keys: np.ndarray) -> np.ndarray:
  """The first 8 bytes of each key as a number: [N, 32] -> [N] uint64."""
  return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]


def read_spec(folder: str | os.PathLike) -> Spec:
  """What the store in `folder` holds, without opening its shards.

  Raises:
    InputError: `folder` holds no store, or one of another format.
  """
  path = pathlib.Path(folder) / 'store.json'
  try:
    description = json.loads(path.read_text(encoding='utf-8'))
    format_number = description.pop('format')
    if format_number != FORMAT:
      raise InputError(
        f'{path}: format is {format_number}; this version reads {FORMAT}. '
        'Delete the folder to encode again, or update pal_jax.'
      )
    spec = Spec(**description)
  except FileNotFoundError:
    raise InputError(
      f'{folder} is no feature store: it has no store.json. Name a folder '
      'that a FeatureStore wrote.'
    ) from None
  except InputError:
    raise
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise InputError(
      f'{path} is not as a store writes it ({error!r}); expected the fields '
      'format, encoder, version, width and dtype. Delete the folder.'
    ) from error
  if spec.dtype not in DTYPES:
    raise InputError(
      f'{path}: dtype is {spec.dtype!r}; expected one of {DTYPES}.'
    )
  return spec


def _open_shard(keys_path: pathlib.Path, spec: Spec) -> _Shard | None:
  """Maps one pair of files; None, with a warning, if they are no pair."""
  name = keys_path.name.removesuffix('.keys.npy')
  path = keys_path.with_name(f'{name}.vectors.npy')
  if not path.exists():
    return None  # Half of a deleted pair: nothing to read, nothing wrong.
  try:
    keys = np.lib.format.open_memmap(keys_path, mode='r')
    vectors = np.lib.format.open_memmap(path, mode='r')
  except (OSError, ValueError, EOFError) as error:
    return _skip(path, f'it cannot be read ({error})')
  if keys.dtype != np.uint8 or keys.shape[1:] != (KEY_BYTES,):
    return _skip(path, f'its keys are {keys.dtype} {keys.shape}')
  if vectors.shape != (len(keys), spec.width) or vectors.dtype != spec.dtype:
    return _skip(
      path,
      f'it holds {vectors.dtype} {vectors.shape}; expected {spec.dtype} '
      f'{(len(keys), spec.width)}',
    )
  # Plain arrays over the same map: indexing np.memmap costs a Python call to
  # __array_finalize__ each time.
  return _Shard(path, keys.view(np.ndarray), vectors.view(np.ndarray))


def _unwritable(folder: pathlib.Path) -> str:
  return (
    f'the feature cache {folder} cannot be written; expected a folder that '
    'can. Set features.cache_dir to one.'
  )


def _skip(path: pathlib.Path, reason: str) -> None:
  warnings.warn(
    f'feature shard {path} is skipped: {reason}. Its texts are encoded again; '
    'delete it and its .keys.npy.',
    stacklevel=2,
  )


def _save(file: BinaryIO, array: np.ndarray) -> None:
  array = np.ascontiguousarray(array)
  np.lib.format.write_array(file, array, allow_pickle=False)


def _write(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    with open(temporary, 'xb') as file:
      write(file)
      file.flush()
      # A rename can reach the disk before the data does; after a power cut
      # the shard would then be zeros that look whole.
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
