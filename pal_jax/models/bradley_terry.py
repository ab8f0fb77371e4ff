"""The homogeneous control: a linear Bradley-Terry model, to convergence.

One score v.h for everybody, fitted by Newton's method on differences of
features. What a personal model must beat, and what K = 1 must match.
"""

import functools

import jax
import jax.numpy as jnp

from pal_jax.losses import logistic


@functools.partial(jax.jit, static_argnames='max_iterations')
def fit_bradley_terry(
  difference: jax.Array,
  label: jax.Array,
  weight: jax.Array,
  ridge: float,
  max_iterations: int = 50,
) -> tuple[jax.Array, jax.Array]:
  """Minimises sum_j w_j loss(v . d_j, y_j) + ridge / 2 ||v||^2.

  Args:
    difference: [N, D] h_a - h_b.
    label: [N] in [0, 1].
    weight: [N] >= 0; 0 for padding.
    ridge: > 0, which keeps separable data finite.
    max_iterations: of damped Newton steps.

  Returns:
    v [D], and the norm of the gradient relative to that at 0.
  """

  def objective(v):
    each = logistic(difference @ v, label)
    return jnp.sum(weight * each) + 0.5 * ridge * jnp.sum(jnp.square(v))

  gradient_of = jax.grad(objective)

  def body(_, v):
    p = jax.nn.sigmoid(difference @ v)
    curvature = weight * p * (1.0 - p)
    hessian = difference.T @ (curvature[:, None] * difference)
    hessian = hessian + ridge * jnp.eye(v.size)
    step = jax.scipy.linalg.solve(hessian, gradient_of(v), assume_a='pos')
    sizes = 0.5 ** jnp.arange(10, dtype=v.dtype)
    values = jax.vmap(lambda t: objective(v - t * step))(sizes)
    best = jnp.argmin(values)
    return jnp.where(values[best] < objective(v), v - sizes[best] * step, v)

  start = jnp.zeros(difference.shape[-1], difference.dtype)
  v = jax.lax.fori_loop(0, max_iterations, body, start)
  scale = jnp.maximum(jnp.linalg.norm(gradient_of(start)), 1e-12)
  return v, jnp.linalg.norm(gradient_of(v)) / scale
