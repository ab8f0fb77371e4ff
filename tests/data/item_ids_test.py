"""item_ids: items known by their row, and what of training is held back."""

import dataclasses

import numpy as np
import pytest

from configs import base
from pal_jax import data
from pal_jax.data.dataset import SEEN_ITEMS, check_disjoint
from pal_jax.data.item_ids import with_item_ids
from pal_jax.errors import InputError
from pal_jax.structs import make_comparisons


@pytest.fixture(scope='module')
def dataset():
  config = base.simulation_data()
  config.num_items = 60  # few, so that a user's pairs share items
  config.num_seen_users = 12
  config.num_unseen_users = 4
  config.comparisons_per_user = 40
  for field in ('seen_query', 'unseen_support', 'unseen_query'):
    config[field] = 5
  config.validation_per_user = 3
  return data.create(config)


def test_a_column_an_item(dataset):
  made = with_item_ids(dataset, 0.15, 0)
  np.testing.assert_allclose(made.item_features, np.sqrt(60) * np.eye(60))
  assert made.prompt_features.shape == (1, 60)


def test_validation_shares_no_item_with_training_of_the_same_user(dataset):
  made = with_item_ids(dataset, 0.15, 0)
  old = {
    (u, *sorted(i))
    for u, i in zip(
      dataset.train.user.tolist(), dataset.train.items.tolist(), strict=True
    )
  }
  for user in range(12):
    mine = [c[c.user == user] for c in (made.train, made.validation)]
    first, second = (set(c.items.ravel().tolist()) for c in mine)
    assert second and not first & second
    assert mine[1].label.size == 6  # 15% of 40
    for c in mine:
      assert {(user, *sorted(i)) for i in c.items.tolist()} <= old
  check_disjoint('train', made.train, 'test', made.seen[SEEN_ITEMS])


def test_labels_stay_with_their_pairs(dataset):
  made = with_item_ids(dataset, 0.15, 0)

  def labelled(c):
    return {
      (u, *i, y)
      for u, i, y in zip(
        c.user.tolist(), c.items.tolist(), c.label.tolist(), strict=True
      )
    }

  for part in (made.train, made.validation):
    assert labelled(part) <= labelled(dataset.train)


def test_the_seed_decides(dataset):
  first, again, other = (
    with_item_ids(dataset, 0.15, seed).validation.items for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_too_little_to_divide_is_refused(dataset):
  one = dataclasses.replace(
    dataset, train=make_comparisons([0], [[0, 1]], [1.0])
  )
  with pytest.raises(InputError, match='1 are left to train on and 0 to'):
    with_item_ids(one, 0.15, 0)
