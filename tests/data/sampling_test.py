"""data.sampling: comparisons drawn from known utilities."""

import re

import numpy as np
import pytest

from configs import base
from pal_jax.data.sampling import (
  check_sizes,
  draw_comparisons,
  draw_memberships,
  draw_splits,
  renumber,
  split_items,
)
from pal_jax.errors import InputError
from pal_jax.structs import make_comparisons


def propose_from(num_items):
  def propose(rng, owners, rows):
    assert len(owners) == len(rows)
    pair = rng.integers(0, num_items, (owners.size, 2))
    return pair, np.zeros(owners.size, np.int64)

  return propose


def larger_index(users, items, prompts):
  del users, prompts
  return items.astype(float)


def by_parity(users, items, prompts):
  """Items of one parity tie; odd users like even items."""
  del prompts
  sign = np.where(users % 2 == 0, 1.0, -1.0)
  return sign[:, None] * (items % 2)


def draw(users=3, per_user=5, num_items=9, utility=larger_index, **kwargs):
  rng = np.random.default_rng(kwargs.pop('seed', 0))
  return draw_comparisons(
    rng, np.arange(users), per_user, propose_from(num_items), utility, **kwargs
  )


def pairs_of(c):
  flat = c.flatten()
  return [
    (int(user), int(prompt), frozenset(items.tolist()))
    for user, prompt, items in zip(
      flat.user, flat.prompt, flat.items, strict=True
    )
  ]


def test_shapes_dtypes_and_owners():
  c = draw(users=3, per_user=5)
  assert c.shape == (3, 5) and c.items.shape == (3, 5, 2)
  assert c.user.dtype == c.prompt.dtype == c.items.dtype == np.int32
  assert c.label.dtype == c.weight.dtype == np.float32
  np.testing.assert_array_equal(c.user, np.repeat([[0], [1], [2]], 5, 1))
  assert np.all(c.mask) and np.all(c.weight == 1.0)


def test_users_keep_their_numbers():
  rng = np.random.default_rng(0)
  users = np.array([7, 3])
  c = draw_comparisons(rng, users, 4, propose_from(9), larger_index)
  np.testing.assert_array_equal(c.user, [[7] * 4, [3] * 4])


def test_the_larger_utility_wins():
  c = draw(users=20, per_user=20)
  np.testing.assert_array_equal(c.label, c.items[..., 0] > c.items[..., 1])


def test_ties_are_drawn_again():
  c = draw(users=20, per_user=15, utility=by_parity)
  assert np.all(c.items[..., 0] % 2 != c.items[..., 1] % 2)
  wins_odd = np.where(c.label == 1, c.items[..., 0], c.items[..., 1]) % 2 == 1
  np.testing.assert_array_equal(wins_odd, c.user % 2 == 0)


def test_a_user_gets_every_pair_there_is_once_if_it_asks_for_all():
  c = draw(users=4, per_user=10, num_items=5)  # 5 * 4 / 2 pairs
  assert len(set(pairs_of(c))) == 40


def test_one_pair_more_than_there_are_is_an_error_that_counts():
  with pytest.raises(InputError, match='4 of 44 comparisons') as caught:
    draw(users=4, per_user=11, num_items=5, what='these (data.field)')
  assert str(caught.value).startswith('these (data.field): after 200 rounds')


def test_only_ties_is_an_error_and_not_an_endless_loop():
  with pytest.raises(InputError, match='15 of 15'):
    draw(utility=lambda users, items, prompts: 0.0 * items)


def test_excluded_pairs_do_not_come_again_in_either_order():
  first = draw(users=4, per_user=6, num_items=5)
  swapped = first.replace(items=first.items[..., ::-1])
  rest = draw(users=4, per_user=4, num_items=5, seed=1, exclude=(swapped,))
  assert set(pairs_of(rest)).isdisjoint(pairs_of(first))
  # Together they are all pairs: nothing else was left to draw.
  assert len({*pairs_of(first), *pairs_of(rest)}) == 40
  with pytest.raises(InputError):
    draw(users=4, per_user=5, num_items=5, exclude=(first,))


def test_what_one_user_had_is_not_excluded_for_another():
  first = draw(users=1, per_user=10, num_items=5)
  rng = np.random.default_rng(1)
  other = draw_comparisons(
    rng, np.array([1]), 10, propose_from(5), larger_index, exclude=(first,)
  )
  assert {p[2] for p in pairs_of(other)} == {p[2] for p in pairs_of(first)}


def test_the_same_pair_under_another_prompt_is_another_comparison():
  def propose(rng, owners, rows):
    del rows
    pair = np.tile([0, 1], (owners.size, 1))
    return pair, rng.integers(0, 3, owners.size)

  rng = np.random.default_rng(0)
  c = draw_comparisons(rng, np.arange(2), 3, propose, larger_index)
  np.testing.assert_array_equal(np.sort(c.prompt), [[0, 1, 2]] * 2)


def test_noise_flips_that_share_of_labels_and_draws_the_same_pairs():
  clean = draw(users=100, per_user=40, num_items=50)
  noisy = draw(users=100, per_user=40, num_items=50, noise=0.25)
  np.testing.assert_array_equal(clean.items, noisy.items)
  share = np.mean(clean.label != noisy.label)
  assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_rows_tell_proposals_which_position_they_fill():
  """A property drawn before the pairs survives that ties are redrawn."""
  wanted = np.random.default_rng(5).random(60) < 0.5

  def propose(rng, owners, rows):
    pair = rng.integers(0, 9, (owners.size, 2))
    return pair + 100 * wanted[rows][:, None], np.zeros(owners.size, np.int64)

  rng = np.random.default_rng(0)
  c = draw_comparisons(rng, np.arange(4), 15, propose, larger_index)
  np.testing.assert_array_equal(c.flatten().items[:, 0] >= 100, wanted)


@pytest.mark.parametrize('num_users, num_personas', [(12, 4), (13, 4), (3, 5)])
def test_a_partition_is_balanced_in_random_order(num_users, num_personas):
  rng = np.random.default_rng(0)
  weights, group = draw_memberships(rng, num_users, num_personas, 0.0)
  count = np.bincount(group, minlength=num_personas)
  assert count.max() - count.min() <= 1
  np.testing.assert_array_equal(weights, np.eye(num_personas)[group])
  other = draw_memberships(rng, num_users, num_personas, 0.0)[1]
  assert not np.array_equal(group, other)


@pytest.mark.parametrize('concentration', [0.3, 1.0, 5.0])
def test_a_mixture_is_dirichlet(concentration):
  rng = np.random.default_rng(0)
  num_personas, n = 3, 20_000
  weights, group = draw_memberships(rng, n, num_personas, concentration)
  assert group is None
  np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-12)
  np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.015)
  # E w^2 = (a + 1) / (K (K a + 1)).
  second = (concentration + 1) / (
    num_personas * (num_personas * concentration + 1)
  )
  np.testing.assert_allclose(np.mean(weights**2, 0), second, atol=0.015)


def test_splits_have_the_shares_in_each_group():
  rng = np.random.default_rng(0)
  groups = np.repeat([0, 1], [20, 60])
  texts = tuple(f'text {i}' for i in range(80))
  split = split_items(rng, groups, texts, 0.1, 0.3)
  assert split.dtype == np.int8
  np.testing.assert_array_equal(np.bincount(split[:20]), [12, 2, 6])
  np.testing.assert_array_equal(np.bincount(split[20:]), [36, 6, 18])


def test_equal_texts_get_equal_splits_across_groups():
  texts = tuple(f'text {i % 30}' for i in range(90))
  for seed in range(10):
    rng = np.random.default_rng(seed)
    split = split_items(rng, np.repeat([0, 1, 2], 30), texts, 0.2, 0.3)
    np.testing.assert_array_equal(split[:30], split[30:60])
    np.testing.assert_array_equal(split[:30], split[60:])


def test_texts_that_differ_in_case_or_white_space_get_equal_splits():
  texts = tuple(f'Text {i}' for i in range(30))
  others = tuple(f'  text\n{i} ' for i in range(30))
  for seed in range(10):
    rng = np.random.default_rng(seed)
    split = split_items(rng, np.zeros(60, int), texts + others, 0.2, 0.3)
    np.testing.assert_array_equal(split[:30], split[30:])


@pytest.mark.parametrize(
  'validation, test',
  [(0.0, 0.3), (0.1, 0.0), (-0.1, 0.3), (0.5, 0.5), (0.1, 1)],
)
def test_fractions_must_leave_a_share_for_everything(validation, test):
  with pytest.raises(InputError, match='data.validation_fraction'):
    split_items(
      np.random.default_rng(0), np.zeros(9, int), ('a',) * 9, validation, test
    )


def recording_draw(calls):
  def draw(rng, users, per_user, split, **kwargs):
    calls.append((users.tolist(), per_user, split, kwargs))
    return make_comparisons(
      users[:, None],
      np.tile([0, 1], (len(users), per_user, 1)),
      np.full((len(users), per_user), len(calls), float),
    )

  return draw


def test_every_set_has_its_users_items_noise_and_exclusions():
  config = base.simulation_data()
  config.update(
    {
      'num_seen_users': 2,
      'num_unseen_users': 3,
      'comparisons_per_user': 11,
      'validation_per_user': 12,
      'seen_query': 13,
      'unseen_support': 14,
      'unseen_query': 15,
      'label_noise': 0.1,
      'support_noise': 0.2,
    }
  )
  calls = []
  out = draw_splits(np.random.default_rng(0), config, recording_draw(calls))
  found = {name: calls[int(c.label[0, 0]) - 1] for name, c in out.items()}
  expected = {
    # users, number, split of the items, noise, what is excluded
    'train': ([0, 1], 11, 0, 0.1, ()),
    'validation': ([0, 1], 12, 1, 0.0, ()),
    'seen_seen_items': ([0, 1], 13, 0, 0.0, (out['train'],)),
    'seen_unseen_items': ([0, 1], 13, 2, 0.0, (out['train'],)),
    'support': ([2, 3, 4], 14, 0, 0.2, ()),
    'unseen_seen_items': ([2, 3, 4], 15, 0, 0.0, (out['support'],)),
    'unseen_unseen_items': ([2, 3, 4], 15, 2, 0.0, (out['support'],)),
  }
  assert found.keys() == expected.keys()
  for name, (users, number, split, kwargs) in found.items():
    *head, noise, exclude = expected[name]
    assert [users, number, split] == head, name
    assert kwargs.get('noise', 0.0) == noise, name
    shown = kwargs.get('exclude', ())
    assert len(shown) == len(exclude), name
    assert all(a is b for a, b in zip(shown, exclude, strict=True)), name


def test_renumber_counts_users_from_an_offset_and_changes_nothing_else():
  c = draw(users=3, per_user=2)
  shifted = renumber(c.replace(user=c.user + np.int32(7)), 7)
  np.testing.assert_array_equal(shifted.user, c.user)
  assert shifted.user.dtype == np.int32
  np.testing.assert_array_equal(shifted.items, c.items)


@pytest.mark.parametrize(
  'field, value',
  [
    ('num_personas', 0),
    ('num_seen_users', 0),
    ('num_unseen_users', -1),
    ('comparisons_per_user', 0),
    ('validation_per_user', 0),
    ('seen_query', 0),
    ('unseen_support', 0),
    ('unseen_query', -5),
    ('label_noise', 0.5),
    ('label_noise', -0.01),
    ('label_noise', float('nan')),
    ('support_noise', 1.0),
    ('mixture', -0.5),
    ('num_personas', 201),
  ],
)
def test_sizes_out_of_range_are_refused_by_name(field, value):
  config = base.simulation_data()
  check_sizes(config)
  config[field] = value
  with pytest.raises(InputError, match=re.escape(f'data.{field}={value}')):
    check_sizes(config)
