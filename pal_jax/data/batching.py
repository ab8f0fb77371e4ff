"""Batches as a pure function of (seed, step): resuming needs the step alone."""

import functools

import numpy as np

from pal_jax.errors import InputError
from pal_jax.structs import Comparisons

# Past it a permutation is computed where it is read: one of 10^8 numbers takes
# seconds and 0.8 GB to draw.
MOST_DRAWN = 2**22


@functools.lru_cache(maxsize=16)  # a sweep draws from many in turn; 0.5 GB
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(size)


def _permute(
  seed: int, epoch: int, size: int, position: np.ndarray
) -> np.ndarray:
  """Where positions [N] of a permutation of range(size) point to."""
  if size <= MOST_DRAWN:
    return _permutation(seed, epoch, size)[position]
  return _scatter(seed, epoch, size, position)


_ROUNDS = 6


def _scatter(
  seed: int, epoch: int, size: int, position: np.ndarray
) -> np.ndarray:
  """`_permute` by a keyed bijection, without an array of all positions.

  A Feistel network (Luby and Rackoff 1988) on the smallest even number of bits
  that holds `size`; what falls outside goes through it again until it is
  inside (cycle walking, Black and Rogaway 2002).
  """
  half = np.uint64((int(size - 1).bit_length() + 1) // 2)
  low = np.uint64((1 << int(half)) - 1)
  keys = np.random.default_rng([seed, epoch, 5]).integers(
    0, 2**64, _ROUNDS, np.uint64
  )

  def network(x):
    left, right = x >> half, x & low
    for key in keys:
      left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << half) | right

  found = network(position.astype(np.uint64))
  while (outside := found >= size).any():
    found[outside] = network(found[outside])
  return found.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
  """[N] uint64, well mixed (SplitMix64, Steele et al. 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def stream_rows(seed: int, start: int, count: int, size: int) -> np.ndarray:
  """Positions start .. start + count of an endless stream of epochs.

  Each epoch is a fresh permutation of range(size); a batch may span two.
  """
  position = np.arange(start, start + count)
  epochs = position // size
  out = np.empty(count, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    out[here] = _permute(seed, int(epoch), size, position[here] % size)
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
    self._users = _UserRows(comparisons.user) if by_user else None
    if by_user:
      longest = self._users.longest
      if longest > batch_size:
        raise InputError(
          f'train.batching=users needs every user whole in a batch: one has '
          f'{longest} comparisons but train.batch_size={batch_size}'
        )
      self._users_per_batch = batch_size // longest

  def __call__(self, step: int) -> Comparisons:
    if self._users is None:
      rows = stream_rows(
        self._seed,
        step * self._batch_size,
        self._batch_size,
        len(self._comparisons.label),
      )
      return self._comparisons[rows]
    count = self._users_per_batch
    users = stream_rows(self._seed, step * count, count, len(self._users))
    # Twice the same user in a batch that spans two epochs would count its
    # evidence twice.
    users = np.array(list(dict.fromkeys(users.tolist())))
    return pad(self._comparisons[self._users.of(users)], self._batch_size)


class _UserRows:
  """The rows of each user's comparisons.

  Args:
    user: [N] whose each comparison is.
  """

  def __init__(self, user: np.ndarray):
    # Those of a simulation stand in order: nothing to sort.
    ordered = bool(np.all(user[1:] >= user[:-1]))
    self._order = None if ordered else np.argsort(user, kind='stable')
    user = user if ordered else user[self._order]
    first = np.flatnonzero(user[1:] != user[:-1]) + 1
    self._start = np.concatenate([[0], first, [len(user)]])

  def __len__(self) -> int:
    return len(self._start) - 1

  @property
  def longest(self) -> int:
    return int(np.diff(self._start).max())

  def of(self, users: np.ndarray) -> np.ndarray:
    """Rows of some users, one user after another."""
    start, stop = self._start[users], self._start[users + 1]
    count = stop - start
    before = np.cumsum(count) - count
    rows = np.arange(count.sum()) + np.repeat(start - before, count)
    return rows if self._order is None else self._order[rows]


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
