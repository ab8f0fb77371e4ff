"""Ideal-point rewards: how good a candidate at x is for a user at u.

Plain functions of arrays, usable alone:

>>> squared_distance(x, u)            # [..., P], [..., P] -> [...]
>>> mix(weights, prototypes)          # [..., K], [K, P] -> [..., P]

Every reward grows as x comes nearer to u in that reward's own geometry
(METHOD section 1; arXiv 2406.08469 sections 2 and 3). Rewards are unscaled:
the models multiply them by a learnable temperature tau.
"""

import jax
import jax.numpy as jnp

from pal_jax.numerics import normalize, safe_norm


def squared_distance(x: jax.Array, u: jax.Array) -> jax.Array:
  """-||x - u||^2, in (-inf, 0]."""
  return -jnp.sum(jnp.square(x - u), axis=-1)


def distance(x: jax.Array, u: jax.Array) -> jax.Array:
  """-||x - u||, in (-inf, 0]; gradient 0 at x = u."""
  return -safe_norm(x - u)


def normalized_distance(x: jax.Array, u: jax.Array) -> jax.Array:
  """-||x/||x|| - u/||u|| ||, in [-2, 0]."""
  return -safe_norm(normalize(x) - normalize(u))


def cosine(x: jax.Array, u: jax.Array) -> jax.Array:
  """cos(x, u), in [-1, 1]; 0 if either is the zero vector."""
  return jnp.sum(normalize(x) * normalize(u), axis=-1)


def inner_product(x: jax.Array, u: jax.Array) -> jax.Array:
  """<x, u>."""
  return jnp.sum(x * u, axis=-1)


PREFERENCES = {
  'squared_distance': squared_distance,
  'distance': distance,
  'normalized_distance': normalized_distance,
  'cosine': cosine,
  'inner_product': inner_product,
}


def mix(weights: jax.Array, points: jax.Array) -> jax.Array:
  """Weighted mean of K points: [..., K], [..., K, P] -> [..., P].

  `points` may lack the leading axes of `weights` (prototypes shared by all
  users); they broadcast.
  """
  return jnp.einsum('...k,...kp->...p', weights, points)


def prototype_logits(
  x: jax.Array, points: jax.Array, preference: str
) -> jax.Array:
  """delta r_k = r_k(first) - r_k(second) for each of K ideal points.

  Args:
    x: [..., 2, P] the two candidates.
    points: [..., K, P] the ideal points; leading axes broadcast.
    preference: a key of PREFERENCES.

  Returns:
    [..., K]. With squared distance and the inner product the logit of a
    convex user is `weights @ prototype_logits` (METHOD section 1, identity).
  """
  reward = PREFERENCES[preference](
    x[..., :, None, :], points[..., None, :, :]
  )  # [..., 2, K]
  return reward[..., 0, :] - reward[..., 1, :]
