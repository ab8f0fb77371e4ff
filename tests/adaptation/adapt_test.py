"""adaptation.adapt: new users of every form, and the prior's strength."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import erf, expit, log_softmax

from pal_jax.adaptation import (
  Prior,
  adapt,
  choose_strength,
  has_closed_form,
  is_linear,
  place,
  score,
  statistics,
)
from pal_jax.ideal_points import PREFERENCES
from pal_jax.models.pal_a import POINTS, PalA
from pal_jax.models.pal_b import PalB
from pal_jax.structs import Comparisons, FeatureTable

K, P, M, Q, U, N = 3, 4, 30, 5, 6, 12
TAU = 0.7


def make_model(cls=PalA, **fields):
  return cls(num_users=U, num_prototypes=K, width=P, **fields)


def variables_of(model, seed=0):
  """Random parameters, prototypes far enough apart to matter."""
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    np.zeros(2, np.int32),
    np.zeros((2, 2, P), np.float32),
    np.zeros((2, P), np.float32),
  )
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: np.float32(rng.normal(size=x.shape)), shapes['params']
  )
  params['log_scale'] = np.float32(np.log(TAU))
  return {'params': params}


def pal_a(point='Pw', projector='identity', **fields):
  return make_model(point=point, feature_width=P, projector=projector, **fields)


def make_table(seed=0):
  rng = np.random.default_rng([seed, 1])
  return FeatureTable(
    items=np.float32(rng.normal(size=(M, P))),
    prompts=np.float32(rng.normal(size=(Q, P))),
  )


def make_comparisons(seed=0, users=U, n=N):
  """[U, N] with soft labels among hard ones, and from 0 to N that count."""
  rng = np.random.default_rng([seed, 2])
  items = np.argsort(rng.random((users, n, M)), -1)[..., :2]
  label = rng.integers(0, 2, (users, n)).astype(np.float32)
  label[:, ::5] = rng.random(label[:, ::5].shape)
  count = np.linspace(0, n, users).astype(int)
  return Comparisons(
    user=np.broadcast_to(np.arange(users, dtype=np.int32)[:, None], (users, n)),
    prompt=rng.integers(0, Q, (users, n)).astype(np.int32),
    items=items.astype(np.int32),
    label=label,
    weight=np.ones((users, n), np.float32),
    mask=np.arange(n) < count[:, None],
  )


def make_prior(strength=0.5, seed=0):
  rng = np.random.default_rng([seed, 3])
  log_prior = log_softmax(rng.normal(size=K))
  return Prior(jnp.float32(log_prior), jnp.float32(strength))


def fit(model, variables, c, prior, table=None, **kwargs):
  placed = place(model, variables, table or make_table())
  stats = statistics(model, variables, placed, c, model.adaptation_rule)
  return adapt(
    model,
    variables,
    stats,
    jnp.asarray(c.label),
    jnp.asarray(c.mask),
    prior,
    **kwargs,
  )


# What the models say, written again in numpy.


def numpy_reward(preference, x, u):
  if preference == 'squared_distance':
    return -np.sum((x - u) ** 2, -1)
  if preference == 'distance':
    return -np.linalg.norm(x - u, axis=-1)
  if preference == 'inner_product':
    return np.sum(x * u, -1)
  x = x / np.linalg.norm(x, axis=-1, keepdims=True)
  u = u / np.linalg.norm(u, axis=-1, keepdims=True)
  if preference == 'cosine':
    return np.sum(x * u, -1)
  return -np.linalg.norm(x - u, axis=-1)


def numpy_mlp(params, h):
  for layer in range(len(params)):
    if layer:
      h = 0.5 * h * (1 + erf(h / np.sqrt(2)))
    dense = params[f'Dense_{layer}']
    h = h @ dense['kernel'] + dense['bias']
  return h


def numpy_logits(model, variables, table, c, user):
  """w [K] -> logits [n] of one user's unmasked comparisons, in float64."""
  params = jax.tree.map(lambda x: np.asarray(x, float), variables['params'])
  live = c.mask[user]

  def f(h):
    if model.projector == 'identity':
      return h
    return numpy_mlp(params['projector'], h)

  x = f(np.asarray(table.items, float))[c.items[user][live]]

  def logits(w):
    if isinstance(model, PalB):
      maps = params['prompt_projectors']
      kernel, bias = maps['Dense_0']['kernel'], maps['Dense_0']['bias']
      h = np.asarray(table.prompts, float)[c.prompt[user][live]]
      g = np.einsum('nd,kdp->nkp', h, kernel) + bias
      u = np.einsum('k,nkp->np', w, g)
    else:
      p = params['prototypes']
      if model.point == 'f(Pw)':
        u = f(w @ p)
      elif model.point == 'f(P)w':
        u = w @ f(p)
      elif model.point == '|f(P)|w':
        placed = f(p)
        u = w @ (placed / np.linalg.norm(placed, axis=-1, keepdims=True))
      else:
        u = w @ p
      u = np.broadcast_to(u, (len(x), P))
    r = numpy_reward(model.preference, x, u[:, None])
    return TAU * (r[:, 0] - r[:, 1])

  return logits


def numpy_objective(logits, label, log_prior, strength):
  def value(theta):
    log_w = log_softmax(theta)
    z = logits(np.exp(log_w))
    loss = label * np.logaddexp(0, -z) + (1 - label) * np.logaddexp(0, z)
    kl = np.sum(np.exp(log_w) * (log_w - log_prior))
    return loss.sum() + strength * kl

  return value


def objective_of(model, variables, table, c, prior, user):
  return numpy_objective(
    numpy_logits(model, variables, table, c, user),
    c.label[user][c.mask[user]].astype(float),
    log_softmax(np.asarray(prior.log_weights, float)),
    float(prior.strength),
  )


# Latent classes, in closed form.

CLASSES = [
  pal_a(membership='partition'),
  pal_a('f(Pw)', 'mlp1', membership='mixture_likelihood', mixture_level='user'),
  make_model(
    PalB, projector='mlp0', membership='partition', preference='distance'
  ),
]


@pytest.mark.parametrize('model', CLASSES, ids=range(len(CLASSES)))
def test_latent_classes_have_the_posterior_of_bayes_rule(model):
  variables, table = variables_of(model), make_table()
  c, prior = make_comparisons(), make_prior()
  users = fit(model, variables, c, prior)
  pi = np.exp(np.asarray(prior.log_weights, float))
  for user in range(U):
    logits = numpy_logits(model, variables, table, c, user)
    y = c.label[user][c.mask[user]].astype(float)
    posterior = pi.copy()
    for k in range(K):
      for z, label in zip(logits(np.eye(K)[k]), y, strict=True):
        posterior[k] *= expit(z) ** label * expit(-z) ** (1 - label)
    posterior /= posterior.sum()
    np.testing.assert_allclose(
      np.exp(users.log_weights[user]), posterior, rtol=2e-4, atol=1e-6
    )
  assert np.all(users.converged) and np.all(users.gap == 0)
  assert np.all(users.iterations == 0)


def test_a_posterior_of_many_strong_comparisons_does_not_underflow():
  model = pal_a(membership='partition')
  variables = variables_of(model)
  variables['params']['prototypes'] *= 100
  c = make_comparisons()
  users = fit(model, variables, c, make_prior())
  assert np.all(np.isfinite(users.log_weights))
  np.testing.assert_allclose(np.exp(users.log_weights).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
  'fields, closed',
  [
    ({'membership': 'convex'}, False),
    ({'membership': 'partition'}, True),
    ({'membership': 'mixture_likelihood'}, False),
    ({'membership': 'mixture_likelihood', 'mixture_level': 'user'}, True),
    ({'membership': 'convex', 'mixture_level': 'user'}, False),
  ],
)
def test_which_models_have_a_closed_form(fields, closed):
  assert has_closed_form(pal_a(**fields)) == closed


# Point estimates.

LINEAR = [
  pal_a(),
  pal_a('|f(P)|w', 'mlp1', preference='inner_product'),
]
NONLINEAR = [
  pal_a('f(P)w', 'mlp1', preference='distance'),
  pal_a('f(Pw)', 'mlp1', preference='cosine'),
  make_model(PalB, projector='mlp0', preference='normalized_distance'),
]


def test_which_forms_are_linear():
  assert all(is_linear(model, 'convex') for model in LINEAR)
  assert is_linear(make_model(PalB), 'convex')
  assert not any(is_linear(model, 'convex') for model in NONLINEAR)
  assert not is_linear(pal_a('f(Pw)'), 'convex')
  assert not is_linear(pal_a(), 'mixture')


@pytest.mark.parametrize(
  'model', [*LINEAR, *NONLINEAR], ids=range(len(LINEAR) + len(NONLINEAR))
)
def test_the_fit_is_as_good_as_optimising_through_the_model(model):
  """The oracle knows nothing of statistics, log-weights or Newton."""
  variables, table = variables_of(model), make_table()
  c, prior = make_comparisons(), make_prior()
  users = fit(model, variables, c, prior)
  assert np.all(users.converged)
  for user in range(U):
    value = objective_of(model, variables, table, c, prior, user)
    theta = np.asarray(users.log_weights[user], float)
    np.testing.assert_allclose(
      users.objective[user], value(theta), rtol=1e-4, atol=1e-4
    )
    best = min(
      minimize(value, start, method='BFGS', options={'gtol': 1e-6}).fun
      for start in (np.asarray(prior.log_weights), np.zeros(K))
    )
    assert value(theta) <= best + 1e-3
    # Stationary: no direction along the simplex leads down.
    for direction in (*np.eye(K), *-np.eye(K)):
      assert value(theta + 0.01 * direction) >= value(theta) - 1e-4


def test_comparison_level_mixtures_mix_likelihoods():
  model = pal_a(membership='mixture_likelihood')
  variables, table = variables_of(model), make_table()
  c, prior = make_comparisons(), make_prior()
  users = fit(model, variables, c, prior)
  for user in range(U):
    logits = numpy_logits(model, variables, table, c, user)
    each = np.stack([logits(vertex) for vertex in np.eye(K)], -1)

    def mixed(w, each=each):
      p = expit(each) @ w
      return np.log(p) - np.log1p(-p)

    label = c.label[user][c.mask[user]].astype(float)
    log_prior = np.asarray(prior.log_weights, float)
    value = numpy_objective(mixed, label, log_prior, 0.5)
    theta = np.asarray(users.log_weights[user], float)
    best = minimize(value, log_prior, method='BFGS').fun
    assert abs(value(theta) - best) < 1e-3
  assert np.all(users.converged)


@pytest.mark.parametrize('model', [CLASSES[0], LINEAR[0], NONLINEAR[1]])
def test_a_user_without_comparisons_is_the_population(model):
  variables, prior = variables_of(model), make_prior()
  c = make_comparisons()
  users = fit(model, variables, c.replace(mask=np.zeros((U, N), bool)), prior)
  np.testing.assert_allclose(
    users.log_weights, np.tile(prior.log_weights, (U, 1)), atol=1e-6
  )
  assert np.all(users.converged) and np.all(users.iterations == 0)


@pytest.mark.parametrize('model', [CLASSES[0], LINEAR[0]])
def test_users_fitted_together_are_those_fitted_one_at_a_time(model):
  variables, prior, c = variables_of(model), make_prior(), make_comparisons()
  together = fit(model, variables, c, prior)
  for user in (0, 3, U - 1):
    alone = fit(model, variables, c[user : user + 1], prior)
    np.testing.assert_allclose(
      np.exp(alone.log_weights[0]),
      np.exp(together.log_weights[user]),
      atol=1e-4,
    )
    np.testing.assert_allclose(
      alone.objective[0], together.objective[user], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize('model', [CLASSES[0], LINEAR[0], NONLINEAR[1]])
def test_what_is_masked_changes_nothing(model):
  variables, prior, c = variables_of(model), make_prior(), make_comparisons()
  users = fit(model, variables, c, prior)
  other = c.replace(
    label=np.where(c.mask, c.label, 1 - c.label),
    items=np.where(c.mask[..., None], c.items, c.items[..., ::-1] * 0 + 1),
  )
  jax.tree.map(
    np.testing.assert_array_equal, users, fit(model, variables, other, prior)
  )


def test_too_few_iterations_are_flagged():
  model = pal_a()
  variables, prior, c = variables_of(model), make_prior(), make_comparisons()
  users = fit(model, variables, c, prior, max_iterations=0)
  np.testing.assert_array_equal(
    np.asarray(users.converged), [True] + [False] * (U - 1)
  )


def test_adaptation_finds_planted_users_and_scores_by_their_weights():
  model = pal_a()
  variables, table = variables_of(model), make_table()
  variables['params']['prototypes'] *= 3
  planted = np.eye(K)[np.arange(U) % K]
  c = make_comparisons()
  c = c.replace(mask=np.ones((U, N), bool))
  z = [
    numpy_logits(model, variables, table, c, i)(w)
    for i, w in enumerate(planted)
  ]
  c = c.replace(label=np.float32(np.array(z) > 0))
  users = fit(model, variables, c, make_prior(0.1))
  np.testing.assert_array_equal(
    np.argmax(users.log_weights, -1), np.argmax(planted, -1)
  )
  placed = place(model, variables, table)
  z = np.asarray(
    score(model, variables, placed, users.log_weights, c, 'convex')
  )
  np.testing.assert_array_equal(z > 0, c.label == 1)
  for i in range(U):
    w = np.exp(np.asarray(users.log_weights[i], float))
    expected = numpy_logits(model, variables, table, c, i)(w)
    np.testing.assert_allclose(z[i], expected, rtol=1e-3, atol=1e-3)


# The strength of the prior.


def seen_comparisons(truth_weights, n=20, scale=3.0, seed=0):
  """Comparisons of seen users with these weights, labels without noise."""
  users = len(truth_weights)
  model = pal_a()
  variables = variables_of(model)
  variables['params']['prototypes'] *= scale
  table = make_table()
  sets = []
  for s in (seed, seed + 1):
    c = make_comparisons(s, users, n)
    c = c.replace(mask=np.ones((users, n), bool))
    z = [
      numpy_logits(model, variables, table, c, i)(w)
      for i, w in enumerate(truth_weights)
    ]
    sets.append(c.replace(label=np.float32(np.array(z) > 0)))
  return model, variables, place(model, variables, table), *sets


def test_only_seen_users_can_reach_the_choice_of_the_strength():
  names = list(inspect.signature(choose_strength).parameters)
  assert names[:6] == [
    'model',
    'variables',
    'placed',
    'support',
    'query',
    'log_prior',
  ]
  assert not {'unseen', 'dataset', 'truth'} & set(names)


@pytest.fixture(scope='module')
def vertices():
  return seen_comparisons(np.eye(K)[np.arange(U) % K])


def test_the_strength_is_the_lowest_of_the_grid_on_held_out_comparisons(
  vertices,
):
  model, variables, placed, support, query = vertices
  log_prior = jnp.log(jnp.full(K, 1 / K))
  grid, counts = (0.05, 0.5, 5.0), (1, 4, 1000)
  best, curve = choose_strength(
    *vertices, log_prior, counts=counts, strengths=grid
  )
  assert tuple(curve) == grid and best in grid
  assert curve[best] == min(curve.values())
  # By hand; a count that nobody has is left out.
  for strength, found in curve.items():
    losses = []
    for n in (1, 4):
      users = fit(
        model,
        variables,
        support.replace(mask=support.mask & (np.arange(20) < n)),
        Prior(log_prior, jnp.float32(strength)),
      )
      z = score(model, variables, placed, users.log_weights, query, 'convex')
      z, y = np.asarray(z, float), query.label
      losses.append(
        np.mean(y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))
      )
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-4)


def test_padded_queries_do_not_count(vertices):
  model, variables, placed, support, query = vertices
  log_prior = jnp.log(jnp.full(K, 1 / K))
  kwargs = {'counts': (4,), 'strengths': (0.5,)}
  mask = np.arange(20) < np.arange(5, 5 + U)[:, None]
  dirty = query.replace(
    mask=mask, label=np.where(mask, query.label, 1 - query.label)
  )
  args = (model, variables, placed, support)
  _, curve = choose_strength(
    *args, query.replace(mask=mask), log_prior, **kwargs
  )
  _, other = choose_strength(*args, dirty, log_prior, **kwargs)
  assert curve == other
  _, full = choose_strength(*args, query, log_prior, **kwargs)
  assert curve != full


def test_users_far_from_the_population_choose_a_weak_prior(vertices):
  log_prior = jnp.log(jnp.full(K, 1 / K))
  best, curve = choose_strength(*vertices, log_prior, counts=(5, 20))
  assert best <= 0.3
  assert curve[best] < curve[10.0] - 0.05


def test_users_like_the_population_choose_a_strong_prior():
  weights = np.array([0.6, 0.3, 0.1])
  model, variables, placed, support, query = seen_comparisons(
    np.tile(weights, (U, 1)), scale=1.0
  )
  flip = np.random.default_rng(0).random(support.shape) < 0.4
  noisy = np.where(flip, 1 - support.label, support.label)
  support = support.replace(label=np.float32(noisy))
  log_prior = jnp.log(weights)
  best, _ = choose_strength(model, variables, placed, support, query, log_prior)
  assert best >= 3.0


@pytest.mark.parametrize(
  'model',
  [
    pal_a(membership='partition'),
    pal_a(membership='mixture_likelihood', mixture_level='user'),
    PalA(num_users=U, num_prototypes=1, width=P, projector='identity'),
  ],
)
def test_there_is_no_strength_to_choose_without_a_point_estimate(model):
  assert choose_strength(model, None, None, None, None, None) == (1.0, {})


def test_all_forms_have_been_covered():
  """A new point or preference must join a list above."""
  fitted = [*LINEAR, *NONLINEAR]
  assert {m.point for m in fitted if isinstance(m, PalA)} == set(POINTS)
  assert {m.preference for m in fitted} == set(PREFERENCES)
