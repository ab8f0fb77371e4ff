"""Where training begins: users at random, or in clusters found beforehand.

A user's mean signed difference s_i = mean_j (2 y_ij - 1) (h_a - h_b) points to
what the user likes; under linear rewards its expectation grows with the
user's own direction. The users' s_i, in the K - 1 directions in which they
differ most, are put into K clusters, and the user table starts there.
"""

import numpy as np

from pal_jax.errors import InputError
from pal_jax.structs import Comparisons, FeatureTable

STARTS = ('random', 'spectral')
RESTARTS = 10  # of k-means
ITERATIONS = 25
OVERSAMPLING, POWERS = 8, 20  # of the subspace iteration
BLOCK = 2**14  # comparisons whose features are in memory at once
CERTAINTY = 0.8  # weight that a user begins with on the own cluster


def check_config(config) -> None:
  """Refuses a start that the model cannot take.

  Raises:
    InputError: naming the field.
  """
  start, model = config.train.start, config.model
  if start not in STARTS:
    raise InputError(
      f'train.start={start!r} is unknown: expected one of {STARTS}'
    )
  user_level = (
    model.membership == 'mixture_likelihood' and model.mixture_level == 'user'
  )
  if start != 'random' and user_level:
    raise InputError(
      f'train.start={start!r} puts users in clusters, but model.mixture_level='
      "'user' has no weights of single users: use train.start='random'"
    )


def signed_differences(
  comparisons: Comparisons, table: FeatureTable, num_users: int
) -> np.ndarray:
  """[U, D] s_i of every user; 0 for those without comparisons."""
  total = np.zeros((num_users, table.items.shape[-1]))
  number = np.zeros(num_users)
  order = np.argsort(comparisons.user, kind='stable')
  for begin in range(0, len(order), BLOCK):
    rows = comparisons[order[begin : begin + BLOCK]]
    sign = np.where(rows.mask, 2.0 * rows.label - 1.0, 0.0)
    pair = table.items[rows.items].astype(np.float32)
    users, start = np.unique(rows.user, return_index=True)
    total[users] += np.add.reduceat(
      sign[:, None] * (pair[:, 0] - pair[:, 1]), start
    )
    number[users] += np.add.reduceat(rows.mask.astype(float), start)
  return total / np.maximum(number, 1.0)[:, None]


def principal_scores(x: np.ndarray, rank: int, seed: int) -> np.ndarray:
  """[U, min(rank, D)] coordinates of x [U, D] in its principal directions.

  By subspace iteration (Halko, Martinsson and Tropp 2011): thin products. A
  whole factorisation took seconds beside other work, whose threads BLAS's
  then wait for.
  """
  width = x.shape[-1]
  rng = np.random.default_rng([seed, 4])
  basis = rng.normal(size=(width, min(rank + OVERSAMPLING, width)))
  for _ in range(POWERS):
    basis, _ = np.linalg.qr(x.T @ (x @ basis))
  scores = x @ basis
  _, turn = np.linalg.eigh(scores.T @ scores)  # ascending
  return scores @ turn[:, ::-1][:, :rank]


def _squared_distances(points, centres) -> np.ndarray:
  return np.square(points[:, None] - centres[None]).sum(-1)


def _first_centres(points, num_clusters: int, rng) -> np.ndarray:
  """k-means++ (Arthur and Vassilvitskii 2007)."""
  chosen = [int(rng.integers(len(points)))]
  for _ in range(num_clusters - 1):
    far = _squared_distances(points, points[chosen]).min(1) + 1e-12
    chosen.append(int(rng.choice(len(points), p=far / far.sum())))
  return points[chosen]


def find_clusters(
  points: np.ndarray, num_clusters: int, seed: int
) -> np.ndarray:
  """[U] the cluster of each point [U, R], the best of some k-means."""
  rng = np.random.default_rng([seed, 3])
  best, cost = np.zeros(len(points), np.int64), np.inf
  for _ in range(RESTARTS):
    centres = _first_centres(points, num_clusters, rng)
    for _ in range(ITERATIONS):
      distance = _squared_distances(points, centres)
      mine = distance.argmin(1)
      centres = np.stack(
        [
          points[mine == k].mean(0) if (mine == k).any() else centres[k]
          for k in range(num_clusters)
        ]
      )
    total = distance.min(1).sum()
    if total < cost:
      best, cost = mine, total
  return best


def spectral_log_weights(
  comparisons: Comparisons,
  table: FeatureTable,
  num_users: int,
  num_prototypes: int,
  seed: int,
) -> np.ndarray:
  """[U, K] log-weights that training begins with.

  Args:
    comparisons: [N] training comparisons.
    table: their features.
    num_users: U.
    num_prototypes: K.
    seed: of the clusters.
  """
  if num_prototypes == 1:
    return np.zeros((num_users, 1), np.float32)
  s = signed_differences(comparisons, table, num_users)
  points = principal_scores(s - s.mean(0), num_prototypes - 1, seed)
  mine = find_clusters(points, num_prototypes, seed)
  rest = (1.0 - CERTAINTY) / (num_prototypes - 1)
  own = mine[:, None] == np.arange(num_prototypes)
  return np.log(np.where(own, CERTAINTY, rest)).astype(np.float32)
