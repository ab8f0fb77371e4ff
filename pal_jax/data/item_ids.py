"""Items known by their row alone: what votes tell without any text."""

import dataclasses

import numpy as np

from pal_jax.data.dataset import Dataset
from pal_jax.errors import InputError


def with_item_ids(dataset: Dataset, share: float, seed: int) -> Dataset:
  """A column an item for features, and validation on items of training.

  Nothing is known of items without comparisons, so that validation on them
  would choose nothing. Of each seen user a share of the training comparisons
  becomes validation, and comparisons that have an item in common with these
  are left out: in votes they would give the answer away.

  Args:
    dataset: any; its test sets on unseen items then are guesses.
    share: of a user's training comparisons, in (0, 1).
    seed: of which.

  Raises:
    InputError: if nothing is left to train or to validate on.
  """
  rng = np.random.default_rng([seed, 8])
  train = dataset.train.flatten()
  rows = rng.permutation(np.flatnonzero(train.mask))
  rows = rows[np.argsort(train.user[rows], kind='stable')]
  bounds = np.flatnonzero(np.diff(train.user[rows])) + 1
  fit, held = [], []
  for mine in np.split(rows, bounds):
    number = int(round(share * len(mine)))
    taken, rest = mine[:number], mine[number:]
    known = np.isin(train.items[rest], train.items[taken]).any(-1)
    held.append(taken)
    fit.append(rest[~known])
  fit, held = (np.sort(np.concatenate(x)) for x in (fit, held))
  if not len(fit) or not len(held):
    raise InputError(
      f'with a share of {share} of the training comparisons for validation, '
      f'{len(fit)} are left to train on and {len(held)} to validate on'
    )
  size = len(dataset.item_names)
  return dataclasses.replace(
    dataset,
    train=train[fit],
    validation=train[held],
    # A mean square of 1, as text features have it.
    item_features=np.eye(size, dtype=np.float32) * np.float32(np.sqrt(size)),
    prompt_features=np.ones((len(dataset.prompt_names), size), np.float32),
  )
