"""data.planted: linear rewards of low rank, and labels by length."""

import re

import jax
import numpy as np
import pytest

from configs import base
from pal_jax import data
from pal_jax.data.dataset import UNSEEN_ITEMS, check_dataset, fingerprint
from pal_jax.data.planted import create_length, create_low_rank
from pal_jax.errors import InputError
from pal_jax.models.bradley_terry import fit_bradley_terry


def small(make=base.low_rank_data, **changes):
  config = make()
  config.update(
    {
      'dimension': 6,
      'num_items': 80,
      'num_seen_users': 20,
      'num_unseen_users': 10,
      'comparisons_per_user': 30,
      'validation_per_user': 8,
      'seen_query': 10,
      'unseen_support': 12,
      'unseen_query': 10,
      'label_noise': 0.0,
      'support_noise': 0.0,
    }
  )
  config.update(changes)
  return config


def by_length(**changes):
  return small(base.length_data, **changes)


def sets_of(dataset):
  """All sets by name, flat, with users numbered as in the truth."""

  def shifted(c):
    return c.replace(user=c.user + dataset.num_users).flatten()

  return {
    'train': dataset.train,
    'validation': dataset.validation,
    'support': shifted(dataset.support),
    **{f'seen {k}': c.flatten() for k, c in dataset.seen.items()},
    **{f'unseen {k}': shifted(c) for k, c in dataset.unseen.items()},
  }


def answers_on_shared_pairs(dataset):
  """For each pair of items: the winners that its users named."""
  found = {}
  for c in sets_of(dataset).values():
    winner = np.where(c.label == 1, c.items[:, 0], c.items[:, 1])
    for pair, item in zip(np.sort(c.items).tolist(), winner, strict=True):
      found.setdefault(tuple(pair), []).append(int(item))
  return [winners for winners in found.values() if len(winners) > 1]


# Low rank.


def test_without_spread_everybody_agrees():
  shared = answers_on_shared_pairs(create_low_rank(small(spread=0.0)))
  assert len(shared) > 200
  assert all(len(set(winners)) == 1 for winners in shared)


def test_with_spread_people_disagree():
  shared = answers_on_shared_pairs(create_low_rank(small(spread=1.0)))
  share = np.mean([len(set(winners)) > 1 for winners in shared])
  assert 0.1 < share < 0.7


def directions(dataset):
  """[U, D] what each seen user wants, up to noise and length.

  Of sign(u . d) with a Gaussian d, E[sign(u . d) d] is u's direction.
  """
  c = dataset.train
  x = dataset.item_features[c.items].astype(float)
  each = (x[:, 0] - x[:, 1]) * (2 * c.label - 1)[:, None]
  return each.reshape(dataset.num_users, -1, x.shape[-1]).mean(1)


@pytest.mark.parametrize('rank', [1, 2, 3])
def test_people_differ_in_as_many_directions_as_said(rank):
  config = small(
    dimension=8,
    rank=rank,
    spread=1.0,
    num_items=400,
    num_seen_users=50,
    comparisons_per_user=600,
  )
  found = np.linalg.svd(directions(create_low_rank(config)), compute_uv=False)
  # The mean is one more; what is left is the noise of 600 comparisons.
  assert found[rank] > 3 * found[rank + 1]
  assert found[rank + 1] < 3 * found[-1]


def test_everybody_leans_towards_the_mean():
  """With a small spread all users' directions are nearly one."""
  config = small(spread=0.05, num_items=400, comparisons_per_user=600)
  found = directions(create_low_rank(config))
  found /= np.linalg.norm(found, axis=-1, keepdims=True)
  assert (found @ found.T).min() > 0.85


def test_noise_flips_about_its_share_of_training_labels():
  noisy = create_low_rank(small(spread=0.0, label_noise=0.2))
  clean = create_low_rank(small(spread=0.0))
  np.testing.assert_array_equal(noisy.train.items, clean.train.items)
  share = np.mean(noisy.train.label != clean.train.label)
  assert abs(share - 0.2) < 4 * np.sqrt(0.16 / 600)
  # What is tested has no noise.
  shared = answers_on_shared_pairs(clean)
  assert all(len(set(winners)) == 1 for winners in shared)


def test_choice_noise_makes_answers_bradley_terry():
  """Of scale 1: the fitted direction has the planted length, 1."""
  config = small(
    spread=0.0, choice_noise=1.0, num_items=400, comparisons_per_user=600
  )
  dataset = create_low_rank(config)
  for c in (dataset.train, dataset.unseen[UNSEEN_ITEMS].flatten()):
    items = dataset.item_features[c.items]
    x = items[:, 0] - items[:, 1]
    v, _ = fit_bradley_terry(x, c.label, np.ones_like(c.label), 1e-3)
    error = np.sqrt(1 / (0.2 * len(c.label)))
    assert abs(float(np.linalg.norm(v)) - 1.0) < 4 * error
  assert 'drawn with Gumbel noise of scale 1' in ' '.join(dataset.notes)


def test_low_rank_people_have_no_groups():
  dataset = create_low_rank(small())
  assert all(value is None for value in vars(dataset.truth).values())
  assert dataset.item_features.shape == (80, 6)
  assert '3 directions' in ' '.join(dataset.notes)


# Length.


def test_the_longer_text_wins_or_the_shorter_by_group():
  dataset = create_length(by_length())
  length = np.array([len(text) for text in dataset.item_names])
  group = dataset.truth.group
  assert set(group) == {0, 1}
  for name, c in sets_of(dataset).items():
    gap = length[c.items[:, 0]] - length[c.items[:, 1]]
    assert np.all(gap != 0), name
    wants_longer = group[c.user] == 0
    np.testing.assert_array_equal(c.label == 1, (gap > 0) == wants_longer)


@pytest.mark.parametrize('share', [0.0, 0.3, 0.5])
def test_one_score_gets_the_majoritys_share(share):
  dataset = create_length(by_length(short_share=share))
  group = dataset.truth.group
  assert np.mean(group[:20] == 1) == np.mean(group[20:] == 1) == share
  length = np.array([len(text) for text in dataset.item_names])
  for c in sets_of(dataset).values():
    longer = length[c.items[:, 0]] > length[c.items[:, 1]]
    assert np.mean(longer == c.label) == pytest.approx(1 - share)
  assert f'{share:.3f} of the people' in ' '.join(dataset.notes)
  np.testing.assert_array_equal(dataset.truth.weights, np.eye(2)[group])


def test_only_the_first_feature_tells_the_length():
  dataset = create_length(by_length(num_items=2000))
  x = dataset.item_features.astype(float)
  log = np.log([len(text) for text in dataset.item_names])
  np.testing.assert_allclose(x[:, 0], (log - log.mean()) / log.std(), atol=1e-5)
  others = np.corrcoef(np.c_[log, x[:, 1:]].T)[0, 1:]
  assert np.abs(others).max() < 4 / np.sqrt(2000)


def test_texts_differ_in_number_and_words():
  names = create_length(by_length()).item_names
  assert len(set(names)) == 80
  assert all(re.fullmatch(r'\d+( word)+', name) for name in names)
  assert len({len(name) for name in names}) > 10


# Both.

EVERY = pytest.mark.parametrize(
  'create, make', [(create_low_rank, small), (create_length, by_length)]
)


@EVERY
def test_the_protocol_holds(create, make):
  dataset = create(make())
  assert check_dataset(dataset) is dataset
  assert dataset.train.label.shape == (20 * 30,)
  assert dataset.unseen[UNSEEN_ITEMS].label.shape == (10, 10)
  assert dataset.support.label.shape == (10, 12)
  assert dataset.item_features.dtype == np.float32


@EVERY
def test_a_seed_decides_everything(create, make):
  first, again = create(make()), create(make())
  jax.tree.map(np.testing.assert_array_equal, first.train, again.train)
  np.testing.assert_array_equal(first.item_features, again.item_features)
  other = fingerprint(create(make(seed=1)))
  assert fingerprint(first)['comparisons'] != other['comparisons']


@EVERY
def test_data_create_finds_it(create, make):
  found, made = data.create(make()), create(make())
  assert found.name == make().name
  assert fingerprint(found) == fingerprint(made)


@pytest.mark.parametrize(
  'changes, parts',
  [
    ({'rank': 0}, ('data.rank=0', 'data.dimension=6')),
    ({'rank': 7}, ('data.rank=7', 'data.dimension=6')),
    ({'spread': -0.5}, ('data.spread=-0.5', 'negative')),
    ({'choice_noise': -1.0}, ('data.choice_noise=-1.0', 'positive')),
    ({'num_items': 0}, ('data.num_items=0',)),
    ({'dimension': 0}, ('data.dimension=0',)),
    ({'num_items': 8}, ('data.num_items=8', 'data.validation_fraction')),
    ({'label_noise': 0.5}, ('data.label_noise=0.5',)),
  ],
)
def test_low_rank_refuses_what_is_out_of_range(changes, parts):
  with pytest.raises(InputError) as caught:
    create_low_rank(small(**changes))
  for part in parts:
    assert part in str(caught.value)


@pytest.mark.parametrize(
  'changes, part',
  [
    ({'short_share': -0.1}, 'data.short_share=-0.1'),
    ({'short_share': 0.6}, 'data.short_share=0.6'),
    ({'short_share': float('nan')}, 'data.short_share=nan'),
    ({'dimension': 1}, 'data.dimension=1'),
    ({'num_seen_users': 0}, 'data.num_seen_users=0'),
    ({'unseen_query': 0}, 'data.unseen_query=0'),
  ],
)
def test_length_refuses_what_is_out_of_range(changes, part):
  with pytest.raises(InputError) as caught:
    create_length(by_length(**changes))
  assert part in str(caught.value)
