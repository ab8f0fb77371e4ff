"""Accuracies on held-out comparisons, with intervals."""

import dataclasses

import numpy as np

from pal_jax.metrics import pair_accuracy
from pal_jax.structs import Comparisons

MARGIN = 0.05  # above chance, before anything is said
# Comparisons a probe is fitted to and measured on; a random subset of more,
# whose standard error is below 0.3 points.
MAX_COMPARISONS = 50_000
NUM_DRAWS = 300
SHRINKAGE = 10.0  # comparisons that the population's rate counts for


@dataclasses.dataclass(frozen=True)
class Measured:
  """A mean over comparisons, and its 95% percentile intervals."""

  mean: float
  users: tuple[float, float]  # users resampled
  items: tuple[float, float] | None  # items resampled, where it was asked for


def above(interval: tuple[float, float], chance: float) -> bool:
  """Clearly, which is to say by MARGIN."""
  return interval[0] > chance + MARGIN


def subset(comparisons: Comparisons, seed: int) -> Comparisons:
  """At most MAX_COMPARISONS of [N], in their order."""
  number = comparisons.label.size
  if number <= MAX_COMPARISONS:
    return comparisons
  rng = np.random.default_rng([seed, 0])
  return comparisons[np.sort(rng.permutation(number)[:MAX_COMPARISONS])]


def bootstrap(
  values: np.ndarray, clusters: np.ndarray, seed: int
) -> np.ndarray:
  """Means over comparisons when clusters are drawn with replacement.

  Args:
    values: [N, F].
    clusters: [N, R] ids; a comparison of R clusters counts for the product of
      how often each was drawn.
    seed: of the draws.

  Returns:
    [at most NUM_DRAWS, F]; a draw that no comparison is in is left out.
  """
  # Comparisons of the same clusters always count alike: they are added up.
  groups, group = np.unique(clusters, axis=0, return_inverse=True)
  sums = np.stack(
    [np.bincount(group, column) for column in (*values.T, np.ones(group.size))],
    axis=-1,
  )
  ids, member = np.unique(groups, return_inverse=True)
  member = member.reshape(groups.shape)
  rng = np.random.default_rng([seed, 1])
  means = []
  for _ in range(NUM_DRAWS):
    drawn = rng.integers(0, ids.size, ids.size)
    times = np.bincount(drawn, minlength=ids.size).astype(float)
    *total, count = times[member].prod(-1) @ sums
    if count:
      means.append(np.divide(total, count))
  return np.stack(means)


def measure(
  logits: dict[str, np.ndarray],
  held: Comparisons,
  seed: int,
  *,
  over_items: bool = False,
  gain: tuple[str, str] | None = None,
) -> dict[str, Measured]:
  """Accuracies of several predictors, with the same draws for all.

  Args:
    logits: [N] each.
    held: [N > 0] without ties.
    seed: of the bootstrap.
    over_items: whether to resample items as well.
    gain: two of the predictors; 'gain' is how far the first is above the
      second, paired.
  """
  right = {k: pair_accuracy(z, held.label) for k, z in logits.items()}
  if gain:
    right['gain'] = right[gain[0]] - right[gain[1]]
  values = np.stack(list(right.values()), -1)

  def intervals(clusters):
    draws = bootstrap(values, clusters, seed)
    return [tuple(x) for x in np.percentile(draws, [2.5, 97.5], 0).T.tolist()]

  users = intervals(held.user[:, None])
  items = intervals(held.items) if over_items else [None] * len(users)
  means = values.mean(0).tolist()
  return {
    name: Measured(*each)
    for name, *each in zip(right, means, users, items, strict=True)
  }


def shrunk_rates(key: np.ndarray, value: np.ndarray, number: int) -> np.ndarray:
  """[number] means of value [N] by key [N], shrunk to the mean of all."""
  total = np.bincount(key, value, minlength=number)
  count = np.bincount(key, minlength=number)
  return (total + SHRINKAGE * value.mean()) / (count + SHRINKAGE)
