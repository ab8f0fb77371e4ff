"""adaptation.adapt: new users of every kind, by both methods."""

import jax
import numpy as np
import pytest
from scipy.special import expit, logsumexp

from pal_jax.adaptation import (
  adapt,
  atom_logits,
  check_method,
  has_classes,
  is_linear,
  place,
  predict_users,
  score,
)
from pal_jax.adaptation.prior import vertices
from pal_jax.errors import InputError
from tests.adaptation import oracle
from tests.adaptation.oracle import K, N, U, fit, pal_a, pal_b

METHODS = ['map', 'posterior']


def class_prior(seed=0):
  """Atoms at the vertices, as `fit_prior` makes them for latent classes."""
  prior = oracle.make_prior(seed=seed)
  return prior.replace(log_atoms=vertices(K), log_masses=prior.log_weights)


# Latent classes.

CLASSES = [
  pal_a(membership='partition'),
  pal_a('f(Pw)', 'mlp1', membership='mixture_likelihood', mixture_level='user'),
  pal_b(membership='partition', preference='distance'),
]


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('model', CLASSES, ids=range(len(CLASSES)))
def test_latent_classes_have_the_posterior_of_bayes_rule(model, method):
  """Whatever the method: they have no point estimate."""
  variables, table = oracle.variables_of(model), oracle.make_table()
  c, prior = oracle.make_comparisons(), class_prior()
  users = fit(model, variables, c, prior, method=method)
  pi = np.exp(np.asarray(prior.log_masses, float))
  for user in range(U):
    logits = oracle.numpy_logits(model, variables, table, c, user)
    y = c.label[user][c.mask[user]].astype(float)
    posterior = pi.copy()
    for k in range(K):
      for z, label in zip(logits(np.eye(K)[k]), y, strict=True):
        posterior[k] *= expit(z) ** label * expit(-z) ** (1 - label)
    np.testing.assert_allclose(
      users.objective[user], -np.log(posterior.sum()), rtol=1e-4, atol=1e-5
    )
    posterior /= posterior.sum()
    for found in (users.log_weights, users.log_belief):
      np.testing.assert_allclose(
        np.exp(found[user]), posterior, rtol=5e-4, atol=1e-6
      )
  assert np.all(users.converged) and np.all(users.gap == 0)
  assert np.all(users.iterations == 0) and np.all(users.residual == 0)


def test_a_posterior_of_many_strong_comparisons_does_not_underflow():
  model = pal_a(membership='partition')
  variables = oracle.variables_of(model)
  variables['params']['prototypes'] *= 100
  c = oracle.make_comparisons()
  users = fit(model, variables, c, class_prior())
  assert np.all(np.isfinite(users.log_weights))
  np.testing.assert_allclose(np.exp(users.log_weights).sum(-1), 1, atol=1e-5)


def test_strong_evidence_against_every_class_is_still_weighed():
  """A confident answer that no class explains must not count for all alike."""
  model = pal_a(membership='partition', preference='inner_product')
  variables = oracle.variables_of(model)
  variables['params']['log_scale'] = np.float32(0)
  variables['params']['prototypes'] = np.float32(50 * np.eye(K, oracle.P))
  table = oracle.make_table()
  table.items[:4] = 0
  table.items[0, :K] = [-2.0, 2.0, 2.0]  # first, against nothing
  table.items[1, :K] = [1.6, -1.6, -1.6]
  c = oracle.make_comparisons()
  c.items[:] = [0, 3]
  c.items[:, 1] = [1, 3]
  c = c.replace(
    label=np.ones((U, N), np.float32), mask=np.tile(np.arange(N) < 2, (U, 1))
  )
  # Class 0 is surprised by exp(-100) once, the others by exp(-80).
  users = fit(model, variables, c, class_prior(), table)
  log_prior = np.asarray(class_prior().log_masses, float)
  expected = log_prior + [-100, -80, -80]
  np.testing.assert_allclose(
    users.log_belief[0], expected - logsumexp(expected), atol=0.01
  )


@pytest.mark.parametrize(
  'fields, classes',
  [
    ({'membership': 'convex'}, False),
    ({'membership': 'partition'}, True),
    ({'membership': 'mixture_likelihood'}, False),
    ({'membership': 'mixture_likelihood', 'mixture_level': 'user'}, True),
    ({'membership': 'convex', 'mixture_level': 'user'}, False),
  ],
)
def test_which_models_have_classes(fields, classes):
  assert has_classes(pal_a(**fields)) == classes


# Everyone else. `statistics_test` has every form; these go all the way.

LINEAR = [pal_a(), pal_a('|f(P)|w', 'mlp1', preference='inner_product')]
NONLINEAR = [pal_a('f(P)w', 'mlp1', preference='distance')]
MIXTURE = pal_a(membership='mixture_likelihood')
ALL = [LINEAR[0], *NONLINEAR, MIXTURE]


def test_which_forms_are_linear():
  assert all(is_linear(model, 'convex') for model in LINEAR)
  assert is_linear(pal_b(), 'convex')
  assert not any(is_linear(model, 'convex') for model in NONLINEAR)
  assert not is_linear(pal_a('f(Pw)'), 'convex')
  assert not is_linear(pal_a(), 'mixture')


@pytest.mark.parametrize('model', ALL, ids=range(len(ALL)))
def test_the_point_estimate_is_the_minimum_of_the_objective(model):
  variables, table = oracle.variables_of(model), oracle.make_table()
  c, prior = oracle.make_comparisons(), oracle.make_prior()
  users = fit(model, variables, c, prior, method='map')
  assert np.all(users.converged) and users.log_belief is None
  for user in range(U):
    problem = oracle.problem_of(
      model, variables, table, c, prior, user, model.adaptation_rule
    )
    value = problem.value(oracle.log_weights_64(users, user))
    np.testing.assert_allclose(
      users.objective[user], value, rtol=1e-4, atol=1e-5
    )
    assert value <= problem.minimum([problem.log_prior]) + 1e-4


@pytest.mark.parametrize('model', ALL, ids=range(len(ALL)))
def test_the_posterior_is_bayes_rule_over_the_atoms(model):
  variables, table = oracle.variables_of(model), oracle.make_table()
  c = oracle.make_comparisons()
  for evidence in (1.0, 2.5):
    prior = oracle.make_prior(evidence=evidence)
    users = fit(model, variables, c, prior, method='posterior')
    atoms = np.exp(np.asarray(prior.log_atoms, float))
    for user in range(U):
      logits = oracle.numpy_logits(
        model, variables, table, c, user, model.adaptation_rule
      )
      y = c.label[user][c.mask[user]].astype(float)
      likelihood = np.array(
        [-oracle.negative_log_likelihood(logits(w), y).sum() for w in atoms]
      )
      masses = np.asarray(prior.log_masses, float)
      belief = masses + evidence * likelihood
      belief = np.exp(belief - logsumexp(belief))
      np.testing.assert_allclose(
        np.exp(users.log_belief[user]), belief, atol=2e-4
      )
      np.testing.assert_allclose(
        np.exp(users.log_weights[user]), belief @ atoms, atol=2e-4
      )
      np.testing.assert_allclose(
        users.objective[user],
        -logsumexp(masses + likelihood),
        rtol=1e-4,
        atol=1e-5,
      )
  assert np.all(users.converged) and np.all(users.gap == 0)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('model', [CLASSES[0], LINEAR[0], NONLINEAR[0]])
def test_a_user_without_comparisons_is_the_population(model, method):
  variables = oracle.variables_of(model)
  prior = class_prior() if has_classes(model) else oracle.make_prior()
  c = oracle.make_comparisons()
  c = c.replace(mask=np.zeros((U, N), bool))
  users = fit(model, variables, c, prior, method=method)
  expected = np.exp(prior.log_weights)
  if users.log_belief is not None:
    np.testing.assert_allclose(
      users.log_belief, np.tile(prior.log_masses, (U, 1)), atol=1e-5
    )
    expected = np.exp(prior.log_masses) @ np.exp(prior.log_atoms)
  np.testing.assert_allclose(
    np.exp(users.log_weights), np.tile(expected, (U, 1)), atol=1e-6
  )
  assert np.all(users.converged) and np.all(users.iterations == 0)


@pytest.mark.parametrize(
  'model, method', [(CLASSES[0], 'posterior'), (LINEAR[0], 'map')]
)
def test_users_fitted_together_are_those_fitted_one_at_a_time(model, method):
  variables, prior = oracle.variables_of(model), oracle.make_prior()
  c = oracle.make_comparisons()
  together = fit(model, variables, c, prior, method=method)
  for user in (3, U - 1):
    alone = fit(model, variables, c[user : user + 1], prior, method=method)
    np.testing.assert_allclose(
      np.exp(alone.log_weights[0]),
      np.exp(together.log_weights[user]),
      atol=1e-4,
    )
    np.testing.assert_allclose(
      alone.objective[0], together.objective[user], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('model', [CLASSES[0], LINEAR[0], NONLINEAR[0]])
def test_what_is_masked_changes_nothing(model, method):
  variables, prior = oracle.variables_of(model), oracle.make_prior()
  c = oracle.make_comparisons()
  users = fit(model, variables, c, prior, method=method)
  other = c.replace(
    label=np.where(c.mask, c.label, np.nan),
    items=np.where(c.mask[..., None], c.items, c.items[..., ::-1] * 0 + 1),
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    users,
    fit(model, variables, other, prior, method=method),
  )


def test_too_few_iterations_are_flagged():
  model = pal_a()
  variables, prior = oracle.variables_of(model), oracle.make_prior()
  c = oracle.make_comparisons()
  users = fit(model, variables, c, prior, max_iterations=0)
  np.testing.assert_array_equal(
    np.asarray(users.converged), [True] + [False] * (U - 1)
  )


@pytest.mark.parametrize('method', ['MAP', '', 'closed form', None])
def test_an_unknown_method_is_refused(method):
  with pytest.raises(InputError, match='method'):
    check_method(method)
  with pytest.raises(InputError, match='posterior'):
    adapt(None, None, None, None, None, None, method=method)


# Predictions.


@pytest.mark.parametrize('model', [LINEAR[0], NONLINEAR[0], MIXTURE])
def test_predictions_plug_in_the_point_estimate(model):
  variables, c = oracle.variables_of(model), oracle.make_comparisons()
  query, prior = oracle.make_comparisons(1), oracle.make_prior()
  users = fit(model, variables, c, prior, method='map')
  stats = oracle.reduce(model, variables, query)
  z = predict_users(model, variables, users, stats, prior)
  query = query.replace(mask=np.ones((U, N), bool))
  for user in range(U):
    logits = oracle.numpy_logits(
      model,
      variables,
      oracle.make_table(),
      query,
      user,
      model.adaptation_rule,
    )
    expected = logits(np.exp(oracle.log_weights_64(users, user)))
    np.testing.assert_allclose(z[user], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('model', [LINEAR[0], NONLINEAR[0], CLASSES[0]])
def test_predictions_integrate_over_the_belief(model):
  variables, c = oracle.variables_of(model), oracle.make_comparisons()
  query = oracle.make_comparisons(1)
  prior = class_prior() if has_classes(model) else oracle.make_prior()
  users = fit(model, variables, c, prior, method='posterior')
  stats = oracle.reduce(model, variables, query)
  rule = model.adaptation_rule
  each = np.float64(atom_logits(model, variables, rule, prior.log_atoms, stats))
  belief = np.exp(np.float64(users.log_belief))[:, None]
  p, q = (np.sum(expit(s * each) * belief, -1) for s in (1, -1))
  for pooling in (0.0, 0.3):
    pooled = prior.replace(pooling=np.float32(pooling))
    z = predict_users(model, variables, users, stats, pooled)
    expected = (1 - pooling) * np.log(p / q)
    expected += pooling * np.sum(each * belief, -1)
    np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-3)


def test_adaptation_finds_planted_users_and_scores_by_their_weights():
  model = pal_a()
  variables, table = oracle.variables_of(model), oracle.make_table()
  variables['params']['prototypes'] *= 3
  planted = np.eye(K)[np.arange(U) % K]
  c = oracle.make_comparisons()
  c = c.replace(mask=np.ones((U, N), bool))
  z = [
    oracle.numpy_logits(model, variables, table, c, i)(w)
    for i, w in enumerate(planted)
  ]
  c = c.replace(label=np.float32(np.array(z) > 0))
  users = fit(model, variables, c, oracle.make_prior(0.1), method='map')
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
    expected = oracle.numpy_logits(model, variables, table, c, i)(w)
    np.testing.assert_allclose(z[i], expected, rtol=1e-3, atol=1e-3)
