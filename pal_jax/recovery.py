"""Whether a trained model found what generated the data."""

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr

from pal_jax.metrics import adjusted_rand_index

NUM_RESTARTS = 10


def kmeans_groups(
  points: np.ndarray, num_groups: int, seed: int = 0
) -> np.ndarray:
  """k-means++ groups [U] of points [U, K], the best of ten restarts.

  With fewer distinct points than groups, equal points are the groups.
  """
  distinct, inverse = np.unique(
    np.round(points, 6), axis=0, return_inverse=True
  )
  if len(distinct) <= num_groups:
    return inverse.reshape(-1)
  best, best_inertia = None, np.inf
  for restart in range(NUM_RESTARTS):
    centres, groups = kmeans2(
      points,
      num_groups,
      minit='++',
      seed=np.random.default_rng([seed, restart]),
    )
    inertia = float(np.sum((points - centres[groups]) ** 2))
    if inertia < best_inertia:
      best, best_inertia = groups, inertia
  return best


def cluster_recovery(
  weights: np.ndarray, group: np.ndarray | None, seed: int = 0
) -> dict[str, float | None]:
  """Adjusted Rand index of users grouped by their fitted weights.

  Args:
    weights: [U, K] on the simplex.
    group: [U] true personas; None where there is no truth.
    seed: of k-means.

  Returns:
    `ari`, with k-means into as many groups as there are personas, and
    `ari_dominant`, by largest weight; both None without a truth.
  """
  if group is None:
    return {'ari': None, 'ari_dominant': None}
  found = kmeans_groups(weights, len(np.unique(group)), seed)
  return {
    'ari': adjusted_rand_index(group, found),
    'ari_dominant': adjusted_rand_index(group, np.argmax(weights, axis=-1)),
  }


def matched_error(found: np.ndarray, planted: np.ndarray) -> float:
  """Relative RMS error of prototypes up to relabelling, both [K, P].

  Only for f = identity and a partition, where they are identified.
  """
  cost = np.sum((found[:, None] - planted[None]) ** 2, axis=-1)
  rows, columns = linear_sum_assignment(cost)
  return float(
    np.sqrt(cost[rows, columns].sum() / np.sum(planted[columns] ** 2))
  )


def relative_error(found: np.ndarray, planted: np.ndarray) -> float:
  """||found - planted|| / ||planted - mean(planted)||, both [U, P]."""
  spread = np.linalg.norm(planted - planted.mean(0))
  return float(np.linalg.norm(found - planted) / spread)


def rank_correlation(reward: np.ndarray, utility: np.ndarray) -> float:
  """Mean over users of Spearman's correlation over items, both [U, M].

  With a learned f only distances are identified, and only in their order.
  """
  each = [
    spearmanr(a, b).statistic for a, b in zip(reward, utility, strict=True)
  ]
  return float(np.mean(each))
