"""recovery: grouping users and matching prototypes."""

import itertools
import warnings

import numpy as np
import pytest

from pal_jax import recovery
from pal_jax.metrics import adjusted_rand_index


@pytest.fixture(scope='module')
def blobs():
  """60 users in three well separated groups of unequal size."""
  rng = np.random.default_rng(0)
  group = np.repeat([0, 1, 2], [10, 20, 30])
  weights = np.eye(3)[group] * 0.8 + rng.dirichlet(np.ones(3), size=60) * 0.2
  return weights, group


def test_kmeans_finds_separated_groups(blobs):
  weights, group = blobs
  found = recovery.kmeans_groups(weights, 3)
  assert adjusted_rand_index(group, found) == 1.0


@pytest.mark.parametrize('seed', [0, 5, 10])
def test_kmeans_finds_eight_small_groups(seed):
  """One start often merges two of them; the best of ten does not."""
  rng = np.random.default_rng(seed)
  group = np.repeat(np.arange(8), 12)
  points = np.eye(8)[group] + 0.05 * rng.normal(size=(96, 8))
  found = recovery.kmeans_groups(points, 8, seed)
  assert adjusted_rand_index(group, found) == 1.0


def test_kmeans_repeats_with_its_seed():
  points = np.random.default_rng(1).normal(size=(40, 3))
  np.testing.assert_array_equal(
    recovery.kmeans_groups(points, 4, seed=5),
    recovery.kmeans_groups(points, 4, seed=5),
  )


@pytest.mark.parametrize('num_groups', [2, 3, 7])
def test_fewer_distinct_points_than_groups_are_the_groups(num_groups):
  points = np.eye(4)[[0, 1, 0, 1, 1]]
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    found = recovery.kmeans_groups(points, num_groups)
  assert found.shape == (5,)
  assert adjusted_rand_index(np.array([0, 1, 0, 1, 1]), found) == 1.0


def test_points_equal_up_to_rounding_are_one_point():
  rng = np.random.default_rng(2)
  points = np.eye(3)[[0, 1, 2, 0, 1, 2]] + 1e-8 * rng.normal(size=(6, 3))
  found = recovery.kmeans_groups(points, 4)
  assert adjusted_rand_index(np.array([0, 1, 2, 0, 1, 2]), found) == 1.0


def test_everybody_alike_is_one_group():
  found = recovery.kmeans_groups(np.full((5, 4), 0.25), 4)
  assert len(np.unique(found)) == 1


def test_cluster_recovery_of_planted_groups(blobs):
  weights, group = blobs
  assert recovery.cluster_recovery(weights, group) == {
    'ari': 1.0,
    'ari_dominant': 1.0,
  }


def test_relabelling_groups_or_prototypes_changes_nothing(blobs):
  weights, group = blobs
  weights = weights + 0.4 * np.random.default_rng(3).normal(size=(60, 3))
  expected = recovery.cluster_recovery(weights, group)
  assert 0.0 < expected['ari'] < 1.0
  renamed = np.array([2, 0, 1])[group]
  assert recovery.cluster_recovery(weights, renamed) == pytest.approx(expected)
  found = recovery.cluster_recovery(weights[:, [1, 2, 0]], group)
  assert found['ari_dominant'] == pytest.approx(expected['ari_dominant'])


def test_more_prototypes_than_personas_can_still_recover():
  """Two prototypes share a persona: k-means sees it, arg-max does not."""
  group = np.repeat([0, 1], 20)
  weights = np.zeros((40, 4))
  weights[:20, 0] = 1.0
  weights[20:, 1] = 0.5 + 0.02 * np.tile([1, -1], 10)
  weights[20:, 2] = 1.0 - weights[20:, 1]
  found = recovery.cluster_recovery(weights, group)
  assert found['ari'] == 1.0
  assert found['ari_dominant'] < 1.0


def test_without_a_truth_recovery_is_null(blobs):
  assert recovery.cluster_recovery(blobs[0], None) == {
    'ari': None,
    'ari_dominant': None,
  }


# Prototypes.


def test_matched_error_is_zero_under_every_relabelling():
  planted = np.random.default_rng(4).normal(size=(4, 3))
  for order in itertools.permutations(range(4)):
    assert recovery.matched_error(planted[list(order)], planted) == 0.0


def test_matched_error_equals_the_best_relabelling():
  rng = np.random.default_rng(5)
  found, planted = rng.normal(size=(2, 4, 3))
  best = min(
    np.linalg.norm(found[list(order)] - planted)
    for order in itertools.permutations(range(4))
  )
  assert recovery.matched_error(found, planted) == pytest.approx(
    best / np.linalg.norm(planted)
  )


def test_matched_error_hand_values():
  planted = np.array([[3.0, 0.0], [0.0, 4.0]])
  assert recovery.matched_error(np.zeros((2, 2)), planted) == 1.0
  found = np.array([[0.0, 4.0], [3.0, 5.0]])
  assert recovery.matched_error(found, planted) == pytest.approx(1.0)


def test_matching_is_one_to_one():
  """Two prototypes at the same place recover one persona, not both."""
  planted = np.array([[1.0, 0.0], [0.0, 1.0]])
  assert recovery.matched_error(planted[[0, 0]], planted) == pytest.approx(1.0)


def test_relative_error_of_the_mean_is_one():
  planted = np.random.default_rng(6).normal(size=(20, 3)) + 100.0
  mean = np.broadcast_to(planted.mean(0), planted.shape)
  assert recovery.relative_error(mean, planted) == pytest.approx(1.0)
  assert recovery.relative_error(planted, planted) == 0.0


def test_rank_correlation_sees_order_only_and_by_user():
  rng = np.random.default_rng(7)
  utility = rng.normal(size=(3, 15))
  assert recovery.rank_correlation(np.exp(utility), utility) == 1.0
  assert recovery.rank_correlation(-utility, utility) == -1.0
  # Each user has its own zero and scale.
  moved = utility * np.array([[1.0], [9.0], [0.1]]) + np.arange(3)[:, None]
  assert recovery.rank_correlation(moved, utility) == pytest.approx(1.0)
  mixed = np.stack([utility[0], -utility[1]])
  assert recovery.rank_correlation(mixed, utility[:2]) == pytest.approx(0.0)
