"""train_step: sums, gradients, masks, weights; every variant learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from configs import base
from pal_jax import models, parallel
from pal_jax import train_step as steps
from pal_jax.data.batching import pad, weight_by_user
from pal_jax.errors import InputError
from pal_jax.mixtures import comparison_log_likelihoods
from pal_jax.shared_rows import share_rows
from pal_jax.structs import FeatureTable, make_comparisons

# Keeps the gradient as its state and moves nothing.
KEEP_GRADIENT = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)
# These programs run for milliseconds: compiling is what they cost. Without the
# fusion emitters it takes a third of the time.
FAST_COMPILE = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_use_fusion_emitters': False,
  'xla_llvm_disable_expensive_passes': True,
}
NUM_USERS, WIDTH, NUM_ITEMS = 4, 3, 12
KEY = jax.random.key(0)


def make(
  loss='logistic',
  bound=(0.0, 4.0),
  num_users=NUM_USERS,
  population_rate=0.0,
  **fields,
):
  """(model, objective) of a small variant."""
  config = base.model()
  config.update(
    {
      'num_prototypes': 2,
      'width': WIDTH,
      'projector': 'identity',
      'activation': 'gelu',
      'dropout': 0.0,
      'init_user_scale': 0.5,
      **fields,
    }
  )
  train = base.train()
  train.loss, train.batching = loss, 'users'
  train.bound_weight, train.bound_radius = bound
  train.population_rate = population_rate
  model = models.create(
    config, num_users=num_users, feature_width=TABLE.items.shape[-1]
  )
  return model, steps.create_objective(train, config)


def initial_state(model, optimizer=KEEP_GRADIENT):
  def create(key):
    return steps.create_state(model, lambda params: optimizer, key, TABLE)[0]

  return jax.jit(create, compiler_options=FAST_COMPILE)(KEY)


def compiled_step(model, objective):
  step = jax.jit(
    steps.bind(model, KEEP_GRADIENT, objective), compiler_options=FAST_COMPILE
  )
  return lambda state, batch, *args: step(state, share_rows(batch), *args)


def gradient_step(model, objective):
  """(state, batch) -> (gradients, metrics, next state)."""
  step = compiled_step(model, objective)

  def run(state, batch):
    state, metrics = step(state, batch, TABLE, KEY)
    return state.opt_state, metrics, state

  return run


def make_table(seed=0):
  rng = np.random.default_rng(seed)
  return FeatureTable(
    rng.normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32),
    rng.normal(size=(2, WIDTH)).astype(np.float32),
  )


def make_batch(users, seed=1, mask=None, weight=None):
  rng = np.random.default_rng(seed)
  users = np.asarray(users)
  items = np.stack([rng.permutation(NUM_ITEMS)[:2] for _ in users])
  return make_comparisons(
    users,
    items,
    rng.integers(0, 2, users.size),
    prompt=rng.integers(0, 2, users.size),
    mask=mask,
    weight=weight,
  )


TABLE = make_table()
USERS = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]


def assert_trees_close(a, b, **kwargs):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, **kwargs)


USER_LEVEL = {'membership': 'mixture_likelihood', 'mixture_level': 'user'}
COMPARISON_LEVEL = {'membership': 'mixture_likelihood'}
SOME_MODELS = {
  'convex': {},
  'convex f(P)w': {'point': 'f(P)w', 'projector': 'mlp1'},
  'comparison-level mixture': COMPARISON_LEVEL,
  'user-level mixture': USER_LEVEL,
  'batch norm': {'projector': 'mlp1', 'batch_norm': True},
  'pal_b batch norm': {
    'name': 'pal_b',
    'projector': 'mlp1',
    'batch_norm': True,
  },
}


@pytest.fixture(scope='module')
def runs():
  """Each of SOME_MODELS with its state and compiled step, made once."""
  made = {}

  def get(name):
    if name not in made:
      model, objective = make(**SOME_MODELS[name])
      run = gradient_step(model, objective)
      made[name] = model, initial_state(model), run
    return made[name]

  return get


# Sums.


def test_metrics_are_the_sums_of_numpy(runs):
  """Squared distance to a mixed point, with ties, weights and a mask."""
  _, state, run = runs('convex')
  batch = make_batch(
    USERS,
    mask=np.array([1, 1, 1, 0, 1, 1, 1, 1, 0, 1], bool),
    weight=np.linspace(0.5, 2.0, len(USERS)),
  )
  batch.label[1] = 0.5  # a tie: neither right nor wrong
  batch.label[2] = 0.75
  batch.items[4] = batch.items[4, 0]  # a logit of exactly 0: worth half
  _, metrics, _ = run(state, batch)

  params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
  logits = params['user_logits'] / np.exp(params['log_temperature'])
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  u = (weights @ params['prototypes'])[batch.user]
  reward = -np.sum((TABLE.items[batch.items] - u[:, None]) ** 2, axis=-1)
  z = np.exp(params['log_scale']) * (reward[:, 0] - reward[:, 1])
  loss = batch.label * np.logaddexp(0, -z) + (1 - batch.label) * np.logaddexp(
    0, z
  )
  live = batch.mask
  decided = live & (batch.label != 0.5)
  right = np.where(z == 0, 0.5, (z > 0) == (batch.label > 0.5))
  np.testing.assert_allclose(
    metrics.loss, np.sum((batch.weight * loss)[live]), rtol=1e-5
  )
  np.testing.assert_allclose(metrics.weight, batch.weight[live].sum())
  np.testing.assert_allclose(metrics.correct, right[decided].sum())
  np.testing.assert_allclose(metrics.decided, decided.sum())
  np.testing.assert_allclose(metrics.count, live.sum())
  assert float(metrics.bound) == 0.0
  assert decided.sum() == 7 and right[4] == 0.5


def test_metrics_of_parts_add_up_to_those_of_the_whole(runs):
  _, state, run = runs('convex')
  batch = make_batch(USERS, weight=np.arange(1.0, 11.0))
  first = batch.replace(mask=np.arange(10) < 3)
  rest = batch.replace(mask=np.arange(10) >= 3)
  _, whole, _ = run(state, batch)
  total = run(state, first)[1] + run(state, rest)[1]
  for field in ('loss', 'weight', 'correct', 'decided', 'count'):
    np.testing.assert_allclose(
      getattr(total, field), getattr(whole, field), rtol=1e-5
    )
  np.testing.assert_allclose(
    total.summary(2)['loss'], whole.summary()['loss'], rtol=1e-5
  )


def test_summary_divides_by_weight_and_by_decided_comparisons():
  metrics = steps.StepMetrics(6.0, 2.0, 4.0, 1.5, 3.0, 5.0, 8.0)
  assert metrics.summary(4) == {
    'loss': 2.0,
    'likelihood_loss': 1.5,
    'accuracy': 0.5,
    'gradient_norm': 2.0,
  }


def test_the_gradient_is_that_of_the_mean_over_all_comparisons(runs):
  """Sums are divided once: parts of unequal size weigh by their size."""
  _, state, run = runs('convex')
  batch = make_batch(USERS)
  whole, _, _ = run(state, batch)
  small, _, _ = run(state, batch.replace(mask=np.arange(10) < 2))
  large, _, _ = run(state, batch.replace(mask=np.arange(10) >= 2))
  mixed = jax.tree.map(lambda a, b: 0.2 * a + 0.8 * b, small, large)
  assert_trees_close(whole, mixed, rtol=1e-4, atol=1e-6)


def test_gradient_norm_is_that_of_all_gradients(runs):
  _, state, run = runs('convex')
  grads, metrics, _ = run(state, make_batch(USERS))
  flat, _ = ravel_pytree(grads)
  np.testing.assert_allclose(
    metrics.gradient_norm, np.linalg.norm(flat), rtol=1e-6
  )


# Masks.


@pytest.mark.parametrize('name', SOME_MODELS)
def test_what_stands_in_masked_rows_changes_nothing(runs, name):
  _, state, run = runs(name)
  mask = np.array([1, 1, 1, 1, 1, 1, 0, 1, 1, 0], bool)
  batch = make_batch(USERS, mask=mask)
  other = make_batch([3, 2, 1, 0, 3, 2, 1, 0, 3, 0], seed=9)
  dirty = jax.tree.map(
    lambda a, b: np.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b),
    batch,
    other.replace(weight=np.full(10, 1e6, np.float32)),
  ).replace(mask=mask)
  assert not np.array_equal(dirty.items, batch.items)
  for x, y in zip(run(state, batch), run(state, dirty), strict=True):
    assert_trees_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', SOME_MODELS)
def test_texts_placed_once_score_as_texts_placed_each_time(runs, name):
  model, state, _ = runs(name)
  batch = make_batch(USERS * 3)
  assert len(np.unique(batch.items)) < batch.items.size
  once = steps.apply_model(
    model, state.params, state.model_state, share_rows(batch), TABLE
  )
  each = model.apply(
    {'params': state.params, **state.model_state},
    batch.user,
    TABLE.items[batch.items],
    TABLE.prompts[batch.prompt],
  )
  assert_trees_close(once, each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['convex', 'user-level mixture', 'batch norm'])
def test_padding_equals_a_smaller_batch(runs, name):
  _, state, run = runs(name)
  batch = make_batch(USERS[:7])
  padded = pad(batch, 10)
  assert padded.shape == (10,)
  for x, y in zip(run(state, batch), run(state, padded), strict=True):
    assert_trees_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', SOME_MODELS)
def test_the_order_of_comparisons_changes_nothing(runs, name):
  _, state, run = runs(name)
  batch = make_batch(USERS, mask=np.arange(10) % 4 != 3)
  shuffled = batch[np.random.default_rng(0).permutation(10)]
  for x, y in zip(run(state, batch), run(state, shuffled), strict=True):
    assert_trees_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_live_row_moves_nothing(runs):
  _, state, run = runs('convex')
  grads, metrics, _ = run(
    state, make_batch(USERS, mask=np.zeros(len(USERS), bool))
  )
  assert_trees_close(grads, jax.tree.map(jnp.zeros_like, grads))
  assert metrics.summary()['loss'] == 0.0


# Gradients.


def in_float64(state):
  return state.replace(
    params=jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
  )


@pytest.mark.parametrize(
  'fields',
  [
    {},
    COMPARISON_LEVEL,
    {**COMPARISON_LEVEL, 'point': 'f(P)w', 'projector': 'mlp1'},
    USER_LEVEL,
    {**USER_LEVEL, 'name': 'pal_b', 'projector': 'mlp1', 'width': 2},
    {'preference': 'cosine', 'point': '|f(P)|w', 'projector': 'mlp1'},
  ],
  ids=str,
)
def test_gradients_equal_finite_differences(fields):
  """Of the reported loss and bound, in float64, over every parameter."""
  model, objective = make(bound=(0.3, 0.2), **fields)
  batch = make_batch(
    USERS,
    mask=np.arange(10) != 7,
    # Equal within a user, as `weight_by_user` makes them.
    weight=np.array([0.5, 2.0, 1.0, 0.7])[USERS],
  )
  state = in_float64(initial_state(model))
  with jax.enable_x64(True):
    flat, unravel = ravel_pytree(state.params)
    step = compiled_step(model, objective)

    def run(x):
      return step(state.replace(params=unravel(x)), batch, TABLE, KEY)

    def value(x):
      metrics = run(x)[1]
      return float((metrics.loss + metrics.bound) / metrics.weight)

    got, _ = ravel_pytree(run(flat)[0].opt_state)
    basis = 1e-5 * np.eye(flat.size)
    expected = [(value(flat + e) - value(flat - e)) / 2e-5 for e in basis]
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)
  assert np.abs(expected).max() > 1e-3


def direct_user_level_loss(model, params, batch):
  """-log sum_k pi_k prod_j p_jk of each user, exponentiated, no posterior."""
  delta = model.apply(
    {'params': params},
    batch.user,
    TABLE.items[batch.items],
    TABLE.prompts[batch.prompt],
  ).delta
  p = jax.nn.sigmoid(delta)  # [B, K]
  p = jnp.where(batch.label[:, None] == 1.0, p, 1.0 - p)
  pi = jax.nn.softmax(params['class_logits'])
  total = 0.0
  for user in np.unique(batch.user[batch.mask]):
    rows = np.flatnonzero((batch.user == user) & batch.mask)
    evidence = jnp.sum(pi * jnp.prod(p[rows], axis=0))
    total -= batch.weight[rows[0]] * jnp.log(evidence)
  return total


@pytest.mark.parametrize('weight', [(1, 1, 1, 1), (0.5, 2.0, 1.0, 0.25)])
def test_user_level_gradient_is_that_of_the_latent_class_likelihood(weight):
  """Fisher's identity: the surrogate of single comparisons loses nothing."""
  model, objective = make(**USER_LEVEL)
  batch = make_batch(
    USERS, mask=np.arange(10) != 8, weight=np.array(weight)[USERS]
  )
  state = in_float64(initial_state(model))
  with jax.enable_x64(True):
    # Unequal classes, so that the prior's gradient counts.
    state.params['class_logits'] += np.array([0.7, -0.4])
    direct = jax.value_and_grad(
      lambda params: direct_user_level_loss(model, params, batch)
    )
    value, grads = jax.jit(direct, compiler_options=FAST_COMPILE)(state.params)
    new, metrics = compiled_step(model, objective)(state, batch, TABLE, KEY)
    total = batch.weight[batch.mask].sum()
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-9)
    assert_trees_close(
      new.opt_state, jax.tree.map(lambda g: g / total, grads), rtol=1e-8
    )


def test_user_level_is_not_comparison_level(runs):
  """The same classes and weights differ as soon as a user has two."""
  prototypes = jnp.array([[2.0, 0, 0], [-2.0, 0, 0]])
  batch = make_batch([0] * 10)
  losses = []
  for name, uniform in (
    ('user-level mixture', 'class_logits'),
    ('comparison-level mixture', 'user_logits'),
  ):
    _, state, run = runs(name)
    params = {**state.params, 'prototypes': prototypes}
    params[uniform] = jnp.zeros_like(params[uniform])
    _, metrics, _ = run(state.replace(params=params), batch)
    losses.append(float(metrics.loss))
  assert abs(losses[0] - losses[1]) > 0.1


@pytest.mark.parametrize(
  'fields', [{'name': 'pal_b', 'projector': 'mlp2'}, {'projector': 'mlp2'}]
)
def test_every_parameter_has_a_gradient(fields):
  """Except the bias that cancels in x_a - x_b or x - u, if there is one."""
  model, objective = make(**fields)
  grads, _, _ = gradient_step(model, objective)(
    initial_state(model), make_batch(USERS)
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize('name', SOME_MODELS)
def test_huge_logits_give_finite_losses_and_gradients(runs, name):
  """METHOD 7: -log(sigmoid) overflows, softplus does not."""
  _, state, run = runs(name)
  params = {**state.params, 'log_scale': jnp.float32(9.0)}
  for key in {'prototypes'} & set(params):
    params[key] = 1e4 * params[key]
  grads, metrics, _ = run(state.replace(params=params), make_batch(USERS))
  assert float(metrics.loss) > 100.0
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all()


# Weights of users.


@pytest.mark.parametrize('name', ['convex', 'comparison-level mixture'])
def test_a_weight_of_two_is_the_comparison_twice(runs, name):
  _, state, run = runs(name)
  batch = make_batch(USERS[:9])
  twice = batch[np.array([*range(9), 2])]
  weighted = batch.replace(weight=np.where(np.arange(9) == 2, 2.0, 1.0))
  padded = pad(weighted, 10)
  a, b = run(state, twice), run(state, padded)
  assert_trees_close(a[0], b[0], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(a[1].loss, b[1].loss, rtol=1e-5)


def test_inverse_counts_give_every_user_the_same_say(runs):
  """Four users' gradients are averaged, whatever their numbers."""
  _, state, run = runs('convex')
  batch = make_batch(USERS)
  weighted = weight_by_user(batch, 'inverse_count')
  got, _, _ = run(state, weighted)
  each = [run(state, batch.replace(mask=batch.user == i))[0] for i in range(4)]
  expected = jax.tree.map(lambda *g: sum(g) / 4, *each)
  assert_trees_close(got, expected, rtol=1e-4, atol=1e-6)
  plain, _, _ = run(state, batch)
  assert not np.allclose(got['prototypes'], plain['prototypes'], rtol=1e-2)


# The bound on ideal points.


@functools.cache
def bound_run(weight, radius=0.5):
  model, objective = make(bound=(weight, radius))
  step = compiled_step(model, objective)
  batch = make_batch(USERS, mask=np.arange(10) != 4)
  state, metrics = step(initial_state(model), batch, TABLE, KEY)
  return state, metrics, batch


def test_the_bound_is_added_to_loss_and_gradient():
  """METHOD 7: a regulariser computed and never added."""
  state, none, batch = bound_run(0.0)
  with_it, some, _ = bound_run(3.0)
  weights = jax.nn.softmax(state.params['user_logits'])
  norm = np.linalg.norm(weights @ state.params['prototypes'], axis=-1)
  excess = np.maximum(norm - 0.5, 0.0)[batch.user][batch.mask]
  assert excess.max() > 0.1
  np.testing.assert_allclose(some.bound, 3 * excess.sum(), rtol=1e-5)
  np.testing.assert_allclose(some.loss, none.loss)
  np.testing.assert_allclose(
    some.summary()['loss'] - none.summary()['loss'],
    3 * excess.mean(),
    rtol=1e-4,
  )
  added = with_it.opt_state['prototypes'] - state.opt_state['prototypes']
  assert np.abs(added).max() > 0.01


def test_points_inside_the_radius_are_not_bound():
  free, _, _ = bound_run(0.0)
  inside, metrics, _ = bound_run(1.0, radius=100.0)
  assert float(metrics.bound) == 0.0
  assert_trees_close(free.opt_state, inside.opt_state)


# Randomness, steps and traces.


def test_noise_depends_on_the_key_and_the_step_and_on_nothing_else():
  model, objective = make(projector='mlp1', dropout=0.5, width=8)
  step = compiled_step(model, objective)
  state = initial_state(model)
  batch = make_batch(USERS)

  def loss(state, key):
    return float(step(state, batch, TABLE, key)[1].loss)

  later = state.replace(step=state.step + 1)
  assert loss(state, KEY) == loss(state, KEY)
  assert loss(state, KEY) != loss(later, KEY)
  assert loss(state, KEY) != loss(state, jax.random.key(1))


def test_the_step_counts(runs):
  _, state, run = runs('convex')
  _, _, new = run(state, make_batch(USERS))
  assert int(state.step) == 0 and int(new.step) == 1
  assert new.step.dtype == state.step.dtype


@pytest.mark.parametrize('mode', parallel.MODES)
def test_many_steps_trace_once(mode):
  """Batches of numpy, with whatever mask, must not trace again."""
  model, objective = make()
  count = []

  def counted(*args):
    count.append(1)
    return steps.train_step(
      *args,
      model=model,
      optimizer=optax.adam(1e-2),
      objective=objective,
      axis_name=parallel.axis_name(mode),
    )

  state = initial_state(model, optax.adam(1e-2))
  run = parallel.compile_step(counted, mode)
  state, table = parallel.place((state, TABLE), mode)
  for seed in range(6):
    batch = make_batch(USERS, seed, mask=np.arange(10) != seed)
    state, metrics = run(state, batch, table, KEY)
    assert np.isfinite(float(metrics.loss))
  assert len(count) == 1 and int(state.step) == 6


def test_float16_features_are_used_in_float32():
  model, objective = make()
  half = FeatureTable(*(np.float16(x) for x in (TABLE.items, TABLE.prompts)))
  single = FeatureTable(*(np.float32(x) for x in (half.items, half.prompts)))
  step = compiled_step(model, objective)
  state, batch = initial_state(model), make_batch(USERS)
  a = step(state, batch, half, KEY)
  b = step(state, batch, single, KEY)
  assert_trees_close(a, b)
  assert a[1].loss.dtype == jnp.float32


# Objectives that cannot be.


@pytest.mark.parametrize(
  ('train', 'model', 'words'),
  [
    ({'loss': 'quadratic'}, {}, ("train.loss='quadratic'", 'smoothed_hinge')),
    ({'loss': 'hinge'}, COMPARISON_LEVEL, ("train.loss='hinge'", 'logistic')),
    ({}, USER_LEVEL, ('mixture_level', '--config.train.batching=users')),
    (
      {'batching': 'users'},
      {**USER_LEVEL, 'matryoshka': (2,)},
      ('model.matryoshka', 'mixture_level'),
    ),
  ],
  ids=str,
)
def test_impossible_objectives_are_refused(train, model, words):
  train_config, model_config = base.train(), base.model()
  train_config.update(train)
  model_config.update(model)
  with pytest.raises(InputError) as error:
    steps.create_objective(train_config, model_config)
  for word in words:
    assert word in str(error.value)


# Every variant learns.

PEOPLE, EACH, SPACE = 8, 32, 4


def opposite_users():
  """Users at p and at -p, items on a sphere: any one score gets one half."""
  rng = np.random.default_rng(0)
  p = rng.normal(size=(1, SPACE))
  points = np.concatenate([p, -p]) / np.linalg.norm(p)
  items = rng.normal(size=(60, SPACE))
  items *= 2.0 / np.linalg.norm(items, axis=-1, keepdims=True)
  user = np.repeat(np.arange(PEOPLE), EACH)
  pair = np.stack([rng.permutation(60)[:2] for _ in user])
  reward = -np.sum((items[pair] - points[user % 2][:, None]) ** 2, axis=-1)
  table = FeatureTable(
    items.astype(np.float32), np.ones((1, SPACE), np.float32)
  )
  return make_comparisons(user, pair, reward[:, 0] > reward[:, 1]), table


POINTS = ('Pw', 'f(P)w', 'f(Pw)', '|f(P)|w', 'pal_b')
PREFERENCES = (
  'squared_distance',
  'distance',
  'normalized_distance',
  'cosine',
  'inner_product',
)
MEMBERSHIPS = (
  {'membership': 'convex'},
  {'membership': 'partition'},
  {'membership': 'partition', 'gumbel': True},
  COMPARISON_LEVEL,
  USER_LEVEL,
)


def variants():
  """A Latin square: every pair of point, preference and membership once."""
  for i, point in enumerate(POINTS):
    for j, preference in enumerate(PREFERENCES):
      kind = {'name': 'pal_b'} if point == 'pal_b' else {'point': point}
      membership = MEMBERSHIPS[(i + j) % len(MEMBERSHIPS)]
      yield {**kind, 'preference': preference, **membership}
  yield {'loss': 'cross_entropy', 'residual': True, 'width': SPACE}
  yield {'loss': 'hinge', 'batch_norm': True}
  yield {'loss': 'smoothed_hinge', 'matryoshka': (1, 4)}
  yield {'projector': 'identity', 'width': SPACE}
  yield {'name': 'pal_b', 'batch_norm': True, 'dropout': 0.1}
  yield {**COMPARISON_LEVEL, 'matryoshka': (4,), 'use_bias': False}
  yield {'compute_dtype': 'bfloat16', 'batch_norm': True}
  yield {'name': 'pal_b', 'compute_dtype': 'bfloat16'}


@pytest.mark.parametrize('fields', list(variants()), ids=str)
def test_every_variant_trains_above_chance(fields):
  batch, table = opposite_users()
  shared = share_rows(batch)
  defaults = {'projector': 'mlp1', 'activation': 'relu', 'width': 8}
  model, objective = make(num_users=PEOPLE, **{**defaults, **fields})
  optimizer = optax.adam(0.1)
  # The default generator is slow to compile.
  key = jax.random.key(0, impl='rbg')
  # Tables differ in width from the one of the other tests.
  model = model.clone(feature_width=SPACE) if 'name' not in fields else model
  # Op by op: most variants share the shapes of their parameters.
  state, _ = steps.create_state(model, lambda params: optimizer, key, table)

  def train(state):
    step = steps.bind(model, optimizer, objective)
    state, metrics = jax.lax.scan(
      lambda s, _: step(s, shared, table, key), state, None, length=100
    )
    out = steps.apply_model(
      model, state.params, state.model_state, shared, table
    )
    return state, metrics, (out.logit, out.delta)

  state, metrics, (logit, delta) = jax.jit(
    train, compiler_options=FAST_COMPILE
  )(state)
  if model.user_level:  # a user's class is that of its largest posterior
    log_p = comparison_log_likelihoods(delta, batch.label)
    log_p = log_p.reshape(PEOPLE, EACH, -1).sum(axis=1)
    best = np.repeat(np.argmax(log_p, axis=-1), EACH)
    logit = np.take_along_axis(np.asarray(delta), best[:, None], 1)[:, 0]
  accuracy = np.mean((np.asarray(logit) > 0) == (batch.label > 0.5))
  assert metrics.loss[-10:].mean() < metrics.loss[0]
  assert accuracy > 0.7
  for leaf in jax.tree.leaves((state.params, state.model_state)):
    assert np.isfinite(leaf).all()


# The population stands in for some users.


@pytest.mark.parametrize(
  'fields',
  [{}, {'membership': 'partition'}, COMPARISON_LEVEL, {'name': 'pal_b'}],
  ids=['convex', 'partition', 'mixture', 'pal_b'],
)
def test_anonymous_examples_are_scored_as_a_new_user_is(fields):
  """By the rule of adaptation, at the mean of the users' weights."""
  model, _ = make(**fields)
  params = initial_state(model).params
  batch = make_batch(USERS)
  who = np.arange(len(USERS)) % 2 == 0

  def run(**kwargs):
    return steps.apply_model(
      model, params, {}, share_rows(batch), TABLE, **kwargs
    ).logit

  mean = np.mean(jax.nn.softmax(params['user_logits'], -1), axis=0)
  rows = jnp.broadcast_to(jnp.log(mean), (len(USERS), 2))
  x = model.apply({'params': params}, TABLE.items[batch.items], method='embed')
  basis = model.apply(
    {'params': params}, TABLE.prompts[batch.prompt], method='basis'
  )
  expected = model.apply(
    {'params': params}, rows, x, basis, model.adaptation_rule, method='logits'
  )
  kwargs = {'train': True, 'rngs': {'gumbel': KEY}}
  found = run(anonymous=jnp.asarray(who), **kwargs)
  np.testing.assert_allclose(found[who], expected[who], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    found[~who], run(**kwargs)[~who], rtol=1e-5, atol=1e-6
  )


def test_anonymous_examples_teach_the_network_and_no_user():
  model, objective = make(population_rate=0.999999)
  state = initial_state(model)
  gradients, metrics, _ = gradient_step(model, objective)(
    state, make_batch(USERS)
  )
  np.testing.assert_array_equal(gradients['user_logits'], 0.0)
  assert float(jnp.abs(gradients['prototypes']).max()) > 1e-3
  # Accuracy is that of users as themselves: here nobody was.
  assert float(metrics.decided) == 0 and float(metrics.count) == len(USERS)


def test_about_the_given_share_is_anonymous():
  model, objective = make(population_rate=0.25)
  state = initial_state(model)
  batch = make_batch([0, 1, 2, 3] * 100)
  _, metrics, _ = gradient_step(model, objective)(state, batch)
  assert 0.65 < float(metrics.decided) / 400 < 0.85


@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(rate):
  with pytest.raises(InputError, match='population_rate'):
    make(population_rate=rate)
