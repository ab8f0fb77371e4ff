"""PAL-A and PAL-B: every variant against numpy, and what must not matter.

Forms are the four points of PAL-A and PAL-B. Parameters are drawn by numpy,
so that no bias, scale or temperature is at a value that hides a mistake.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from scipy.special import expit

from configs import base
from pal_jax import models
from pal_jax.errors import InputError
from pal_jax.ideal_points import PREFERENCES
from pal_jax.models import PalA, PalB
from pal_jax.models.pal_a import POINTS
from pal_jax.models.projectors import Projector

# One batch size throughout: every new shape compiles every operation again.
U, K, D, P, B = 5, 3, 4, 3, 9
FORMS = (*POINTS, 'pal_b')
MEMBERSHIPS = {
  'convex': {},
  'partition': {'membership': 'partition'},
  'gumbel': {'membership': 'partition', 'gumbel': True},
  'comparison level': {'membership': 'mixture_likelihood'},
  'user level': {'membership': 'mixture_likelihood', 'mixture_level': 'user'},
}
# Gumbel differs from partition in training only.
DISTINCT = tuple(name for name in MEMBERSHIPS if name != 'gumbel')
every_form = pytest.mark.parametrize('form', FORMS)
every_preference = pytest.mark.parametrize('preference', sorted(PREFERENCES))
every_membership = pytest.mark.parametrize('membership', DISTINCT)

_rng = np.random.default_rng(0)
USER = np.array([0, 3, 1, 4, 2, 3, 0, 4, 1])
ITEMS = _rng.normal(size=(B, 2, D)).astype(np.float32)
PROMPTS = _rng.normal(size=(B, D)).astype(np.float32)
PADDED = np.arange(B) >= 6
TRAIN = {'train': True, 'mutable': ['batch_stats']}


def make(form, membership='convex', **fields):
  fields = {
    'num_users': U,
    'num_prototypes': K,
    'width': P,
    'projector': 'mlp1',
    'activation': 'relu',
    **MEMBERSHIPS[membership],
    **fields,
  }
  if form == 'pal_b':
    return PalB(**fields)
  return PalA(point=form, **{'feature_width': D, **fields})


@functools.cache
def shapes_of(model, width):
  return jax.eval_shape(
    lambda key: model.init(
      key,
      jnp.zeros(1, jnp.int32),
      jnp.zeros((1, 2, width)),
      jnp.zeros((1, width)),
    ),
    jax.random.key(0),
  )


def draw(model, width=D, seed=1):
  """Variables of the model, drawn by numpy."""
  rng = np.random.default_rng(seed)
  variables = jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(np.float32),
    dict(shapes_of(model, width)),
  )
  if 'batch_stats' in variables:  # a variance is positive
    variables['batch_stats'] = jax.tree.map(
      lambda x: np.abs(x) + 0.5, variables['batch_stats']
    )
  params = variables['params']
  params['log_scale'] = np.float32(0.4)
  if 'log_temperature' in params:
    params['log_temperature'] = np.float32(-0.7)
  return variables


def changed(variables, **params):
  """A copy with some top-level parameters replaced."""
  variables = copy.deepcopy(variables)
  variables['params'].update(params)
  return variables


def run(model, variables, user=USER, items=ITEMS, prompts=PROMPTS, **kwargs):
  return model.apply(variables, user, items, prompts, **kwargs)


@functools.cache
def evaluated(form, membership):
  """(model, variables, outputs) of the batch, run once."""
  model = make(form, membership)
  variables = draw(model)
  return model, variables, run(model, variables)


# The oracle, in float64 and one comparison at a time.


def f(layers, h):
  """mlp1 with relu."""
  x = h.astype(float) @ layers['Dense_0']['kernel'] + layers['Dense_0']['bias']
  x = np.maximum(x, 0.0)
  return x @ layers['Dense_1']['kernel'] + layers['Dense_1']['bias']


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def cos(x, u):
  return x @ u / np.sqrt((x @ x) * (u @ u))


REWARDS = {
  'squared_distance': lambda x, u: -((x - u) @ (x - u)),
  'distance': lambda x, u: -np.sqrt((x - u) @ (x - u)),
  'normalized_distance': lambda x, u: (
    -np.linalg.norm(x / np.linalg.norm(x) - u / np.linalg.norm(u))
  ),
  'cosine': cos,
  'inner_product': lambda x, u: x @ u,
}


def point(form, params, weights, prompt):
  """The ideal point of one user for one prompt; METHOD section 1."""
  if form == 'pal_b':
    maps = [
      jax.tree.map(lambda leaf, k=k: leaf[k], params['prompt_projectors'])
      for k in range(len(weights))
    ]
    return sum(w * f(g, prompt) for w, g in zip(weights, maps, strict=True))
  p, project = params['prototypes'], params['projector']
  if form == 'Pw':
    return sum(w * row for w, row in zip(weights, p, strict=True))
  if form == 'f(Pw)':
    return f(project, sum(w * row for w, row in zip(weights, p, strict=True)))
  placed = [f(project, row) for row in p]
  if form == '|f(P)|w':
    placed = [row / np.sqrt(row @ row) for row in placed]
  return sum(w * row for w, row in zip(weights, placed, strict=True))


def weights_of(params, user, membership):
  if membership == 'user level':
    return softmax(params['class_logits'].astype(float))
  logits = params['user_logits'][user].astype(float)
  return softmax(logits / np.exp(params['log_temperature']))


def logit_at(form, preference, params, weights, row, prefix=P):
  """The logit of one comparison for a user at `weights`."""
  u = point(form, params, weights, PROMPTS[row])[:prefix]
  a, b = (f(params['projector'], ITEMS[row, c])[:prefix] for c in (0, 1))
  reward = REWARDS[preference]
  return np.exp(params['log_scale']) * (reward(a, u) - reward(b, u))


def oracle(form, preference, membership, params, prefix=P, train=False):
  found = []
  for row, user in enumerate(USER):
    w = weights_of(params, user, membership)
    if membership == 'partition' and not train:
      w = np.eye(K)[np.argmax(w)]
    if 'level' in membership:
      each = [
        logit_at(form, preference, params, np.eye(K)[k], row, prefix)
        for k in range(K)
      ]
      p = w @ expit(np.array(each))
      found.append(np.log(p) - np.log1p(-p))
    else:
      found.append(logit_at(form, preference, params, w, row, prefix))
  return np.array(found)


THIRD = B // 3


@functools.cache
def scored(form, preference, membership):
  """(variables, outputs) of three rows, the same swapped, and with equals.

  One run for the properties that are asked of every variant.
  """
  model = make(form, membership, preference=preference, matryoshka=(2,))
  variables = draw(model)
  items = ITEMS[:THIRD]
  out = run(
    model,
    variables,
    np.tile(USER[:THIRD], 3),
    np.concatenate([items, items[:, ::-1], np.repeat(items[:, :1], 2, 1)]),
    np.tile(PROMPTS[:THIRD], (3, 1)),
  )
  return variables, jax.tree.map(np.asarray, out)


@every_form
@every_preference
def test_logits_equal_numpy(form, preference):
  for membership in DISTINCT:
    variables, out = scored(form, preference, membership)
    params = variables['params']
    for prefix, logit in ((P, out.logit), (2, out.nested[0])):
      np.testing.assert_allclose(
        logit[:THIRD],
        oracle(form, preference, membership, params, prefix)[:THIRD],
        rtol=2e-3,
        atol=2e-3,
        err_msg=f'{membership}, prefix of {prefix}',
      )
    assert out.logit.shape == out.norm.shape == (B,)
    assert out.log_weights.shape == (B, K)
    assert (out.delta is not None) == ('level' in membership)


@every_form
def test_partition_is_soft_in_training_and_arg_max_in_evaluation(form):
  model = make(form, 'partition')
  variables = draw(model)
  soft = run(model, variables, train=True)
  np.testing.assert_allclose(
    soft.logit,
    oracle(form, 'squared_distance', 'partition', variables['params'], P, True),
    rtol=2e-3,
    atol=2e-3,
  )
  np.testing.assert_allclose(
    soft.logit, run(make(form), variables).logit, rtol=1e-5, atol=1e-5
  )
  assert np.abs(soft.logit - run(model, variables).logit).max() > 1e-2


@every_form
def test_ideal_points_equal_numpy(form):
  model = make(form)
  variables = draw(model)
  basis = model.apply(variables, PROMPTS, method='basis')
  weights = np.random.default_rng(2).dirichlet(np.ones(K), size=B)
  found = model.apply(
    variables, jnp.array(weights, jnp.float32), basis, method='ideal_points'
  )
  expected = [
    point(form, variables['params'], w, prompt)
    for w, prompt in zip(weights, PROMPTS, strict=True)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_normalisation_is_per_prototype():
  """|f(P)|w: every prototype has norm 1, whatever the others'."""
  model = make('|f(P)|w')
  variables = draw(model)
  basis = model.apply(variables, method='basis')
  np.testing.assert_allclose(np.linalg.norm(basis, axis=-1), 1.0, rtol=1e-5)
  prototypes = variables['params']['prototypes'].copy()
  prototypes[0] *= 100.0
  other = changed(variables, prototypes=prototypes)
  np.testing.assert_allclose(
    model.apply(other, method='basis')[1:], basis[1:], rtol=1e-5
  )


def test_mixed_ideal_points_are_shorter_than_normalised_prototypes():
  """The mean of unit vectors, not the unit vector of a mean."""
  model = make('|f(P)|w')
  norm = run(model, draw(model)).norm
  assert (np.asarray(norm) < 1.0 - 1e-3).all()


@every_form
def test_norm_is_that_of_the_ideal_point(form):
  """What the bound of the objective is put on."""
  model = make(form)
  variables = draw(model)
  expected = [
    np.linalg.norm(
      point(
        form,
        variables['params'],
        weights_of(variables['params'], user, 'convex'),
        prompt,
      )
    )
    for user, prompt in zip(USER, PROMPTS, strict=True)
  ]
  found = run(model, variables).norm
  np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_bound_would_move_the_ideal_points():
  model = make('f(Pw)', projector='mlp0')
  gradient = jax.jit(
    jax.grad(lambda params: run(model, {'params': params}).norm.sum())
  )(draw(model)['params'])
  assert np.abs(gradient['prototypes']).max() > 1e-3


# Symmetries.


@every_form
@every_preference
def test_swapping_candidates_negates_the_logit(form, preference):
  for membership in DISTINCT:
    _, out = scored(form, preference, membership)
    for logit in (out.logit, *out.nested):
      np.testing.assert_array_equal(
        logit[:THIRD], -logit[THIRD : 2 * THIRD], err_msg=membership
      )
    np.testing.assert_array_equal(out.norm[:THIRD], out.norm[-THIRD:])
    assert np.abs(out.logit[:THIRD]).max() > 1e-3


@every_form
@every_preference
def test_equal_candidates_have_logit_zero(form, preference):
  for membership in DISTINCT:
    _, out = scored(form, preference, membership)
    for logit in (out.logit, *out.nested):
      np.testing.assert_array_equal(logit[2 * THIRD :], 0.0, err_msg=membership)


@every_form
@every_preference
def test_the_nearer_candidate_is_preferred(form, preference):
  """In that reward's own geometry, through the whole model."""
  model = make(form, preference=preference)
  variables = draw(model)
  params = variables['params']
  rng = np.random.default_rng(3)
  seen = 0
  for _ in range(4):
    items = rng.normal(size=(B, 2, D)).astype(np.float32)
    user = rng.integers(0, U, B)
    logit = np.asarray(run(model, variables, user, items).logit)
    for row in range(B):
      u = point(
        form, params, weights_of(params, user[row], 'convex'), PROMPTS[row]
      )
      near, far = (
        distance_to(preference, f(params['projector'], items[row, c]), u)
        for c in (0, 1)
      )
      if abs(far - near) > 1e-3:
        seen += 1
        assert (logit[row] > 0) == (near < far)
  assert seen > 3 * B


def distance_to(preference, x, u):
  if preference in ('squared_distance', 'distance'):
    return np.linalg.norm(x - u)
  if preference == 'inner_product':
    return -x @ u
  return np.arccos(np.clip(cos(x, u), -1, 1))


def relabelled(variables, order):
  variables = copy.deepcopy(variables)
  params = variables['params']
  if 'user_logits' in params:
    params['user_logits'] = params['user_logits'][:, order]
  if 'class_logits' in params:
    params['class_logits'] = params['class_logits'][order]
  if 'prototypes' in params:
    params['prototypes'] = params['prototypes'][order]
  if 'prompt_projectors' in params:
    params['prompt_projectors'] = jax.tree.map(
      lambda leaf: leaf[order], params['prompt_projectors']
    )
  return variables


@every_form
@every_membership
def test_relabelling_prototypes_changes_nothing(form, membership):
  model, variables, expected = evaluated(form, membership)
  order = np.array([2, 0, 1])
  found = run(model, relabelled(variables, order))
  np.testing.assert_allclose(found.logit, expected.logit, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-5)
  np.testing.assert_allclose(
    found.log_weights, expected.log_weights[:, order], rtol=1e-5, atol=1e-6
  )


@every_form
@pytest.mark.parametrize('membership', ['convex', 'comparison level'])
def test_order_of_the_batch_changes_nothing(form, membership):
  model = make(form, membership, batch_norm=True)
  variables = draw(model)
  order = np.random.default_rng(4).permutation(B)
  expected, statistics = run(model, variables, **TRAIN)
  found, shuffled = run(
    model, variables, USER[order], ITEMS[order], PROMPTS[order], **TRAIN
  )
  np.testing.assert_allclose(
    found.logit, expected.logit[order], rtol=1e-3, atol=1e-4
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    shuffled,
    statistics,
  )


@every_form
@pytest.mark.parametrize('membership', ['convex', 'comparison level'])
def test_what_padding_holds_changes_nothing(form, membership):
  """Not even NaN and an unknown user, with batch statistics and without."""
  model = make(form, membership, batch_norm=True)
  variables = draw(model)
  user, items, prompts = USER.copy(), ITEMS.copy(), PROMPTS.copy()
  user[PADDED], items[PADDED], prompts[PADDED] = [-1, U, 0], np.nan, np.nan
  for kwargs in ({'mask': ~PADDED, **TRAIN}, {'mutable': ['batch_stats']}):
    found, statistics = run(model, variables, user, items, prompts, **kwargs)
    expected, bare = run(model, variables, **kwargs)
    np.testing.assert_array_equal(found.logit[~PADDED], expected.logit[~PADDED])
    jax.tree.map(np.testing.assert_array_equal, statistics, bare)


def test_padding_equals_a_smaller_batch():
  model = make('pal_b', batch_norm=True)
  variables = draw(model)
  found, statistics = run(model, variables, mask=~PADDED, **TRAIN)
  expected, bare = run(
    model, variables, USER[:6], ITEMS[:6], PROMPTS[:6], **TRAIN
  )
  np.testing.assert_allclose(
    found.logit[:6], expected.logit, rtol=1e-3, atol=1e-4
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    statistics,
    bare,
  )


# The linear identity.


@pytest.mark.parametrize('form', ['Pw', 'f(P)w', '|f(P)|w', 'pal_b'])
@pytest.mark.parametrize('preference', ['squared_distance', 'inner_product'])
def test_logit_is_linear_in_the_weights(form, preference):
  model = make(form, preference=preference)
  variables = draw(model)
  x = model.apply(variables, ITEMS, method='embed')
  basis = model.apply(variables, PROMPTS, method='basis')
  delta = model.apply(variables, x, basis, method='deltas')
  assert delta.shape == (B, K)
  out = run(model, variables)
  np.testing.assert_allclose(
    out.logit,
    (np.exp(out.log_weights) * delta).sum(-1),
    rtol=1e-3,
    atol=1e-4,
  )


def test_logit_of_f_of_a_mixture_is_not_linear():
  model = make('f(Pw)')
  variables = draw(model)
  x = model.apply(variables, ITEMS, method='embed')
  basis = model.apply(variables, PROMPTS, method='basis')
  delta = model.apply(variables, x, basis, method='deltas')
  out = run(model, variables)
  assert (
    np.abs(out.logit - (np.exp(out.log_weights) * delta).sum(-1)).max() > 1e-2
  )


@every_form
@every_membership
def test_pieces_equal_the_whole(form, membership):
  """Adaptation and evaluation use `logits`; training uses `__call__`."""
  model, variables, expected = evaluated(form, membership)
  x = model.apply(variables, ITEMS, method='embed')
  basis = model.apply(variables, PROMPTS, method='basis')
  log_w = model.apply(variables, USER, method='user_log_weights')
  found = model.apply(
    variables, log_w, x, basis, model.evaluation_rule, method='logits'
  )
  np.testing.assert_allclose(found, expected.logit, rtol=1e-4, atol=1e-5)


def test_rules_of_the_memberships():
  rules = {
    membership: (
      make('Pw', membership).training_rule,
      make('Pw', membership).evaluation_rule,
      make('Pw', membership).adaptation_rule,
    )
    for membership in MEMBERSHIPS
  }
  mixture = ('mixture', 'mixture', 'mixture')
  assert rules == {
    'convex': ('convex', 'convex', 'convex'),
    'partition': ('convex', 'argmax', 'mixture'),
    'gumbel': ('convex', 'argmax', 'mixture'),
    'comparison level': mixture,
    'user level': mixture,
  }


# Users.


@every_form
@pytest.mark.parametrize(
  'membership', ['convex', 'partition', 'comparison level']
)
def test_an_unknown_user_is_nan_and_never_another(form, membership):
  model, variables, expected = evaluated(form, membership)
  unknown = np.arange(B) % 2 == 0
  user = USER.copy()
  user[unknown] = [-1, U, -U, -7, 2**31 - 1]
  found = run(model, variables, user)
  np.testing.assert_array_equal(np.isnan(found.logit), unknown)
  np.testing.assert_array_equal(np.isnan(found.log_weights).all(-1), unknown)
  np.testing.assert_array_equal(found.logit[~unknown], expected.logit[~unknown])


def test_the_user_level_gives_everybody_the_class_prior():
  model = make('Pw', 'user level')
  variables = draw(model)
  assert 'user_logits' not in variables['params']
  found = run(model, variables, np.arange(B) - 2).log_weights
  logits = variables['params']['class_logits']
  for row in found:
    np.testing.assert_allclose(np.exp(row), softmax(logits), rtol=1e-5)


@pytest.mark.parametrize('form', ['f(Pw)', 'pal_b'])
def test_only_a_users_own_row_has_a_gradient(form):
  model = make(form)
  variables = draw(model)

  def total(logits):
    out = run(model, changed(variables, user_logits=logits), np.full(B, 3))
    return out.logit @ jnp.arange(1.0, B + 1)

  gradient = jax.jit(jax.grad(total))(variables['params']['user_logits'])
  assert np.abs(gradient[3]).max() > 1e-4
  np.testing.assert_array_equal(np.delete(gradient, 3, axis=0), 0.0)


def test_weights_are_a_softmax_of_logits_over_the_temperature():
  model = make('Pw')
  variables = draw(model)
  logits = variables['params']['user_logits']
  for s in (-2.0, 0.0, 1.5):
    other = changed(variables, log_temperature=np.float32(s))
    found = np.exp(model.apply(other, USER, method='user_log_weights'))
    for row, user in zip(found, USER, strict=True):
      np.testing.assert_allclose(
        row, softmax(logits[user] / np.exp(s)), rtol=1e-4, atol=1e-6
      )


def test_temperature_is_positive_whatever_its_parameter():
  model = make('Pw', projector='mlp0')
  variables = draw(model)

  @jax.jit
  def total(params):
    return run(model, {'params': params}).logit.sum()

  gradient_of = jax.jit(jax.grad(total))
  for s in (-1e3, -50.0, 0.0, 50.0):
    other = changed(variables, log_temperature=jnp.float32(s))
    assert float(model.apply(other, method='temperature')) > 0
    assert np.isfinite(total(other['params']))
    gradient = gradient_of(other['params'])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  ('s', 'expected'),
  [(-1e3, 0.0), (0.0, 1.0), (4.0, np.exp(4.0)), (4.7, 100.0), (1e3, 100.0)],
)
def test_scale_is_exp_and_at_most_100(s, expected):
  model = make('Pw', preference='cosine')
  variables = changed(draw(model), log_scale=jnp.float32(s))
  tau = float(model.apply(variables, method='scale'))
  assert tau == pytest.approx(expected, rel=1e-5)
  assert tau <= 100.0
  assert np.abs(run(model, variables).logit).max() <= 200.0


def test_scale_multiplies_rewards_and_may_be_held():
  for learn in (True, False):
    model = make('Pw', learn_scale=learn)
    variables = draw(model)
    double = changed(variables, log_scale=np.float32(0.4 + np.log(2)))
    np.testing.assert_allclose(
      run(model, double).logit, 2 * run(model, variables).logit, rtol=1e-4
    )
    gradient = jax.grad(
      lambda s, m=model, v=variables: jnp.abs(
        run(m, changed(v, log_scale=s)).logit
      ).sum()
    )(jnp.float32(0.4))
    assert (float(gradient) != 0.0) == learn


# Initial values.


def initialise(model):
  return jax.jit(model.init)(
    jax.random.key(0),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 2, D)),
    jnp.zeros((1, D)),
  )['params']


def test_pal_a_starts_where_the_method_says():
  model = make(
    'Pw', 'user level', preference='distance', projector='identity', width=D
  )
  params = initialise(model)
  assert params['prototypes'].shape == (K, D)
  np.testing.assert_allclose(
    np.linalg.norm(params['prototypes'], axis=-1), 1.0, rtol=1e-5
  )
  assert float(params['log_scale']) == 0.0
  np.testing.assert_array_equal(params['class_logits'], 0.0)


def test_pal_b_starts_with_different_projectors():
  model = make(
    'pal_b',
    preference='cosine',
    projector='mlp0',
    num_users=400,
    init_user_scale=0.1,
  )
  params = initialise(model)
  assert float(params['log_scale']) == pytest.approx(np.log(1 / 0.07))
  assert float(params['log_temperature']) == 0.0
  assert np.std(params['user_logits']) == pytest.approx(0.1, rel=0.1)
  kernel = params['prompt_projectors']['Dense_0']['kernel']
  assert kernel.shape == (K, D, P)
  for k in range(K):
    for j in range(k):
      assert np.abs(kernel[k] - kernel[j]).max() > 0.1


@pytest.mark.parametrize('point', POINTS)
def test_prototypes_live_where_the_point_says(point):
  params = draw(make(point))['params']
  width = P if point == 'Pw' else D
  assert params['prototypes'].shape == (K, width)


# PAL-A.


@pytest.mark.parametrize('point', POINTS)
def test_pal_a_ignores_the_prompt(point):
  model = make(point)
  variables = draw(model)
  np.testing.assert_array_equal(
    run(model, variables).logit,
    run(model, variables, prompts=PROMPTS * np.nan).logit,
  )


@pytest.mark.parametrize('point', ['f(P)w', 'f(Pw)', '|f(P)|w'])
def test_prototypes_and_candidates_share_one_projector(point):
  """The same network, once in the parameters: no step is taken twice."""
  model = make(point)
  variables = draw(model)
  assert set(variables['params']) == {
    'projector',
    'prototypes',
    'user_logits',
    'log_scale',
    'log_temperature',
  }
  # A candidate whose features are a user's prototype is at its ideal point.
  if point != '|f(P)|w':
    logits = np.full((U, K), -1e4, np.float32)
    logits[:, 1] = 0.0
    vertex = changed(variables, user_logits=logits)
    items = ITEMS.copy()
    items[:, 0] = variables['params']['prototypes'][1]
    x = model.apply(vertex, items, method='embed')
    delta = run(model, vertex, items=items)
    scale = np.exp(0.4)
    gap = ((x[:, 1] - x[:, 0]) ** 2).sum(-1)
    np.testing.assert_allclose(delta.logit, scale * gap, rtol=1e-4)


@pytest.mark.parametrize('point', ['f(P)w', 'f(Pw)', '|f(P)|w'])
def test_prototypes_stay_out_of_the_batch_statistics(point):
  model = make(point, batch_norm=True)
  variables = draw(model)
  other = changed(
    variables, prototypes=variables['params']['prototypes'] + 100.0
  )
  _, first = run(model, variables, **TRAIN)
  _, second = run(model, other, **TRAIN)
  jax.tree.map(np.testing.assert_array_equal, first, second)


# PAL-B.


def test_pal_b_has_k_independent_projectors_of_the_prompt():
  model = make('pal_b')
  variables = draw(model)
  basis = model.apply(variables, PROMPTS, method='basis')
  assert basis.shape == (B, K, P)
  maps = variables['params']['prompt_projectors']
  for k in range(K):
    own = {'params': jax.tree.map(lambda leaf, k=k: leaf[k], maps)}
    expected = Projector(P, kind='mlp1', activation='relu').apply(own, PROMPTS)
    np.testing.assert_allclose(basis[:, k], expected, rtol=1e-4, atol=1e-5)
  other = jax.tree.map(np.array, maps)
  other['Dense_0']['kernel'][1] += 1.0
  moved = model.apply(
    changed(variables, prompt_projectors=other), PROMPTS, method='basis'
  )
  np.testing.assert_array_equal(moved[:, [0, 2]], basis[:, [0, 2]])
  assert np.abs(moved[:, 1] - basis[:, 1]).max() > 1e-2


@every_form
@every_membership
def test_other_rows_of_the_batch_change_nothing(form, membership):
  """User i is scored with prompt i and items i only."""
  model, variables, expected = evaluated(form, membership)
  other = np.isin(np.arange(B), [0, 3])
  found = run(
    model,
    variables,
    np.where(other, (USER + 1) % U, USER),
    ITEMS + other[:, None, None].astype(np.float32),
    PROMPTS - other[:, None].astype(np.float32),
  )
  np.testing.assert_array_equal(found.logit != expected.logit, other)


@every_membership
def test_pal_b_uses_each_rows_own_prompt(membership):
  """No row's prompt routes the whole batch, nor does a mean of them."""
  model, variables, expected = evaluated('pal_b', membership)
  for row in (0, 4, B - 1):
    prompts = np.tile(PROMPTS[row], (B, 1))
    found = run(model, variables, prompts=prompts)
    np.testing.assert_array_equal(
      found.logit == expected.logit, np.arange(B) == row
    )


@pytest.mark.parametrize('form', ['f(Pw)', 'pal_b'])
def test_one_prototype_is_homogeneous_under_every_membership(form):
  """So the ablation over K compares like with like."""
  logits = []
  for membership in MEMBERSHIPS:
    model = make(form, membership, num_prototypes=1)
    variables = changed(draw(model), **_shared(form))
    logits.append(np.asarray(run(model, variables).logit))
    logits.append(np.asarray(run(model, variables, (USER + 1) % U).logit))
  for logit in logits[1:]:
    np.testing.assert_allclose(logit, logits[0], rtol=1e-4, atol=1e-5)


@functools.cache
def _shared(form):
  params = draw(make(form, num_prototypes=1))['params']
  names = {'projector', 'prompt_projectors', 'prototypes', 'log_scale'}
  return {name: params[name] for name in names & set(params)}


# Projector fields.


@every_form
def test_identity_and_residual_need_equal_widths(form):
  for fields in ({'projector': 'identity'}, {'residual': True}):
    with pytest.raises(InputError, match=f'width={P}.*D={D}'):
      draw(make(form, **fields))


@every_form
def test_identity_places_candidates_where_they_are(form):
  model = make(form, projector='identity', width=D)
  variables = draw(model)
  assert 'projector' not in variables['params']
  x = model.apply(variables, ITEMS, method='embed')
  np.testing.assert_array_equal(x, ITEMS)
  if form == 'pal_b':
    basis = model.apply(variables, PROMPTS, method='basis')
    np.testing.assert_array_equal(basis, np.repeat(PROMPTS[:, None], K, 1))
  assert np.isfinite(run(model, variables).logit).all()


def test_with_identity_three_points_are_one():
  logits = []
  for form in ('Pw', 'f(P)w', 'f(Pw)'):
    model = make(form, projector='identity', width=D)
    logits.append(run(model, draw(model)).logit)
  np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5)
  np.testing.assert_allclose(logits[2], logits[0], rtol=1e-5)


@every_form
def test_residual_and_no_bias_reach_every_projector(form):
  model = make(form, residual=True, width=D, use_bias=False)
  variables = draw(model)
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(variables)
  ]
  assert not any('bias' in name for name in names)
  zero = copy.deepcopy(variables)
  for name in ('projector', 'prompt_projectors'):
    if name in zero['params']:
      zero['params'][name] = jax.tree.map(np.zeros_like, zero['params'][name])
  np.testing.assert_array_equal(model.apply(zero, ITEMS, method='embed'), ITEMS)
  if form == 'pal_b':
    np.testing.assert_array_equal(
      model.apply(zero, PROMPTS, method='basis')[:, 1], PROMPTS
    )


@every_form
def test_dropout_only_in_training(form):
  model = make(form, dropout=0.5)
  variables = draw(model)
  expected = run(make(form), variables).logit
  np.testing.assert_array_equal(run(model, variables).logit, expected)
  draws = [
    run(model, variables, train=True, rngs={'dropout': jax.random.key(i)}).logit
    for i in (0, 0, 1)
  ]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert np.abs(draws[0] - draws[2]).max() > 1e-3
  with pytest.raises(InvalidRngError):
    run(model, variables, train=True)


@pytest.mark.parametrize('point', POINTS)
def test_dropout_leaves_prototypes_alone(point):
  model = make(point, dropout=0.5)
  variables = draw(model)
  rngs = {'dropout': jax.random.key(0)}
  found = run(model, variables, train=True, rngs=rngs).norm
  np.testing.assert_array_equal(found, run(model, variables).norm)


def test_dropout_differs_between_prompt_projectors():
  model = make('pal_b', dropout=0.5, num_prototypes=2)
  variables = draw(model)
  maps = variables['params']['prompt_projectors']
  same = jax.tree.map(lambda leaf: np.stack([leaf[0]] * 2), maps)
  variables = changed(variables, prompt_projectors=same)
  basis = model.apply(
    variables,
    PROMPTS,
    True,
    method='basis',
    rngs={'dropout': jax.random.key(0)},
  )
  assert np.abs(basis[:, 0] - basis[:, 1]).max() > 1e-3


# Gumbel.


@every_form
def test_gumbel_noise_only_in_training(form):
  model = make(form, 'gumbel')
  variables = draw(model)
  # Evaluation needs no rng, and is the partition's arg-max.
  np.testing.assert_array_equal(
    run(model, variables).logit, run(make(form, 'partition'), variables).logit
  )
  with pytest.raises(InvalidRngError):
    run(model, variables, train=True)


@every_form
def test_gumbel_training_scores_at_a_vertex(form):
  model = make(form, 'gumbel')
  variables = draw(model)
  at = np.array(
    [
      [
        logit_at(form, 'squared_distance', variables['params'], e, row)
        for e in np.eye(K)
      ]
      for row in range(B)
    ]
  )
  seen = set()
  for seed in range(6):
    rngs = {'gumbel': jax.random.key(seed)}
    found = run(model, variables, train=True, rngs=rngs).logit
    gap = np.abs(np.asarray(found)[:, None] - at)
    np.testing.assert_allclose(gap.min(-1), 0.0, atol=5e-3 * np.abs(at).max())
    seen |= set(enumerate(gap.argmin(-1)))
  assert len(seen) > B  # not always the same vertex


@pytest.mark.parametrize('form', ['f(Pw)', 'pal_b'])
def test_gumbel_gradients_reach_the_users(form):
  model = make(form, 'gumbel')
  variables = draw(model)

  def total(logits):
    out = run(
      model,
      changed(variables, user_logits=logits),
      train=True,
      rngs={'gumbel': jax.random.key(0)},
    )
    return out.logit @ jnp.arange(1.0, B + 1)

  gradient = jax.jit(jax.grad(total))(variables['params']['user_logits'])
  assert np.isfinite(gradient).all()
  assert np.abs(gradient).max() > 1e-3


# Gradients where norms vanish.


@pytest.mark.parametrize('preference', ['distance', 'normalized_distance'])
def test_gradients_are_finite_at_the_ideal_point_and_at_zero(preference):
  model = make('Pw', preference=preference, projector='identity', width=D)
  variables = draw(model)
  logits = np.zeros((U, K), np.float32)
  logits[:, 1] = 1000.0
  variables = changed(variables, user_logits=logits)
  items = ITEMS.copy()
  items[:, 0] = variables['params']['prototypes'][1]
  items[0] = 0.0

  def total(params, items):
    out = run(model, {'params': params}, items=items)
    return jnp.sum(out.logit) + jnp.sum(out.norm)

  value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(
    variables['params'], items
  )
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


# Matryoshka.


@pytest.mark.parametrize('form', ['Pw', 'f(P)w', 'f(Pw)', 'pal_b'])
def test_a_prefix_is_a_smaller_model(form):
  """Cutting the output layer leaves a model of that width and logits."""
  model = make(form, projector='mlp0', matryoshka=(1, 2))
  variables = draw(model)
  found = run(model, variables)
  assert len(found.nested) == 2
  for width, logit in zip((1, 2), found.nested, strict=True):
    small = copy.deepcopy(variables)
    for name in ('projector', 'prompt_projectors'):
      if name in small['params']:
        small['params'][name] = jax.tree.map(
          lambda leaf, p=width: leaf[..., :p], small['params'][name]
        )
    if form == 'Pw':
      prototypes = small['params']['prototypes']
      small['params']['prototypes'] = prototypes[:, :width]
    expected = run(make(form, projector='mlp0', width=width), small).logit
    np.testing.assert_allclose(logit, expected, rtol=1e-4, atol=1e-5)
  plain = run(make(form, projector='mlp0'), variables)
  np.testing.assert_array_equal(found.logit, plain.logit)
  assert plain.nested == ()


# create.


def config_of(**fields):
  config = base.model()
  config.update({'num_prototypes': K, 'width': P, 'dropout': 0.0})
  config.update(fields)
  return config


@pytest.mark.parametrize(
  ('field', 'known'),
  [
    ('name', ('pal_a', 'pal_b')),
    ('point', POINTS),
    ('preference', PREFERENCES),
    ('membership', ('convex', 'partition', 'mixture_likelihood')),
    ('mixture_level', ('comparison', 'user')),
    ('activation', ('relu', 'gelu', 'linear')),
    ('compute_dtype', ('float32', 'bfloat16')),
    ('projector', ('identity', 'mlpN')),
  ],
)
def test_an_unknown_name_lists_the_known_ones(field, known):
  with pytest.raises(InputError) as error:
    models.create(config_of(**{field: 'wrong'}), num_users=U, feature_width=D)
  message = str(error.value)
  assert f"model.{field}='wrong'" in message
  assert all(repr(name) in message for name in known if name != 'mlpN')
  assert field != 'projector' or 'mlpN' in message


def test_more_prototypes_than_users_is_an_error():
  with pytest.raises(InputError, match='num_prototypes=6.*seen users, 5'):
    models.create(config_of(num_prototypes=6), num_users=5, feature_width=D)
  models.create(config_of(num_prototypes=5), num_users=5, feature_width=D)


@pytest.mark.parametrize(
  'fields',
  [
    {'num_prototypes': 0},
    {'width': 0},
    {'dropout': 1.0},
    {'dropout': -0.1},
    {'matryoshka': (0,)},
    {'matryoshka': (1, P)},
  ],
  ids=str,
)
def test_numbers_out_of_range_name_their_field(fields):
  (field,) = fields
  with pytest.raises(InputError, match=f'config.model.{field}='):
    models.create(config_of(**fields), num_users=U, feature_width=D)


@pytest.mark.parametrize('name', sorted(models.MODELS))
def test_create_hands_every_field_of_the_config_on(name):
  config = config_of(
    name=name,
    point='f(P)w',
    preference='cosine',
    membership='partition',
    mixture_level='user',
    gumbel=True,
    gumbel_temperature=0.5,
    projector='mlp1',
    activation='relu',
    dropout=0.25,
    residual=True,
    batch_norm=True,
    use_bias=False,
    learn_scale=False,
    init_user_scale=0.3,
    matryoshka=(1, 2),
  )
  model = models.create(config, num_users=U, feature_width=D, axis_name='b')
  assert isinstance(model, models.MODELS[name])
  assert (model.num_users, model.axis_name) == (U, 'b')
  for field, value in config.items():
    if field != 'name' and (field != 'point' or name == 'pal_a'):
      assert getattr(model, field) == value, field
  if name == 'pal_a':
    assert model.feature_width == D
  hash(model)  # a static argument of jit


def test_equal_configs_give_equal_models():
  """Or every call would trace again."""
  one, two = (
    models.create(config_of(matryoshka=(1, 2)), num_users=U, feature_width=D)
    for _ in range(2)
  )
  assert one == two and hash(one) == hash(two)
