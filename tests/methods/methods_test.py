"""methods: what every family promises, on planted people."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import benchmark, tiny
from pal_jax import methods
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.errors import InputError
from pal_jax.methods import catalogue
from pal_jax.methods.context import sample_users
from pal_jax.methods.pal import _from_classes
from pal_jax.methods.reward_features import _spectral_start
from pal_jax.methods.surface import Surface
from pal_jax.methods.training import Trained, minimise, task_arrays
from pal_jax.metrics import evaluate_logits
from pal_jax.structs import FeatureTable
from pal_jax.train import create_experiment

PAL = benchmark.get_config().pal
LINEAR = {'model__projector': 'identity', 'model__num_prototypes': 2}
SMALL = {'learning_rate': 3e-3, 'num_steps': 200}


def make_config():
  """Two personas who contradict each other: one score gets half of it right."""
  config = tiny.get_config().copy_and_resolve_references()
  with config.unlocked():
    config.data.num_seen_users = 60
    config.data.num_unseen_users = 30
    config.data.comparisons_per_user = 30
    config.data.validation_per_user = 10
    config.data.seen_query = 20
    config.data.unseen_support = 20
    config.data.unseen_query = 20
    config.train.num_steps = 400
  return config


METHODS = {
  'random': methods.Random(),
  'btl': methods.BradleyTerry(),
  'btl_mlp': methods.BradleyTerryMlp(hidden=8, **SMALL),
  'per_user': methods.PerUser(),
  'em': methods.Em(num_classes=2),
  'em_hard': methods.Em(num_classes=2, hard=True),
  'rfm': methods.RewardFeatures(num_features=3, **SMALL),
  'rfm_mlp': methods.RewardFeatures(num_features=3, hidden=8, **SMALL),
  'pref': methods.RewardFeatures(num_features=3, svd=True, **SMALL),
  'neighbours': methods.Neighbours(
    methods.RewardFeatures(num_features=3, **SMALL)
  ),
  'dpl': methods.Distributional(hidden=8, **SMALL),
  'dpl_categorical': methods.Distributional(
    kind='categorical', hidden=8, num_atoms=5, **SMALL
  ),
  'micro': methods.ContextRouter(num_rewards=3, hidden=8, **SMALL),
  'np_btl': methods.NeuralProcess(width=16, **SMALL),
  'vpl': methods.Variational(latent=8, width=16, **SMALL),
  'pal': methods.Pal(ml_collections.FrozenConfigDict(make_config())),
  'pal_em': catalogue.pal(PAL, 'em', **LINEAR, train__num_steps=100),
  'length': Surface(),
  'formatting': Surface(kind='formatting'),
}
STATELESS = {
  'random',
  'btl',
  'btl_mlp',
  'dpl',
  'dpl_categorical',
  'length',
  'formatting',
}
# `micro` learns its rewards without user ids: of people who contradict each
# other exactly, it learns nothing.
PERSONAL = set(METHODS) - STATELESS - {'micro'}
every_method = pytest.mark.parametrize('name', sorted(METHODS))


@functools.cache
def planted(name='btl'):
  """The task as a method sees it, and the dataset."""
  experiment = create_experiment(make_config())
  table = METHODS[name].view(experiment.dataset, experiment.table)
  return methods.make_task(experiment.dataset, table), experiment.dataset


@functools.cache
def fitted(name):
  task, _ = planted(name)
  return METHODS[name].fit(task, jax.random.key(0))


def answer(name, support, queries):
  task, _ = planted(name)
  method, parameters = METHODS[name], fitted(name)
  states = methods.adapt_users(method, parameters, task.table, support)
  z = methods.predict_users(method, parameters, states, task.table, queries)
  return np.asarray(z)


def some(support, n):
  return support.replace(
    mask=support.mask & (np.arange(support.label.shape[1]) < n)
  )


@every_method
def test_a_new_user_is_served_better_with_answers(name):
  _, dataset = planted()
  queries = dataset.unseen[UNSEEN_ITEMS]
  few, many = (
    evaluate_logits(answer(name, some(dataset.support, n), queries), q)['nll']
    for n, q in ((0, queries.label), (20, queries.label))
  )
  assert np.isfinite(few) and np.isfinite(many)
  if name in PERSONAL:
    assert many < few - 0.1
  elif name in STATELESS:
    assert many == few


@every_method
def test_seen_users_are_above_one_score(name):
  task, dataset = planted(name)
  method, parameters = METHODS[name], fitted(name)
  states = method.seen_states(parameters, task)
  queries = dataset.seen[UNSEEN_ITEMS]
  z = methods.predict_users(method, parameters, states, task.table, queries)
  accuracy = evaluate_logits(np.asarray(z), queries.label)['accuracy']
  if name in PERSONAL:
    one = evaluate_logits(answer('btl', queries, queries), queries.label)
    assert accuracy > one['accuracy'] + 0.15
  else:
    assert abs(accuracy - 0.5) < 0.1


@every_method
def test_without_comparisons_everybody_is_the_same(name):
  _, dataset = planted()
  support = some(dataset.support, 0)
  queries = jax.tree.map(
    lambda x: np.broadcast_to(x[:1], x.shape), dataset.unseen[UNSEEN_ITEMS]
  )
  z = answer(name, support, queries)
  np.testing.assert_allclose(z, np.broadcast_to(z[:1], z.shape), atol=1e-5)


@every_method
def test_padding_and_order_change_nothing(name):
  _, dataset = planted()
  support = some(dataset.support, 8)
  queries = dataset.unseen[UNSEEN_ITEMS]
  z = answer(name, support, queries)
  live = support.mask
  dirty = support.replace(
    label=np.where(live, support.label, np.nan),
    items=np.where(live[..., None], support.items, 0),
  )
  np.testing.assert_allclose(answer(name, dirty, queries), z, atol=1e-6)
  order = np.random.default_rng(0).permutation(8)
  columns = np.concatenate([order, np.arange(8, live.shape[1])])
  shuffled = jax.tree.map(lambda x: x[:, columns], support)
  np.testing.assert_allclose(
    answer(name, shuffled, queries), z, rtol=1e-3, atol=2e-3
  )


@every_method
def test_swapping_candidates_negates_log_odds(name):
  _, dataset = planted()
  support, queries = some(dataset.support, 5), dataset.unseen[UNSEEN_ITEMS]

  def swap(c):
    return c.replace(items=c.items[..., ::-1])

  z = answer(name, support, queries)
  np.testing.assert_allclose(
    answer(name, support, swap(queries)), -z, rtol=1e-3, atol=1e-3
  )
  other = swap(support).replace(label=1 - support.label)
  np.testing.assert_allclose(
    answer(name, other, queries), z, rtol=1e-3, atol=2e-3
  )


@pytest.mark.parametrize('name', ['em', 'np_btl', 'pal'])
def test_a_fit_is_determined_by_its_key(name):
  task, _ = planted()
  again = METHODS[name].fit(task, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, fitted(name), again)


def test_a_task_holds_nothing_of_unseen_users():
  task, dataset = planted()
  kept = task.dataset
  assert not kept.unseen and not kept.seen and not kept.unseen_user_ids
  assert kept.support.label.size == 0 and kept.truth.group is None
  rows = np.sort(np.asarray(methods.gather(task.table, task.train).mask).sum(1))
  np.testing.assert_array_equal(
    rows, np.sort(np.bincount(dataset.train.user, minlength=60))
  )


def test_hedge_multiplies_the_routers_weights_by_likelihoods():
  task, dataset = planted()
  method, parameters = METHODS['micro'], fitted('micro')
  pairs = methods.gather(task.table, some(dataset.support, 3)[0])
  state = method.adapt(parameters, pairs)
  rewards = parameters['params']['rewards']['kernel']
  delta = np.float64(pairs.items[:, 0] - pairs.items[:, 1]) @ rewards
  label = np.float64(pairs.label)[:, None]
  loss = label * np.logaddexp(0, -delta) + (1 - label) * np.logaddexp(0, delta)
  np.testing.assert_allclose(state, -loss[:3].sum(0), rtol=1e-3, atol=1e-4)
  z = method.logit(parameters, state, pairs.prompt[0], *pairs.items[0])
  log_pi, d = method._net().apply(parameters, pairs.prompt[0], pairs.items[0])
  pi = np.exp(np.float64(log_pi + state))
  p = np.sum(pi / pi.sum() / (1 + np.exp(-np.float64(d))))
  np.testing.assert_allclose(z, np.log(p / (1 - p)), rtol=1e-3, atol=1e-3)


# Contexts.


def test_contexts_and_targets_share_no_comparison():
  task, _ = planted()
  context, targets = sample_users(
    task_arrays(task), jax.random.key(1), 50, 10, 20
  )
  assert context.label.shape == (50, 10) and targets.label.shape == (50, 20)
  counts = np.asarray(context.mask).sum(1)
  assert counts.min() == 0 and counts.max() == 10
  for a, b in zip(
    np.asarray(context.items), np.asarray(targets.items), strict=True
  ):
    pairs = {x.tobytes() for x in a}
    assert len(pairs) == 10 and not pairs & {x.tobytes() for x in b}


@pytest.mark.parametrize('name', ['np_btl', 'vpl'])
def test_more_than_a_context_is_not_looked_at(name):
  _, dataset = planted()
  queries = dataset.unseen[UNSEEN_ITEMS]
  limit = METHODS[name].context
  np.testing.assert_array_equal(
    answer(name, some(dataset.support, limit), queries),
    answer(name, some(dataset.support, limit + 5), queries),
  )


# The loop.


@dataclasses.dataclass(frozen=True)
class Slope(Trained):
  """One number whose loss is itself: it falls by learning_rate a step."""

  learning_rate: float = 0.1
  num_steps: int = 20
  check_every: int = 5
  broken: bool = False

  def init(self, data, key):
    return jnp.float32(1.0)

  def sample(self, data, key):
    return None

  def loss(self, parameters, data, batch, key, progress):
    return parameters

  def validate(self, parameters, data):
    return parameters * jnp.nan if self.broken else jnp.abs(parameters)

  def optimizer(self):
    return optax.sgd(self.learning_rate)


def test_the_loop_keeps_the_best_of_validation():
  # Validation is best at 0, after ten steps.
  x, value, step = minimise(Slope(), jnp.float32(1.0), None, jax.random.key(0))
  assert step == 10
  np.testing.assert_allclose([x, value], 0, atol=1e-6)


def test_the_loop_refuses_to_go_on_without_a_number():
  with pytest.raises(InputError, match='step 5.*learning rate'):
    minimise(Slope(broken=True), jnp.float32(1.0), None, jax.random.key(0))


# The start of PAL.


def test_pal_starts_at_the_rewards_that_em_found():
  """Without a step of training the logits of each class are EM's."""
  task, dataset = planted()
  method = catalogue.pal(
    PAL,
    'em',
    **LINEAR,
    train__num_steps=1,
    train__log_every=1,
    train__checkpoint_every=1,
    optimizer__groups__projectors__optional=True,
  )
  model = method._model(task.num_users, task.table.items.shape[-1])
  classes = methods.Em(num_classes=2).fit(task, jax.random.key(0))
  params = _from_classes(
    model, classes, task, 0, {'log_scale': jnp.zeros(()), 'prototypes': 0}
  )
  pairs = methods.gather(task.table, dataset.unseen[UNSEEN_ITEMS][0])
  params['log_temperature'] = jnp.zeros(())
  delta = model.apply(
    {'params': params}, pairs.items, params['prototypes'], method='deltas'
  )
  np.testing.assert_allclose(
    delta, pairs.difference @ classes.v.T, rtol=1e-3, atol=2e-3
  )
  users = np.exp(params['user_logits'])
  np.testing.assert_allclose(users.sum(-1), 1, rtol=1e-5)
  assert users.min() >= 0.05 - 1e-6


# The catalogue.


def test_the_catalogue_has_no_more_settings_than_its_budget():
  for name, found in catalogue.catalogue(PAL).items():
    assert 1 <= len(found) <= catalogue.BUDGET, name
    assert len(set(found)) == len(found), f'{name} tries a setting twice'


def test_the_catalogue_limits_settings_and_steps():
  (first, second) = catalogue.candidates(PAL, 'rfm', 2, 7)
  assert first.num_steps == second.num_steps == 7
  (pal_,) = catalogue.candidates(PAL, 'pal_a', 1, 7)
  assert pal_.config.train.num_steps == 7
  (near,) = catalogue.candidates(PAL, 'neighbours', 1, 7)
  assert near.base.num_steps == 7
  with pytest.raises(InputError, match="'nobody' is unknown.*pal_a"):
    catalogue.candidates(PAL, 'nobody')


def test_surface_features_are_of_the_texts():
  task, dataset = planted('length')
  x = np.asarray(task.table.items)
  lengths = np.log1p([len(name) for name in dataset.item_names])
  assert x.shape == (len(dataset.item_names), 1)
  np.testing.assert_allclose(
    x[:, 0], (lengths - lengths.mean()) / lengths.std(), rtol=1e-3, atol=1e-3
  )
  with pytest.raises(InputError, match="kind='colour'"):
    Surface(kind='colour').view(dataset, task.table)


def test_pref_with_more_features_than_columns_has_the_rank_of_the_columns():
  task, _ = planted()
  table = FeatureTable(task.table.items[:, :4], task.table.prompts[:, :4])
  narrow = dataclasses.replace(task, table=table)
  kernel, w = _spectral_start(narrow, 6)
  assert kernel.shape == (4, 6) and w.shape == (narrow.num_users, 6)
  few_kernel, few_w = _spectral_start(narrow, 4)
  np.testing.assert_allclose(w @ kernel.T, few_w @ few_kernel.T, atol=1e-6)
  method = methods.RewardFeatures(num_features=6, svd=True, num_steps=2)
  assert np.isfinite(method.fit(narrow, jax.random.key(0)).scale)
