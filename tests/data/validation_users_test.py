"""data.validation_users: seen users who play the unseen, and nobody else."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from configs import base
from pal_jax.data.dataset import (
  UNSEEN_ITEMS,
  check_disjoint,
  fingerprint,
  pair_keys,
)
from pal_jax.data.simulation import create_simulation
from pal_jax.data.validation_users import validation_users
from pal_jax.errors import InputError
from pal_jax.structs import make_comparisons


@pytest.fixture(scope='module')
def dataset():
  """20 seen users with 30 training and 8 validation comparisons each."""
  config = base.simulation_data()
  config.update(
    {
      'dimension': 3,
      'num_personas': 2,
      'num_items': 120,
      'num_seen_users': 20,
      'num_unseen_users': 6,
      'comparisons_per_user': 30,
      'validation_per_user': 8,
      'seen_query': 10,
      'unseen_support': 12,
      'unseen_query': 10,
    }
  )
  return create_simulation(config)


def limited(comparisons, most):
  """At most `most[user]` comparisons of each user, the others masked."""
  rank = np.zeros(comparisons.user.size, int)
  seen = Counter()
  for row, user in enumerate(comparisons.user.tolist()):
    rank[row] = seen[user]
    seen[user] += 1
  allowed = np.array([most.get(u, 10**6) for u in comparisons.user.tolist()])
  return comparisons.replace(mask=comparisons.mask & (rank < allowed))


def rows_of(comparisons, names):
  """{(user's id, prompt, items, label, weight)} of what is no padding."""
  flat = comparisons.flatten()
  flat = flat[np.asarray(flat.mask)]
  return {
    (names[user], prompt, *items, label, weight)
    for user, prompt, items, label, weight in zip(
      flat.user.tolist(),
      flat.prompt.tolist(),
      flat.items.tolist(),
      flat.label.tolist(),
      flat.weight.tolist(),
      strict=True,
    )
  }


def of_users(comparisons, dataset, names):
  rows = rows_of(comparisons, dataset.user_ids)
  return {row for row in rows if row[0] in names}


# Who.


def test_a_share_of_the_seen_users_plays_the_unseen(dataset):
  held = validation_users(dataset, 0.3, 10, 0)
  assert len(held.unseen_user_ids) == 6 and held.num_users == 14
  assert not set(held.user_ids) & set(held.unseen_user_ids)
  # Nobody is renamed, left out, or new; the order stays.
  every = sorted(held.user_ids + held.unseen_user_ids)
  assert every == sorted(dataset.user_ids)
  for part in (held.user_ids, held.unseen_user_ids):
    kept = set(part)
    assert part == tuple(u for u in dataset.user_ids if u in kept)


@pytest.mark.parametrize('seed', range(3))
def test_a_seed_decides_everything(dataset, seed):
  first = validation_users(dataset, 0.5, 10, seed)
  again = validation_users(dataset, 0.5, 10, seed)
  assert fingerprint(first) == fingerprint(again)
  jax.tree.map(np.testing.assert_array_equal, first.support, again.support)
  other = validation_users(dataset, 0.5, 10, seed + 1)
  assert other.unseen_user_ids != first.unseen_user_ids


def test_who_is_chosen_depends_on_no_number_of_comparisons(dataset):
  few, many = (validation_users(dataset, 0.5, n, 3) for n in (2, 20))
  assert few.unseen_user_ids == many.unseen_user_ids


def test_only_those_with_both_sets_are_chosen(dataset):
  changed = dataclasses.replace(
    dataset,
    train=limited(dataset.train, dict.fromkeys(range(5), 0)),
    validation=limited(dataset.validation, dict.fromkeys(range(5, 10), 0)),
  )
  held = validation_users(changed, 0.9, 10, 0)
  assert len(held.unseen_user_ids) == 9
  assert set(held.unseen_user_ids) < set(dataset.user_ids[10:])


def test_those_with_the_whole_curve_are_chosen_if_most_have_it(dataset):
  some = dict.fromkeys(range(10), 9)
  changed = dataclasses.replace(dataset, train=limited(dataset.train, some))
  held = validation_users(changed, 0.8, 10, 0)
  assert len(held.unseen_user_ids) == 8  # of ten
  assert set(held.unseen_user_ids) < set(dataset.user_ids[10:])
  assert held.support.mask.sum(-1).tolist() == [10] * 8
  # One more who lacks it, and everybody may be chosen.
  some[10] = 9
  changed = dataclasses.replace(dataset, train=limited(dataset.train, some))
  held = validation_users(changed, 0.8, 10, 0)
  assert len(held.unseen_user_ids) == 16
  assert set(held.support.mask.sum(-1).tolist()) == {9, 10}


# What.


def test_queries_are_their_validation_comparisons(dataset):
  held = validation_users(dataset, 0.4, 10, 1)
  mine = set(held.unseen_user_ids)
  assert set(held.unseen) == {UNSEEN_ITEMS}
  found = rows_of(held.unseen[UNSEEN_ITEMS], held.unseen_user_ids)
  assert found == of_users(dataset.validation, dataset, mine)
  assert held.unseen[UNSEEN_ITEMS].label.shape == (8, 8)


def test_support_is_some_of_their_training_comparisons(dataset):
  held = validation_users(dataset, 0.4, 10, 1)
  mine = set(held.unseen_user_ids)
  found = rows_of(held.support, held.unseen_user_ids)
  assert found < of_users(dataset.train, dataset, mine)
  assert held.support.label.shape == (8, 10) and held.support.mask.all()
  check_disjoint('a', held.support, 'b', held.unseen[UNSEEN_ITEMS])
  everything = validation_users(dataset, 0.4, 1000, 1)
  assert rows_of(everything.support, held.unseen_user_ids) == of_users(
    dataset.train, dataset, mine
  )


def test_the_others_keep_their_training_and_validation(dataset):
  held = validation_users(dataset, 0.4, 10, 1)
  others = set(held.user_ids)
  for name in ('train', 'validation'):
    found = rows_of(getattr(held, name), held.user_ids)
    assert found == of_users(getattr(dataset, name), dataset, others)
    rows = set(getattr(held, name).user.tolist())
    assert rows == set(range(held.num_users))


def test_nothing_is_there_of_tests_and_of_unseen_users(dataset):
  held = validation_users(dataset, 0.5, 10, 0)
  assert held.seen == {}
  assert not set(held.unseen_user_ids) & set(dataset.unseen_user_ids)
  assert all(value is None for value in vars(held.truth).values())
  # Whatever stands in test sets: the result is the same.
  other = dataclasses.replace(
    dataset,
    seen={},
    unseen={},
    support=dataset.support[:0],
    unseen_user_ids=(),
  )
  again = validation_users(other, 0.5, 10, 0)
  assert fingerprint(again) == fingerprint(held)
  # Test items are never asked about.
  for c in (held.train, held.validation, held.support, *held.unseen.values()):
    assert set(dataset.item_split[c.items].ravel()) <= {0, 1}


def test_items_stay_as_they_are(dataset):
  held = validation_users(dataset, 0.5, 10, 0)
  assert held.item_names == dataset.item_names
  np.testing.assert_array_equal(held.item_split, dataset.item_split)
  np.testing.assert_array_equal(held.item_features, dataset.item_features)


def test_masked_comparisons_come_nowhere(dataset):
  most = dict.fromkeys(range(20), 3)
  changed = dataclasses.replace(
    dataset,
    train=limited(dataset.train, most | {0: 1, 7: 1}),
    validation=limited(dataset.validation, most | {0: 1, 7: 1}),
  )
  held = validation_users(changed, 0.5, 10, 0)
  assert held.train.mask.all() and held.validation.mask.all()
  for name, comparisons, mine in (
    ('train', held.support, held.unseen_user_ids),
    ('validation', held.unseen[UNSEEN_ITEMS], held.unseen_user_ids),
    ('train', held.train, held.user_ids),
    ('validation', held.validation, held.user_ids),
  ):
    found = rows_of(comparisons, mine)
    assert found == of_users(getattr(changed, name), changed, set(mine))
  assert np.all(held.support.label[~held.support.mask] == 0.5)
  row = np.broadcast_to(np.arange(10)[:, None], held.support.label.shape)
  np.testing.assert_array_equal(held.support.user, row)
  assert len(pair_keys(held.support)) == held.support.mask.sum()


# The order of the support.


def with_chained_pairs(dataset):
  """Each user's six training pairs are (0, 1), (1, 2), ..., (5, 6)."""
  items = np.tile(np.arange(6)[:, None] + np.arange(2), (20, 1))
  user = np.repeat(np.arange(20), 6)
  train = make_comparisons(user, items, np.ones(120))
  return dataclasses.replace(dataset, train=train)


def fresh_pairs(row):
  """For each pair of a row: whether its items are new."""
  used, fresh = set(), []
  for pair in row:
    fresh.append(not used & set(pair))
    used |= set(pair)
  return fresh


@pytest.mark.parametrize('seed', range(3))
def test_pairs_that_repeat_an_item_come_last(dataset, seed):
  held = validation_users(with_chained_pairs(dataset), 0.5, 6, seed)
  rows = held.support.items.tolist()
  for row in rows:
    fresh = fresh_pairs(row)
    assert fresh == sorted(fresh, reverse=True)
    assert len({tuple(pair) for pair in row}) == 6
  assert len({str(row) for row in rows}) > 1  # at random


def test_no_pair_comes_last_that_repeats_no_item_of_the_first(dataset):
  chained = with_chained_pairs(dataset)
  for seed in range(10):
    held = validation_users(chained, 0.5, 6, seed)
    for row in held.support.items.tolist():
      # Of six pairs in a chain, any that are disjoint and to which none can be
      # added are two or three.
      assert sum(fresh_pairs(row)) in (2, 3)


# Errors.


@pytest.mark.parametrize('share', [0.0, 0.01, -1.0, 1.0, 1.5])
def test_either_side_needs_somebody(dataset, share):
  with pytest.raises(InputError) as caught:
    validation_users(dataset, share, 10, 0)
  for part in (f'validation_share={share}', 'of 20 seen users', 'both sides'):
    assert part in str(caught.value)


def test_without_validation_comparisons_there_is_nobody_to_choose(dataset):
  nobody = dataset.validation[:0]
  with pytest.raises(InputError, match='0 of 0 seen users'):
    validation_users(
      dataclasses.replace(dataset, validation=nobody), 0.5, 10, 0
    )


def test_the_others_need_validation_comparisons_too(dataset):
  none = dict.fromkeys(range(19), 0)
  changed = dataclasses.replace(
    dataset, validation=limited(dataset.validation, none)
  )
  with pytest.raises(InputError, match='validation_share=0.9.*lower it'):
    validation_users(changed, 0.9, 10, 0)
