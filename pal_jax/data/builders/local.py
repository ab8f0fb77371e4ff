"""What the builders of this package share: where their files come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from pal_jax.errors import InputError


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder of files that lie somewhere, or that it may download.

  Attributes:
    source_files: what it is made of; () looks into TFDS's manual folder.
    may_download: whether it may use the network.
    all_checksums_known: whether a file without a checksum is refused.
    SUFFIXES: of its files.
  """

  SUFFIXES: ClassVar[Sequence[str]]
  source_files: tuple[Path, ...] = ()
  may_download = True
  all_checksums_known = False

  @classmethod
  def find_files(cls, folder: Path) -> tuple[Path, ...]:
    """Those of its files that a folder holds, in their order."""
    found = (
      p for p in folder.iterdir() if p.suffix in cls.SUFFIXES and p.is_file()
    )
    return tuple(sorted(found))

  def local_files(self, dl_manager) -> tuple[Path, ...]:
    """Files that need no download; () if there are none and it may download.

    Raises:
      InputError: if there are none and it may not, with what to fetch.
    """
    files = self.source_files
    if not files:
      try:
        folder = Path(dl_manager.manual_dir)
      except AssertionError:  # what TFDS says where it is missing or empty
        folder = None
      if folder and any(p.suffix in self.SUFFIXES for p in folder.iterdir()):
        files = self.find_files(folder)
    if not files and not self.may_download:
      raise InputError(f'{self.name}: {self.MANUAL_DOWNLOAD_INSTRUCTIONS}')
    return files
