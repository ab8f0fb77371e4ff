"""Texts on disk that behave like a tuple of strings."""

import tempfile
from array import array
from collections.abc import Iterator, Sequence

import numpy as np


class SpooledTexts(Sequence):
  """M strings in a temporary file, read when asked for.

  A million responses are a gigabyte as Python strings, and are needed only
  while they are encoded. The file has no name and goes with the object.
  """

  def __init__(self):
    self._file = tempfile.TemporaryFile()  # noqa: SIM115
    self._ends = array('q')
    self._size = 0

  def append(self, text: str) -> int:
    """Adds a text; returns its row."""
    # Lone surrogates, which UTF-8 cannot hold, are refused where texts are
    # read.
    data = text.encode()
    self._file.write(data)
    self._size += len(data)
    self._ends.append(self._size)
    return len(self._ends) - 1

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, row):
    if isinstance(row, slice):
      return [self[i] for i in range(*row.indices(len(self)))]
    row = int(row)
    if row < 0:
      row += len(self)
    if not 0 <= row < len(self):
      raise IndexError(row)
    start = self._ends[row - 1] if row else 0
    self._file.seek(start)
    return self._file.read(self._ends[row] - start).decode()

  def __iter__(self) -> Iterator[str]:
    start = 0
    for end in np.asarray(self._ends).tolist():
      self._file.seek(start)
      yield self._file.read(end - start).decode()
      start = end
