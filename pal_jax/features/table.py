"""The feature table of a dataset."""

from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from pal_jax.data.dataset import Dataset
from pal_jax.data.persona import CORPUS
from pal_jax.errors import InputError
from pal_jax.features import checks
from pal_jax.features.encoder import Encoder
from pal_jax.features.factory import create
from pal_jax.features.lookup import lookup_or_encode, stored_reader
from pal_jax.features.rows import FileRows
from pal_jax.structs import FeatureTable

# Features that ship with the embedded corpus: never written to.
SHIPPED = CORPUS / 'features'


_CHUNK = 2**17  # texts
OnHost = Callable[[int], bool]
NORMALIZATIONS = ('rms', 'none')


def check_normalization(kind: str) -> None:
  """Refuses an unknown name. Raises InputError."""
  if kind not in NORMALIZATIONS:
    raise InputError(
      f'features.normalize={kind!r} is unknown: expected one of '
      f'{NORMALIZATIONS}'
    )


def normalize_rows(features: np.ndarray, kind: str) -> np.ndarray:
  """Scales each row: 'rms' to a mean square of 1, 'none' not at all.

  Sentence encoders give unit vectors, whose entries are about D^-1/2: small
  enough that an MLP at its initialisation is nearly linear in them, which
  cost three points of validation accuracy on the Persona data.

  Args:
    features: [M, D].
    kind: a name of NORMALIZATIONS.

  Raises:
    InputError: if the kind is unknown.
  """
  check_normalization(kind)
  if kind == 'none':
    return features
  rows = np.asarray(features, np.float32)
  rms = np.sqrt(np.mean(np.square(rows), axis=-1, keepdims=True))
  return rows / np.maximum(rms, 1e-12)


class _Progress:
  """A bar that appears only if something has to be encoded."""

  def __init__(self):
    self._bar = None

  def __call__(self, done: int, total: int) -> None:
    if self._bar is None:
      self._bar = tqdm(total=total, desc='encode', unit='text')
    self._bar.update(done - self._bar.n)
    if done == total:
      self._bar.close()


def _encode(
  names: Sequence[str],
  encoder: Encoder,
  config,
  on_host: OnHost,
  empty: int = 0,
):
  """[N, D] of N names; a part of a long list is in memory at a time.

  The first `empty` names are not encoded: their vectors are zeros.
  """
  vectors = None
  for start in range(empty, len(names), _CHUNK):
    piece = normalize_rows(
      lookup_or_encode(
        names[start : start + _CHUNK],
        encoder,
        stores=[SHIPPED],
        cache_dir=config.cache_dir,
        dtype=config.dtype,
        progress=_Progress(),
      ),
      config.normalize,
    )
    if vectors is None:
      shape = len(names), piece.shape[1]
      stays = on_host(len(names) * piece[0].nbytes) and _has_files(encoder)
      # Filled, not put together at the end, which would need it all twice.
      vectors = piece if stays else np.zeros(shape, piece.dtype)
    if not stays:  # otherwise it was encoded and checked, which is enough
      vectors[start : start + len(piece)] = piece
  if stays:
    return _in_files(names[empty:], encoder, config, shape, vectors.dtype)
  return vectors


def _has_files(encoder: Encoder) -> bool:
  """Whether its vectors lie on disk, once they were asked for."""
  return getattr(encoder, 'cacheable', True) or hasattr(encoder, 'reader')


def _in_files(names, encoder: Encoder, config, shape, dtype) -> FileRows:
  """The same rows, after as many of zeros as `names` are fewer."""
  if getattr(encoder, 'cacheable', True):
    read = stored_reader(
      names, encoder, [SHIPPED], config.cache_dir, config.dtype
    )
  else:
    read = encoder.reader(names)

  def prepare(vectors: np.ndarray) -> np.ndarray:
    rounded = vectors.astype(config.dtype, copy=False)
    return normalize_rows(rounded, config.normalize)

  return FileRows(read, shape, dtype, prepare, shape[0] - len(names))


def feature_table(
  dataset: Dataset, config, on_host: OnHost = lambda nbytes: False
) -> FeatureTable:
  """Features of every item and prompt, encoded once and cached.

  Args:
    dataset: with texts, or with arrays of its own, which are used as they
      are.
    config: the `features` part of an experiment's config.
    on_host: whether features of so many bytes are to stay in their files, if
      they are in any; otherwise they are read into memory.

  Returns:
    FeatureTable of numpy arrays or `FileRows`, [M, D] and [Q, D].

  Raises:
    InputError: if texts cannot be encoded, or features are not finite or not
      as many as the items.
  """
  check_normalization(config.normalize)  # before hours of encoding
  if dataset.item_features is not None:
    items, prompts = dataset.item_features, dataset.prompt_features
  else:
    encoder = create(config)
    items = _encode(dataset.item_names, encoder, config, on_host)
    # Nothing was asked where the prompt is empty: a vector of zeros.
    empty = int(dataset.prompt_names[0] == '')
    if len(dataset.prompt_names) > empty:
      prompts = _encode(dataset.prompt_names, encoder, config, on_host, empty)
    else:
      prompts = np.zeros((empty, items.shape[1]), items.dtype)
  for what, array, names in (
    ('item', items, dataset.item_names),
    ('prompt', prompts, dataset.prompt_names),
  ):
    if array.ndim != 2 or len(array) != len(names):
      raise InputError(
        f'{what} features have shape {array.shape}, expected one row for each '
        f'of {len(names)} {what}s'
      )
    # What lies in files was checked when it was encoded.
    found = isinstance(array, np.ndarray)
    bad = checks.first_bad_row(array) if found else None
    if bad is not None:
      raise InputError(
        f'{what} features: row {bad} ({names[bad]!r}) holds NaN or infinity; '
        'encode it again'
      )
  return FeatureTable(items=items, prompts=prompts)
