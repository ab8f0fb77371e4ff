"""benchmark.cell: what a cell holds, and what it refuses."""

import dataclasses
import functools

import numpy as np
import pytest
from scipy.special import expit

from configs import base
from pal_jax import methods
from pal_jax.benchmark.cell import (
  CONTROLS,
  WHERE,
  Protocol,
  check_sets,
  fit_temperature,
  run_cell,
  support_sizes,
)
from pal_jax.data.dataset import SEEN_ITEMS, UNSEEN_ITEMS
from pal_jax.data.planted import create_length
from pal_jax.errors import InputError
from pal_jax.evaluate import labels
from pal_jax.metrics import negative_log_likelihood, user_accuracies
from pal_jax.structs import FeatureTable

METHODS = {
  'random': methods.Random(),
  'btl': methods.BradleyTerry(),
  'em': methods.Em(num_classes=2, num_starts=1, num_iterations=10),
}
STATELESS = ('random', 'btl')
PROTOCOL = Protocol((1, 4, 12, 99), resamples=2)
every_method = pytest.mark.parametrize('name', sorted(METHODS))


@functools.cache
def planted():
  """Half of the people want the longer text, half the shorter."""
  config = base.length_data()
  config.update(
    {
      'short_share': 0.5,
      'dimension': 3,
      'num_items': 80,
      'num_seen_users': 24,
      'num_unseen_users': 16,
      'comparisons_per_user': 12,
      'validation_per_user': 6,
      'seen_query': 9,
      'unseen_support': 12,
      'unseen_query': 10,
    }
  )
  dataset = create_length(config)
  return dataset, FeatureTable(dataset.item_features, dataset.prompt_features)


@functools.cache
def cell(name, seed=0):
  return run_cell(METHODS[name], *planted(), PROTOCOL, seed)


def accuracy(cell, key, index=()):
  label = cell[f'unseen/{UNSEEN_ITEMS}/label']
  return user_accuracies(cell[key][index], label).mean()


# The temperature.


@pytest.mark.parametrize('planted_t', [0.2, 1.0, 5.0])
def test_a_planted_temperature_is_recovered(planted_t):
  rng = np.random.default_rng(0)
  z = rng.normal(size=(100, 400)) * 2
  label = (rng.random(z.shape) < expit(z)).astype(float)
  # Overconfident by planted_t; dividing by it gives the odds back.
  found = fit_temperature(z * planted_t, label)
  assert found == pytest.approx(planted_t, rel=0.05)
  # Exact where labels are probabilities.
  exact = fit_temperature(z * planted_t, expit(z))
  assert exact == pytest.approx(planted_t, rel=1e-4)


def test_a_fitted_temperature_is_no_worse_than_others():
  rng = np.random.default_rng(1)
  z, label = rng.normal(size=300), rng.choice([0.0, 0.5, 1.0], 300)

  def nll(t):
    return negative_log_likelihood(z / t, label).mean()

  t = fit_temperature(z, label)
  assert all(nll(t) <= nll(t * factor) + 1e-9 for factor in (0.9, 0.99, 1.01))


def test_padding_has_no_part_in_the_temperature():
  rng = np.random.default_rng(2)
  z = rng.normal(size=(9, 8))
  label = (rng.random(z.shape) < expit(2 * z)).astype(float)
  known = fit_temperature(z, label)
  more = np.concatenate([z, np.full((9, 2), 50.0)], -1)
  padded = np.pad(label, ((0, 0), (0, 2)), constant_values=np.nan)
  assert fit_temperature(more, padded) == known


@pytest.mark.parametrize(
  'logit, label',
  [
    (np.zeros((0, 3)), np.zeros((0, 3))),
    (np.ones((2, 3)), np.full((2, 3), np.nan)),
    (np.zeros((2, 3)), np.ones((2, 3))),
  ],
)
def test_where_nothing_is_known_the_temperature_is_one(logit, label):
  assert fit_temperature(logit, label) == 1.0


# What is refused.


def changed(**changes):
  return dataclasses.replace(planted()[0], **changes)


def with_first_pair_of(queries, known):
  """Queries whose first comparison is the first of `known` of that user."""
  items = queries.items.copy()
  items[0, 0] = known[::-1]  # in either order
  return queries.replace(items=items)


@pytest.mark.parametrize('where', WHERE)
def test_support_among_the_queries_is_refused(where):
  dataset, _ = planted()
  bad = with_first_pair_of(dataset.unseen[where], dataset.support.items[0, 0])
  with pytest.raises(InputError) as caught:
    check_sets(changed(unseen=dataset.unseen | {where: bad}))
  for part in ('unseen support', f'query {where}', 'share 1 comparisons'):
    assert part in str(caught.value)


@pytest.mark.parametrize('where', WHERE)
@pytest.mark.parametrize('learnt', ['train', 'validation'])
def test_what_is_learnt_from_is_not_tested(learnt, where):
  dataset, _ = planted()
  known = getattr(dataset, learnt)
  bad = with_first_pair_of(dataset.seen[where], known.items[known.user == 0][0])
  with pytest.raises(InputError) as caught:
    check_sets(changed(seen=dataset.seen | {where: bad}))
  for part in (learnt, f'test {where}', 'share 1 comparisons'):
    assert part in str(caught.value)


def test_a_user_on_both_sides_is_refused():
  dataset, table = planted()
  ids = (*dataset.user_ids[3:5], *dataset.unseen_user_ids[2:])
  bad = changed(unseen_user_ids=ids)
  with pytest.raises(InputError) as caught:
    check_sets(bad)
  for part in ('2 users are seen and unseen', repr(dataset.user_ids[3])):
    assert part in str(caught.value)
  with pytest.raises(InputError, match='seen and unseen'):
    run_cell(METHODS['random'], bad, table, PROTOCOL, 0)


def test_a_proper_dataset_passes():
  check_sets(planted()[0])


@pytest.mark.filterwarnings('ignore:invalid value')
def test_log_odds_that_are_no_numbers_are_refused():
  class Broken(methods.BradleyTerry):
    def logit(self, parameters, state, prompt, a, b):
      return super().logit(parameters, state, prompt, a, b) * np.nan

  with pytest.raises(InputError, match='values are not finite'):
    run_cell(Broken(), *planted(), PROTOCOL, 0)


# n.


def test_n_is_what_every_unseen_user_has():
  dataset, _ = planted()
  assert support_sizes(dataset, PROTOCOL) == [0, 1, 4, 12]
  assert support_sizes(dataset, Protocol((5, 2, 5))) == [0, 2, 5]
  assert support_sizes(dataset, Protocol(())) == [0]
  mask = dataset.support.mask.copy()
  mask[3, 5:] = False
  poorer = changed(support=dataset.support.replace(mask=mask))
  assert support_sizes(poorer, PROTOCOL) == [0, 1, 4]
  mask[3] = False
  nothing = changed(support=dataset.support.replace(mask=mask))
  assert support_sizes(nothing, PROTOCOL) == [0]


def test_padded_support_is_never_adapted_to():
  """Dirty padding changes nothing, at any n and in no control."""
  dataset, table = planted()
  mask = dataset.support.mask.copy()
  mask[::3, 6:] = False
  support = dataset.support.replace(mask=mask)
  dirty = support.replace(
    label=np.where(mask, support.label, 1 - support.label),
    items=np.where(mask[..., None], support.items, 0),
  )
  clean, other = (
    run_cell(METHODS['em'], changed(support=s), table, PROTOCOL, 0)
    for s in (support, dirty)
  )
  assert clean['num_support'].tolist() == [0, 1, 4]
  for name in set(clean) - {'seconds'}:
    np.testing.assert_array_equal(clean[name], other[name], err_msg=name)


# What a cell holds.


@every_method
def test_shapes_are_those_of_the_sets(name):
  found = cell(name)
  users = {'unseen': (16, 10), 'seen': (24, 9)}
  expected = {'num_support': (4,), 'temperature': (), 'seconds': (2,)}
  expected |= {f'control/{name}': (16, 10) for name in CONTROLS}
  for where in WHERE:
    expected[f'unseen/{where}/logit'] = (4, 2, 16, 10)
    expected[f'seen/{where}/logit'] = (24, 9)
    for who, shape in users.items():
      expected[f'{who}/{where}/label'] = shape
      expected[f'{who}/{where}/items'] = (*shape, 2)
  assert {k: np.shape(v) for k, v in found.items()} == expected
  assert found['num_support'].tolist() == [0, 1, 4, 12]
  assert found['temperature'] > 0 and np.all(found['seconds'] >= 0)


@every_method
def test_labels_and_items_are_those_of_the_sets(name):
  dataset, _ = planted()
  for who, sets in (('seen', dataset.seen), ('unseen', dataset.unseen)):
    for where, queries in sets.items():
      found = cell(name)
      np.testing.assert_array_equal(
        found[f'{who}/{where}/label'], labels(queries)
      )
      np.testing.assert_array_equal(
        found[f'{who}/{where}/items'], queries.items
      )


def test_sets_that_a_dataset_lacks_are_left_out():
  dataset, table = planted()
  only = {UNSEEN_ITEMS: dataset.unseen[UNSEEN_ITEMS]}
  found = run_cell(
    METHODS['btl'], changed(seen={}, unseen=only), table, PROTOCOL, 0
  )
  assert set(found) == {
    'num_support',
    'seconds',
    *(f'unseen/{UNSEEN_ITEMS}/{x}' for x in ('logit', 'label', 'items')),
    *(f'control/{name}' for name in CONTROLS),
  }
  for name in found.keys() - {'seconds'}:
    np.testing.assert_array_equal(found[name], cell('btl')[name])


def test_padded_queries_have_no_label():
  dataset, table = planted()
  queries = dataset.unseen[UNSEEN_ITEMS]
  mask = queries.mask.copy()
  mask[2, 4:] = False
  some = dataset.unseen | {UNSEEN_ITEMS: queries.replace(mask=mask)}
  found = run_cell(METHODS['btl'], changed(unseen=some), table, PROTOCOL, 0)
  label = found[f'unseen/{UNSEEN_ITEMS}/label']
  np.testing.assert_array_equal(np.isnan(label), ~mask)


@pytest.mark.parametrize('where', WHERE)
def test_without_comparisons_all_orders_are_one(where):
  z = cell('em')[f'unseen/{where}/logit']
  np.testing.assert_array_equal(z[0, 0], z[0, 1])
  assert np.any(z[1, 0] != z[1, 1])
  # All comparisons are the same ones, in whichever order.
  np.testing.assert_allclose(z[3, 0], z[3, 1], rtol=1e-3, atol=1e-3)


def test_answers_are_learnt_from():
  key = f'unseen/{UNSEEN_ITEMS}/logit'
  curve = [accuracy(cell('em'), key, i) for i in range(4)]
  assert abs(curve[0] - 0.5) < 0.1 and curve[-1] > 0.9
  assert curve[0] < curve[1] < curve[-1]
  for where in WHERE:
    seen = cell('em')[f'seen/{where}/logit']
    label = cell('em')[f'seen/{where}/label']
    assert user_accuracies(seen, label).mean() > 0.9


def test_the_temperature_is_of_the_seen_users_validation():
  dataset, table = planted()
  check = dataset.validation
  flipped = check.replace(label=1 - check.label)
  # `btl` chooses its ridge by validation; `random` looks at no label.
  other = run_cell(
    METHODS['random'], changed(validation=flipped), table, PROTOCOL, 0
  )
  assert other['temperature'] != cell('random')['temperature']
  tested = {k: v for k, v in other.items() if 'unseen' in k}
  for name, x in tested.items():
    np.testing.assert_array_equal(x, cell('random')[name])


# Controls.


def test_another_users_state_costs_accuracy():
  own = accuracy(cell('em'), f'unseen/{UNSEEN_ITEMS}/logit', (-1, 0))
  assert accuracy(cell('em'), 'control/swapped_users') < own - 0.2


def test_anybodys_answers_cost_accuracy():
  own = accuracy(cell('em'), f'unseen/{UNSEEN_ITEMS}/logit', (-1, 0))
  assert accuracy(cell('em'), 'control/shuffled_support') < own - 0.2


def test_opposite_answers_fall_below_chance():
  assert accuracy(cell('em'), 'control/flipped_labels') < 0.1


def test_swapped_states_are_those_of_others_all_of_them():
  """Each user's queries are answered from the group of somebody else."""
  dataset, _ = planted()
  found = cell('em')
  label = found[f'unseen/{UNSEEN_ITEMS}/label']
  swapped = user_accuracies(found['control/swapped_users'], label) > 0.5
  group = dataset.truth.group[dataset.num_users :]
  said = np.where(swapped, group, 1 - group)
  # Nobody's state is lost: both groups have eight.
  assert said.sum() == 8
  assert not swapped.all()


@pytest.mark.parametrize('name', STATELESS)
def test_who_has_no_state_loses_nothing(name):
  found = cell(name)
  own = found[f'unseen/{UNSEEN_ITEMS}/logit']
  for control in CONTROLS:
    np.testing.assert_array_equal(found[f'control/{control}'], own[-1, 0])
  np.testing.assert_array_equal(own, np.broadcast_to(own[:1, :1], own.shape))


# Determinism.


@every_method
def test_a_seed_decides_everything_but_the_time(name):
  again = run_cell(METHODS[name], *planted(), PROTOCOL, 0)
  for key in set(again) - {'seconds'}:
    np.testing.assert_array_equal(again[key], cell(name)[key], err_msg=key)


def test_resamples_and_controls_are_drawn_by_the_seed():
  first, other = cell('em'), cell('em', 1)
  for key in ('control/swapped_users', f'unseen/{SEEN_ITEMS}/logit'):
    assert np.any(first[key] != other[key])
