"""Pick-a-Pic and Pick-a-Filter: whose pictures does whom please.

PAL (arXiv 2406.08469), section 5; METHOD section 4. Features are embeddings
of images and captions, computed beforehand (`features.encoder=precomputed`).
"""

import dataclasses
import importlib

import numpy as np

from pal_jax.data.dataset import Dataset
from pal_jax.data.given import Rows, create_given, without_known
from pal_jax.data.people import Items, rows_by_person
from pal_jax.errors import InputError

VERSIONS = ('v1', 'v2')
TEST_ROWS = ('all', 'overlap', 'no_overlap')
_SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of the prepared dataset, with the distinct images and captions."""

  users: tuple[str, ...]
  prompts: tuple[str, ...]  # Q
  images: tuple[str, ...]  # M, of a prompt each
  prompt_of: np.ndarray  # [M]
  rows: Rows  # [N]
  split: np.ndarray  # [N] place in _SPLITS
  overlap: np.ndarray  # [N] 1, 0, or -1 where it is not known
  group: np.ndarray | None  # [users], of Pick-a-Filter
  note: str


def create_pickapic(config, *, join_prompt: bool = True) -> Dataset:
  """Pick-a-Pic, v1 or v2, with its published splits.

  Args:
    config: `configs.base.pickapic_data`.
    join_prompt: whether captions are left out (PAL-A), whose images are made
      for them, or read apart (PAL-B).

  Raises:
    InputError: if files or fields are not as expected.
  """
  _check(config)
  if config.version not in VERSIONS:
    raise InputError(
      f'data.version={config.version!r} is unknown: expected one of {VERSIONS}'
    )
  table = _read(config, lambda builders: (builders.PickAPic, config.version))
  return _create('pickapic', config, table, (), join_prompt)


def create_pick_a_filter(config, *, join_prompt: bool = True) -> Dataset:
  """Pick-a-Filter: v1, whose images are filtered for half-and-half users.

  Args:
    config: `configs.base.pick_a_filter_data`.
    join_prompt: whether captions are left out (PAL-A), whose images are made
      for them, or read apart (PAL-B).

  Raises:
    InputError: if files or fields are not as expected.
  """
  _check(config)
  table = _read(
    config,
    lambda builders: (
      builders.PickAFilter,
      builders.filter_config(config.beta, config.seed),
    ),
  )
  changed = sum(name.endswith(('-blue', '-red')) for name in table.images)
  note = (
    f'beta = {config.beta:g} of the pairs have a filtered image, {changed:,} '
    f'of {len(table.images):,} images are filtered; '
    f'{int((table.group == 0).sum()):,} users like blue, '
    f'{int((table.group == 1).sum()):,} red.'
  )
  return _create('pick_a_filter', config, table, (note,), join_prompt)


def _check(config) -> None:
  for field in ('min_support', 'max_support', 'min_query'):
    if config[field] < 1:
      raise InputError(f'data.{field}={config[field]} must be at least 1')
  if config.min_support > config.max_support:
    raise InputError(
      f'data.min_support={config.min_support} must be at most '
      f'data.max_support={config.max_support}'
    )
  if not 0.0 < config.unseen_fraction < 1.0:
    raise InputError(
      f'data.unseen_fraction={config.unseen_fraction} must lie in (0, 1)'
    )
  if config.test_rows not in TEST_ROWS:
    raise InputError(
      f'data.test_rows={config.test_rows!r} is unknown: expected one of '
      f'{TEST_ROWS}'
    )


def _read(config, choose) -> Table:
  """Prepares and reads what `choose(builders)`, (class, config), names."""
  # Here, because they import TensorFlow Datasets.
  prepare = importlib.import_module('pal_jax.data.builders.prepare')
  builders = importlib.import_module('pal_jax.data.builders.pickapic')
  folder = prepare.check_folder(config.path, builders.HOW)
  builder_class, builder_config = choose(builders)
  builder = prepare.prepare(
    builder_class,
    builder_config,
    files=builder_class.find_files(folder),
    data_dir=config.tfds_dir,
  )
  users: dict[str, int] = {}
  prompts: dict[str, int] = {}
  images: dict[tuple[int, str], int] = {}
  groups: dict[int, int] = {}
  numbers, labels = [], []
  for place, split in enumerate(_SPLITS):
    for row in prepare.read_split(builder, split):
      user = users.setdefault(row['user_id'], len(users))
      prompt = prompts.setdefault(row['prompt'], len(prompts))
      pair = [
        images.setdefault((prompt, row[f'image_{side}']), len(images))
        for side in (0, 1)
      ]
      if 'group' in row:
        groups[user] = int(row['group'])
      numbers.append((user, *pair, place, row['overlap']))
      labels.append(row['label'])
  user, one, two, split, overlap = np.array(numbers, np.int64).T
  return Table(
    users=tuple(users),
    prompts=tuple(prompts),
    images=tuple(name for _, name in images),
    prompt_of=np.array([prompt for prompt, _ in images]),
    rows=Rows(user, np.stack([one, two], -1), np.array(labels, np.float32)),
    split=split,
    overlap=overlap,
    group=np.array([groups[i] for i in range(len(users))]) if groups else None,
    note=prepare.note(builder),
  )


def _create(
  name: str, config, table: Table, notes, join_prompt: bool
) -> Dataset:
  rng = np.random.default_rng(config.seed)
  number = len(table.users)
  is_train, is_validation, is_test = (table.split == i for i in range(3))
  tested = is_test & _wanted(config, table.overlap, is_test)
  learnt = np.bincount(table.rows.user[is_train], minlength=number)
  # Of all test rows: who is unseen must not depend on which are asked about.
  asked = np.bincount(table.rows.user[is_test], minlength=number)
  able = np.flatnonzero(
    (learnt >= config.min_support) & (asked >= config.min_query)
  )
  wanted = max(1, int(round(config.unseen_fraction * len(able))))
  chosen = rng.permutation(able)[:wanted]
  if not len(chosen):
    raise InputError(
      f'data.name={name}: none of {number} users can be an unseen one, with '
      f'data.min_support={config.min_support} training rows and '
      f'data.min_query={config.min_query} test rows; lower these, '
      'or give the whole of the data'
    )
  unseen = np.zeros(number, bool)
  unseen[chosen] = True
  seen = (learnt > 0) & ~unseen
  of_seen, of_unseen = seen[table.rows.user], unseen[table.rows.user]
  support = np.concatenate(
    [
      rng.permutation(rows)[: config.max_support]
      for rows in rows_by_person(table.rows.user, is_train & of_unseen, number)
    ]
  )
  masks = {
    'train': is_train & of_seen,
    'validation': is_validation & of_seen,
    'test': tested & of_seen,
    'query': tested & of_unseen,
  }
  sets = {key: table.rows.take(mask) for key, mask in masks.items()}
  sets['support'] = table.rows.take(support)
  asked = len(sets['test']) + len(sets['query'])
  sets['test'] = without_known(sets['test'], sets['train'])
  sets['query'] = without_known(sets['query'], sets['support'])
  sets['validation'] = without_known(sets['validation'], sets['train'])
  again = asked - len(sets['test']) - len(sets['query'])
  return create_given(
    name,
    users=table.users,
    sets=sets,
    items=Items(
      names=table.images,
      groups=('',) * len(table.images),
      prompts=('',) if join_prompt else table.prompts,
      prompt=np.zeros_like(table.prompt_of) if join_prompt else table.prompt_of,
      split=np.full(len(table.images), -1, np.int8),
    ),
    group=table.group,
    notes=(
      table.note,
      *notes,
      *_notes(config, table, seen, unseen, sets, is_train),
      f'{again:,} test rows of a pair that the user had before are left out.',
    ),
  )


def _wanted(config, overlap: np.ndarray, is_test: np.ndarray) -> np.ndarray:
  """[N] bool: the rows that may be asked about."""
  if config.test_rows == 'all':
    return np.ones_like(is_test)
  if (overlap[is_test] < 0).any():
    raise InputError(
      f'data.test_rows={config.test_rows!r} needs the training table of v1 as '
      f'v1_train*.parquet or .csv, or overlap_ranking_ids.txt, beside the '
      f'others in {config.path}'
    )
  return overlap == int(config.test_rows == 'overlap')


def _notes(config, table, seen, unseen, sets, is_train) -> tuple[str, ...]:
  test = table.split == 2
  known = table.overlap[test] >= 0
  strangers = (~seen & ~unseen)[table.rows.user]
  withheld = int((is_train & unseen[table.rows.user]).sum())
  lines = [
    f'{int(seen.sum()):,} seen users and {int(unseen.sum()):,} unseen ones. '
    f'Train, validation, test of seen users: {len(sets["train"]):,}, '
    f'{len(sets["validation"]):,}, {len(sets["test"]):,}. {withheld:,} '
    f'training rows are of unseen users, who adapt from at most '
    f'{config.max_support} of them each and answer {len(sets["query"]):,} '
    f'test rows. {int(strangers.sum()):,} validation '
    'and test rows are of people without training rows and left out.',
  ]
  if known.all():
    both = int((table.overlap[test] == 1).sum())
    lines.append(
      f'Of {int(test.sum()):,} test rows {both:,} overlap with the training '
      f'table of v1, {int(test.sum()) - both:,} do not; tested here: '
      f'{config.test_rows}.'
    )
  return tuple(lines)
