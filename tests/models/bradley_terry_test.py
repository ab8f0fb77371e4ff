"""models.bradley_terry: Newton against scipy in float64."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from pal_jax.models.bradley_terry import fit_bradley_terry


def problem(seed=0, number=200, width=4):
  rng = np.random.default_rng(seed)
  d = rng.normal(size=(number, width))
  truth = np.linspace(-1.0, 2.0, width)
  y = (rng.uniform(size=number) < expit(d @ truth)).astype(float)
  soft = rng.uniform(size=number) < 0.2
  return d, np.where(soft, 0.5 + 0.3 * (y - 0.5), y), rng.uniform(size=number)


def fit(d, y, w, ridge):
  return fit_bradley_terry(
    d.astype(np.float32), y.astype(np.float32), w.astype(np.float32), ridge
  )


def objective(v, d, y, w, ridge):
  z = d @ v
  each = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
  value = (w * each).sum() + 0.5 * ridge * v @ v
  return value, d.T @ (w * (expit(z) - y)) + ridge * v


def oracle(d, y, w, ridge):
  return minimize(
    objective,
    np.zeros(d.shape[-1]),
    (d, y, w, ridge),
    jac=True,
    method='BFGS',
    options={'gtol': 1e-9},
  ).x


@pytest.mark.parametrize('ridge', [1e-3, 1.0, 100.0])
def test_newton_equals_scipy(ridge):
  d, y, w = problem()
  v, gradient = fit(d, y, w, ridge)
  np.testing.assert_allclose(v, oracle(d, y, w, ridge), rtol=1e-3, atol=1e-4)
  assert float(gradient) < 1e-4


def test_padding_of_weight_0_changes_nothing():
  d, y, w = problem()
  found, _ = fit(d, y, w, 0.1)
  w[150:] = 0.0
  expected, _ = fit(d, y, w, 0.1)
  d[150:], y[150:] = 1e3, 0.0
  padded, _ = fit(d, y, w, 0.1)
  np.testing.assert_allclose(padded, expected, atol=1e-5)
  assert np.abs(found - expected).max() > 1e-2


def test_order_and_swaps_change_nothing():
  d, y, w = problem()
  order = np.random.default_rng(1).permutation(200)
  expected, _ = fit(d, y, w, 0.1)
  found, _ = fit(-d[order], 1.0 - y[order], w[order], 0.1)
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('ridge', [1e-4, 1e-1])
@pytest.mark.parametrize('scale', [1.0, 30.0])
def test_separable_data_stay_finite_and_converge(scale, ridge):
  """Without the ridge the optimum is at infinity."""
  d = problem()[0] * scale
  y, w = (d[:, 0] > 0).astype(float), np.ones(200)
  v, gradient = fit(d, y, w, ridge)
  assert np.isfinite(v).all()
  assert float(gradient) < 1e-4
  assert ((d @ np.asarray(v) > 0) == (y > 0.5)).mean() > 0.98
  found = objective(np.asarray(v, float), d, y, w, ridge)[0]
  best = objective(oracle(d, y, w, ridge), d, y, w, ridge)[0]
  # The gradient is relative to that at 0, so not every last nat is won.
  assert found <= best * (1 + 1e-3) + 0.01


def test_ties_alone_give_no_opinion():
  d, _, w = problem()
  v, gradient = fit(d, np.full(200, 0.5), w, 0.1)
  np.testing.assert_allclose(v, 0.0, atol=1e-6)
  assert np.isfinite(gradient)


def test_more_features_than_comparisons():
  d, y, w = problem(number=5, width=12)
  v, _ = fit(d, y, w, 0.1)
  np.testing.assert_allclose(v, oracle(d, y, w, 0.1), atol=1e-3)


def test_it_recovers_the_truth():
  d, _, _ = problem(number=200)
  truth = np.array([-1.0, 0.0, 1.0, 2.0])
  v, _ = fit(d, expit(d @ truth), np.ones(200), 1e-4)
  np.testing.assert_allclose(v, truth, atol=1e-3)
