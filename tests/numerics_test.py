"""numerics: the helpers at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pal_jax import numerics


@pytest.fixture(scope='module')
def vectors():
  rng = np.random.default_rng(0)
  scale = np.array([1e-4, 1.0, 1e4])[:, None]
  return (rng.normal(size=(3, 5)) * scale).astype(np.float32)


def test_safe_norm_equals_numpy(vectors):
  np.testing.assert_allclose(
    numerics.safe_norm(vectors), np.linalg.norm(vectors, axis=-1), rtol=1e-6
  )
  np.testing.assert_allclose(
    numerics.safe_norm(vectors, axis=0, keepdims=True),
    np.linalg.norm(vectors, axis=0, keepdims=True),
    rtol=1e-6,
  )


def test_gradient_of_safe_norm_is_the_direction_and_0_at_0():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
  gradient = jax.grad(lambda x: numerics.safe_norm(x).sum())(x)
  np.testing.assert_allclose(gradient, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_normalize_gives_unit_vectors_whatever_the_scale(vectors):
  unit = numerics.normalize(vectors)
  np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1.0, rtol=1e-6)
  np.testing.assert_allclose(
    numerics.normalize(vectors.T, axis=0), unit.T, rtol=1e-6
  )


def test_normalize_leaves_zero_with_zero_gradient():
  zero = jnp.zeros(3)
  np.testing.assert_array_equal(numerics.normalize(zero), 0.0)
  # The docstring says "with zero gradient": x / 1 would give the identity.
  np.testing.assert_array_equal(jax.jacobian(numerics.normalize)(zero), 0.0)


def test_gradient_of_normalize_is_tangent():
  x = jnp.array([3.0, 4.0])
  unit = np.array([0.6, 0.8])
  expected = (np.eye(2) - np.outer(unit, unit)) / 5.0
  np.testing.assert_allclose(
    jax.jacobian(numerics.normalize)(x), expected, atol=1e-7
  )


def test_masked_mean_never_reads_what_is_masked():
  value = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
  mask = jnp.array([True, False, True, False])
  assert float(numerics.masked_mean(value, mask)) == 2.0


def test_gradient_of_masked_mean_is_zero_where_masked():
  mask = jnp.array([True, False, True])
  gradient = jax.grad(numerics.masked_mean)(jnp.array([1.0, 5.0, 3.0]), mask)
  np.testing.assert_allclose(gradient, [0.5, 0.0, 0.5])


def test_masked_mean_of_nothing_is_zero():
  assert float(numerics.masked_mean(jnp.full(3, jnp.nan), jnp.zeros(3))) == 0.0


def test_masked_mean_broadcasts_and_weighs():
  value = jnp.array([[1.0, 2.0], [3.0, 6.0]])
  assert float(
    numerics.masked_mean(value, jnp.array([[1.0], [3.0]]))
  ) == pytest.approx((3.0 + 27.0) / 8.0)


def test_log_weights_stay_finite_at_a_vertex():
  weights = jnp.array([1.0, 0.0, 1e-38])
  log_w = numerics.log_weights(weights)
  assert np.isfinite(log_w).all()
  assert float(log_w[0]) == 0.0
  # Nothing comes back: the floor is far below one float32 epsilon.
  np.testing.assert_allclose(jnp.exp(log_w), weights, atol=1e-29)
  gradient = jax.grad(lambda w: numerics.log_weights(w).sum())(weights)
  assert np.isfinite(gradient).all()


def test_log_mean_weights_is_the_mean_of_the_users():
  weights = np.random.default_rng(1).dirichlet(np.ones(4), size=7)
  found = numerics.log_mean_weights(jnp.log(weights))
  np.testing.assert_allclose(jnp.exp(found), weights.mean(0), rtol=1e-5)


def test_log_mean_weights_of_extreme_users_is_finite_and_normalised():
  log_w = jax.nn.log_softmax(jnp.array([[0.0, -1000.0], [0.0, -900.0]]))
  found = numerics.log_mean_weights(log_w)
  np.testing.assert_allclose(found, [0.0, -900.0 - np.log(2)], rtol=1e-6)
