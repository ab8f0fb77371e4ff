"""Logistic regression with a Gaussian prior, in as many variables as answers.

For a user with N comparisons of D features, z = z0 + X v with v ~ N(0, s^2 I).
The minimum lies in the span of the rows of X, so Newton's method runs in R^N
(Rasmussen and Williams 2006, algorithm 3.1), vmappable over users.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

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


def _by_length(mask) -> list[tuple[np.ndarray, int]]:
  """[(users, columns that hold their comparisons)] of a mask [U, N].

  Widths are powers of four: padded to the longest, work of N^3 a user would
  nearly all be padding where a few people answered most.
  """
  mask = np.asarray(mask)
  last = np.where(mask.any(1), mask.shape[1] - mask[:, ::-1].argmax(1), 0)
  width = 4 ** np.ceil(np.log(np.maximum(last, 1)) / np.log(4)).astype(int)
  width = np.minimum(width, mask.shape[1])
  return [(np.flatnonzero(width == w), int(w)) for w in np.unique(width)]


@jax.jit
def _fit(args, scale) -> Fit:
  """Of users [u, n]; data are arguments, not constants to be folded."""
  return jax.lax.map(
    lambda each: fit_gaussian(*each, scale), args, batch_size=64
  )


@jax.jit
def _evidence(args, scales):
  """[S] nats, summed over users."""
  return jax.lax.map(lambda scale: jnp.sum(_fit(args, scale).evidence), scales)


def fit_users(x, offset, label, mask, scale: float) -> jax.Array:
  """v [U, D] of everybody's own `fit_gaussian`, from [U, N, ...]."""
  out = np.zeros((x.shape[0], x.shape[-1]), np.float32)
  for users, n in _by_length(mask):
    part = tuple(np.asarray(a)[users, :n] for a in (x, offset, label, mask))
    out[users] = _fit(part, scale).v
  return jnp.asarray(out)


def choose_scale(x, offset, label, mask, scales: tuple[float, ...]):
  """The s with the largest evidence summed over users, [U, N, ...].

  Returns:
    (s, {s: nats a comparison}).
  """
  values = 0.0
  for users, n in _by_length(mask):
    part = tuple(np.asarray(a)[users, :n] for a in (x, offset, label, mask))
    values += np.asarray(_evidence(part, jnp.asarray(scales)), np.float64)
  values = values / max(int(np.sum(mask)), 1)
  return scales[int(np.argmax(values))], {
    s: float(v) for s, v in zip(scales, values, strict=True)
  }
