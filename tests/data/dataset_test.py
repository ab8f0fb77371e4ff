"""data.dataset: a dataset that measures on what it was shown is refused."""

import dataclasses

import numpy as np
import pytest

from configs import base
from pal_jax import data
from pal_jax.data.dataset import (
  SEEN_ITEMS,
  UNSEEN_ITEMS,
  Dataset,
  Truth,
  check_dataset,
  check_disjoint,
  pair_keys,
)
from pal_jax.errors import InputError
from pal_jax.structs import make_comparisons

# Items 0 to 3 are of training, 4 and 5 of validation, 6 to 8 of test.
SPLIT = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2], np.int8)


def comparisons(*rows, **kwargs):
  """Of (user, first, second)."""
  rows = np.array(rows).reshape(-1, 3)
  return make_comparisons(rows[:, 0], rows[:, 1:], np.ones(len(rows)), **kwargs)


def by_user(*pairs):
  """[2, N]: both users get these pairs."""
  c = comparisons(*((u, *p) for u in (0, 1) for p in pairs))
  n = len(pairs)
  return type(c)(
    user=c.user.reshape(2, n),
    prompt=c.prompt.reshape(2, n),
    items=c.items.reshape(2, n, 2),
    label=c.label.reshape(2, n),
    weight=c.weight.reshape(2, n),
    mask=c.mask.reshape(2, n),
  )


def dataset(**changes):
  fields = {
    'name': 'by hand',
    'user_ids': ('a', 'b'),
    'unseen_user_ids': ('c', 'd'),
    'item_names': tuple('012345678'),
    'item_groups': ('item',) * 9,
    'prompt_names': ('',),
    'item_split': SPLIT,
    'train': by_user((0, 1), (1, 2)).flatten(),
    'validation': by_user((4, 5)).flatten(),
    'seen': {
      SEEN_ITEMS: by_user((0, 2)),
      UNSEEN_ITEMS: by_user((6, 7)),
    },
    'support': by_user((0, 1), (1, 3)),
    'unseen': {
      SEEN_ITEMS: by_user((2, 3)),
      UNSEEN_ITEMS: by_user((7, 8)),
    },
    'truth': Truth(),
  }
  return Dataset(**fields | changes)


def test_a_sound_dataset_passes_and_comes_back():
  sound = dataset()
  assert check_dataset(sound) is sound
  assert sound.num_users == 2


def test_keys_ignore_the_order_of_a_pair_and_its_label():
  a, b = comparisons((3, 7, 2)), comparisons((3, 2, 7))
  np.testing.assert_array_equal(pair_keys(a), [[3, 0, 2, 7]])
  np.testing.assert_array_equal(pair_keys(a), pair_keys(b))


def test_keys_tell_users_and_prompts_apart():
  prompts = comparisons((0, 1, 2), (0, 1, 2), prompt=[4, 5])
  assert len({tuple(key) for key in pair_keys(prompts)}) == 2
  users = comparisons((0, 1, 2), (1, 1, 2))
  assert len({tuple(key) for key in pair_keys(users)}) == 2


def test_padding_has_no_keys():
  c = comparisons((0, 1, 2), (0, 3, 4), mask=[True, False])
  np.testing.assert_array_equal(pair_keys(c), [[0, 0, 1, 2]])


@pytest.mark.parametrize('second', [(1, 2), (2, 1)])
def test_a_shared_pair_is_refused_in_either_order(second):
  a, b = comparisons((0, 1, 2), (0, 3, 4)), comparisons((0, *second))
  with pytest.raises(InputError, match='left and right share 1 comparisons'):
    check_disjoint('left', a, 'right', b)


def test_the_shared_pairs_are_counted():
  a = comparisons((0, 1, 2), (0, 3, 4), (1, 1, 2))
  b = comparisons((0, 2, 1), (0, 4, 3), (1, 5, 6))
  with pytest.raises(InputError, match='share 2 '):
    check_disjoint('left', a, 'right', b)


@pytest.mark.parametrize(
  'a, b',
  [
    (comparisons((0, 1, 2)), comparisons((1, 1, 2))),  # another user
    (comparisons((0, 1, 2)), comparisons((0, 1, 3))),
    (
      comparisons((0, 1, 2), prompt=[0]),
      comparisons((0, 1, 2), prompt=[1]),
    ),
    (comparisons((0, 1, 2)), comparisons((0, 1, 2), mask=[False])),
    (comparisons((0, 1, 2)), comparisons()),
  ],
)
def test_what_shares_no_comparison_passes(a, b):
  check_disjoint('a', a, 'b', b)


@pytest.mark.parametrize(
  'changes, part',
  [
    ({'support': by_user((2, 3))}, 'support and query seen_items'),
    ({'support': by_user((3, 2))}, 'support and query seen_items'),
    ({'support': by_user((7, 8))}, 'support and query unseen_items'),
    ({'train': by_user((2, 0)).flatten()}, 'train and test seen_items'),
    ({'train': by_user((7, 6)).flatten()}, 'train and test unseen_items'),
  ],
)
def test_a_planted_overlap_is_refused_by_the_names_of_both(changes, part):
  with pytest.raises(InputError, match=part):
    check_dataset(dataset(**changes))


@pytest.mark.parametrize(
  'changes, part',
  [
    ({'train': by_user((0, 8)).flatten()}, r'train: .*split \[2\]'),
    ({'train': by_user((4, 5)).flatten()}, r'train: .*split \[1\]'),
    ({'train': by_user((4, 8)).flatten()}, r'train: .*split \[1, 2\]'),
    ({'validation': by_user((4, 0)).flatten()}, r'validation: .*split \[0\]'),
    ({'support': by_user((0, 6))}, r'unseen support: .*split \[2\]'),
    (
      {'seen': dataset().seen | {UNSEEN_ITEMS: by_user((6, 3))}},
      r'seen users, unseen items: .*split \[0\]',
    ),
    (
      {'unseen': dataset().unseen | {UNSEEN_ITEMS: by_user((6, 4))}},
      r'unseen users, unseen items: .*split \[1\]',
    ),
  ],
)
def test_an_item_of_a_wrong_split_is_refused(changes, part):
  with pytest.raises(InputError, match=part):
    check_dataset(dataset(**changes))


def test_items_that_belong_to_no_split_may_stand_anywhere():
  split = SPLIT.copy()
  split[0] = -1
  check_dataset(dataset(item_split=split, validation=by_user((0, 4)).flatten()))


@pytest.mark.parametrize('item', [-1, 9, 1000])
def test_an_item_out_of_range_is_refused(item):
  with pytest.raises(InputError, match='there are 9 of them'):
    check_dataset(dataset(train=by_user((0, item)).flatten()))


def test_padding_is_not_checked():
  train = by_user((0, 1), (8, 8)).flatten()
  mask = np.array([True, False, True, False])
  check_dataset(dataset(train=train.replace(mask=mask)))


# Those of real people have tests of their own: they need files.
@pytest.mark.parametrize('name', ['neural_process', 'persona', 'simulation'])
def test_create_makes_the_dataset_of_that_name(name):
  config = getattr(base, f'{name}_data')()
  config.update({'num_seen_users': 4, 'num_unseen_users': 3})
  found = data.create(config)
  assert found.name == name
  assert check_dataset(found) is found
  # One overlap planted by hand: the first training pair becomes a query.
  c = found.seen[SEEN_ITEMS]
  items, prompt = np.array(c.items), np.array(c.prompt)
  (row,) = np.flatnonzero(found.train.user == 2)[:1]
  items[2, 0] = found.train.items[row][::-1]
  prompt[2, 0] = found.train.prompt[row]
  bad = found.seen | {SEEN_ITEMS: c.replace(items=items, prompt=prompt)}
  with pytest.raises(InputError, match='share 1 '):
    check_dataset(dataclasses.replace(found, seen=bad))


def test_an_unknown_name_lists_the_known_ones():
  config = base.simulation_data()
  config.name = 'personas'
  with pytest.raises(InputError, match='neural_process.*persona.*simulation'):
    data.create(config)
