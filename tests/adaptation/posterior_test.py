"""adaptation.posterior: beliefs, predictions and intervals from atoms."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax

from pal_jax.adaptation import (
  atom_log_likelihoods,
  believe,
  credible_interval,
  predict,
)
from pal_jax.adaptation.statistics import Statistics
from tests.adaptation import oracle
from tests.adaptation.oracle import K, pal_a

# Simulated people, drawn from the prior.
PEOPLE, SUPPORT, QUERIES, ATOMS = 600, 8, 20, 60


def log_of(masses):
  with np.errstate(divide='ignore'):
    return jnp.log(jnp.float32(masses))


# Beliefs.


def test_without_comparisons_the_belief_is_the_prior():
  prior = oracle.make_prior(evidence=2.0)
  users = believe(prior, jnp.zeros((3, oracle.ATOMS)))
  expected = np.tile(prior.log_masses, (3, 1))
  np.testing.assert_allclose(users.log_belief, expected, atol=1e-6)
  mean = np.exp(prior.log_masses) @ np.exp(prior.log_atoms)
  np.testing.assert_allclose(
    np.exp(users.log_weights), np.tile(mean, (3, 1)), atol=1e-6
  )
  np.testing.assert_allclose(users.objective, 0, atol=1e-6)


def test_evidence_is_a_power_of_the_likelihood():
  log_likelihoods = jnp.float32(-10 * np.random.default_rng(0).random((4, 7)))
  half = believe(oracle.make_prior(evidence=0.5), log_likelihoods)
  same = believe(oracle.make_prior(evidence=1.0), 0.5 * log_likelihoods)
  np.testing.assert_allclose(half.log_belief, same.log_belief, atol=1e-5)
  none = believe(oracle.make_prior(evidence=0.0), log_likelihoods)
  np.testing.assert_allclose(
    none.log_belief,
    believe(oracle.make_prior(), 0 * log_likelihoods).log_belief,
  )


@pytest.mark.parametrize('scale', [1.0, 1e4])
def test_beliefs_stay_finite_distributions(scale):
  log_likelihoods = -scale * np.random.default_rng(1).random((50, oracle.ATOMS))
  users = believe(oracle.make_prior(), jnp.float32(log_likelihoods))
  for x in (users.log_weights, users.log_belief):
    assert not np.any(np.isnan(x))
    np.testing.assert_allclose(np.exp(x).sum(-1), 1, atol=1e-5)
  assert np.all(users.converged)


def test_a_likelihood_that_is_not_finite_is_flagged():
  log_likelihoods = np.zeros((2, oracle.ATOMS), np.float32)
  log_likelihoods[1] = np.nan
  users = believe(oracle.make_prior(), log_likelihoods)
  np.testing.assert_array_equal(users.converged, [True, False])


# Predictions.


def test_predictions_are_the_average_of_probabilities():
  rng = np.random.default_rng(2)
  prior = oracle.make_prior()
  z = rng.normal(size=(5, 3, oracle.ATOMS)) * 4
  belief = rng.dirichlet(np.ones(oracle.ATOMS), 5)
  found = predict(prior, log_of(belief), jnp.float32(z))
  expected = np.einsum('unm,um->un', expit(z), belief)
  np.testing.assert_allclose(expit(np.float64(found)), expected, atol=1e-5)


def test_predictions_keep_the_precision_of_both_tails():
  """log(1 - p) of an average next to 1 is not a difference from 1."""
  z = jnp.float32([[60.0, 70.0], [-60.0, -70.0]])
  prior = oracle.make_prior(atoms=2)
  found = predict(prior, log_of([0.5, 0.5]), z)
  expected = 60 - np.log(0.5 + 0.5 * np.exp(-10))
  np.testing.assert_allclose(found, [expected, -expected], rtol=1e-4)


@pytest.mark.parametrize('pooling', [0.0, 0.4, 1.0])
def test_predictions_of_a_certain_belief_are_its_atoms_logits(pooling):
  z = jnp.float32(np.random.default_rng(3).normal(size=(6, 4)))
  found = predict(oracle.make_prior(pooling=pooling), log_of([0, 0, 1, 0]), z)
  np.testing.assert_allclose(found, z[:, 2], rtol=1e-4, atol=1e-5)


def test_pooling_moves_from_averaged_probabilities_to_averaged_logits():
  rng = np.random.default_rng(4)
  z, belief = rng.normal(size=(9, 5)) * 3, rng.dirichlet(np.ones(5))
  ends = [
    np.asarray(
      predict(oracle.make_prior(pooling=x), log_of(belief), jnp.float32(z))
    )
    for x in (0.0, 0.25, 1.0)
  ]
  np.testing.assert_allclose(ends[2], z @ belief, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    ends[1], 0.75 * ends[0] + 0.25 * ends[2], rtol=1e-4, atol=1e-5
  )


def test_swapping_candidates_negates_predictions():
  rng = np.random.default_rng(5)
  z, belief = (
    jnp.float32(rng.normal(size=(9, 5)) * 5),
    rng.dirichlet(np.ones(5)),
  )
  prior = oracle.make_prior(pooling=0.3)
  a, b = (predict(prior, log_of(belief), s * z) for s in (1, -1))
  np.testing.assert_allclose(a, -b, rtol=1e-4, atol=1e-5)


# Intervals.


@pytest.mark.parametrize(
  'level, low, high',
  [
    (0.1, 2.0, 3.0),  # quantiles 0.45 and 0.55
    (0.5, 1.0, 3.0),  # 0.25 and 0.75
    (0.9, 0.0, 4.0),  # 0.05 and 0.95
    (0.99, 0.0, 9.0),  # 0.005 and 0.995
  ],
)
def test_an_interval_by_hand(level, low, high):
  # In no order; below: 0.1 at 0, 0.3 at 1, 0.5 at 2, 0.8 at 3, 0.97 at 4.
  z = jnp.float32([[3.0, 0.0, 9.0, 2.0, 1.0, 4.0]])
  belief = log_of([0.3, 0.1, 0.03, 0.2, 0.2, 0.17])
  found = credible_interval(belief, z, level)
  np.testing.assert_array_equal(np.ravel(found), [low, high])


def test_an_end_at_which_the_mass_is_reached_exactly_is_that_atom():
  z = jnp.arange(20.0)[None]
  found = credible_interval(log_of(np.full(20, 0.05)), z, 0.9)
  np.testing.assert_array_equal(np.ravel(found), [0, 18])


def random_beliefs(seed=6, size=200, atoms=9):
  rng = np.random.default_rng(seed)
  belief = rng.dirichlet(np.full(atoms, 0.5), size)
  return belief, np.float32(rng.normal(size=(size, 3, atoms)) * 4)


@pytest.mark.parametrize('level', [0.2, 0.5, 0.8, 0.9, 0.99])
def test_an_interval_holds_its_mass_and_no_smaller_one_would(level):
  belief, z = random_beliefs()
  low, high = credible_interval(log_of(belief), z, level)
  mass = belief[:, None]
  tail, slack = (1 - level) / 2, 1e-5
  below = np.sum(mass * (z < low[..., None]), -1)
  at_or_below = np.sum(mass * (z <= low[..., None]), -1)
  assert np.all(below <= tail + slack) and np.all(at_or_below >= tail - slack)
  under = np.sum(mass * (z < high[..., None]), -1)
  inside = np.sum(mass * (z >= low[..., None]) * (z <= high[..., None]), -1)
  assert np.all(under <= 1 - tail + slack)
  assert np.all(inside >= level - slack)
  assert np.all(low <= high)


def test_higher_levels_have_wider_intervals():
  belief, z = random_beliefs()
  last = np.full(z.shape[:2], np.inf), np.full(z.shape[:2], -np.inf)
  for level in (0.05, 0.3, 0.6, 0.9, 0.999):
    low, high = credible_interval(log_of(belief), z, level)
    assert np.all(low <= last[0]) and np.all(high >= last[1])
    last = low, high


def test_swapping_candidates_negates_and_swaps_the_ends():
  belief, z = random_beliefs()
  low, high = credible_interval(log_of(belief), z, 0.9)
  again_low, again_high = credible_interval(log_of(belief), -z, 0.9)
  # Exact unless a cumulated mass meets a quantile, as random ones do not.
  assert np.mean(low == -again_high) > 0.99
  assert np.mean(high == -again_low) > 0.99


def test_an_interval_of_a_certain_belief_is_a_point():
  z = jnp.float32(np.random.default_rng(7).normal(size=(5, 3)))
  low, high = credible_interval(log_of([0, 1, 0]), z)
  np.testing.assert_array_equal(low, z[:, 1])
  np.testing.assert_array_equal(high, z[:, 1])


# People drawn from the prior itself: Bayes' rule is then calibrated.


@pytest.fixture(scope='module')
def simulated():
  rng = np.random.default_rng(8)
  prior = oracle.make_prior(atoms=ATOMS)
  atoms = np.exp(np.float64(prior.log_atoms))
  masses = np.exp(np.float64(prior.log_masses))
  who = rng.choice(ATOMS, PEOPLE, p=masses / masses.sum())
  delta = np.float32(2 * rng.normal(size=(PEOPLE, SUPPORT + QUERIES, K)))
  truth = np.einsum('unk,uk->un', delta, atoms[who])
  label = np.float32(rng.random(truth.shape) < expit(truth))
  model = pal_a()
  likelihoods = atom_log_likelihoods(
    model,
    oracle.variables_of(model),
    'convex',
    prior.log_atoms,
    Statistics(jnp.asarray(delta[:, :SUPPORT]), None, None),
    jnp.asarray(label[:, :SUPPORT]),
    jnp.ones((PEOPLE, SUPPORT), bool),
  )
  users = believe(prior, likelihoods)
  z = jnp.asarray(delta[:, SUPPORT:] @ np.float32(atoms.T))
  return prior, users, z, truth[:, SUPPORT:], label[:, SUPPORT:]


@pytest.mark.parametrize('level', [0.5, 0.9])
def test_credible_intervals_cover_people_drawn_from_the_prior(simulated, level):
  _, users, z, truth, _ = simulated
  low, high = credible_interval(users.log_belief, z, level)
  covered = (truth >= low - 1e-4) & (truth <= high + 1e-4)
  # Atoms are lumps: intervals hold more than they must, and say how much.
  inside = (z >= low[..., None]) & (z <= high[..., None])
  mass = np.sum(np.exp(users.log_belief)[:, None] * inside, -1)
  assert np.mean(covered) >= level - 0.02
  # Answers to several queries of a person hang together.
  error = np.std((covered - mass).mean(1)) / np.sqrt(PEOPLE)
  assert abs(np.mean(covered) - np.mean(mass)) < 4 * error < 0.08


def test_predictions_are_calibrated_on_people_drawn_from_the_prior(simulated):
  prior, users, z, _, label = simulated
  p = expit(np.float64(predict(prior, users.log_belief, z)))
  bins = np.digitize(p, [0.1, 0.25, 0.4, 0.6, 0.75, 0.9])
  for b in range(7):
    inside = bins == b
    error = np.sqrt(np.mean(p[inside] * (1 - p[inside])) / inside.sum())
    assert abs(p[inside].mean() - label[inside].mean()) < 4 * error
  # And better than knowing only the population.
  blank = np.broadcast_to(prior.log_masses, users.log_belief.shape)
  q = expit(np.float64(predict(prior, blank, z)))

  def loss(p):
    return -np.mean(np.where(label == 1, np.log(p), np.log1p(-p)))

  assert loss(p) < loss(q) - 0.02


def test_another_evidence_power_is_worse_for_people_drawn_from_the_prior(
  simulated,
):
  """A belief of power 4 is overconfident: its intervals cover too little."""
  prior, users, z, truth, _ = simulated
  log_belief = log_softmax(
    4 * np.asarray(users.log_belief) - 3 * np.asarray(prior.log_masses), -1
  )
  low, high = credible_interval(jnp.float32(log_belief), z, 0.9)
  assert np.mean((truth >= low - 1e-4) & (truth <= high + 1e-4)) < 0.8
