"""Vectors that somebody computed already, from one file.

    .npz           one 2-D float array, `features`, and 1-D `texts` or `ids`
    .npy           the array; opened memory-mapped
    .safetensors   the same, one tensor

For the latter two, the texts come from the caller, or from a JSON list beside
the array: `vectors.npy` and `vectors.texts.json`. Row m of the array belongs
to text m. A "text" may be any id that the data set uses for its items, such
as the name of an image. Where nothing says what the texts are, they are the
rows' numbers: '0' is the first row.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import safetensors.numpy

from pal_jax.errors import InputError
from pal_jax.features import checks
from pal_jax.features.rows import Read, read_from

_FIELD = 'features'
_TEXT_FIELDS = ('texts', 'ids')
SUFFIXES = ('.npz', '.npy', '.safetensors')
# One way to write each number; longer ones are no row of any file.
_NUMBER = re.compile('0|[1-9][0-9]{0,17}')


class Precomputed:
  """Encoder of `precomputed`; see `features.encoder.Encoder`.

  `encode` looks texts up. Its vectors are on disk already, so they are not
  cached again.

  Args:
    path: the file.
    texts: M texts or ids, one for each row; by default those of the file or
      beside it, or else the numbers of the rows.

  Raises:
    InputError: when first used: the file is not as described above, or holds
      NaN or infinity.
  """

  name = 'precomputed'
  cacheable = False

  def __init__(
    self, path: str | os.PathLike, texts: Sequence[str] | None = None
  ):
    if not str(path):
      raise InputError(
        'features.path is empty; the encoder precomputed needs a file that '
        f'ends in one of {SUFFIXES}.'
      )
    self._path = pathlib.Path(path).expanduser()
    self._texts = texts

  @functools.cached_property
  def version(self) -> str:
    """The hash of the file, or InputError if it cannot be read."""
    _check_path(self._path)
    with open(self._path, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()[:32]

  @property
  def width(self) -> int:
    return self._vectors.shape[1]

  @property
  def has_texts(self) -> bool:
    """Whether rows have names; otherwise they are known by their number."""
    return self._row_of is not None

  def knows(self, text: str) -> bool:
    """Whether there is a vector of this text."""
    if self._row_of is None:
      return self._row_number(text) is not None
    return text in self._row_of

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """The vectors [N, D], float32, of N texts, in their order.

    Raises:
      InputError: names the first text that the file does not have, and says
        how many there are; or as the class.
    """
    return self._vectors[self.rows_of(texts)].astype(np.float32, copy=False)

  def reader(self, texts: Sequence[str]) -> Read:
    """Reads rows of what `encode` gives, in the dtype of the file."""
    return read_from([self.read], np.zeros(()), self.rows_of(texts))

  def read(self, rows: np.ndarray) -> np.ndarray:
    """Rows [N] of the file."""
    return self._vectors[rows]

  def rows_of(self, texts: Sequence[str]) -> np.ndarray:
    """The row [N] of each text in the file; raises as `encode`."""
    checks.check_texts(texts)
    row_of = self._row_number if self._row_of is None else self._row_of.get
    rows = [row_of(text) for text in texts]
    missing = [t for t, row in zip(texts, rows, strict=True) if row is None]
    if missing:
      raise InputError(
        f'{self._path}: no vector for {checks.excerpt(missing[0])}, nor for '
        f'{len(missing) - 1} more of the {len(texts)} texts asked for '
        f'{self._what_it_has()}'
      )
    return np.array(rows, np.int64)

  def _row_number(self, text: str) -> int | None:
    """The row that an id names as '0', '17'; None if it names none."""
    row = int(text) if _NUMBER.fullmatch(text) else len(self._vectors)
    return row if row < len(self._vectors) else None

  def _what_it_has(self) -> str:
    if self._row_of is not None:
      return (
        f'(the file has {len(self._row_of)}). Compute them, or drop these '
        'texts.'
      )
    return (
      f'(there is no {_beside(self._path).name} beside the file, so its texts '
      f'are the numbers of its rows, 0 to {len(self._vectors) - 1}, without '
      'prompt or leading zeros). Ask for those, or write a JSON list there '
      'that names the rows.'
    )

  @functools.cached_property
  def _vectors(self) -> np.ndarray:
    return load_array(self._path)

  @functools.cached_property
  def _row_of(self) -> dict[str, int] | None:
    """The row of each text; None if texts are numbers of rows."""
    texts = self._texts
    if texts is None:
      texts = _load_texts(self._path)
    if texts is None:
      return None
    vectors = self._vectors
    _check_rows(self._path, vectors, len(texts), 'texts')
    row_of = {}
    for row, text in enumerate(texts):
      first = row_of.setdefault(text, row)
      if first != row and not np.array_equal(vectors[first], vectors[row]):
        raise InputError(
          f'{self._path}: rows {first} and {row} are of one text, '
          f'{checks.excerpt(text)}, and differ. Keep one of them.'
        )
    return row_of


def load_array(
  path: str | os.PathLike, num_rows: int | None = None
) -> np.ndarray:
  """The array [M, D] of a file, for a caller who knows what its rows are.

  Args:
    path: .npz, .npy or .safetensors.
    num_rows: M, if it is known.

  Returns:
    [M, D] float16 or float32, as in the file if it is one of them. Of .npy it
    is then memory-mapped and read-only.

  Raises:
    InputError: not such a file; not 2-D, not float, another number of rows
      (says both), or not finite in float32 (names the first bad row).
  """
  path = pathlib.Path(path)
  _check_path(path)
  vectors = _read(path)
  if vectors.ndim != 2 or vectors.dtype.kind != 'f':
    raise InputError(
      f'{path}, {_FIELD}: {vectors.dtype} of shape {vectors.shape}; expected '
      'floats of shape [M, D]. Save one row for each text.'
    )
  if num_rows is not None:
    _check_rows(path, vectors, num_rows, 'rows')
  if vectors.dtype not in (np.float16, np.float32):
    with np.errstate(over='ignore'):  # to infinity, which the check names
      vectors = vectors.astype(np.float32)
  bad = checks.first_bad_row(vectors)
  if bad is not None:
    raise InputError(
      f'{path}, {_FIELD}: row {bad} holds NaN, infinity or a number beyond '
      'float32; expected finite ones. Compute this row again, or drop it with '
      'its text.'
    )
  return vectors


def _check_path(path: pathlib.Path) -> None:
  if path.suffix not in SUFFIXES:
    raise InputError(
      f'features.path {path} ends in {path.suffix!r}; expected one of '
      f'{SUFFIXES}.'
    )
  if not path.is_file():
    raise InputError(f'features.path {path} is no file. Check the path.')


def _check_rows(path, vectors, expected: int, what: str) -> None:
  if len(vectors) != expected:
    raise InputError(
      f'{path}, {_FIELD}: {len(vectors)} rows for {expected} {what}; expected '
      'one row each, in the same order. Save both from one list.'
    )


def _read(path: pathlib.Path) -> np.ndarray:
  """The array, of whatever shape."""
  if path.suffix == '.npz':
    return _read_npz(path, (_FIELD,))
  if path.suffix == '.safetensors':
    return _read_safetensors(path)
  try:
    return np.lib.format.open_memmap(path, mode='r').view(np.ndarray)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(
      f'{path} cannot be read ({error}); expected a whole .npy file of '
      'numbers, as numpy.save writes it.'
    ) from error


def _read_npz(path: pathlib.Path, fields: Sequence[str]) -> np.ndarray:
  """The first of `fields` that is there."""
  try:
    with np.load(path, allow_pickle=False) as file:
      for field in fields:
        if field in file:
          return file[field]
      present = file.files
  # A truncated archive is zipfile.BadZipFile or zlib.error, neither of which
  # is an OSError; an array of Python objects is a ValueError.
  except Exception as error:
    raise InputError(
      f'{path} cannot be read ({error}); expected a whole .npz file without '
      "pickled objects. Save texts with numpy.array(texts, dtype='U')."
    ) from error
  raise InputError(
    f'{path} has the fields {present}; expected '
    f'{" or ".join(fields)}. Save with '
    'numpy.savez(path, features=vectors, texts=texts).'
  )


def _read_safetensors(path: pathlib.Path) -> np.ndarray:
  try:
    tensors = safetensors.numpy.load_file(path)
  # Its own exception, or KeyError and TypeError for types that numpy lacks.
  except Exception as error:
    raise InputError(
      f'{path} cannot be read as safetensors of float16 or float32 ({error!r}).'
    ) from error
  if len(tensors) == 1:
    return next(iter(tensors.values()))
  if _FIELD in tensors:
    return tensors[_FIELD]
  raise InputError(
    f'{path} has the tensors {sorted(tensors)}; expected one, or one that is '
    f'called {_FIELD}.'
  )


def _beside(path: pathlib.Path) -> pathlib.Path:
  """Where the texts of an array without texts are."""
  return path.with_suffix('.texts.json')


def _load_texts(path: pathlib.Path) -> list[str] | None:
  """The texts that belong to the rows of `path`; None if nothing says them."""
  if path.suffix == '.npz':
    texts = _read_npz(path, _TEXT_FIELDS)
    if texts.ndim != 1 or texts.dtype.kind not in 'US' + 'iu':
      raise InputError(
        f'{path}, texts or ids: {texts.dtype} of shape {texts.shape}; '
        'expected strings or whole numbers of shape [M].'
      )
    if texts.dtype.kind == 'S':
      texts = np.char.decode(texts, 'utf-8')
    return [str(text) for text in texts.tolist()]
  beside = _beside(path)
  try:
    texts = json.loads(beside.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise InputError(
      f'{beside} cannot be read ({error}); expected a JSON list of the texts '
      f'of {path.name}, in the order of its rows. Write it again, or delete '
      'it if texts are the numbers of the rows.'
    ) from error
  if not isinstance(texts, list):
    raise InputError(
      f'{beside} holds a {type(texts).__name__}; expected a list of texts.'
    )
  checks.check_texts(texts)
  return texts
