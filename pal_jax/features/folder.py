"""Vectors of several files: images in one, captions in another."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from pal_jax.errors import InputError
from pal_jax.features import checks
from pal_jax.features.precomputed import SUFFIXES, Precomputed
from pal_jax.features.rows import Read, read_from


class PrecomputedFolder:
  """Encoder of `precomputed` for a folder; see `features.encoder.Encoder`.

  Args:
    path: a folder with files as `Precomputed` reads, each with its texts or
      ids; of a text in two of them the first file's vector counts.

  Raises:
    InputError: when first used: there is no such file, one has no texts, or
      they differ in width.
  """

  name = 'precomputed'
  cacheable = False

  def __init__(self, path: str | os.PathLike):
    self._path = pathlib.Path(path).expanduser()

  @functools.cached_property
  def _files(self) -> tuple[Precomputed, ...]:
    paths = sorted(p for p in self._path.iterdir() if p.suffix in SUFFIXES)
    if not paths:
      raise InputError(
        f'features.path {self._path} is a folder without a file that ends in '
        f'one of {SUFFIXES}.'
      )
    files = tuple(map(Precomputed, paths))
    for path, file in zip(paths, files, strict=True):
      if not file.has_texts:
        raise InputError(
          f'{path}: nothing says what its rows are, and numbers of rows would '
          'not say of which file. Write a JSON list of the ids to '
          f'{path.with_suffix(".texts.json").name}.'
        )
    widths = {p.name: f.width for p, f in zip(paths, files, strict=True)}
    if len(set(widths.values())) > 1:
      raise InputError(
        f'{self._path}: files differ in width: {widths}. Keep those of one '
        'encoder.'
      )
    return files

  @functools.cached_property
  def version(self) -> str:
    """The hash of the files."""
    versions = '\0'.join(file.version for file in self._files)
    return hashlib.sha256(versions.encode()).hexdigest()[:32]

  @property
  def width(self) -> int:
    return self._files[0].width

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """The vectors [N, D], float32, of N texts, in their order.

    Raises:
      InputError: names the first text that no file has; or as the class.
    """
    file, row = self._locate(texts)
    vectors = np.zeros((len(texts), self.width), np.float32)
    for i, found in enumerate(self._files):
      vectors[file == i] = found.read(row[file == i])
    return vectors

  def reader(self, texts: Sequence[str]) -> Read:
    """Reads rows of what `encode` gives, in the dtype of the files."""
    return read_from([file.read for file in self._files], *self._locate(texts))

  def _locate(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """([N] which file has each text, [N] its row there)."""
    checks.check_texts(texts)
    file, row = np.zeros((2, len(texts)), np.int64)
    left = np.arange(len(texts))
    for i, found in enumerate(self._files):
      here = np.array([found.knows(texts[at]) for at in left], bool)
      rows = left[here]
      file[rows] = i
      row[rows] = found.rows_of([texts[at] for at in rows])
      left = left[~here]
      if not left.size:
        return file, row
    raise InputError(
      f'{self._path}: no file has a vector for '
      f'{checks.excerpt(texts[left[0]])}, nor for {left.size - 1} more of the '
      f'{len(texts)} texts asked for. Compute them, or drop these texts.'
    )
