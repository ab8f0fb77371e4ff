"""ideal_points: rewards against numpy, and the linear identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pal_jax import ideal_points
from pal_jax.ideal_points import PREFERENCES


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Written by hand in float64, from METHOD section 1.
ORACLES = {
  'squared_distance': lambda x, u: -((x - u) ** 2).sum(-1),
  'distance': lambda x, u: -np.sqrt(((x - u) ** 2).sum(-1)),
  'normalized_distance': lambda x, u: (
    -np.linalg.norm(unit(x) - unit(u), axis=-1)
  ),
  'cosine': lambda x, u: (
    (x * u).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(u, axis=-1)
  ),
  'inner_product': lambda x, u: (x * u).sum(-1),
}
HAND = {  # at x = (3, 4), u = (0, 2)
  'squared_distance': -13.0,
  'distance': -np.sqrt(13.0),
  'normalized_distance': -np.sqrt(0.4),
  'cosine': 0.8,
  'inner_product': 8.0,
}
every_preference = pytest.mark.parametrize('name', sorted(PREFERENCES))


def geometry(name, x, u):
  """How far x is from u in the reward's own geometry."""
  if name in ('squared_distance', 'distance'):
    return np.linalg.norm(x - u, axis=-1)
  if name == 'inner_product':
    return -(x @ u) / np.linalg.norm(u)
  return np.arccos(np.clip(unit(x) @ unit(u), -1.0, 1.0))


def test_every_preference_has_an_oracle():
  assert set(PREFERENCES) == set(ORACLES) == set(HAND)


@every_preference
def test_hand_values(name):
  x, u = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
  assert float(PREFERENCES[name](x, u)) == pytest.approx(HAND[name], rel=1e-6)


@every_preference
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_reward_equals_numpy_with_broadcasting(name, scale):
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(6, 1, 5)) * scale).astype(np.float32)
  u = rng.normal(size=(4, 5)).astype(np.float32)
  found = PREFERENCES[name](x, u)
  assert found.shape == (6, 4)
  expected = ORACLES[name](x.astype(float), u.astype(float))
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5 * scale)


@every_preference
@pytest.mark.parametrize('at', ['x = u', 'x = 0', 'u = 0', 'both 0'])
def test_gradients_are_finite_where_norms_vanish(name, at):
  point = jnp.array([3.0, 4.0])
  x = point if at in ('x = u', 'u = 0') else jnp.zeros(2)
  u = point if at in ('x = u', 'x = 0') else jnp.zeros(2)
  value, gradients = jax.value_and_grad(PREFERENCES[name], argnums=(0, 1))(x, u)
  assert np.isfinite(value)
  assert np.isfinite(gradients).all()


def test_gradients_at_the_kinks_are_zero():
  point, zero = jnp.array([3.0, 4.0]), jnp.zeros(2)
  for name, x, u in (
    ('squared_distance', point, point),
    ('distance', point, point),
    ('distance', zero, zero),
    ('normalized_distance', point, point),
    ('cosine', zero, point),
  ):
    gradient = jax.grad(PREFERENCES[name])(x, u)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6, err_msg=name)


@every_preference
def test_gradients_equal_finite_differences(name):
  x, u = np.array([0.5, -1.5, 2.0]), np.array([1.0, 0.3, -0.7])
  found = jax.grad(PREFERENCES[name])(jnp.array(x), jnp.array(u))
  expected = [
    (ORACLES[name](x + step, u) - ORACLES[name](x - step, u)) / 2e-6
    for step in 1e-6 * np.eye(3)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@every_preference
def test_reward_falls_with_distance(name):
  rng = np.random.default_rng(1)
  x, u = rng.normal(size=(200, 4)), rng.normal(size=4)
  reward = np.asarray(PREFERENCES[name](jnp.array(x), jnp.array(u)))
  order = np.argsort(geometry(name, x, u))
  assert (np.diff(reward[order]) <= 1e-6).all()
  assert reward[order[0]] > reward[order[-1]] + 0.5


def test_rewards_are_largest_at_the_ideal_point_itself():
  rng = np.random.default_rng(2)
  x, u = rng.normal(size=(200, 4)), jnp.array(rng.normal(size=4))
  for name, best in (
    ('squared_distance', 0.0),
    ('distance', 0.0),
    ('normalized_distance', 0.0),
    ('cosine', 1.0),
  ):
    assert float(PREFERENCES[name](u, u)) == pytest.approx(best, abs=1e-6)
    assert (np.asarray(PREFERENCES[name](jnp.array(x), u)) <= best + 1e-6).all()


@pytest.mark.parametrize('name', ['normalized_distance', 'cosine'])
def test_directions_alone_count_on_the_sphere(name):
  x, u = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 0.2, -1.0])
  found = PREFERENCES[name](7.0 * x, 0.01 * u)
  np.testing.assert_allclose(found, PREFERENCES[name](x, u), rtol=1e-5)


def test_normalized_distance_is_a_function_of_the_cosine():
  rng = np.random.default_rng(3)
  x, u = jnp.array(rng.normal(size=(2, 50, 6)))
  np.testing.assert_allclose(
    ideal_points.normalized_distance(x, u) ** 2,
    2.0 - 2.0 * ideal_points.cosine(x, u),
    atol=1e-5,
  )


def test_mix_equals_a_loop_and_broadcasts_shared_points():
  rng = np.random.default_rng(4)
  weights = rng.dirichlet(np.ones(3), size=(5, 2)).astype(np.float32)
  shared = rng.normal(size=(3, 4)).astype(np.float32)
  own = rng.normal(size=(5, 2, 3, 4)).astype(np.float32)
  found = ideal_points.mix(weights, shared)
  found_own = ideal_points.mix(weights, own)
  assert found.shape == found_own.shape == (5, 2, 4)
  for i in range(5):
    for j in range(2):
      np.testing.assert_allclose(
        found[i, j], weights[i, j] @ shared, rtol=1e-5, atol=1e-6
      )
      np.testing.assert_allclose(
        found_own[i, j], weights[i, j] @ own[i, j], rtol=1e-5, atol=1e-6
      )


def test_mix_at_a_vertex_is_that_prototype():
  points = jnp.arange(12.0).reshape(3, 4)
  np.testing.assert_array_equal(
    ideal_points.mix(jnp.eye(3)[1], points), points[1]
  )


@every_preference
@pytest.mark.parametrize('own', [False, True], ids=['shared', 'per row'])
def test_prototype_logits_equal_a_loop(name, own):
  rng = np.random.default_rng(5)
  x = rng.normal(size=(6, 2, 4))
  points = rng.normal(size=(6, 3, 4) if own else (3, 4))
  found = ideal_points.prototype_logits(jnp.array(x), jnp.array(points), name)
  assert found.shape == (6, 3)
  for i in range(6):
    for k in range(3):
      p = points[i, k] if own else points[k]
      expected = ORACLES[name](x[i, 0], p) - ORACLES[name](x[i, 1], p)
      assert float(found[i, k]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@every_preference
def test_swapping_candidates_negates_prototype_logits(name):
  rng = np.random.default_rng(6)
  x, points = jnp.array(rng.normal(size=(6, 2, 4))), rng.normal(size=(3, 4))
  first = ideal_points.prototype_logits(x, jnp.array(points), name)
  swapped = ideal_points.prototype_logits(x[:, ::-1], jnp.array(points), name)
  np.testing.assert_array_equal(first, -swapped)


@pytest.mark.parametrize('name', ['squared_distance', 'inner_product'])
def test_logit_is_linear_in_the_weights(name):
  """METHOD section 1, identity, for weights on the simplex."""
  rng = np.random.default_rng(7)
  x = jnp.array(rng.normal(size=(9, 2, 5)))
  points = jnp.array(rng.normal(size=(3, 5)))
  weights = jnp.array(rng.dirichlet(np.ones(3), size=9))
  reward = PREFERENCES[name](x, ideal_points.mix(weights, points)[:, None])
  linear = jnp.sum(
    weights * ideal_points.prototype_logits(x, points, name), axis=-1
  )
  np.testing.assert_allclose(reward[:, 0] - reward[:, 1], linear, atol=1e-5)


@pytest.mark.parametrize('name', ['distance', 'normalized_distance', 'cosine'])
def test_the_other_logits_are_not_linear(name):
  """So that nobody adds them to the linear ones by mistake."""
  rng = np.random.default_rng(8)
  x = jnp.array(rng.normal(size=(9, 2, 5)))
  points = jnp.array(rng.normal(size=(3, 5)))
  weights = jnp.array(rng.dirichlet(np.ones(3), size=9))
  reward = PREFERENCES[name](x, ideal_points.mix(weights, points)[:, None])
  linear = jnp.sum(
    weights * ideal_points.prototype_logits(x, points, name), axis=-1
  )
  assert np.abs(reward[:, 0] - reward[:, 1] - linear).max() > 1e-2
