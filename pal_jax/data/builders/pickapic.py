"""Pick-a-Pic and Pick-a-Filter as TFDS builders: ids and labels.

Kirstain et al. 2023, Pick-a-Pic (arXiv 2305.01569): who was asked for which of
two images, made for a prompt, they like better. A table a split, of which
these columns are read:

    user_id, caption, image_0_uid, image_1_uid, label_0 (1, 0, or 0.5 a tie)
    has_label, ranking_id, where there are some

Embeddings are not part of it: they stay in the file that
`features.encoder=precomputed` reads, by the images' ids and the captions.

Pick-a-Filter (PAL, arXiv 2406.08469, section 5): half of the users of v1 like
blue, half red. A share beta of the pairs is filtered: half of the time the
winner with the colour the user likes, else the loser with the other.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from pal_jax.data.builders.local import LocalBuilder
from pal_jax.data.table.values import WRONG, as_id
from pal_jax.errors import InputError
from pal_jax.optional import require

SPLITS = ('train', 'validation', 'test')
# Of version 2 alone: what PickScore was trained on, to tell who overlaps.
V1_TRAIN = 'v1_train'
# Or a list of ranking ids of test rows, one a line.
OVERLAP = 'overlap_ranking_ids.txt'
COLORS = ('blue', 'red')  # of group 0, of group 1
_NEEDED = ('user_id', 'caption', 'image_0_uid', 'image_1_uid', 'label_0')
_OPTIONAL = ('has_label', 'ranking_id')
_BATCH = 8192  # rows read at a time
_NULL = 'with a null user, caption or image'
_UNLABELED = 'without a label'
_SAME = 'of an image against itself'
HOW = (
  'fetch the tables of yuvalkirstain/pickapic_v1 or pickapic_v2 from the '
  'Hugging Face hub, or those without images, and put those of each split into '
  'one folder, named train*.parquet, validation*.parquet and test*.parquet (or '
  '.csv), with the columns '
  f'{", ".join(_NEEDED)}; to tell which test rows of v2 overlap with the '
  'training of v1, put its training table there as v1_train*.parquet, or the '
  f'ranking ids of those rows, one a line, as {OVERLAP}. Set '
  '--config.data.path=FOLDER. CLIP embeddings of the images and captions, '
  'computed by yourself, are --config.features.path'
)


@dataclasses.dataclass
class FilterConfig(tfds.core.BuilderConfig):
  """Which pairs of Pick-a-Filter are filtered.

  Attributes:
    beta: share of the pairs, in [0, 1].
    seed: of the groups and the pairs.
  """

  beta: float = 1.0
  seed: int = 0


def filter_config(beta: float, seed: int) -> FilterConfig:
  """A config with a name of its own. Raises InputError."""
  if not 0.0 <= beta <= 1.0:
    raise InputError(f'data.beta={beta} must lie in [0, 1]')
  return FilterConfig(
    name=f'beta_{beta!r}_seed_{seed}'.replace('.', '_'), beta=beta, seed=seed
  )


class PickAPic(LocalBuilder):
  """Pairs of images made for a prompt, and which one a user liked better."""

  name = 'pickapic'
  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name='v1', description='4,725 users'),
    tfds.core.BuilderConfig(name='v2', description='6,083 users'),
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = HOW
  SUFFIXES = ('.parquet', '.csv')
  may_download = False  # a hundred gigabytes of images

  @classmethod
  def find_files(cls, folder: Path) -> tuple[Path, ...]:
    """The tables of a folder, split by split. Raises InputError."""
    files = super().find_files(folder)
    missing = [split for split in SPLITS if not files_of(files, split)]
    if missing:
      raise InputError(f'{folder}: has no table of {", ".join(missing)}; {HOW}')
    names = (*SPLITS, V1_TRAIN)
    tables = tuple(path for name in names for path in files_of(files, name))
    return tables + tuple(p for p in (folder / OVERLAP,) if p.is_file())

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      homepage='https://huggingface.co/datasets/yuvalkirstain/pickapic_v1',
      features=tfds.features.FeaturesDict(self._features()),
      metadata=tfds.core.MetadataDict({}),
      disable_shuffling=True,
    )

  def _features(self) -> dict:
    return {
      'user_id': tfds.features.Text(),
      'prompt': tfds.features.Text(),
      'image_0': tfds.features.Text(),
      'image_1': tfds.features.Text(),
      'label': np.float32,  # probability that image_0 is liked better
      'ranking_id': tfds.features.Text(),
      # Whether the row is listed, or the pair stands in the training table of
      # v1; -1 not known.
      'overlap': np.int64,
    }

  def _split_generators(self, dl_manager):
    files = self.local_files(dl_manager)
    old = _pairs(files_of(files, V1_TRAIN))
    listed = _listed(files)
    return {
      split: self._generate_examples(files_of(files, split), split, old, listed)
      for split in SPLITS
    }

  def _generate_examples(self, files, split, old, listed):
    number = 0
    for path in files:
      for where, row in read_rows(path):
        example, why = _parse(where, row)
        if example is None:
          self.info.metadata[why] = self.info.metadata.get(why, 0) + 1
          continue
        pair = _pair_key(example['image_0'], example['image_1'])
        example['overlap'] = -1
        if listed is not None:
          example['overlap'] = int(example['ranking_id'] in listed)
        elif old:
          example['overlap'] = int(pair in old)
        yield number, self._finish(example, f'{split} {number}')
        number += 1
    if not number:
      raise InputError(
        f'{files[0].parent}: no {split} row has a user, two images and a '
        f'label; {HOW}'
      )

  def _finish(self, example: dict, key: str) -> dict:
    del key
    return example


class PickAFilter(PickAPic):
  """Pick-a-Pic v1 with filtered images, named `UID-blue` and `UID-red`."""

  name = 'pick_a_filter'
  BUILDER_CONFIGS = [FilterConfig(name='all_filtered', beta=1.0, seed=0)]

  def _features(self) -> dict:
    return {**super()._features(), 'group': np.int64}  # 0 blue, 1 red

  def _finish(self, example: dict, key: str) -> dict:
    config = self.builder_config
    user = example['user_id']
    group = int(_draw(config.seed, 'group', user) < 0.5)
    label = example['label']
    filtered = _draw(config.seed, 'pair', key) < config.beta
    if filtered and label != 0.5:  # who wins a tie?
      winner = 0 if label > 0.5 else 1
      if _draw(config.seed, 'which', key) < 0.5:
        side, color = winner, COLORS[group]
      else:
        side, color = 1 - winner, COLORS[1 - group]
      name = f'image_{side}'
      example = {**example, name: f'{example[name]}-{color}'}
    return {**example, 'group': group}


def _draw(seed: int, *parts: str) -> float:
  """A number in [0, 1) that depends on nothing but its arguments."""
  text = '\0'.join((str(seed), *parts))
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def files_of(files, split: str) -> tuple[Path, ...]:
  """`train.csv` and `train-00000-of-00010.parquet`, not `train_old.csv`."""
  return tuple(p for p in files if p.name.split('.')[0].split('-')[0] == split)


def read_rows(path: Path, columns=_NEEDED) -> Iterator[tuple[str, dict]]:
  """(where, row) of every row; other columns, of images, are not read.

  Raises:
    InputError: if the file is not such a table.
  """
  why, how = f'reading {path.name}', 'pip install pyarrow'
  pyarrow = require('pyarrow', why, how)
  read = _parquet_batches if path.suffix == '.parquet' else _csv_batches
  try:
    number = 0
    for batch in read(path, columns):
      for row in batch.to_pylist():
        yield f'{path}, row {number}', row
        number += 1
  except (pyarrow.ArrowException, OSError) as error:
    raise InputError(
      f'{path}: is not a {path.suffix[1:]} table ({error}); {HOW}'
    ) from error


def _wanted(path: Path, names, columns) -> list[str]:
  missing = [name for name in columns if name not in names]
  if missing:
    raise InputError(
      f'{path}: the column {missing[0]!r} is missing; the table has '
      f'{sorted(names)}; {HOW}'
    )
  return [name for name in (*columns, *_OPTIONAL) if name in names]


def _parquet_batches(path: Path, columns):
  parquet = require('pyarrow.parquet', path.name, 'pip install pyarrow')
  with parquet.ParquetFile(path) as file:
    wanted = _wanted(path, file.schema_arrow.names, columns)
    yield from file.iter_batches(_BATCH, columns=wanted)


def _csv_batches(path: Path, columns):
  csv = require('pyarrow.csv', path.name, 'pip install pyarrow')
  pyarrow = require('pyarrow', path.name, 'pip install pyarrow')
  lines = csv.ParseOptions(newlines_in_values=True)
  with csv.open_csv(path, parse_options=lines) as file:
    names = file.schema.names
  wanted = _wanted(path, names, columns)
  # Ids stay as they are written: '007' is not 7.
  options = csv.ConvertOptions(
    include_columns=wanted,
    column_types={name: pyarrow.string() for name in wanted},
    strings_can_be_null=True,
    null_values=[''],  # a caption may be 'null'
  )
  with csv.open_csv(path, parse_options=lines, convert_options=options) as file:
    yield from file


def _parse(where: str, row: dict) -> tuple[dict | None, str]:
  """(example, '') or (None, why the row is left out)."""
  user, one, two = (as_id(row[_NEEDED[i]]) for i in (0, 2, 3))
  caption = row['caption']
  if WRONG in (user, one, two):
    raise InputError(
      f'{where}: user_id {row["user_id"]!r}, image_0_uid '
      f'{row["image_0_uid"]!r} and image_1_uid {row["image_1_uid"]!r} must be '
      'strings or whole numbers'
    )
  if not (
    user and one and two and isinstance(caption, str) and caption.strip()
  ):
    return None, _NULL
  if str(row.get('has_label', True)).lower() in ('false', '0'):
    return None, _UNLABELED
  if row['label_0'] is None:
    return None, _UNLABELED
  try:
    label = float(row['label_0'])
  except (TypeError, ValueError):
    label = np.nan
  if label not in (0.0, 0.5, 1.0):
    raise InputError(
      f"{where}: the column 'label_0' is {row['label_0']!r}, expected 0, 0.5 "
      'or 1'
    )
  if one == two:
    return None, _SAME
  return {
    'user_id': user,
    'prompt': caption,
    'image_0': one,
    'image_1': two,
    'label': np.float32(label),
    'ranking_id': str(as_id(row.get('ranking_id')) or ''),
  }, ''


def _pair_key(one: str, two: str) -> bytes:
  """16 bytes that are the same in either order: a million take little."""
  text = '\0'.join(sorted((one, two)))
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _listed(files) -> set[str] | None:
  """Ranking ids of test rows that overlap, if somebody lists them."""
  for path in files:
    if path.name == OVERLAP:
      return set(path.read_text(encoding='utf-8').split())
  return None


def _pairs(files) -> set[bytes]:
  """Pairs of images of the training table of v1."""
  columns = ('image_0_uid', 'image_1_uid')
  return {
    _pair_key(str(row['image_0_uid']), str(row['image_1_uid']))
    for path in files
    for _, row in read_rows(path, columns)
  }
