"""methods.newton: against scipy and numerical integration, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize

from pal_jax.methods.newton import choose_scale, fit_gaussian, fit_users


def problem(seed, n=12, width=20, size=1.0):
  rng = np.random.default_rng(seed)
  x = size * rng.normal(size=(n, width))
  offset, mask = rng.normal(size=n), np.arange(n) < n - 3
  label = rng.integers(0, 2, n).astype(float)
  label[0] = 0.3
  return [np.float32(a) for a in (x, offset, label)] + [mask]


def objective(v, x, offset, label, scale):
  z = offset + x @ v
  loss = np.logaddexp(0, -z) * label + np.logaddexp(0, z) * (1 - label)
  return loss.sum() + v @ v / (2 * scale**2)


@pytest.mark.parametrize('scale', [0.01, 0.3, 3.0])
@pytest.mark.parametrize('size', [0.3, 10.0])
def test_the_fit_is_that_of_scipy(scale, size):
  for seed in range(3):
    x, offset, label, mask = problem(seed, size=size)
    found = fit_gaussian(x, offset, label, mask, jnp.float32(scale))
    args = [np.float64(a[mask]) for a in (x, offset, label)]
    best = minimize(objective, np.zeros(20), (*args, scale), method='BFGS')
    value = objective(np.float64(found.v), *args, scale)
    assert value <= best.fun + 1e-4 * max(1, best.fun)


def test_the_evidence_is_the_integral_over_one_weight():
  rng = np.random.default_rng(0)
  x, label = rng.normal(size=(30, 1)), rng.integers(0, 2, 30).astype(float)
  zero, scale = np.zeros(30), 0.7
  normal = np.sqrt(2 * np.pi) * scale

  def density(v):
    return np.exp(-objective(np.array([v]), x, zero, label, scale)) / normal

  exact = np.log(quad(density, -8, 8, epsabs=0, epsrel=1e-9)[0])
  found = fit_gaussian(
    *(jnp.float32(a) for a in (x, zero, label)), np.ones(30, bool), 0.7
  )
  # Laplace's approximation is good to 1 / n.
  np.testing.assert_allclose(found.evidence, exact, atol=0.05)


def test_masked_rows_and_duplicated_users_change_nothing():
  x, offset, label, mask = problem(1)
  a = fit_gaussian(x, offset, label, mask, jnp.float32(1.0))
  x[~mask], label[~mask] = 7.0, 1.0
  b = fit_gaussian(x, offset, label, mask, jnp.float32(1.0))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_no_comparisons_leave_the_population():
  x, offset, label, mask = problem(2)
  found = fit_gaussian(x, offset, label, mask & False, jnp.float32(1.0))
  np.testing.assert_array_equal(found.v, 0)
  np.testing.assert_allclose(found.evidence, 0, atol=1e-6)


@pytest.mark.parametrize('true', [0.4, 1.0])
def test_the_scale_that_made_the_people_is_chosen(true):
  rng = np.random.default_rng(3)
  x = rng.normal(size=(200, 30, 5))
  v = true * rng.normal(size=(200, 5))
  z = np.einsum('und,ud->un', x, v)
  label = rng.random(z.shape) < 1 / (1 + np.exp(-z))
  args = (jnp.float32(a) for a in (x, 0 * z, label))
  scales = (true / 10, true / 3, true, 3 * true)
  best, curve = choose_scale(*args, jnp.ones(z.shape, bool), scales)
  assert best == true and max(curve, key=curve.get) == true


def test_padding_to_the_longest_changes_nobody():
  """Users of 1, 3, 17 and no answers, beside one of 30."""
  rng = np.random.default_rng(4)
  count = np.array([1, 30, 0, 3, 17])
  mask = np.arange(30) < count[:, None]
  x = rng.normal(size=(5, 30, 6)).astype(np.float32)
  offset = rng.normal(size=(5, 30)).astype(np.float32)
  label = (rng.random((5, 30)) < 0.5).astype(np.float32)
  found = fit_users(*map(jnp.asarray, (x, offset, label, mask)), 0.7)
  alone = [
    fit_gaussian(*each, jnp.float32(0.7))
    for each in zip(x, offset, label, mask, strict=True)
  ]
  np.testing.assert_allclose(found, [a.v for a in alone], atol=1e-3)
  assert np.abs(found[count > 0]).max(1).min() > 0.01
  _, curve = choose_scale(*map(jnp.asarray, (x, offset, label, mask)), (0.7,))
  total = sum(float(a.evidence) for a in alone)
  np.testing.assert_allclose(curve[0.7], total / count.sum(), rtol=1e-5)
