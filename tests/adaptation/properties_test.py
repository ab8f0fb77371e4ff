"""adaptation: properties of both methods on drawn problems.

Shapes are fixed, so that each method is compiled once.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logsumexp

from pal_jax.adaptation import Statistics, adapt
from tests.adaptation import oracle
from tests.adaptation.oracle import DeltaProblem, log_weights_64, pal_a

USERS, NUM, K, ATOMS = 8, 12, 4, 16
few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
CASES = [
  (method, rule)
  for method in ('map', 'posterior')
  for rule in ('convex', 'mixture')
]
every_case = pytest.mark.parametrize('method, rule', CASES)
VARIABLES = {}


@dataclasses.dataclass
class Drawn:
  delta: np.ndarray  # [USERS, NUM, K]
  label: np.ndarray  # [USERS, NUM]
  mask: np.ndarray
  prior: object
  seed: int  # for what a test wants to draw besides

  def replace(self, **fields):
    return dataclasses.replace(self, **fields)

  def solve(self, method, rule):
    num = self.delta.shape[-1]
    membership = 'convex' if rule == 'convex' else 'mixture_likelihood'
    model = pal_a(num_prototypes=num, membership=membership)
    users = adapt(
      model,
      VARIABLES.setdefault(model, oracle.variables_of(model)),
      Statistics(jnp.float32(self.delta), None, None),
      np.float32(self.label),
      self.mask,
      self.prior,
      method=method,
    )
    assert np.all(users.converged)
    return users

  def oracle(self, rule, i):
    live = self.mask[i]
    return DeltaProblem(
      self.delta[i][live],
      self.label[i][live],
      self.prior.log_weights,
      self.prior.strength,
      rule,
    )


@st.composite
def problems(draw, max_scale=2.0, num=K):
  seed = draw(st.integers(0, 2**31))
  scale = 10 ** draw(st.floats(-1, max_scale))
  strength = 10 ** draw(st.floats(np.log10(0.03), 1))
  kind = draw(st.sampled_from(['hard', 'soft', 'agree', 'separable']))
  counts = draw(st.lists(st.integers(0, NUM), min_size=USERS, max_size=USERS))
  rng = np.random.default_rng(seed)
  delta = np.float32(scale * rng.normal(size=(USERS, NUM, num)))
  label = {
    'hard': rng.integers(0, 2, (USERS, NUM)),
    'soft': rng.random((USERS, NUM)),
    'agree': np.ones((USERS, NUM)),
    'separable': delta @ rng.dirichlet(np.ones(num)) > 0,
  }[kind]
  prior = oracle.make_prior(strength, seed, num, ATOMS)
  mask = np.arange(NUM) < np.array(counts)[:, None]
  return Drawn(delta, np.float32(label), mask, prior, seed)


def assert_same(drawn, a, b, method, rule):
  """As the same people: up to rounding and the tolerance of the solver."""
  if method == 'posterior':
    np.testing.assert_allclose(
      np.exp(a.log_belief), np.exp(b.log_belief), atol=3e-3
    )
    np.testing.assert_allclose(a.objective, b.objective, rtol=1e-4, atol=1e-4)
    return
  for i in range(USERS):
    problem = drawn.oracle(rule, i)
    values = [problem.value(log_weights_64(x, i)) for x in (a, b)]
    assert abs(values[0] - values[1]) <= 3e-5 * max(1, values[0])
    assert abs(a.objective[i] - b.objective[i]) <= 3e-5 * max(1, values[0])


@every_case
@few
@given(drawn=problems())
def test_the_order_of_comparisons_does_not_matter(method, rule, drawn):
  order = np.random.default_rng(drawn.seed).permuted(
    np.tile(np.arange(NUM), (USERS, 1)), axis=1
  )
  other = drawn.replace(
    delta=np.take_along_axis(drawn.delta, order[..., None], 1),
    label=np.take_along_axis(drawn.label, order, 1),
    mask=np.take_along_axis(drawn.mask, order, 1),
  )
  a, b = drawn.solve(method, rule), other.solve(method, rule)
  assert_same(drawn, a, b, method, rule)


@every_case
@few
@given(drawn=problems(), who=st.integers(0, USERS - 1))
def test_the_same_comparisons_make_the_same_person(method, rule, drawn, who):
  rows = np.full(USERS, who)
  other = drawn.replace(
    delta=drawn.delta[rows], label=drawn.label[rows], mask=drawn.mask[rows]
  )
  a, b = drawn.solve(method, rule), other.solve(method, rule)
  np.testing.assert_array_equal(b.log_weights, b.log_weights[rows * 0])
  np.testing.assert_allclose(
    b.objective, np.tile(a.objective[who], USERS), rtol=2e-5, atol=2e-5
  )
  np.testing.assert_allclose(
    np.exp(b.log_weights[0]), np.exp(a.log_weights[who]), atol=3e-3
  )


@every_case
@few
@given(drawn=problems(), order=st.permutations(range(K)))
def test_relabelling_prototypes_relabels_people(method, rule, drawn, order):
  order, prior = np.array(order), drawn.prior
  other = drawn.replace(
    delta=drawn.delta[..., order],
    prior=prior.replace(
      log_weights=prior.log_weights[order], log_atoms=prior.log_atoms[:, order]
    ),
  )
  a, b = drawn.solve(method, rule), other.solve(method, rule)
  back = b.replace(log_weights=b.log_weights[:, np.argsort(order)])
  assert_same(drawn, a, back, method, rule)


@every_case
@few
@given(
  drawn=problems(),
  garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 0.0]),
)
def test_padding_may_be_anything(method, rule, drawn, garbage):
  other = drawn.replace(
    delta=np.where(drawn.mask[..., None], drawn.delta, garbage),
    label=np.where(drawn.mask, drawn.label, garbage),
  )
  a, b = drawn.solve(method, rule), other.solve(method, rule)
  np.testing.assert_array_equal(a.log_weights, b.log_weights)
  np.testing.assert_array_equal(a.objective, b.objective)


@every_case
@few
@given(drawn=problems())
def test_a_pair_answered_both_ways_is_two_ties(method, rule, drawn):
  half = NUM // 2
  delta = np.concatenate([drawn.delta[:, :half]] * 2, 1)
  mask = np.concatenate([drawn.mask[:, :half]] * 2, 1)
  label = np.repeat(np.float32([[1, 0]]), half, 1).repeat(USERS, 0)
  both = drawn.replace(delta=delta, mask=mask, label=label)
  ties = both.replace(label=np.full_like(label, 0.5))
  a, b = both.solve(method, rule), ties.solve(method, rule)
  assert_same(both, a, b, method, rule)


@every_case
@few
@given(drawn=problems())
def test_swapping_candidates_and_answers_changes_nothing(method, rule, drawn):
  other = drawn.replace(delta=-drawn.delta, label=1 - drawn.label)
  a, b = drawn.solve(method, rule), other.solve(method, rule)
  assert_same(drawn, a, b, method, rule)


@every_case
@few
@given(drawn=problems())
def test_without_comparisons_people_are_the_prior(method, rule, drawn):
  none = drawn.replace(mask=np.zeros_like(drawn.mask))
  users = none.solve(method, rule)
  np.testing.assert_array_equal(users.iterations, 0)
  np.testing.assert_allclose(users.objective, 0, atol=1e-5)
  prior = drawn.prior
  expected = np.exp(prior.log_weights)
  if method == 'posterior':
    expected = np.exp(prior.log_masses) @ np.exp(prior.log_atoms)
    np.testing.assert_allclose(
      users.log_belief, np.tile(prior.log_masses, (USERS, 1)), atol=1e-5
    )
  np.testing.assert_allclose(
    np.exp(users.log_weights), np.tile(expected, (USERS, 1)), atol=1e-5
  )


@every_case
@few
@given(drawn=problems(num=1))
def test_one_prototype_leaves_nothing_to_learn(method, rule, drawn):
  users = drawn.solve(method, rule)
  np.testing.assert_allclose(users.log_weights, 0, atol=1e-6)
  np.testing.assert_array_equal(users.iterations, 0)
  each = oracle.negative_log_likelihood(
    np.float64(drawn.delta[..., 0]), drawn.label
  )
  np.testing.assert_allclose(
    users.objective, np.sum(each * drawn.mask, -1), rtol=1e-5, atol=1e-4
  )


# Against float64.


@pytest.mark.parametrize('rule', ['convex', 'mixture'])
@few
@given(drawn=problems())
def test_the_gap_of_the_point_estimate_is_that_of_float64(rule, drawn):
  users = drawn.solve('map', rule)
  assert users.iterations.max() < 60
  for i in range(USERS):
    problem = drawn.oracle(rule, i)
    log_w = log_weights_64(users, i)
    value = problem.value(log_w)
    assert problem.gap(log_w) <= 2e-5 * max(1, value)
    np.testing.assert_allclose(users.objective[i], value, rtol=1e-5, atol=1e-5)


# Likelihoods of a mixture end at 1e-37: smaller logits.
@pytest.mark.parametrize('rule', ['convex', 'mixture'])
@few
@given(drawn=problems(max_scale=1.2), evidence=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_posterior_is_an_enumeration_in_float64(rule, drawn, evidence):
  prior = drawn.prior.replace(evidence=np.float32(evidence))
  users = drawn.replace(prior=prior).solve('posterior', rule)
  atoms = np.exp(log_softmax(np.float64(prior.log_atoms), -1))
  log_masses = np.float64(prior.log_masses)
  delta = np.float64(drawn.delta)
  if rule == 'convex':
    z = delta @ atoms.T
  else:
    z = np.log(expit(delta) @ atoms.T) - np.log(expit(-delta) @ atoms.T)
  each = -oracle.negative_log_likelihood(z, drawn.label[..., None])
  likelihood = np.sum(each * drawn.mask[..., None], 1)
  np.testing.assert_allclose(
    users.objective,
    -logsumexp(log_masses + likelihood, -1),
    rtol=2e-5,
    atol=1e-4,
  )
  belief = np.exp(log_softmax(log_masses + evidence * likelihood, -1))
  np.testing.assert_allclose(np.exp(users.log_belief), belief, atol=2e-3)
  np.testing.assert_allclose(
    np.exp(users.log_weights), belief @ atoms, atol=2e-3
  )


@pytest.mark.parametrize('rule', ['convex', 'mixture'])
@few
@given(drawn=problems(max_scale=1.2), first=st.integers(0, NUM))
def test_yesterdays_posterior_is_todays_prior(rule, drawn, first):
  """Bayes' rule in two helpings."""
  early = np.arange(NUM) < first
  who = 0  # the prior is shared
  day = drawn.replace(mask=drawn.mask & early).solve('posterior', rule)
  prior = drawn.prior.replace(log_masses=day.log_belief[who])
  night = drawn.replace(mask=drawn.mask & ~early, prior=prior)
  night = night.solve('posterior', rule)
  whole = drawn.solve('posterior', rule)
  np.testing.assert_allclose(
    np.exp(night.log_belief[who]), np.exp(whole.log_belief[who]), atol=3e-3
  )
  np.testing.assert_allclose(
    day.objective[who] + night.objective[who],
    whole.objective[who],
    rtol=1e-4,
    atol=1e-3,
  )
