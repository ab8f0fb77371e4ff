"""adaptation.solver: against references in float64, and its certificate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.special import expit, logsumexp, softmax

from pal_jax.adaptation.solver import fit_weights
from pal_jax.mixtures import mixture_logit

# One shape for nearly all problems, so that little is compiled.
COUNT = 40  # users
NUM = 50  # comparisons of a user, some of them padding
TOLERANCE = 1e-5


def linear(log_w, delta):
  return delta @ jnp.exp(log_w)


LOGITS = {'linear': linear, 'mixture': mixture_logit}


@functools.partial(jax.jit, static_argnames='rule')
def _solve(delta, label, mask, log_prior, strength, rule, max_iterations):
  def one(delta, label, mask, log_prior, strength):
    return fit_weights(
      lambda log_w: LOGITS[rule](log_w, delta),
      label,
      mask,
      log_prior,
      strength,
      max_iterations=max_iterations,
      tolerance=TOLERANCE,
    )

  return jax.vmap(one)(delta, label, mask, log_prior, strength)


def solve(problems, rule='linear', max_iterations=500):
  return jax.tree.map(
    np.asarray, _solve(*problems, rule=rule, max_iterations=max_iterations)
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


class Reference:
  """F, its gradient in w and its minimum, in float64."""

  def __init__(self, problem, rule):
    self.delta, self.label, self.log_prior, self.strength = problem
    self.rule = rule

  def logits(self, log_w):
    if self.rule == 'linear':
      return self.delta @ np.exp(log_w)
    positive = log_w - np.logaddexp(0, -self.delta)
    negative = log_w - np.logaddexp(0, self.delta)
    return logsumexp(positive, -1) - logsumexp(negative, -1)

  def jacobian(self, log_w):
    """d logits / d w, [N, K]."""
    if self.rule == 'linear':
      return self.delta
    # d log(p / (1 - p)) = dp / p - d(1 - p) / (1 - p).
    p = -np.logaddexp(0, -self.delta)
    q = -np.logaddexp(0, self.delta)
    log_p = logsumexp(log_w + p, -1, keepdims=True)
    log_q = logsumexp(log_w + q, -1, keepdims=True)
    return np.exp(p - log_p) - np.exp(q - log_q)

  def value(self, log_w):
    z = self.logits(log_w)
    loss = np.logaddexp(0, -z) * self.label
    loss = loss + np.logaddexp(0, z) * (1 - self.label)
    return loss.sum() + self.strength * np.sum(
      np.exp(log_w) * (log_w - self.log_prior)
    )

  def gradient(self, log_w):
    """Of the likelihood alone, [K]."""
    return (expit(self.logits(log_w)) - self.label) @ self.jacobian(log_w)

  def gap(self, log_w):
    """A bound on value - minimum, whatever the optimiser did."""
    target = self.log_prior - self.gradient(log_w) / self.strength
    target = target - logsumexp(target)
    return self.strength * np.sum(np.exp(log_w) * (log_w - target))

  def minimum(self):
    """The lower of two runs of SLSQP over weights on the simplex."""

    def both(w):
      log_w = np.log(w)
      slope = self.strength * (log_w - self.log_prior + 1)
      return self.value(log_w), self.gradient(log_w) + slope

    size = self.log_prior.size
    starts = np.exp(self.log_prior), np.full(size, 1 / size)
    found = [
      minimize(
        both,
        start,
        jac=True,
        method='SLSQP',
        bounds=[(1e-12, 1.0)] * size,
        constraints={
          'type': 'eq',
          'fun': lambda w: np.sum(w) - 1,
          'jac': np.ones_like,
        },
        options={'ftol': 1e-12, 'maxiter': 200},
      ).x
      for start in starts
    ]
    return min(self.value(np.log(w / w.sum())) for w in found)


def log_weights_64(users, i):
  log_w = users.log_weights[i].astype(float)
  return log_w - logsumexp(log_w)


def weights(users):
  return np.exp(users.log_weights)


# Against references.


@pytest.mark.parametrize(
  'num_weights, rule',
  [
    (1, 'linear'),
    (2, 'linear'),
    (4, 'linear'),
    (8, 'linear'),
    (4, 'mixture'),
    (8, 'mixture'),
  ],
)
def test_the_minimum_is_that_of_a_float64_reference(num_weights, rule):
  problems = random_problems(0, num_weights)
  users = solve(problems, rule)
  assert np.all(users.converged)
  np.testing.assert_allclose(weights(users).sum(-1), 1.0, atol=1e-5)
  for i in range(0, COUNT, 2):
    reference = Reference(one_of(problems, i), rule)
    value = reference.value(log_weights_64(users, i))
    scale = max(1.0, value)
    assert value <= reference.minimum() + 2 * TOLERANCE * scale
    # This needs no optimiser to be right.
    assert reference.gap(log_weights_64(users, i)) <= 2 * TOLERANCE * scale
    np.testing.assert_allclose(users.objective[i], value, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize('rule', ['linear', 'mixture'])
def test_the_gap_bounds_the_distance_to_the_minimum_at_every_iteration(rule):
  problems = random_problems(1, high=20.0)
  rows = range(0, COUNT, 4)
  references = {i: Reference(one_of(problems, i), rule) for i in rows}

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


@pytest.mark.parametrize('num_weights', [2, 8])
def test_large_logits_converge(num_weights):
  """Full Newton steps, or the noisiest step near the optimum, do not."""
  for seed in range(100, 110):
    users = solve(random_problems(seed, num_weights, low=10.0, high=100.0))
    assert np.all(users.converged)
    assert users.iterations.max() < 100


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
    lowest = Reference(one_of(problems, i), 'linear').value(log_w)
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


@pytest.mark.parametrize('rule', ['linear', 'mixture'])
def test_logits_of_a_thousand_stay_finite(rule):
  delta, label, mask, log_prior, strength = random_problems(5)
  delta = 1000 * np.sign(delta)
  users = solve((delta, label, mask, log_prior, strength), rule)
  for x in (users.log_weights, users.objective, users.gap):
    assert np.all(np.isfinite(x))


# The ends.


@pytest.mark.parametrize('rule', ['linear', 'mixture'])
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


@pytest.mark.parametrize('garbage', [0.0, 1e6, np.inf, np.nan])
@pytest.mark.parametrize('rule', ['linear', 'mixture'])
def test_what_is_masked_changes_nothing(rule, garbage):
  delta, label, mask, log_prior, strength = random_problems(10, high=5.0)
  clean = solve((delta, label, mask, log_prior, strength), rule)
  dirty = np.where(mask[..., None], delta, np.float32(garbage))
  flipped = np.where(mask, label, 1 - label)
  other = solve((dirty, flipped, mask, log_prior, strength), rule)
  jax.tree.map(np.testing.assert_array_equal, clean, other)


def test_padding_changes_nothing():
  delta, label, mask, log_prior, strength = random_problems(11, high=5.0)
  mask = mask & (np.arange(NUM) < 12)
  padded = solve((delta, label, mask, log_prior, strength))
  delta, label, mask = delta[:, :12], label[:, :12], mask[:, :12]
  assert_same_users(solve((delta, label, mask, log_prior, strength)), padded)


def test_the_order_of_comparisons_does_not_matter():
  delta, label, mask, log_prior, strength = random_problems(12, high=5.0)
  users = solve((delta, label, mask, log_prior, strength))
  order = np.random.default_rng(0).permutation(NUM)
  other = solve(
    (delta[:, order], label[:, order], mask[:, order], log_prior, strength)
  )
  assert_same_users(users, other)


def test_relabelling_prototypes_relabels_weights():
  delta, label, mask, log_prior, strength = random_problems(13, high=5.0)
  users = solve((delta, label, mask, log_prior, strength))
  order = np.array([2, 0, 3, 1])
  other = solve((delta[..., order], label, mask, log_prior[:, order], strength))
  users = users.replace(log_weights=users.log_weights[:, order])
  assert_same_users(users, other)


@pytest.mark.parametrize('rule', ['linear', 'mixture'])
def test_swapping_candidates_and_answers_changes_nothing(rule):
  delta, label, mask, log_prior, strength = random_problems(14, high=5.0)
  users = solve((delta, label, mask, log_prior, strength), rule)
  other = solve((-delta, 1 - label, mask, log_prior, strength), rule)
  assert_same_users(users, other)


def test_users_fitted_together_are_those_fitted_one_at_a_time():
  problems = random_problems(15, high=30.0)
  together = solve(problems)
  assert len(np.unique(together.iterations)) > 3
  for i in range(0, COUNT, 8):
    alone = solve(tuple(x[i : i + 1] for x in problems))
    assert_same_users(
      alone, jax.tree.map(lambda x, i=i: x[i : i + 1], together)
    )
    assert alone.converged[0] == together.converged[i]


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
