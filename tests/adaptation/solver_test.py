"""adaptation.solver: against references in float64, and its certificate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logsumexp, softmax

from pal_jax.adaptation import Statistics, fit_users, fit_weights
from pal_jax.adaptation.solver import CHUNK
from pal_jax.models.pal_a import PalA
from tests.adaptation.oracle import DeltaProblem, log_weights_64

AS_COMPILED = True  # rounding is what these tests are about
# One shape for nearly all problems, so that little is compiled.
COUNT = 40  # users
NUM = 50  # comparisons of a user, some of them padding
TOLERANCE = 1e-5
RULES = ['convex', 'mixture']


@functools.partial(jax.jit, static_argnames=('rule', 'tolerance', 'chunk'))
def _solve(problems, rule, max_iterations, tolerance, chunk):
  """`fit_users`, compiled once for all numbers of iterations."""
  delta, *rest = problems
  # It only says that logits are linear.
  model = PalA(num_users=1, num_prototypes=delta.shape[-1], point='Pw')
  return fit_users.__wrapped__(
    model,
    None,
    rule,
    Statistics(delta, None, None),
    *rest,
    max_iterations=max_iterations,
    tolerance=tolerance,
    chunk=chunk,
  )


def solve(problems, rule='convex', max_iterations=500, chunk=CHUNK):
  return jax.tree.map(
    np.asarray, _solve(problems, rule, max_iterations, TOLERANCE, chunk)
  )


def random_problems(seed, num_weights=4, low=0.1, high=100.0):
  """[COUNT] problems; half are separable by some user, some have soft labels.

  Returns delta [., NUM, K], label, mask [., NUM], log_prior [., K], strength.
  """
  rng = np.random.default_rng(seed)
  scale = 10 ** rng.uniform(np.log10(low), np.log10(high), COUNT)
  strength = 10 ** rng.uniform(np.log10(0.03), 1, COUNT)
  delta = rng.normal(size=(COUNT, NUM, num_weights)) * scale[:, None, None]
  label = rng.integers(0, 2, (COUNT, NUM)).astype(float)
  user = rng.dirichlet(np.full(num_weights, 0.3), COUNT)
  separable = rng.random(COUNT) < 0.5
  right = np.einsum('pnk,pk->pn', delta, user) > 0
  label[separable] = right[separable]
  label[::7] = rng.random(label[::7].shape)
  mask = np.arange(NUM) < rng.integers(0, NUM + 1, COUNT)[:, None]
  log_prior = np.log(rng.dirichlet(np.ones(num_weights), COUNT))
  single = (np.float32(x) for x in (delta, label))
  return (*single, mask, np.float32(log_prior), np.float32(strength))


def one_of(problems, i):
  """Problem i in float64, without its padding."""
  delta, label, mask, log_prior, strength = (
    np.asarray(x)[i].astype(float) for x in problems
  )
  live = mask.astype(bool)
  log_prior = log_prior - logsumexp(log_prior)
  return delta[live], label[live], log_prior, strength


def weights(users):
  return np.exp(users.log_weights)


# Against references.


@pytest.mark.parametrize(
  'num_weights, rule',
  [(1, 'convex'), (2, 'convex'), (4, 'convex'), (8, 'convex'), (4, 'mixture')],
)
def test_the_minimum_is_that_of_a_float64_reference(num_weights, rule):
  problems = random_problems(0, num_weights)
  users = solve(problems, rule)
  assert np.all(users.converged)
  assert users.iterations.max() < 60 and users.iterations.mean() < 15
  np.testing.assert_allclose(weights(users).sum(-1), 1.0, atol=1e-5)
  for i in range(COUNT):
    reference = DeltaProblem(*one_of(problems, i), rule)
    log_w = log_weights_64(users, i)
    value = reference.value(log_w)
    scale = max(1.0, value)
    np.testing.assert_allclose(users.objective[i], value, rtol=5e-6, atol=5e-6)
    # This needs no optimiser to be right.
    gap = reference.gap(log_w)
    assert gap <= 2 * TOLERANCE * scale
    # Float32 gradients of logits of 100 are good to about 1e-4.
    np.testing.assert_allclose(users.gap[i], gap, rtol=0.2, atol=3e-6 * scale)
    if i % 4 == 0:
      assert value <= reference.minimum() + 2 * TOLERANCE * scale


@pytest.mark.parametrize('rule', RULES)
def test_the_residual_is_the_gradient_within_the_simplex(rule):
  problems = random_problems(2, high=10.0)
  for iterations in (1, 3, 500):
    users = solve(problems, rule, iterations)
    for i in range(0, COUNT, 4):
      reference = DeltaProblem(*one_of(problems, i), rule)
      log_w = log_weights_64(users, i)
      slope = reference.gradient(log_w)
      scale = max(1.0, np.abs(slope).max())
      slope = slope + reference.strength * (log_w - reference.log_prior)
      slope = slope - np.exp(log_w) @ slope
      slope = np.where(log_w < -59, np.maximum(-slope, 0), np.abs(slope))
      np.testing.assert_allclose(
        users.residual[i], slope.max(), rtol=1e-3, atol=1e-4 * scale
      )


def test_one_user_by_any_logits_is_one_of_many():
  problems = random_problems(19, high=10.0)

  @jax.jit
  @jax.vmap
  def fit(delta, label, mask, log_prior, strength):
    return fit_weights(
      lambda log_w: delta @ jnp.exp(log_w), label, mask, log_prior, strength
    )

  one = fit(*problems)
  assert np.all(one.converged) and one.log_belief is None
  assert_same_users(one, solve(problems))


@pytest.mark.parametrize('rule', RULES)
def test_the_gap_bounds_the_distance_to_the_minimum_at_every_iteration(rule):
  problems = random_problems(1, high=20.0)
  rows = range(0, COUNT, 4)
  references = {i: DeltaProblem(*one_of(problems, i), rule) for i in rows}

  def values(users):
    return {i: r.value(log_weights_64(users, i)) for i, r in references.items()}

  final = values(solve(problems, rule))
  best = {i: min(final[i], r.minimum()) for i, r in references.items()}
  largest = 0.0
  for iterations in (0, 1, 2, 4, 500):
    users = solve(problems, rule, iterations)
    for i, value in values(users).items():
      excess = value - best[i]
      largest = max(largest, excess)
      assert users.gap[i] >= 0
      assert excess <= users.gap[i] + 2e-6 * max(1.0, value)
  assert largest > 0.1


@pytest.mark.parametrize('num_weights', [2, 4, 8])
def test_large_logits_converge(num_weights):
  """Full Newton steps, or the noisiest step near the optimum, do not."""
  for seed in range(100, 110):
    users = solve(random_problems(seed, num_weights, low=10.0, high=100.0))
    assert np.all(users.converged)
    assert users.iterations.max() < 60


def test_one_comparison_of_two_prototypes_is_the_root_of_an_equation():
  """z = slope * w1: strength * (logit w1 - logit w0) = slope * sigma(-z)."""
  prior = 0.3
  slopes, strengths = (
    x.ravel()
    for x in np.meshgrid(
      [-30.0, -3.0, -1.0, 0.0, 0.2, 4.0, 30.0, 100.0],
      [0.03, 0.3, 1.0, 3.0, 10.0],
    )
  )
  assert slopes.size == COUNT
  delta = np.zeros((COUNT, NUM, 2), np.float32)
  delta[:, 0, 0] = slopes
  problems = (
    delta,
    np.ones((COUNT, NUM), np.float32),
    np.tile(np.arange(NUM) < 1, (COUNT, 1)),
    np.tile(np.log(np.float32([prior, 1 - prior])), (COUNT, 1)),
    np.float32(strengths),
  )
  users = solve(problems)
  for i, (slope, strength) in enumerate(zip(slopes, strengths, strict=True)):

    def stationarity(a, slope=slope, strength=strength):  # a = logit w1
      pull = strength * (a - np.log(prior / (1 - prior)))
      return pull - slope * expit(-slope * expit(a))

    root = brentq(stationarity, -1e5, 1e5, xtol=1e-13)
    np.testing.assert_allclose(weights(users)[i, 0], expit(root), atol=5e-3)
    log_w = np.array([-np.logaddexp(0, -root), -np.logaddexp(0, root)])
    lowest = DeltaProblem(*one_of(problems, i), 'convex').value(log_w)
    np.testing.assert_allclose(users.objective[i], lowest, atol=2e-5)


# Hard data.


def test_separable_data_stay_finite_and_go_to_their_prototype():
  delta, label, mask, log_prior, strength = random_problems(3)
  delta = 5 * np.sign(delta) + delta / np.abs(delta).max()
  who = np.arange(COUNT) % 4
  label = np.float32(delta[np.arange(COUNT), :, who] > 0)
  mask = np.ones_like(mask)
  strength = np.full_like(strength, 0.03)
  users = solve((delta, label, mask, np.zeros_like(log_prior), strength))
  assert np.all(users.converged) and np.all(np.isfinite(users.log_weights))
  np.testing.assert_array_equal(np.argmax(users.log_weights, -1), who)
  assert np.all(np.max(weights(users), -1) > 0.7)


def test_contradictory_pairs_are_two_ties():
  delta, label, _, log_prior, strength = random_problems(3, high=10.0)
  delta[:, 10:20] = delta[:, :10]
  label[:, :10], label[:, 10:20] = 1.0, 0.0
  mask = np.tile(np.arange(NUM) < 20, (COUNT, 1))
  contradictory = solve((delta, label, mask, log_prior, strength))
  ties = solve((delta, np.full_like(label, 0.5), mask, log_prior, strength))
  assert np.all(contradictory.converged)
  assert_same_users(contradictory, ties)


def test_a_pair_answered_both_ways_leaves_a_symmetric_user_alone():
  delta, label, mask, log_prior, strength = random_problems(3)
  delta[:, :2] = [3.0, -3.0, 1.0, -1.0]
  label[:, :2] = [1.0, 0.0]
  mask = np.tile(np.arange(NUM) < 2, (COUNT, 1))
  users = solve((delta, label, mask, np.zeros_like(log_prior), strength))
  np.testing.assert_allclose(weights(users), 0.25, atol=1e-6)
  np.testing.assert_array_equal(users.iterations, 0)


def test_twice_the_data_at_twice_the_strength_is_the_same_user():
  delta, label, mask, log_prior, strength = random_problems(4, high=5.0)
  half = mask & (np.arange(NUM) < NUM // 2)
  once = solve((delta, label, half, log_prior, strength))

  def repeat(x):
    return np.concatenate([x[:, : NUM // 2]] * 2, 1)

  twice = solve(
    (repeat(delta), repeat(label), repeat(half), log_prior, 2 * strength)
  )
  np.testing.assert_allclose(weights(once), weights(twice), atol=3e-3)
  np.testing.assert_allclose(
    twice.objective, 2 * once.objective, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('rule', RULES)
def test_logits_of_a_thousand_stay_finite(rule):
  delta, label, mask, log_prior, strength = random_problems(5)
  delta = 1000 * np.sign(delta)
  users = solve((delta, label, mask, log_prior, strength), rule)
  for x in (users.log_weights, users.objective, users.gap):
    assert np.all(np.isfinite(x))


# The ends.


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('max_iterations', [0, 500])
def test_without_comparisons_the_prior_comes_back_in_no_iteration(
  rule, max_iterations
):
  delta, label, mask, log_prior, strength = random_problems(6)
  none = np.zeros_like(mask)
  users = solve((delta, label, none, log_prior, strength), rule, max_iterations)
  np.testing.assert_allclose(weights(users), softmax(log_prior, -1), atol=1e-6)
  np.testing.assert_array_equal(users.iterations, 0)
  np.testing.assert_allclose(users.gap, 0.0, atol=1e-6)
  np.testing.assert_allclose(users.objective, 0.0, atol=1e-6)
  assert np.all(users.converged)


def test_the_prior_need_not_be_normalised():
  delta, label, mask, log_prior, strength = random_problems(6)
  a = solve((delta, label, mask, log_prior, strength))
  b = solve((delta, label, mask, log_prior + np.float32(3), strength))
  np.testing.assert_allclose(a.objective, b.objective, rtol=1e-5, atol=1e-5)
  none = np.zeros_like(mask)
  users = solve((delta, label, none, log_prior + np.float32(3), strength))
  np.testing.assert_allclose(weights(users).sum(-1), 1.0, atol=1e-6)


def test_one_prototype_leaves_nothing_to_fit():
  users = solve(random_problems(7, 1))
  np.testing.assert_array_equal(users.log_weights, 0.0)
  np.testing.assert_array_equal(users.iterations, 0)
  assert np.all(users.converged)


def test_a_weight_of_zero_in_the_prior_stays_near_zero():
  delta, label, mask, log_prior, strength = random_problems(8, high=3.0)
  log_prior[:, 2] = -np.inf
  strength = np.maximum(strength, 1.0)
  users = solve((delta, label, mask, log_prior, strength))
  assert np.all(np.isfinite(users.log_weights)) and np.all(users.converged)
  assert np.all(weights(users)[:, 2] < 1e-6)


def test_a_strong_prior_wins_and_a_weak_one_yields():
  delta, label, mask, log_prior, strength = random_problems(9, high=2.0)
  log_prior = np.float32(np.log(softmax(log_prior, -1)))
  mask = np.ones_like(mask)

  def fit(value):
    strengths = np.full_like(strength, value)
    users = solve((delta, label, mask, log_prior, strengths))
    kl = np.sum(weights(users) * (users.log_weights - log_prior), -1)
    return users, users.objective - value * kl  # the likelihood alone

  prior = fit(1e6)[0]
  np.testing.assert_allclose(weights(prior), np.exp(log_prior), atol=1e-3)
  losses = [fit(value)[1] for value in (10.0, 1.0, 0.1, 0.03)]
  assert np.all(np.diff(losses, axis=0) <= 1e-3)


# What must not matter.


def assert_same_users(a, b, atol=2e-3):
  """Up to what the tolerance of the fit leaves undecided."""
  np.testing.assert_allclose(weights(a), weights(b), atol=atol)
  np.testing.assert_allclose(a.objective, b.objective, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('rule', RULES)
def test_swapping_candidates_and_answers_changes_nothing(rule):
  delta, label, mask, log_prior, strength = random_problems(14, high=5.0)
  users = solve((delta, label, mask, log_prior, strength), rule)
  other = solve((-delta, 1 - label, mask, log_prior, strength), rule)
  assert_same_users(users, other)


def test_chunks_of_users_are_fitted_like_all_of_them():
  """The last chunk is short, and the slowest user of each decides."""
  problems = random_problems(15, high=30.0)
  together = solve(problems)
  assert len(np.unique(together.iterations)) > 3
  chunks = solve(problems, chunk=16)
  assert chunks.log_weights.shape == (COUNT, 4)
  assert_same_users(chunks, together)
  np.testing.assert_array_equal(chunks.converged, together.converged)


# Honesty.


@pytest.mark.parametrize('max_iterations', [0, 1])
def test_too_few_iterations_are_flagged(max_iterations):
  delta, label, _, log_prior, strength = random_problems(16, low=5.0)
  mask = np.ones((COUNT, NUM), bool)
  users = solve(
    (delta, label, mask, log_prior, strength), max_iterations=max_iterations
  )
  assert not np.any(users.converged)
  np.testing.assert_array_equal(users.iterations, max_iterations)
  assert np.all(users.gap > TOLERANCE * np.maximum(1, users.objective))
  done = solve((delta, label, mask, log_prior, strength))
  assert np.all(done.converged) and np.all(users.objective > done.objective)


def test_no_iteration_leaves_the_prior():
  problems = random_problems(16, low=5.0)
  users = solve(problems, max_iterations=0)
  np.testing.assert_allclose(
    weights(users), softmax(problems[3], -1), atol=1e-6
  )


def test_the_objective_never_rises_with_more_iterations():
  problems = random_problems(17)
  last = np.inf
  for iterations in (0, 1, 2, 4, 500):
    users = solve(problems, max_iterations=iterations)
    slack = 1e-5 * np.maximum(1, np.abs(users.objective))
    assert np.all(users.objective <= last + slack)
    last = users.objective


def test_converged_is_what_the_gap_says():
  users = solve(random_problems(18), max_iterations=2)
  small = users.gap <= TOLERANCE * np.maximum(1, np.abs(users.objective))
  np.testing.assert_array_equal(users.converged, small)
  assert 0 < users.converged.sum() < COUNT
