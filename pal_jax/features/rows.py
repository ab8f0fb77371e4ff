"""Vectors that stay in their files, read a few rows at a time."""

from collections.abc import Callable, Sequence

import numpy as np

Read = Callable[[np.ndarray], np.ndarray]  # rows [N] -> vectors [N, D]
_BLOCK = 16_384  # rows in memory while an array is made of all


def read_from(
  sources: Sequence[Read], source: np.ndarray, row: np.ndarray
) -> Read:
  """One `Read` of M rows that lie in several places.

  Args:
    sources: the places.
    source: [M] the place of each row.
    row: [M] which one it is there.
  """
  if len(sources) == 1:
    (only,) = sources
    return lambda wanted: only(row[wanted])

  def read(wanted: np.ndarray) -> np.ndarray:
    found = None
    for place, read_there in enumerate(sources):
      members = np.flatnonzero(source[wanted] == place)
      if members.size:
        vectors = read_there(row[wanted[members]])
        if found is None:
          found = np.empty((len(wanted), vectors.shape[1]), vectors.dtype)
        found[members] = vectors
    return found

  return read


class FileRows:
  """An array [M, D] that reads rows when it is indexed with them.

  Args:
    read: of the rows after the first `empty`, counted from there.
    shape: (M, D).
    dtype: what `prepare` returns.
    prepare: vectors [N, D] as they lie there -> as they are wanted.
    empty: the first rows, which are zeros and lie nowhere.
  """

  ndim = 2

  def __init__(
    self, read: Read, shape: tuple[int, int], dtype, prepare: Read, empty=0
  ):
    self.shape, self.dtype = shape, np.dtype(dtype)
    self._read, self._prepare, self._empty = read, prepare, empty

  def __len__(self) -> int:
    return self.shape[0]

  @property
  def nbytes(self) -> int:
    return self.shape[0] * self.shape[1] * self.dtype.itemsize

  def __getitem__(self, index) -> np.ndarray:
    """Vectors [..., D] of rows [...] >= 0, or of a slice."""
    if isinstance(index, slice):
      index = np.arange(*index.indices(len(self)))
    index = np.asarray(index)
    rows = index.ravel() - self._empty
    if rows.size and rows.min() >= 0:
      found = self._prepare(self._read(rows))
    else:
      found = np.zeros((len(rows), self.shape[1]), self.dtype)
      there = np.flatnonzero(rows >= 0)
      if there.size:
        found[there] = self._prepare(self._read(rows[there]))
    return found.reshape(*index.shape, self.shape[1])

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """All of it, in memory."""
    del copy
    whole = np.empty(self.shape, dtype or self.dtype)
    for start in range(0, len(self), _BLOCK):
      whole[start : start + _BLOCK] = self[start : start + _BLOCK]
    return whole
