"""Datasets of real people: who is seen, what is held out, who is left out.

A dataset of people says which comparisons each person made on which items.
Here they become the 2 x 2 grid of seen and unseen users and items.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pal_jax.data.dataset import (
  SEEN_ITEMS,
  UNSEEN_ITEMS,
  Dataset,
  Truth,
  check_dataset,
)
from pal_jax.errors import InputError
from pal_jax.structs import Comparisons, make_comparisons


@dataclasses.dataclass(frozen=True)
class Items:
  """Candidates, what was asked about each, and the split of each."""

  names: Sequence[str]  # M texts
  groups: tuple[str, ...]  # M labels, for figures
  prompts: Sequence[str]  # Q
  prompt: np.ndarray  # [M] int, row of the prompt of each item
  split: np.ndarray  # [M] int8: 0 train, 1 validation, 2 test


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Comparisons of one person; both items are of one split."""

  items: np.ndarray  # [n, 2] int
  label: np.ndarray  # [n] in [0, 1]
  weight: np.ndarray | None = None  # [n] in the training loss; None: 1 each

  def __len__(self) -> int:
    return len(self.label)


@dataclasses.dataclass(frozen=True)
class Division:
  """All comparisons of one person that are used."""

  fit: Pairs  # on train items: training, or the support of an unseen user
  held_out: Pairs  # on train items, for testing
  validation: Pairs  # on validation items
  test: Pairs  # on test items


# (rng, person, whether unseen) -> the person's comparisons.
Divide = Callable[[np.random.Generator, int, bool], Division]


def check_people(config) -> None:
  """Refuses counts and shares out of range, naming the field.

  Raises:
    InputError: as said.
  """
  for field in (
    'min_comparisons',
    'max_pairs_per_user',
    'max_query',
    'min_support',
    'min_query',
  ):
    if config[field] < 1:
      raise InputError(f'data.{field}={config[field]} must be at least 1')
  if not 0.0 < config.unseen_fraction < 1.0:
    raise InputError(
      f'data.unseen_fraction={config.unseen_fraction} must lie in (0, 1)'
    )
  if not 0.0 <= config.heldout_fraction < 1.0:
    raise InputError(
      f'data.heldout_fraction={config.heldout_fraction} must lie in [0, 1)'
    )
  for low, high in (('min_support', 'max_support'), ('min_query', 'max_query')):
    if config[low] > config[high]:
      raise InputError(
        f'data.{low}={config[low]} must be at most data.{high}={config[high]}'
      )


def num_fit(config, available: int, unseen: bool) -> int:
  """How many of a person's comparisons on train items may be learnt from.

  Seen users keep a share back; an unseen user has its support first and
  answers queries with what is left.
  """
  held_out = min(int(config.heldout_fraction * available), config.max_query)
  fit = available - held_out
  if unseen:
    fit = min(available, max(config.min_support, min(config.max_support, fit)))
  return fit


def rows_by_person(
  person: np.ndarray, use: np.ndarray, number: int
) -> list[np.ndarray]:
  """Rows [n] of each of `number` people, of those [R] that are in use.

  Args:
    person: [R] whole numbers.
    use: [R] bool.
    number: of the people.
  """
  rows = np.flatnonzero(use)
  rows = rows[np.argsort(person[rows], kind='stable')]
  ends = np.cumsum(np.bincount(person[rows], minlength=number))
  return np.split(rows, ends[:-1])


def divide_rows(
  config,
  rows: np.ndarray,
  split: np.ndarray,
  pairs: Callable[[np.ndarray], Pairs],
  unseen: bool,
) -> Division:
  """One person's comparisons, of which the first are learnt from.

  An unseen user's queries share no item with its support.

  Args:
    config: `configs.base.convarg_data` or `table_data`.
    rows: [n] of the person, in order.
    split: [R] of each comparison: 0 train, 1 validation, 2 test.
    pairs: gives the comparisons of some rows.
    unseen: whether the person is met only after training.
  """
  train, validation, test = (rows[split[rows] == s] for s in range(3))
  fit, rest = np.split(train, [num_fit(config, len(train), unseen)])
  if unseen:
    known = np.isin(pairs(rest).items, pairs(fit).items).any(-1)
    rest = rest[~known]
  else:
    fit = fit[: config.max_pairs_per_user]
  return Division(
    pairs(fit),
    *(pairs(part[: config.max_query]) for part in (rest, validation, test)),
  )


def create_people(
  config,
  rng: np.random.Generator,
  *,
  name: str,
  people: tuple[str, ...],
  items: Items,
  divide: Divide,
  notes: tuple[str, ...],
) -> Dataset:
  """Splits people into seen and unseen users and collects their comparisons.

  Seen users have at least `min_comparisons` to train on; unseen ones have at
  least `min_support` and `min_query` on test items, so that they are one
  cohort for every n up to `min_support`. Others are left out and counted.

  Args:
    config: `configs.base.polis_data` or `convarg_data`.
    rng: of everything random.
    name: of the dataset.
    people: ids of everybody.
    items: all candidates.
    divide: gives a person's comparisons.
    notes: sentences on the data.

  Raises:
    InputError: if no seen or no unseen users are left.
  """
  num_unseen = int(round(config.unseen_fraction * len(people)))
  is_unseen = np.zeros(len(people), bool)
  is_unseen[rng.permutation(len(people))[:num_unseen]] = True
  kept: dict[bool, dict[str, Division]] = {False: {}, True: {}}
  for person, unseen in enumerate(is_unseen.tolist()):
    division = divide(rng, person, unseen)
    if unseen:
      enough = (
        len(division.fit) >= config.min_support
        and len(division.test) >= config.min_query
      )
    else:
      enough = len(division.fit) >= config.min_comparisons
    if enough:
      kept[unseen][people[person]] = division
  seen, unseen = list(kept[False].values()), list(kept[True].values())
  if not seen or not unseen:
    raise InputError(
      f'data.name={name}: of {len(people)} people {len(seen)} are left as seen '
      f'users, with at least data.min_comparisons={config.min_comparisons}, '
      f'and {len(unseen)} of {num_unseen} as unseen ones, with at least '
      f'data.min_support={config.min_support} and on test items '
      f'data.min_query={config.min_query}; both need one: lower these numbers, '
      'change data.unseen_fraction, or give more data'
    )

  def padded(divisions, part):
    return pad_people([getattr(d, part) for d in divisions], items.prompt)

  def flat(part):
    comparisons = padded(seen, part).flatten()
    return comparisons[comparisons.mask]

  sets = {'train': flat('fit'), 'validation': flat('validation')}
  for what, comparisons in sets.items():
    if not comparisons.label.size:
      raise InputError(
        f'data.name={name}: nobody has a comparison on {what} items; raise '
        f'their share (data.{what}_fraction) or give more data'
      )
  return check_dataset(
    Dataset(
      name=name,
      user_ids=tuple(kept[False]),
      unseen_user_ids=tuple(kept[True]),
      item_names=items.names,
      item_groups=items.groups,
      prompt_names=items.prompts,
      item_split=items.split,
      seen={
        SEEN_ITEMS: padded(seen, 'held_out'),
        UNSEEN_ITEMS: padded(seen, 'test'),
      },
      support=padded(unseen, 'fit'),
      unseen={
        SEEN_ITEMS: padded(unseen, 'held_out'),
        UNSEEN_ITEMS: padded(unseen, 'test'),
      },
      truth=Truth(),
      notes=(*notes, _cohort_note(config, is_unseen, len(seen), len(unseen))),
      **sets,
    )
  )


def _cohort_note(config, is_unseen, num_seen, num_unseen) -> str:
  few_seen = int((~is_unseen).sum()) - num_seen
  few_unseen = int(is_unseen.sum()) - num_unseen
  return (
    f'Of {is_unseen.size} people, {num_seen} are seen users and {num_unseen} '
    f'unseen ones. Left out: {few_seen} for the seen side with fewer than '
    f'{config.min_comparisons} training comparisons, {few_unseen} for the '
    f'unseen side with fewer than {config.min_support} support comparisons or '
    f'{config.min_query} queries on test items.'
  )


def pad_people(pairs: list[Pairs], prompt: np.ndarray) -> Comparisons:
  """[U, N] comparisons of U people; the rest of each row is masked.

  Args:
    pairs: of each person, any number.
    prompt: [M] row of the prompt of each item.
  """
  count = np.array([len(p) for p in pairs])
  mask = np.arange(max(1, count.max())) < count[:, None]
  items = np.zeros((*mask.shape, 2), np.int32)
  # Padding is a tie: where a mask is forgotten, accuracies leave it out.
  label = np.full(mask.shape, 0.5, np.float32)
  weight = np.ones(mask.shape, np.float32)
  items[mask] = np.concatenate([p.items for p in pairs])
  label[mask] = np.concatenate([p.label for p in pairs])
  weight[mask] = np.concatenate(
    [np.ones(len(p)) if p.weight is None else p.weight for p in pairs]
  )
  return make_comparisons(
    np.arange(len(pairs))[:, None],
    items,
    label,
    prompt=prompt[items[..., 0]],
    weight=weight,
    mask=mask,
  )
