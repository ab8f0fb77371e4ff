"""Small numerical helpers that are safe at the edges."""

import jax
import jax.numpy as jnp

# Smallest weight that keeps its logarithm finite in float32 with room to add.
MIN_WEIGHT = 1e-30


def safe_norm(x: jax.Array, axis: int = -1, keepdims: bool = False):
  """Euclidean norm whose gradient at 0 is 0, not NaN.

  The inner `where` keeps the square root away from 0: a single outer one still
  multiplies infinity by zero in the backward pass.
  """
  squared = jnp.sum(jnp.square(x), axis=axis, keepdims=keepdims)
  is_zero = squared == 0.0
  return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))


def normalize(x: jax.Array, axis: int = -1) -> jax.Array:
  """x / ||x|| along `axis`; the zero vector stays zero, with zero gradient."""
  norm = safe_norm(x, axis=axis, keepdims=True)
  is_zero = norm == 0.0
  return jnp.where(is_zero, 0.0, x / jnp.where(is_zero, 1.0, norm))


def masked_mean(value: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of `value` where `mask` is positive; 0 where nothing is.

  Padded values may be anything, NaN included: they are replaced, not
  multiplied by zero.
  """
  mask = jnp.broadcast_to(mask, value.shape).astype(value.dtype)
  total = jnp.sum(jnp.where(mask > 0, value * mask, 0.0))
  return total / jnp.maximum(jnp.sum(mask), 1e-12)


def log_weights(weights: jax.Array) -> jax.Array:
  """Logarithm of simplex weights, floored so that it stays finite."""
  return jnp.log(jnp.maximum(weights, MIN_WEIGHT))


def log_mean_weights(log_w: jax.Array) -> jax.Array:
  """Log of the mean of simplex points: [U, K] -> [K]; the population."""
  log_mean = jax.nn.logsumexp(log_w, axis=0) - jnp.log(log_w.shape[0])
  return jax.nn.log_softmax(log_mean)


def is_known(number) -> bool:
  """Whether a number can be asked about in Python: one of a sweep is traced,
  and `grid` answers for it."""
  return not isinstance(number, jax.core.Tracer)
