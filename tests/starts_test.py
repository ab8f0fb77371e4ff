"""starts: planted clusters are found, whatever users are called."""

import numpy as np
import pytest

from configs import tiny
from pal_jax import starts, train
from pal_jax.errors import InputError
from pal_jax.metrics import adjusted_rand_index
from pal_jax.structs import FeatureTable, make_comparisons

USERS, CLUSTERS, EACH = 60, 3, 40


@pytest.fixture(scope='module')
def planted():
  """(comparisons, table, group [U]); users of a group like one direction."""
  rng = np.random.default_rng(0)
  table = FeatureTable(
    rng.normal(size=(300, 6)).astype(np.float16), np.zeros((1, 6))
  )
  group = rng.integers(CLUSTERS, size=USERS)
  liked = 3.0 * np.linalg.qr(rng.normal(size=(6, 6)))[0][:CLUSTERS]
  user = rng.permutation(np.repeat(np.arange(USERS), EACH))
  items = rng.integers(300, size=(len(user), 2))
  reward = np.einsum('nd,ncd->nc', liked[group[user]], table.items[items])
  return (
    make_comparisons(user, items, reward[:, 0] > reward[:, 1]),
    table,
    group,
  )


def find(comparisons, table, seed=0):
  return starts.spectral_log_weights(comparisons, table, USERS, CLUSTERS, seed)


def test_planted_clusters_are_found(planted):
  comparisons, table, group = planted
  log_w = find(comparisons, table)
  assert adjusted_rand_index(log_w.argmax(1), group) > 0.95
  np.testing.assert_allclose(np.exp(log_w).sum(1), 1.0, rtol=1e-6)
  np.testing.assert_allclose(np.exp(log_w).max(1), starts.CERTAINTY, rtol=1e-6)


def test_other_numbers_for_users_give_the_same_clusters(planted):
  comparisons, table, _ = planted
  place = np.random.default_rng(1).permutation(USERS)
  moved = comparisons.replace(user=place[comparisons.user].astype(np.int32))
  found, again = find(comparisons, table), find(moved, table)[place]
  assert adjusted_rand_index(found.argmax(1), again.argmax(1)) == 1.0


def test_the_seed_decides_and_the_order_of_comparisons_does_not(planted):
  comparisons, table, _ = planted
  found = find(comparisons, table)
  np.testing.assert_array_equal(found, find(comparisons, table))
  back = comparisons[np.arange(len(comparisons.label))[::-1]]
  np.testing.assert_array_equal(found, find(back, table))


def test_signed_differences_by_hand_in_blocks_without_what_is_masked(
  monkeypatch,
):
  monkeypatch.setattr(starts, 'BLOCK', 2)  # a user's rows are in two blocks
  table = FeatureTable(np.eye(3, dtype=np.float32), np.zeros((1, 3)))
  comparisons = make_comparisons(
    [2, 0, 2, 2],
    [[0, 1], [1, 2], [2, 0], [0, 1]],
    [1.0, 0.0, 0.75, 0.0],
    mask=[True, True, True, False],
  )
  found = starts.signed_differences(comparisons, table, 3)
  wanted = [[0, -1, 1], [0, 0, 0], [0.25, -0.5, 0.25]]
  np.testing.assert_allclose(found, wanted)


def test_principal_scores_are_those_of_a_whole_factorisation():
  x = np.random.default_rng(0).normal(size=(40, 30)) * 0.9 ** np.arange(30)
  left, size, _ = np.linalg.svd(x, full_matrices=False)
  found = starts.principal_scores(x, 3, seed=1)
  np.testing.assert_allclose(abs(found), abs(left * size)[:, :3], atol=1e-3)


def test_one_prototype_and_users_without_comparisons_will_do(planted):
  comparisons, table, _ = planted
  one = starts.spectral_log_weights(comparisons, table, USERS, 1, 0)
  np.testing.assert_array_equal(one, np.zeros((USERS, 1)))
  more = starts.spectral_log_weights(comparisons, table, USERS + 2, 3, 0)
  assert np.isfinite(more).all()


def test_training_begins_there():
  config = tiny.get_config('simulation')
  config.train.start = 'spectral'
  experiment = train.create_experiment(config)
  state, _ = train.begin(experiment)
  wanted = starts.spectral_log_weights(
    experiment.dataset.train, experiment.table, 20, 2, config.seed
  )
  np.testing.assert_array_equal(state.params['user_logits'], wanted)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'train.start': 'kmeans'}, "train.start='kmeans' is unknown"),
    (
      {
        'train.start': 'spectral',
        'train.batching': 'users',
        'model.membership': 'mixture_likelihood',
        'model.mixture_level': 'user',
      },
      'has no weights of single users',
    ),
  ],
)
def test_starts_that_cannot_be_are_refused(fields, words):
  config = tiny.get_config('simulation')
  config.update_from_flattened_dict(fields)
  with pytest.raises(InputError, match=words):
    train.create_experiment(config)
