"""Texts -> vectors, each distinct text encoded once and kept on disk."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pal_jax.errors import InputError
from pal_jax.features import checks
from pal_jax.features.encoder import Encoder
from pal_jax.features.rows import Read, read_from
from pal_jax.features.store import (
  DTYPES,
  FeatureStore,
  Spec,
  read_spec,
  text_keys,
)
from pal_jax.user_cache import user_cache_dir

# Texts encoded between two writes: what a killed process loses at most.
_CHUNK = 2048


def lookup_or_encode(
  texts: Sequence[str],
  encoder: Encoder,
  stores: Sequence[str | os.PathLike] = (),
  cache_dir: str | os.PathLike = '',
  dtype: str = 'float16',
  progress: Callable[[int, int], None] | None = None,
  keep: bool = True,
) -> np.ndarray:
  """The vectors of `texts`, in their order; duplicates are allowed.

  Looks in `stores` first, in their order, then in the user's cache; encodes
  what is left and appends it to the cache. The encoder loads its weights only
  if something is left. What is encoded is rounded to `dtype` before it is
  returned, so that a first and a second run see the same numbers. Vectors of
  `stores` keep the precision they were written with, whatever `dtype` says.

  Args:
    texts: N texts. Equal means equal code points: nothing is normalised.
    encoder: of which only name and version are used if all is found.
    stores: folders of a FeatureStore each, never written; those of another
      encoder or version are passed over.
    cache_dir: the user's cache; '' is `user_cache_dir('features')`.
    dtype: 'float16' or 'float32', in the cache and of the result.
    progress: called with (done, total), distinct texts encoded.
    keep: whether what is encoded goes to the user's cache; False where texts
      come once and never again.

  Returns:
    [N, D] in `dtype`, read-only.

  Raises:
    InputError: a text that is no string; a folder that is no store; a vector
      with NaN or infinity (names the row); or the encoder cannot run.
  """
  if dtype not in DTYPES:
    raise InputError(f'features.dtype is {dtype!r}; expected one of {DTYPES}.')
  checks.check_texts(texts)
  first_row = {}  # of each distinct text; its order is theirs
  for row, text in enumerate(texts):
    first_row.setdefault(text, row)
  if getattr(encoder, 'cacheable', True):
    vectors = _cached(
      first_row, encoder, stores, cache_dir, dtype, progress, keep
    )
  else:
    vectors = _encode(first_row, encoder, encoder.width, dtype)
  if len(first_row) != len(texts):
    index = {text: i for i, text in enumerate(first_row)}
    vectors = vectors[[index[text] for text in texts]]
  # A view: an encoder may have returned its own table.
  vectors = vectors.view()
  vectors.flags.writeable = False
  return vectors


def stored_reader(
  texts: Sequence[str],
  encoder: Encoder,
  stores: Sequence[str | os.PathLike],
  cache_dir: str | os.PathLike,
  dtype: str,
) -> Read:
  """Reads rows of what `lookup_or_encode` gave for the same arguments.

  They are not checked again, and come in the dtype of their store.
  """
  sources = list(_sources(encoder, stores, cache_dir, dtype).values())
  located, _ = _locate(texts, sources)
  source, position = np.zeros((2, len(texts)), np.int64)
  for i, (_, positions, rows) in enumerate(located):
    source[rows], position[rows] = i, positions
  return read_from([store.read for store in sources], source, position)


def cache_folder(
  encoder: Encoder, cache_dir: str | os.PathLike, dtype: str
) -> pathlib.Path:
  """The encoder's store in the user's cache; it need not exist."""
  root = pathlib.Path(cache_dir).expanduser() if cache_dir else None
  identity = hashlib.sha256(f'{encoder.name}\0{encoder.version}'.encode())
  folder = f'{encoder.name}-{identity.hexdigest()[:16]}-{dtype}'
  return (root or user_cache_dir('features')) / folder


def _cached(first_row, encoder, stores, cache_dir, dtype, progress, keep):
  """The vectors [N, D] of N distinct texts, the keys of `first_row`."""
  texts, first_rows = list(first_row), list(first_row.values())
  folder = cache_folder(encoder, cache_dir, dtype)
  sources = _sources(encoder, stores, cache_dir, dtype)
  width = _width(sources, encoder)
  located, missing = _locate(texts, sources.values())
  if len(missing) and keep:
    cache = sources.get(str(folder))
    if cache is None:
      spec = Spec(encoder.name, encoder.version, width, dtype)
      cache = FeatureStore.open_or_create(folder, spec)
    # Before encoding: hours of it must not end at a folder that refuses.
    cache.check_writable()
  vectors = np.empty((len(texts), width), dtype)
  for store, positions, rows in located:
    _read(store, positions, rows, vectors, texts, first_rows)
  for start in range(0, len(missing), _CHUNK):
    rows = missing[start : start + _CHUNK]
    chunk = {texts[row]: first_rows[row] for row in rows}
    try:
      vectors[rows] = _encode(chunk, encoder, width, dtype)
    except InputError as error:
      raise InputError(
        f'{len(missing)} of {len(texts)} texts are in no store of encoder '
        f'{encoder.name}, version {encoder.version} (looked in '
        f'{[str(path) for path in stores]}), and encoding them failed: '
        f'{error}'
      ) from error
    if keep:
      cache.append(list(chunk), vectors[rows])
    if progress is not None:
      progress(start + len(rows), len(missing))
  return vectors


def _sources(encoder, stores, cache_dir, dtype) -> dict[str, FeatureStore]:
  """The encoder's among the stores, and its cache if there is one."""
  folder = cache_folder(encoder, cache_dir, dtype)
  if (folder / 'store.json').exists():
    stores = [*stores, folder]
  return {
    str(path): FeatureStore(path)
    for path in stores
    if _identity(read_spec(path)) == (encoder.name, encoder.version)
  }


def _identity(spec: Spec) -> tuple[str, str]:
  return spec.encoder, spec.version


def _locate(texts, sources):
  """Where the texts are: [(store, positions, rows)], and the rows missing."""
  keys = text_keys(texts)
  missing = np.arange(len(texts))
  located = []
  for store in sources:
    positions = store.find(keys[missing])
    found = positions >= 0
    located.append((store, positions[found], missing[found]))
    missing = missing[~found]
  return located, missing


def _width(sources: Mapping[str, FeatureStore], encoder: Encoder) -> int:
  """D, from the stores if there are any: the encoder may not be installed."""
  widths = {path: store.spec.width for path, store in sources.items()}
  if len(set(widths.values())) > 1:
    raise InputError(
      f'stores of encoder {encoder.name}, version {encoder.version}, differ '
      f'in width: {widths}. Delete the wrong one.'
    )
  return next(iter(widths.values())) if widths else encoder.width


def _read(store, positions, rows, vectors, texts, first_rows):
  """Copies rows of a store into `vectors[rows]`, in bounded pieces."""
  for start in range(0, len(rows), _CHUNK):
    piece = slice(start, start + _CHUNK)
    stored = store.read(positions[piece])
    bad = checks.first_bad_row(stored)
    if bad is not None:
      row = rows[piece][bad]
      raise InputError(
        f'{store.locate(positions[piece][bad])}: the vector of texts, row '
        f'{first_rows[row]}, {checks.excerpt(texts[row])}, holds NaN or '
        'infinity. Delete this file and its .keys.npy to encode it again.'
      )
    vectors[rows[piece]] = checks.to_dtype(
      stored,
      vectors.dtype.name,
      [texts[row] for row in rows[piece]],
      [first_rows[row] for row in rows[piece]],
    )


def _encode(first_row, encoder, width, dtype):
  """Encodes the keys of `first_row`, checks, and rounds to `dtype`."""
  texts = list(first_row)
  vectors = np.asarray(encoder.encode(texts))
  if vectors.shape != (len(texts), width):
    raise InputError(
      f'encoder {encoder.name}, version {encoder.version}: {len(texts)} texts '
      f'gave an array of shape {vectors.shape}; expected '
      f'{(len(texts), width)}. Mend the encoder.'
    )
  return checks.to_dtype(vectors, dtype, texts, list(first_row.values()))
