"""Files of a download -> a prepared TFDS dataset, read without TensorFlow."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager

from pal_jax.errors import InputError

# Not 'tfrecord', the default, which needs TensorFlow; and not 'parquet', which
# rounds slices of splits to whole shards.
FILE_FORMAT = 'array_record'
_BATCH = 4096  # records read at a time
_DOWNLOADED = 'download'  # instead of a hash
_HASHED_WHOLE = 2**28  # bytes; longer files take minutes
_END = 2**20  # bytes


def check_folder(path: str, what: str) -> Path:
  """The folder that holds the files of a dataset.

  Raises:
    InputError: if there is none, with what to fetch and where to put it.
  """
  if not path:
    raise InputError(f'data.path is empty: {what}')
  folder = Path(path).expanduser()
  if not folder.is_dir():
    raise InputError(f'data.path={path}: no such folder; {what}')
  return folder


def hash_files(files: Sequence[Path]) -> str:
  """16 hex digits of the names and contents of files.

  Prepared data lie in a folder of that name: other files, or the same after a
  change, are not answered from an old preparation. Of a large file, which may
  hold a hundred gigabytes of images, size, time of change and both ends count.
  """
  digest = hashlib.sha256()
  for path in files:
    status = path.stat()
    digest.update(f'{path.name}\0{status.st_size}\0'.encode())
    with path.open('rb') as file:
      if status.st_size <= _HASHED_WHOLE:
        digest.update(hashlib.file_digest(file, 'sha256').digest())
        continue
      digest.update(f'{status.st_mtime_ns}\0'.encode())
      digest.update(file.read(_END))
      file.seek(-_END, os.SEEK_END)
      digest.update(file.read(_END))
  return digest.hexdigest()[:16]


def prepare(
  builder_class: type,
  config: tfds.core.BuilderConfig | str = '',
  *,
  files: Sequence[Path] = (),
  data_dir: str = '',
  download: bool = False,
) -> tfds.core.DatasetBuilder:
  """Prepares a dataset, unless it is prepared.

  Args:
    builder_class: of this package.
    config: one of its configs, or the name of one; '' where it has none.
    files: what it is made of, of one folder; empty if it is downloaded.
    data_dir: where prepared data are kept; '' is TFDS's own folder,
      $TFDS_DATA_DIR or ~/tensorflow_datasets.
    download: whether the builder may use the network.

  Returns:
    The builder; its `as_data_source(split)` needs no TensorFlow.

  Raises:
    InputError: from the builder, if a file is not as expected; or the
      download failed, or the folder cannot be written.
  """
  name = hash_files(files) if files else _DOWNLOADED
  root = Path(data_dir).expanduser() if data_dir else _default_dir()
  folder = root / 'pal_jax' / name

  def make() -> tfds.core.DatasetBuilder:
    made = builder_class(
      data_dir=folder,
      file_format=FILE_FORMAT,
      **({'config': config} if config else {}),
    )
    made.source_files = tuple(files)
    made.may_download = download
    return made

  try:
    builder = make()
    # TFDS says what it does; a program's output is its results.
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
          # None would be a folder whose files are not in the name.
          manual_dir=files[0].parent if files else folder / 'nothing',
          force_checksums_validation=builder.all_checksums_known,
          try_download_gcs=False,
        )
      )
  except InputError:
    raise
  except (
    tfds.download.DownloadError,
    # Not public, like what raises it.
    download_manager.NonMatchingChecksumError,
    ValueError,  # a file without a checksum
  ) as error:
    raise InputError(
      f'{builder_class.name}: the download failed ({error}); fetch the files '
      'yourself and set --config.data.path=FOLDER'
    ) from error
  except OSError as error:
    # Another process may have finished first: two seeds started together.
    builder = make()
    if builder.is_prepared():
      return builder
    raise InputError(
      f'{builder_class.name}: cannot be downloaded or prepared in {root} '
      f'({error}); set --config.data.tfds_dir=FOLDER, which can be written, or '
      'fetch the files yourself and set --config.data.path=FOLDER'
    ) from error
  return builder


def _default_dir() -> Path:
  return Path(tfds.core.constants.DATA_DIR).expanduser()


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[dict]:
  """Records of a split in their order; texts are `str`.

  Raises:
    InputError: if files of the prepared data are missing or damaged.
  """
  source = builder.as_data_source(split)
  expected = builder.info.splits[split].num_examples
  for start in range(0, expected, _BATCH):
    rows = range(start, min(start + _BATCH, expected))
    try:
      records = source.__getitems__(list(rows))
    except (RuntimeError, OSError) as error:
      raise InputError(
        f'{builder.data_dir}: the split {split!r} cannot be read ({error}); '
        'delete this folder to prepare it again'
      ) from error
    for record in records:
      yield {
        key: value.decode() if isinstance(value, bytes) else value
        for key, value in record.items()
      }


def note(builder: tfds.core.DatasetBuilder) -> str:
  """What the builder kept and left out, as it counted."""
  counts = builder.info.metadata or {}
  out = ', '.join(
    f'{number:,} {what}' for what, number in counts.items() if number
  )
  kept = ', '.join(
    f'{info.num_examples:,} {name}'
    for name, info in builder.info.splits.items()
  )
  return f'Rows kept: {kept}. Rows left out: {out or "none"}.'
