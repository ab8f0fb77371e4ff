"""Batches as a pure function of (seed, step): resuming needs the step alone."""

import functools

import numpy as np

from pal_jax.errors import InputError
from pal_jax.structs import Comparisons


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(size)


def stream_rows(seed: int, start: int, count: int, size: int) -> np.ndarray:
  """Positions start .. start + count of an endless stream of epochs.

  Each epoch is a fresh permutation of range(size); a batch may span two.
  """
  position = np.arange(start, start + count)
  epochs = position // size
  out = np.empty(count, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    out[here] = _permutation(seed, int(epoch), size)[position[here] % size]
  return out


class Batcher:
  """batcher(step) -> Comparisons [B], always of the same shape.

  Args:
    comparisons: [N] training comparisons.
    batch_size: B.
    seed: of the order.
    by_user: whole users rather than single comparisons, padded to B.

  Raises:
    InputError: if a whole user does not fit in a batch.
  """

  def __init__(
    self,
    comparisons: Comparisons,
    batch_size: int,
    seed: int,
    by_user: bool = False,
  ):
    self._comparisons = comparisons
    self._batch_size = batch_size
    self._seed = seed
    self._rows_of_user = None
    if by_user:
      order = np.argsort(comparisons.user, kind='stable')
      _, start = np.unique(comparisons.user[order], return_index=True)
      self._rows_of_user = np.split(order, start[1:])
      longest = max(len(rows) for rows in self._rows_of_user)
      if longest > batch_size:
        raise InputError(
          f'train.batching=users needs every user whole in a batch: one has '
          f'{longest} comparisons but train.batch_size={batch_size}'
        )
      self._users_per_batch = batch_size // longest

  def __call__(self, step: int) -> Comparisons:
    if self._rows_of_user is None:
      rows = stream_rows(
        self._seed,
        step * self._batch_size,
        self._batch_size,
        len(self._comparisons.label),
      )
      return self._comparisons[rows]
    count = self._users_per_batch
    users = stream_rows(
      self._seed, step * count, count, len(self._rows_of_user)
    )
    # Twice the same user in a batch that spans two epochs would count its
    # evidence twice.
    users = list(dict.fromkeys(users.tolist()))
    rows = np.concatenate([self._rows_of_user[u] for u in users])
    return pad(self._comparisons[rows], self._batch_size)


def pad(comparisons: Comparisons, size: int) -> Comparisons:
  """Pads [N] comparisons to [size] with masked copies of the first."""
  missing = size - len(comparisons.label)
  if missing <= 0:
    return comparisons
  rows = np.concatenate(
    [np.arange(len(comparisons.label)), np.zeros(missing, np.int64)]
  )
  padded = comparisons[rows]
  mask = np.array(padded.mask)
  mask[size - missing :] = False
  return padded.replace(mask=mask)


def weight_by_user(comparisons: Comparisons, kind: str) -> Comparisons:
  """Sets the loss weights: 'none' keeps them, 'inverse_count' has 1 / n_i.

  The weights are scaled to a mean of 1, so that rates keep their meaning.

  Raises:
    InputError: for any other kind.
  """
  if kind == 'none':
    return comparisons
  if kind != 'inverse_count':
    raise InputError(
      f"train.user_weighting={kind!r} is unknown: expected 'none' or "
      "'inverse_count'"
    )
  _, inverse, count = np.unique(
    comparisons.user, return_inverse=True, return_counts=True
  )
  weight = comparisons.weight / count[inverse]
  weight = weight / weight.mean()
  return comparisons.replace(weight=weight.astype(np.float32))
