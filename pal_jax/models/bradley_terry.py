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
  tolerance: float = 1e-5,
  start: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Minimises sum_j w_j loss(v . d_j, y_j) + ridge / 2 ||v||^2.

  Args:
    difference: [N, D] h_a - h_b.
    label: [N] in [0, 1].
    weight: [N] >= 0; 0 for padding.
    ridge: > 0, which keeps separable data finite.
    max_iterations: of damped Newton steps.
    tolerance: of the gradient's norm, relative to that at 0.
    start: [D] v to begin with; 0 if not given.

  Returns:
    v [D], and the norm of the gradient relative to that at 0.
  """

  def objective(v):
    each = logistic(difference @ v, label)
    return jnp.sum(weight * each) + 0.5 * ridge * jnp.sum(jnp.square(v))

  gradient_of = jax.grad(objective)

  zero = jnp.zeros(difference.shape[-1], difference.dtype)
  start = zero if start is None else start
  scale = jnp.maximum(jnp.linalg.norm(gradient_of(zero)), 1e-12)
  sizes = 0.5 ** jnp.arange(8, dtype=difference.dtype)

  def body(carry):
    v, gradient, iteration, _ = carry
    p = jax.nn.sigmoid(difference @ v)
    curvature = weight * p * (1.0 - p)
    hessian = difference.T @ (curvature[:, None] * difference)
    hessian = hessian + ridge * jnp.eye(v.size)
    step = jax.scipy.linalg.solve(hessian, gradient, assume_a='pos')
    values = jax.vmap(lambda t: objective(v - t * step))(sizes)
    best = jnp.argmin(values)
    # Within rounding a decrease is no longer visible: then it has converged.
    moved = values[best] < objective(v)
    v = jnp.where(moved, v - sizes[best] * step, v)
    return v, gradient_of(v), iteration + 1, moved

  def go_on(carry):
    _, gradient, iteration, moved = carry
    large = jnp.linalg.norm(gradient) > tolerance * scale
    return large & moved & (iteration < max_iterations)

  v, gradient, _, _ = jax.lax.while_loop(
    go_on, body, (start, gradient_of(start), 0, True)
  )
  return v, jnp.linalg.norm(gradient) / scale
