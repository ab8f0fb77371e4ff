"""A table becomes a dataset: who is unseen, what is held out."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pal_jax.data.dataset import (
  SEEN_ITEMS,
  UNSEEN_ITEMS,
  Dataset,
  Truth,
  check_dataset,
)
from pal_jax.data.people import (
  Items,
  Pairs,
  check_people,
  create_people,
  divide_rows,
  pad_people,
  rows_by_person,
)
from pal_jax.data.sampling import split_items
from pal_jax.data.table.table import SEEN_SPLITS, SPLITS, Table, read_table
from pal_jax.data.texts import together
from pal_jax.errors import InputError
from pal_jax.structs import Comparisons

# A set of items that hang together by comparisons or a prompt is of one split,
# unless it holds more than this share of all items.
_LARGEST_UNIT = 0.3


class JoinedTexts(Sequence):
  """Prompt and response of each item as one text, made when asked for."""

  def __init__(self, prompts, texts, prompt_of: np.ndarray):
    self._prompts, self._texts = prompts, texts
    self._prompt_of = prompt_of

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, row):
    if isinstance(row, slice):
      return [self[i] for i in range(*row.indices(len(self)))]
    return together(self._prompts[int(self._prompt_of[row])], self._texts[row])

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))


def create_table(config, *, join_prompt: bool = True) -> Dataset:
  """People's own comparisons, split by person and by item.

  Items that hang together, by a prompt or a chain of comparisons, are of one
  split, so that no comparison is lost and a test prompt is new. Where nearly
  everything hangs together (a fixed list of items), items are split one by
  one, and comparisons across are left out. With a column of splits nothing is
  drawn.

  Args:
    config: `configs.base.table_data`.
    join_prompt: whether a candidate is prompt and response together (PAL-A)
      or the response alone (PAL-B).

  Raises:
    InputError: as `read_table`; if too few people or comparisons are left.
  """
  check_people(config)
  table = read_table(config)
  names = (
    JoinedTexts(table.prompts, table.texts, table.prompt_of)
    if join_prompt
    else table.texts
  )
  made = _given if table.split is not None else _drawn
  dataset = made(config, table, names)
  return dataclasses.replace(dataset, truth=_truth(table, dataset))


def _truth(table: Table, dataset: Dataset) -> Truth:
  if table.group is None or (table.group < 0).any():
    return Truth()
  group = dict(zip(table.users, table.group.tolist(), strict=True))
  ids = (*dataset.user_ids, *dataset.unseen_user_ids)
  return Truth(group=np.array([group[i] for i in ids]))


def units(table: Table) -> np.ndarray:
  """[M] number of the set of items that each item hangs together with."""
  size, prompts = len(table.texts), len(table.prompts)
  asked = np.flatnonzero(table.prompt_of > 0)
  start = np.concatenate([table.items[:, 0], asked])
  end = np.concatenate([table.items[:, 1], size + table.prompt_of[asked]])
  graph = coo_array(
    (np.ones(len(start), bool), (start, end)), shape=(size + prompts,) * 2
  )
  return connected_components(graph, directed=False)[1][:size]


def _split(config, rng, table: Table) -> tuple[np.ndarray, str]:
  """([M] int8: 0 train, 1 validation, 2 test; how, for the report)."""
  unit = units(table)
  used = np.zeros(len(unit), bool)
  used[table.items] = True
  numbers, of_unit = np.unique(unit, return_inverse=True)
  size = np.bincount(of_unit, used)
  if size.max() <= _LARGEST_UNIT * used.sum():
    drawn = split_items(
      rng,
      np.zeros(len(numbers), int),
      tuple(map(str, range(len(numbers)))),
      config.validation_fraction,
      config.test_fraction,
    )
    return drawn[
      of_unit
    ], f'in {int((size > 0).sum()):,} sets that hang together'
  # Equal texts under several prompts are of one split, as everywhere.
  drawn = split_items(
    rng,
    np.zeros(len(unit), int),
    table.texts,
    config.validation_fraction,
    config.test_fraction,
  )
  return drawn, 'one by one, because most hang together'


def _pairs(table: Table, rows: np.ndarray) -> Pairs:
  return Pairs(table.items[rows], table.label[rows], table.weight[rows])


def _drawn(config, table: Table, names) -> Dataset:
  rng = np.random.default_rng(config.seed)
  split, how = _split(config, rng, table)
  across = split[table.items[:, 0]] != split[table.items[:, 1]]
  rows_of = rows_by_person(table.user, ~across, len(table.users))
  split_of_row = split[table.items[:, 0]]

  def divide(rng, person, unseen):
    rows = rng.permutation(rows_of[person])
    if table.time is not None:
      rows = rows[np.argsort(table.time[rows], kind='stable')]
    return divide_rows(
      config, rows, split_of_row, functools.partial(_pairs, table), unseen
    )

  note = (
    f'Responses are split {how}: {np.bincount(split, minlength=3).tolist()} '
    f'(train, validation, test). {int(across.sum()):,} comparisons of '
    'responses of two splits are left out.'
  )
  return create_people(
    config,
    rng,
    name='table',
    people=table.users,
    items=Items(
      names=names,
      groups=('',) * len(names),
      prompts=table.prompts,
      prompt=table.prompt_of,
      split=split,
    ),
    divide=divide,
    notes=(*table.notes, note),
  )


def _given(config, table: Table, names) -> Dataset:
  """By the column of splits, as it is."""
  del config
  rows = {
    name: np.flatnonzero(table.split == number)
    for number, name in enumerate(SPLITS)
  }
  empty = [name for name in SPLITS if not len(rows[name])]
  if empty:
    raise InputError(
      f'the column of splits has no {", ".join(empty)}: seen users need '
      f'{", ".join(SEEN_SPLITS)}, unseen ones support and query; or set '
      "--config.data.columns.split='' and have them drawn"
    )

  def grouped(people: np.ndarray, name: str) -> Comparisons:
    mine = rows[name]
    of = [mine[table.user[mine] == person] for person in people]
    return pad_people([_pairs(table, r) for r in of], table.prompt_of)

  def flat(people, name) -> Comparisons:
    comparisons = grouped(people, name).flatten()
    return comparisons[comparisons.mask]

  seen = np.unique(table.user[rows['train']])
  unseen = np.unique(table.user[rows['support']])
  strangers = {
    name: np.setdiff1d(table.user[rows[name]], who)
    for name, who in (
      ('validation', seen),
      ('test', seen),
      ('query', unseen),
    )
  }
  for name, users in strangers.items():
    if users.size:
      raise InputError(
        f'{users.size} users have {name} rows but none of '
        f'{"support" if name == "query" else "train"}, the first '
        f'{table.users[users[0]]!r}: nothing would be known of them'
      )
  learnt = np.unique(table.items[rows['train']])
  test = table.items[rows['test']]
  old = int(np.isin(test, learnt).any(-1).sum())

  def both(people, name) -> dict[str, Comparisons]:
    given = grouped(people, name)
    none = given.replace(mask=np.zeros_like(given.mask))
    return {SEEN_ITEMS: none, UNSEEN_ITEMS: given}

  return check_dataset(
    Dataset(
      name='table',
      user_ids=tuple(table.users[i] for i in seen),
      unseen_user_ids=tuple(table.users[i] for i in unseen),
      item_names=names,
      item_groups=('',) * len(names),
      prompt_names=table.prompts,
      item_split=np.full(len(names), -1, np.int8),
      train=flat(seen, 'train'),
      validation=flat(seen, 'validation'),
      seen=both(seen, 'test'),
      support=grouped(unseen, 'support'),
      unseen=both(unseen, 'query'),
      truth=Truth(),
      notes=(
        *table.notes,
        'Splits are those of the column; the sets called unseen items are its '
        f'test and query rows. {old:,} of {len(test):,} test comparisons have '
        'a response that training has, too.',
      ),
    )
  )
