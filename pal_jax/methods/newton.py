"""Logistic regression with a Gaussian prior, in as many variables as answers.

For a user with N comparisons of D features, z = z0 + X v with v ~ N(0, s^2 I).
The minimum lies in the span of the rows of X, so Newton's method runs in R^N
(Rasmussen and Williams 2006, algorithm 3.1), vmappable over users.
"""

import flax.struct
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic

NUM_STEPS = 20
SIZES = 0.5 ** jnp.arange(4.0)


@flax.struct.dataclass
class Fit:
  """Of one user."""

  v: jax.Array  # [D], the maximum a posteriori deviation
  evidence: jax.Array  # () log p(y) by Laplace's approximation
  gradient: jax.Array  # () largest |gradient| in R^N that is left


def fit_gaussian(
  x: jax.Array,
  offset: jax.Array,
  label: jax.Array,
  mask: jax.Array,
  scale: jax.Array,
) -> Fit:
  """Maximises sum_j log p(y_j | z_j) - ||v||^2 / (2 s^2), z = offset + X v.

  Args:
    x: [N, D].
    offset: [N] log odds at v = 0.
    label: [N] in [0, 1].
    mask: [N].
    scale: () s > 0.
  """
  live = mask.astype(x.dtype)
  x = jnp.where(mask[:, None], x, 0.0)
  kernel = jnp.square(scale) * (x @ x.T)
  eye = jnp.eye(x.shape[0])

  def objective(alpha):
    f = kernel @ alpha
    return jnp.sum(live * logistic(offset + f, label)) + 0.5 * alpha @ f

  def curvature(alpha):
    p = jax.nn.sigmoid(offset + kernel @ alpha)
    return p, jnp.sqrt(live * p * (1.0 - p))

  def step(alpha, _):
    f = kernel @ alpha
    p, root = curvature(alpha)
    target = jnp.square(root) * f + live * (label - p)
    b = eye + root[:, None] * kernel * root
    inner = jax.scipy.linalg.solve(b, root * (kernel @ target), assume_a='pos')
    move = target - root * inner - alpha
    values = jax.vmap(lambda t: objective(alpha + t * move))(SIZES)
    best = jnp.argmin(values)
    better = values[best] < objective(alpha)
    return jnp.where(better, alpha + SIZES[best] * move, alpha), None

  alpha, _ = jax.lax.scan(step, jnp.zeros(x.shape[0]), None, length=NUM_STEPS)
  p, root = curvature(alpha)
  determinant = jnp.linalg.slogdet(eye + root[:, None] * kernel * root)[1]
  return Fit(
    v=jnp.square(scale) * (x.T @ alpha),
    evidence=-objective(alpha) - 0.5 * determinant,
    gradient=jnp.max(jnp.abs(alpha - live * (label - p)), initial=0.0),
  )


@jax.jit
def _evidence(x, offset, label, mask, scales):
  """[S] nats a comparison; data are arguments, not constants to be folded."""

  def total(scale):
    fits = jax.lax.map(
      lambda args: fit_gaussian(*args, scale).evidence,
      (x, offset, label, mask),
      batch_size=64,
    )
    return jnp.sum(fits) / jnp.maximum(jnp.sum(mask), 1)

  return jax.lax.map(total, scales)


def choose_scale(x, offset, label, mask, scales: tuple[float, ...]):
  """The s with the largest evidence summed over users, [U, N, ...].

  Returns:
    (s, {s: nats a comparison}).
  """

  values = _evidence(x, offset, label, mask, jnp.asarray(scales))
  best = int(jnp.argmax(values))
  return scales[best], {
    s: float(v) for s, v in zip(scales, values, strict=True)
  }
