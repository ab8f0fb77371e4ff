"""Users to choose on: some of the seen ones, treated as if unseen."""

import dataclasses

import numpy as np

from pal_jax.data.dataset import UNSEEN_ITEMS, Dataset, Truth, check_disjoint
from pal_jax.errors import InputError
from pal_jax.structs import Comparisons, make_comparisons


def validation_users(
  dataset: Dataset, share: float, max_support: int, seed: int
) -> Dataset:
  """A dataset of the seen users alone, some of whom play the unseen.

  These adapt from their training comparisons and answer their validation
  ones; the others are trained on. Unseen users and test sets have no part.

  Args:
    dataset: with seen users who have validation comparisons.
    share: of those, to be validation users, in (0, 1).
    max_support: comparisons a validation user may adapt from. Those that share
      no item come first: pairs made of the same votes tell less.
    seed: of who is.

  Raises:
    InputError: if either side would be empty.
  """
  train, check = dataset.train.flatten(), dataset.validation.flatten()
  able = np.intersect1d(train.user[train.mask], check.user[check.mask])
  counts = np.bincount(train.user[train.mask], minlength=dataset.num_users)
  full = able[counts[able] >= max_support]
  if 2 * len(full) >= len(able):
    able = full  # the whole curve, where most users have enough for it
  number = int(round(share * len(able)))
  if not 0 < number < dataset.num_users:
    raise InputError(
      f'validation_share={share}: {number} of {len(able)} seen users with '
      f'validation comparisons (of {dataset.num_users}) would be validation '
      'users; both sides need one'
    )
  rng = np.random.default_rng([seed, 5])
  chosen = np.sort(rng.permutation(able)[:number])
  rest = np.setdiff1d(np.arange(dataset.num_users), chosen)
  new_row = np.full(dataset.num_users, -1)
  new_row[rest] = np.arange(len(rest))

  def of_rest(comparisons: Comparisons) -> Comparisons:
    kept = comparisons[(new_row[comparisons.user] >= 0) & comparisons.mask]
    return kept.replace(user=new_row[kept.user].astype(np.int32))

  support = [
    _disjoint_first(rng, train, np.flatnonzero((train.user == u) & train.mask))[
      :max_support
    ]
    for u in chosen
  ]
  queries = [np.flatnonzero((check.user == u) & check.mask) for u in chosen]
  made = dataclasses.replace(
    dataset,
    user_ids=tuple(dataset.user_ids[u] for u in rest),
    unseen_user_ids=tuple(dataset.user_ids[u] for u in chosen),
    train=of_rest(train),
    validation=of_rest(check),
    seen={},
    support=_padded(train, support),
    unseen={UNSEEN_ITEMS: _padded(check, queries)},
    truth=Truth(),
  )
  if not made.train.label.size or not made.validation.label.size:
    raise InputError(
      f'validation_share={share} leaves no training or no validation '
      'comparisons of the other users; lower it'
    )
  check_disjoint(
    'support', made.support, 'validation queries', made.unseen[UNSEEN_ITEMS]
  )
  return made


def _disjoint_first(rng, comparisons: Comparisons, rows) -> np.ndarray:
  """Rows in random order, but those that repeat an item last."""
  rows = rng.permutation(rows)
  used, first, last = set(), [], []
  for row in rows.tolist():
    items = set(comparisons.items[row].tolist())
    if items & used:
      last.append(row)
    else:
      first.append(row)
      used |= items
  return np.array(first + last, np.int64)


def _padded(comparisons: Comparisons, rows: list[np.ndarray]) -> Comparisons:
  """[V, N] of the rows of each user, masked."""
  size = max(len(r) for r in rows)
  mask = np.arange(size) < np.array([len(r) for r in rows])[:, None]
  table = np.zeros(mask.shape, np.int64)
  table[mask] = np.concatenate(rows)
  taken = comparisons[table]
  return make_comparisons(
    np.arange(len(rows))[:, None],
    taken.items,
    np.where(mask, taken.label, 0.5),
    prompt=taken.prompt,
    weight=taken.weight,
    mask=mask,
  )
