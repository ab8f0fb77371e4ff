"""adaptation.prior: what is learned of the population from seen users."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logsumexp, softmax

from pal_jax.adaptation import (
  atom_log_likelihoods,
  atom_logits,
  choose_strength,
  fit_masses,
  fit_prior,
)
from pal_jax.adaptation.posterior import believe, predict
from pal_jax.adaptation.prior import (
  EVIDENCES,
  POOLINGS,
  SPREAD,
  choose_atoms,
  choose_belief,
  vertices,
)
from tests.adaptation import oracle
from tests.adaptation.oracle import K, U, negative_log_likelihood, pal_a, pal_b

NUM = 20  # comparisons of a seen user, twice


# Masses.


def random_likelihoods(seed=0, users=40, atoms=6, scale=3.0):
  """[users, atoms], some far below 0 as those of many comparisons are."""
  rng = np.random.default_rng(seed)
  each = scale * rng.normal(size=(users, atoms)) - 200 * rng.random((users, 1))
  return np.float32(each)


def mean_evidence(log_masses, log_likelihoods):
  """L(pi) of masses that sum to 1, in float64."""
  log_masses = np.asarray(log_masses, float)
  log_masses = log_masses - logsumexp(log_masses)
  return logsumexp(log_masses + np.float64(log_likelihoods), axis=1).mean()


def best_evidence(log_likelihoods):
  """By a quasi-Newton method over a softmax; nothing of EM."""
  found = minimize(
    lambda theta: -mean_evidence(log_softmax(theta), log_likelihoods),
    np.zeros(log_likelihoods.shape[1]),
    method='BFGS',
    options={'gtol': 1e-7},
  )
  return -found.fun


@pytest.mark.parametrize('seed', range(4))
def test_masses_maximise_the_evidence(seed):
  log_likelihoods = random_likelihoods(seed)
  log_masses, bound, iterations = fit_masses(log_likelihoods)
  assert 0 < iterations < 2000 and 0 <= bound <= 1e-3
  np.testing.assert_allclose(np.exp(log_masses).sum(), 1, atol=1e-5)
  best = best_evidence(log_likelihoods)
  assert best - mean_evidence(log_masses, log_likelihoods) <= bound + 1e-5


@pytest.mark.parametrize('max_iterations', [0, 3, 30])
def test_the_bound_holds_before_the_end(max_iterations):
  loose = 0
  for seed in range(4):
    log_likelihoods = random_likelihoods(seed)
    log_masses, bound, iterations = fit_masses(
      log_likelihoods, max_iterations=max_iterations
    )
    assert iterations <= max_iterations
    lost = best_evidence(log_likelihoods)
    lost -= mean_evidence(log_masses, log_likelihoods)
    assert -1e-6 <= lost <= bound + 1e-5
    loose = max(loose, lost)
    ratio = np.float64(log_likelihoods) - logsumexp(
      np.float64(log_likelihoods) + np.float64(log_masses), 1, keepdims=True
    )
    np.testing.assert_allclose(
      bound, np.exp(ratio).mean(0).max() - 1, rtol=1e-3, atol=1e-4
    )
  assert loose > (1e-3 if max_iterations else 0.05) / max(1, max_iterations)


def test_users_that_say_nothing_leave_masses_even():
  log_masses, bound, iterations = fit_masses(np.zeros((9, 5), np.float32))
  np.testing.assert_allclose(np.exp(log_masses), 0.2, atol=1e-6)
  assert iterations == 0 and abs(bound) < 1e-5


def test_one_atom_has_all_the_mass():
  log_masses, _, _ = fit_masses(random_likelihoods(atoms=1))
  np.testing.assert_allclose(log_masses, 0, atol=1e-6)


# Seen users, as `fit_prior` gets them.


def seen_users(model, weights, seed=0, noise=True, prototypes=3.0):
  """Their comparisons, twice, answered by these weights [users, K]."""
  variables = oracle.variables_of(model)
  if 'prototypes' in variables['params']:
    variables['params']['prototypes'] *= prototypes
  table, parts = oracle.make_table(), []
  for s in (seed, seed + 1):
    c = oracle.make_comparisons(s, len(weights), NUM)
    c = c.replace(mask=np.ones_like(c.mask))
    z = np.array(
      [
        oracle.numpy_logits(model, variables, table, c, i)(w)
        for i, w in enumerate(weights)
      ]
    )
    u = np.random.default_rng([s, 4]).random(z.shape) if noise else 0.5
    stats = oracle.reduce(model, variables, c, table)
    parts.append((stats, np.float32(expit(z) > u), c.mask))
  return model, variables, *parts


def log_of(weights):
  return np.float32(np.log(np.maximum(weights, 1e-12)))


@pytest.fixture(scope='module')
def corners():
  """Users at the vertices, without noise."""
  return seen_users(pal_a(), np.eye(K)[np.arange(U) % K], noise=False)


def test_a_planted_population_of_two_kinds_is_recovered():
  atoms = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])
  who = np.arange(60) % 10 >= 7  # 70 % and 30 %
  model, variables, support, _ = seen_users(pal_a(), atoms[who.astype(int)])
  log_likelihoods = atom_log_likelihoods(
    model, variables, 'convex', log_of(atoms), *support
  )
  masses = np.exp(fit_masses(log_likelihoods)[0])
  np.testing.assert_allclose(masses, [0.7, 0.3, 0.0], atol=0.05)


@pytest.mark.parametrize('model', [pal_a(), pal_b(preference='distance')])
def test_log_likelihoods_are_sums_over_comparisons(model):
  weights = np.random.default_rng(0).dirichlet(np.ones(K), U)
  model, variables, (stats, label, mask), _ = seen_users(model, weights)
  atoms = np.log(np.random.default_rng(1).dirichlet(np.ones(K), 4))
  mask = mask & (np.arange(NUM) < np.arange(U)[:, None])
  found = atom_log_likelihoods(
    model, variables, 'convex', np.float32(atoms), stats, label, mask, chunk=4
  )
  z = np.float64(
    atom_logits(model, variables, 'convex', jnp.float32(atoms), stats)
  )
  each = -negative_log_likelihood(z, label[..., None]) * mask[..., None]
  np.testing.assert_allclose(found, each.sum(1), rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(found[0], 0)
  dirty = stats.map(
    lambda x: jnp.where(
      mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.nan
    )
  )
  again = atom_log_likelihoods(
    model,
    variables,
    'convex',
    np.float32(atoms),
    dirty,
    np.where(mask, label, np.nan),
    mask,
    chunk=4,
  )
  np.testing.assert_array_equal(found, again)


# Atoms.


def test_atoms_are_seen_users_vertices_and_the_centre():
  seen = log_softmax(np.random.default_rng(2).normal(size=(U, K)), -1)
  atoms = choose_atoms(pal_a(), jnp.float32(seen))
  assert atoms.shape == (U + K + 1, K) and np.all(np.isfinite(atoms))
  np.testing.assert_allclose(atoms[:U], seen, atol=1e-5)
  np.testing.assert_allclose(np.exp(atoms[U:-1]), np.eye(K), atol=1e-6)
  np.testing.assert_allclose(np.exp(atoms[-1]), np.exp(seen).mean(0), atol=1e-5)
  few = choose_atoms(pal_a(), jnp.float32(seen), max_atoms=3)
  assert few.shape == (3 + K + 1, K)
  np.testing.assert_allclose(few[:3], seen[[0, 2, 5]], atol=1e-5)


@pytest.mark.parametrize(
  'model',
  [
    pal_a(membership='partition'),
    pal_a(membership='mixture_likelihood', mixture_level='user'),
    pal_a(num_prototypes=1),
  ],
)
def test_classes_have_only_vertices_as_atoms(model):
  num = model.num_prototypes
  seen = jnp.full((U, num), -jnp.log(num))
  np.testing.assert_array_equal(choose_atoms(model, seen), vertices(num))
  np.testing.assert_allclose(np.exp(vertices(num)), np.eye(num), atol=1e-6)


# The whole prior.


def test_the_prior_of_a_partition_is_the_share_of_each_class():
  model = pal_a(membership='partition')
  shares = np.eye(K)[np.arange(60) % 10 // 4 % K]  # 40, 40 and 20 %
  model, variables, support, held_out = seen_users(model, shares)
  prior, summary = fit_prior(
    model, variables, np.log(np.full((60, K), 1 / K)), support, held_out
  )
  assert prior.log_atoms.shape == (K, K) and summary['atoms'] == K
  expected = (1 - SPREAD) * shares.mean(0) + SPREAD / K
  np.testing.assert_allclose(np.exp(prior.log_masses), expected, atol=0.05)
  np.testing.assert_array_equal(prior.log_weights, prior.log_masses)
  assert prior.strength == 1 and summary['strength_curve'] == {}


def test_one_prototype_has_a_prior_with_nothing_in_it():
  model = pal_a(num_prototypes=1)
  model, variables, support, held_out = seen_users(model, np.ones((U, 1)))
  prior, summary = fit_prior(
    model, variables, jnp.zeros((U, 1)), support, held_out
  )
  for x in (prior.log_weights, prior.log_atoms, prior.log_masses):
    np.testing.assert_allclose(x, 0, atol=1e-6)
  assert (prior.evidence, prior.pooling, prior.strength) == (1, 0, 1)
  assert summary['effective_atoms'] == pytest.approx(1)
  assert summary['belief_curve'] == {}


def test_a_prior_holds_what_its_summary_says(corners):
  model, variables, support, held_out = corners
  seen = log_softmax(np.random.default_rng(3).normal(size=(U, K)), -1)
  prior, summary = fit_prior(
    model, variables, jnp.float32(seen), support, held_out
  )
  masses = np.exp(np.float64(prior.log_masses))
  np.testing.assert_allclose(masses.sum(), 1, atol=1e-5)
  # Nobody is impossible.
  assert np.all(masses >= 0.99 * SPREAD / masses.size)
  # Users sit at the vertices, and so does the mass.
  assert masses[U : U + K].sum() > 0.8
  assert summary['effective_atoms'] == pytest.approx(
    np.exp(-np.sum(masses * np.log(masses))), rel=1e-3
  )
  np.testing.assert_allclose(
    np.exp(prior.log_weights), np.exp(seen).mean(0), atol=1e-5
  )
  assert summary['strength'] == pytest.approx(float(prior.strength))
  curve = summary['strength_curve']
  assert min(curve, key=curve.get) == f'{summary["strength"]:g}'
  curve = summary['belief_curve']
  chosen = f'{summary["evidence"]:g}/{summary["pooling"]:g}'
  assert min(curve, key=curve.get) == chosen
  assert prior.evidence == np.float32(summary['evidence'])
  assert prior.pooling == np.float32(summary['pooling'])
  given, summary = fit_prior(
    model, variables, jnp.float32(seen), support, held_out, strength=2.0
  )
  assert given.strength == 2 and summary['strength_curve'] == {}


# What is chosen on held-out comparisons.


@pytest.mark.parametrize('choose', [choose_strength, choose_belief])
def test_only_seen_users_can_reach_the_choice(choose):
  names = list(inspect.signature(choose).parameters)
  assert names[:4] == ['model', 'variables', 'support', 'held_out']
  assert not {'unseen', 'dataset', 'truth', 'table', 'placed'} & set(names)


def test_evidence_and_pooling_are_the_best_of_the_grid(corners):
  model, variables, support, held_out = corners
  log_atoms = log_softmax(np.random.default_rng(4).normal(size=(5, K)), -1)
  log_masses = log_softmax(np.random.default_rng(5).normal(size=5))
  log_atoms, log_masses = jnp.float32(log_atoms), jnp.float32(log_masses)
  best, curve = choose_belief(
    *corners, log_atoms, log_masses, counts=(1, 4, 99)
  )
  assert len(curve) == len(EVIDENCES) * len(POOLINGS)
  assert curve[f'{best[0]:g}/{best[1]:g}'] == min(curve.values())
  # By hand; a count that nobody has is left out.
  stats, label, mask = support
  z = atom_logits(model, variables, 'convex', log_atoms, held_out[0])
  for evidence, pooling in ((1.0, 0.0), (3.0, 0.2), best):
    prior = oracle.make_prior(evidence=evidence, pooling=pooling)
    prior = prior.replace(log_atoms=log_atoms, log_masses=log_masses)
    losses = []
    for n in (1, 4):
      users = believe(
        prior,
        atom_log_likelihoods(
          model,
          variables,
          'convex',
          log_atoms,
          stats,
          label,
          mask & (np.arange(NUM) < n),
        ),
      )
      logits = np.float64(predict(prior, users.log_belief, z))
      losses.append(np.mean(negative_log_likelihood(logits, held_out[1])))
    assert curve[f'{evidence:g}/{pooling:g}'] == pytest.approx(
      np.mean(losses), rel=1e-4
    )


def test_the_strength_is_the_best_of_the_grid(corners):
  model, variables, (stats, label, mask), held_out = corners
  center = jnp.log(jnp.full(K, 1 / K))
  grid = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
  best, curve = choose_strength(*corners, center, counts=(1, 4, 1000))
  assert tuple(curve) == grid and curve[best] == min(curve.values())
  # By hand, in float64 and without the solver.
  z = np.float64(stats.delta)
  for strength in (0.3, 3.0):
    losses = []
    for n in (1, 4):
      for i in range(U):
        problem = oracle.Problem(
          lambda w, i=i, n=n: z[i, :n] @ w, label[i, :n], center, strength
        )
        theta = minimize(problem.value, np.zeros(K), method='BFGS').x
        logits = np.float64(held_out[0].delta[i]) @ softmax(theta)
        losses.append(np.mean(negative_log_likelihood(logits, held_out[1][i])))
    assert curve[strength] == pytest.approx(np.mean(losses), rel=2e-3)


def test_padded_comparisons_do_not_reach_the_choice(corners):
  model, variables, support, held_out = corners
  center = jnp.log(jnp.full(K, 1 / K))
  kept = np.arange(NUM) < np.arange(5, 5 + U)[:, None]

  def pad(part, garbage):
    stats, label, _ = part
    stats = stats.map(lambda x: jnp.where(kept[..., None], x, garbage))
    return stats, np.where(kept, label, garbage), kept

  clean = [pad(x, 0.0) for x in (support, held_out)]
  dirty = [pad(x, np.nan) for x in (support, held_out)]
  counts = {'counts': (1, 4, 1000)}
  _, curve = choose_strength(model, variables, *clean, center, **counts)
  _, other = choose_strength(model, variables, *dirty, center, **counts)
  assert curve == other
  assert curve != choose_strength(*corners, center, **counts)[1]
  atoms = vertices(K), center
  _, curve = choose_belief(model, variables, *clean, *atoms)
  _, other = choose_belief(model, variables, *dirty, *atoms)
  assert curve == other and np.all(np.isfinite(list(curve.values())))


def test_users_far_from_the_population_choose_a_weak_prior(corners):
  center = jnp.log(jnp.full(K, 1 / K))
  best, curve = choose_strength(*corners, center, counts=(5, 20))
  assert best <= 0.3
  assert curve[best] < curve[10.0] - 0.05


def test_users_like_the_population_choose_a_strong_prior():
  weights = np.array([0.6, 0.3, 0.1])
  args = seen_users(pal_a(), np.tile(weights, (U, 1)), prototypes=1.0)
  best, _ = choose_strength(*args, jnp.log(weights), counts=(5, 20))
  assert best >= 3.0


@pytest.mark.parametrize(
  'model',
  [
    pal_a(membership='partition'),
    pal_a(membership='mixture_likelihood', mixture_level='user'),
    pal_a(num_prototypes=1),
  ],
)
def test_there_is_no_strength_to_choose_without_a_point_estimate(model):
  assert choose_strength(model, None, None, None, None) == (1.0, {})


def test_a_prior_is_a_tree_of_arrays():
  prior = oracle.make_prior()
  assert len(jax.tree.leaves(prior)) == 6
