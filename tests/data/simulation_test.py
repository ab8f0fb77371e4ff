"""data.simulation: planted prototypes, and the toy with a known optimum."""

import itertools
import re

import jax
import numpy as np
import pytest

from configs import base, simulation
from pal_jax.data.simulation import (
  create_neural_process,
  create_simulation,
  neural_process_bayes_accuracy,
  neural_process_utility,
)
from pal_jax.errors import InputError
from pal_jax.models.bradley_terry import fit_bradley_terry


def small(data=base.simulation_data, **changes):
  config = data()
  config.update(
    {
      'num_items': 80,
      'num_seen_users': 9,
      'num_unseen_users': 5,
      'comparisons_per_user': 30,
      'validation_per_user': 8,
      'seen_query': 10,
      'unseen_support': 12,
      'unseen_query': 10,
    }
  )
  config.update(changes)
  return config


def sets_of(dataset):
  """All sets by name, flat, with users numbered as in the truth."""
  offset = dataset.num_users

  def shifted(c):
    return c.replace(user=c.user + offset).flatten()

  return {
    'train': dataset.train,
    'validation': dataset.validation,
    'support': shifted(dataset.support),
    **{f'seen {k}': c.flatten() for k, c in dataset.seen.items()},
    **{f'unseen {k}': shifted(c) for k, c in dataset.unseen.items()},
  }


@pytest.mark.parametrize('mixture', [0.0, 1.0])
@pytest.mark.parametrize('num_personas', [1, 3])
def test_the_nearer_item_wins(mixture, num_personas):
  dataset = create_simulation(small(mixture=mixture, num_personas=num_personas))
  truth = dataset.truth
  points = truth.weights @ truth.prototypes
  np.testing.assert_allclose(points, truth.ideal_points, atol=1e-12)
  for name, c in sets_of(dataset).items():
    x = dataset.item_features[c.items].astype(float)  # [N, 2, P]
    far = np.linalg.norm(x - points[c.user][:, None], axis=-1)
    assert np.all(far[:, 0] != far[:, 1]), name
    np.testing.assert_array_equal(c.label, far[:, 0] < far[:, 1])


def test_features_are_the_items_the_labels_come_from():
  dataset = create_simulation(small(dimension=3))
  features = dataset.item_features
  assert features.shape == (80, 3) and features.dtype == np.float32
  assert dataset.prompt_features.shape == (1, 3)
  assert len(dataset.item_names) == len(set(dataset.item_names)) == 80
  assert len(dataset.item_groups) == 80


def test_items_and_prototypes_are_standard_normal():
  dataset = create_simulation(
    small(num_items=4000, num_personas=200, num_seen_users=200)
  )
  for x in (dataset.item_features, dataset.truth.prototypes):
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.std() - 1) < 5 / np.sqrt(2 * x.size)


def test_a_partition_puts_users_on_prototypes_evenly():
  truth = create_simulation(small(num_personas=3)).truth
  np.testing.assert_array_equal(truth.weights, np.eye(3)[truth.group])
  np.testing.assert_array_equal(
    truth.ideal_points, truth.prototypes[truth.group]
  )
  np.testing.assert_array_equal(np.bincount(truth.group[:9]), [3, 3, 3])
  unseen = np.bincount(truth.group[9:], minlength=3)
  assert sorted(unseen.tolist()) == [1, 2, 2]


def test_a_mixture_has_no_groups():
  truth = create_simulation(small(mixture=0.5)).truth
  assert truth.group is None
  np.testing.assert_allclose(truth.weights.sum(-1), 1.0)


@pytest.mark.parametrize(
  'create, data',
  [
    (create_simulation, base.simulation_data),
    (create_neural_process, base.neural_process_data),
  ],
)
def test_splits_of_items_and_pairs_are_disjoint(create, data):
  dataset = create(small(data))
  sets = sets_of(dataset)
  items = {name: set(np.unique(c.items)) for name, c in sets.items()}
  test = items['seen unseen_items'] | items['unseen unseen_items']
  train = items['train'] | items['support']
  train |= items['seen seen_items'] | items['unseen seen_items']
  assert test.isdisjoint(train) and test.isdisjoint(items['validation'])
  assert train.isdisjoint(items['validation'])
  pairs = {
    name: [
      (u, frozenset(i))
      for u, i in zip(c.user.tolist(), c.items.tolist(), strict=True)
    ]
    for name, c in sets.items()
  }
  for name, found in pairs.items():
    assert len(set(found)) == len(found), name
  assert set(pairs['train']).isdisjoint(pairs['seen seen_items'])
  assert set(pairs['support']).isdisjoint(pairs['unseen seen_items'])


@pytest.mark.parametrize(
  'create, data',
  [
    (create_simulation, base.simulation_data),
    (create_neural_process, base.neural_process_data),
  ],
)
def test_the_seed_decides_everything(create, data):
  def tree(seed):
    dataset = create(small(data, seed=seed))
    return vars(dataset) | {'truth': vars(dataset.truth)}

  first, again, other = tree(0), tree(0), tree(1)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first['train'].items, other['train'].items)
  assert not np.array_equal(first['item_features'], other['item_features'])
  assert not np.array_equal(first['item_split'], other['item_split'])


def test_label_noise_is_in_training_labels_alone():
  sizes = {'num_seen_users': 40, 'comparisons_per_user': 60}
  clean = sets_of(create_simulation(small(**sizes)))
  noisy = sets_of(create_simulation(small(label_noise=0.3, **sizes)))
  share = np.mean(clean['train'].label != noisy['train'].label)
  assert abs(share - 0.3) < 4 * np.sqrt(0.21 / 2400)
  for name, c in clean.items():
    np.testing.assert_array_equal(c.items, noisy[name].items)
    if name != 'train':
      np.testing.assert_array_equal(c.label, noisy[name].label)


@pytest.mark.parametrize(
  'num_personas, level', [(2, 0.80), (3, 0.775), (4, 0.75), (6, 0.73)]
)
def test_one_score_for_everybody_reaches_the_known_level(num_personas, level):
  """METHOD section 4. One ideal point is linear in (x, ||x||^2)."""
  accuracies = []
  for seed in range(8):
    config = base.simulation_data()
    config.update({'num_personas': num_personas, 'seed': seed})
    config.update({'num_seen_users': 12, 'num_unseen_users': 1})
    config.update({'comparisons_per_user': 100, 'seen_query': 100})
    dataset = create_simulation(config)
    x = dataset.item_features
    h = np.concatenate([x, np.sum(x**2, -1, keepdims=True)], -1)
    train, test = dataset.train, dataset.seen['unseen_items'].flatten()

    def difference(c, h=h):
      return h[c.items[:, 0]] - h[c.items[:, 1]]

    v, _ = fit_bradley_terry(difference(train), train.label, train.weight, 1.0)
    right = (difference(test) @ np.asarray(v) > 0) == (test.label == 1)
    accuracies.append(right.mean())
  assert abs(np.mean(accuracies) - level) < 0.02


# The neural-process toy.


def test_toy_utilities_by_hand():
  y = np.array([0.0, 0.25, 0.49, 0.5, 0.75, 1.0])
  np.testing.assert_allclose(
    neural_process_utility(y, np.zeros(6)), [0, 0.25, 0.49, 1.0, 1.5, 2.0]
  )
  np.testing.assert_allclose(
    neural_process_utility(y, np.ones(6)), [0, 0.25, 0.49, 0.5, 0.25, 0.0]
  )


def test_the_toy_groups_disagree_on_half_of_all_pairs():
  y = (np.arange(1000) + 0.5) / 1000 + 1e-6 * np.sin(np.arange(1000))
  first, second = np.triu_indices(1000, 1)
  prefers = [
    neural_process_utility(y[first], g) > neural_process_utility(y[second], g)
    for g in (0, 1)
  ]
  assert abs(np.mean(prefers[0] != prefers[1]) - 0.5) < 0.002


@pytest.mark.parametrize(
  'num_support, percent',
  [(0, 75.0), (1, 87.5), (3, 96.9), (5, 99.2), (10, 99.98)],
)
def test_the_bayes_formula_gives_the_known_values(num_support, percent):
  found = 100 * neural_process_bayes_accuracy(num_support)
  assert abs(found - percent) < 0.05


@pytest.fixture(scope='module')
def toy():
  config = base.neural_process_data()
  config.update({'num_seen_users': 4, 'num_unseen_users': 400})
  config.update({'unseen_support': 8, 'unseen_query': 100})
  config.update({'comparisons_per_user': 10, 'num_items': 4000})
  return create_neural_process(config)


def by_group(dataset, c):
  """[2, ...] what each group prefers: 1.0 the first, 0.0 the second."""
  y = dataset.item_features[:, 0].astype(float)[c.items]
  low = y < 0.5
  likes = np.stack([np.where(low, y, 2 * y), np.where(low, y, 1 - y)])
  return (likes[..., 0] > likes[..., 1]).astype(float)


def test_toy_labels_are_those_of_the_users_group(toy):
  for c in sets_of(toy).values():
    group = toy.truth.group[c.user]
    np.testing.assert_array_equal(
      c.label, by_group(toy, c)[group, np.arange(len(group))]
    )


@pytest.mark.parametrize('num_support', [0, 1, 3, 8])
@pytest.mark.parametrize('where', ['seen_items', 'unseen_items'])
def test_a_brute_force_bayes_predictor_gets_what_the_formula_says(
  toy, num_support, where
):
  support, queries = toy.support, toy.unseen[where]
  fits = by_group(toy, support) == support.label  # [2, V, N]
  posterior = fits[..., :num_support].all(-1).astype(float)
  posterior /= posterior.sum(0)
  p = np.sum(posterior[..., None] * by_group(toy, queries), 0)
  expected = np.where(queries.label == 1, np.sign(p - 0.5), np.sign(0.5 - p))
  accuracy = np.mean(0.5 * (1 + expected))  # one half where it must guess
  formula = neural_process_bayes_accuracy(num_support)
  assert abs(accuracy - formula) < 0.02
  assert toy.truth.bayes_accuracy[num_support] == formula


def test_the_bayes_curve_reaches_as_far_as_the_support():
  config = small(
    base.neural_process_data, unseen_support=130, unseen_query=10, num_items=300
  )
  curve = create_neural_process(config).truth.bayes_accuracy
  assert set(range(131)) <= curve.keys()


@pytest.mark.parametrize(
  'changes, part',
  [
    *(
      ({field: value}, f'data.{field}={value}')
      for field, value in itertools.product(
        (
          'num_items',
          'dimension',
          'num_personas',
          'num_seen_users',
          'comparisons_per_user',
          'unseen_query',
        ),
        (0, -1),
      )
    ),
    ({'num_items': 12, 'comparisons_per_user': 1}, 'data.num_items=12'),
    ({'num_items': 20}, 'data.comparisons_per_user'),  # 66 pairs, 1 too many
    ({'num_personas': 10}, 'data.num_seen_users'),
    ({'mixture': -1.0}, 'data.mixture'),
    ({'label_noise': 0.6}, 'data.label_noise'),
    ({'test_fraction': 1.0}, 'data.test_fraction'),
  ],
)
def test_a_bad_field_is_refused_by_its_name(changes, part):
  if changes.get('num_items') == 20:
    changes = changes | {'comparisons_per_user': 67}
  with pytest.raises(InputError, match=re.escape(part)):
    create_simulation(small(**changes))


@pytest.mark.parametrize(
  'changes', [{'num_personas': 3}, {'dimension': 2}, {'mixture': 1.0}]
)
def test_the_toy_has_two_groups_on_one_dimension(changes):
  with pytest.raises(InputError, match='neural_process'):
    create_neural_process(small(base.neural_process_data, **changes))


@pytest.mark.parametrize('which', ['partition', 'mixture', 'toy'])
def test_the_configs_make_their_data(which):
  config = simulation.get_config(which).unlock()
  config.data.update({'num_seen_users': 4, 'num_unseen_users': 2})
  toy = which == 'toy'
  create = create_neural_process if toy else create_simulation
  dataset = create(config.data)
  assert dataset.name == ('neural_process' if toy else 'simulation')
  assert (dataset.truth.group is None) == (which == 'mixture')
