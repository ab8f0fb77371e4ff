"""Maximum a posteriori weights on the simplex, by a globalised Newton method.

Minimises over one user's weights w

  F(w) = sum_j m_j loss(z_j(w), y_j) + lambda KL(w || w0)

with logits z_j that are a function of w. In log-weights the Newton equation
is (A W + lambda I) d = -(g + lambda (log w - log w0)), W = diag(w), with the
generalised Gauss-Newton matrix A = J^T diag(loss'') J: it stays well
conditioned at the vertices of the simplex, where one step sends a vanishing
weight to its final value. Steps are halved until F decreases enough, because
full Newton steps are not safe at large logits (METHOD section 3).
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic

NUM_HALVINGS = 16
ARMIJO = 1e-4
# Rounding error of F, relative to max(1, |F|), that a decrease may hide in.
ROUNDING = 1e-6
# Keeps weights and their products with gradients out of underflow.
MIN_LOG_WEIGHT = -60.0


@flax.struct.dataclass
class UserState:
  """A fitted user, or [U] of them with a leading axis."""

  log_weights: jax.Array  # [..., K], on the simplex
  objective: jax.Array  # [...] F(w), nats
  # [...] lambda KL(w || softmax(log w0 - grad f / lambda)): zero where and
  # only where w is stationary. A bound on F(w) - min F if f is convex in w
  # (`statistics.is_linear`, or the 'mixture' rule); elsewhere a residual.
  gap: jax.Array
  iterations: jax.Array  # [...] int32
  converged: jax.Array  # [...] bool, gap <= tolerance * max(1, F)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _normalize(log_w: jax.Array) -> jax.Array:
  log_w = jax.nn.log_softmax(log_w, axis=-1)
  return jax.nn.log_softmax(jnp.maximum(log_w, MIN_LOG_WEIGHT), axis=-1)


def fit_weights(
  logits_of: Callable[[jax.Array], jax.Array],
  label: jax.Array,
  mask: jax.Array,
  log_prior: jax.Array,
  strength: jax.Array,
  *,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
) -> UserState:
  """Fits one user; `vmap` it over users.

  The loss is the logistic likelihood whatever the model was trained with,
  because its logits are read as log odds. Without comparisons the result is
  the prior, in no iteration.

  Args:
    logits_of: log-weights [K] -> logits [N] of the support.
    label: [N] in [0, 1].
    mask: [N] False for padding.
    log_prior: [K] log w0, the population; also the starting point.
    strength: () lambda > 0, nats.
    max_iterations: of Newton's method.
    tolerance: of the gap, relative to max(1, F).

  Returns:
    UserState without a leading axis. `converged` is False if the iterations
    ran out or no step decreased F; the best point so far is returned.
  """
  live = mask.astype(jnp.float32)
  log_prior = _normalize(log_prior)
  num_weights = log_prior.shape[-1]

  def likelihood(log_w):
    return jnp.sum(jnp.where(mask, logistic(logits_of(log_w), label), 0.0))

  def objective(log_w):
    return likelihood(log_w) + strength * _kl(log_w, log_prior)

  def expand(log_w):
    """Gradient [K] and curvature root [N, K] of f in w."""
    w = jnp.exp(log_w)
    z, jvp = jax.linearize(logits_of, log_w)
    # Columns d z / d log w_k = w_k d z / d w_k.
    jac = jax.vmap(jvp, out_axes=1)(jnp.eye(num_weights)) / w
    jac = jnp.where(mask[:, None], jac, 0.0)
    p = jax.nn.sigmoid(jnp.where(mask, z, 0.0))
    residual = live * (p - label)
    gradient = residual @ jac
    root = jac * jnp.sqrt(live * p * (1.0 - p))[:, None]
    return gradient, root

  def certificate(log_w, gradient):
    target = jax.nn.log_softmax(log_prior - gradient / strength)
    return jnp.maximum(strength * _kl(log_w, target), 0.0)

  def is_done(gap, value):
    return gap <= tolerance * jnp.maximum(1.0, jnp.abs(value))

  def body(carry):
    log_w, value, gradient, root, gap, iteration, _ = carry
    sqrt_w = jnp.exp(0.5 * log_w)
    slope = gradient + strength * (log_w - log_prior)
    slope = slope - jnp.exp(log_w) @ slope  # a constant changes nothing
    scaled = root * sqrt_w  # (W^1/2 A W^1/2) = scaled^T scaled
    matrix = scaled.T @ scaled + strength * jnp.eye(num_weights)
    # Two right-hand sides: the slope, and the multiplier of sum_k dw_k = 0.
    # W^1/2 d = -matrix^-1 W^1/2 s gives d without dividing by W^1/2, which
    # may have underflowed.
    sides = jnp.stack([slope, jnp.ones_like(slope)], axis=1)  # [K, 2]
    inner = jax.scipy.linalg.solve(
      matrix, sqrt_w[:, None] * sides, assume_a='pos'
    )
    steps = -(sides - root.T @ (scaled @ inner)) / strength
    mass = jnp.exp(log_w) @ steps
    step = steps[:, 0] - mass[0] / mass[1] * steps[:, 1]
    decrease = jnp.exp(log_w) @ (slope * step)  # directional derivative

    sizes = 0.5 ** jnp.arange(NUM_HALVINGS, dtype=jnp.float32)
    trials = jax.vmap(lambda t: _normalize(log_w + t * step))(sizes)
    values = jax.vmap(objective)(trials)
    slack = ROUNDING * jnp.maximum(1.0, jnp.abs(value))
    good = values <= value + ARMIJO * sizes * decrease + slack
    good &= jnp.isfinite(values)
    # The first good one, unless a later one is lower by more than rounding,
    # which helps far from the optimum. Near it all values are equal up to
    # rounding, and the lowest of them may be any step but Newton's.
    first = jnp.argmax(good)
    lowest = jnp.argmin(jnp.where(good, values, jnp.inf))
    best = jnp.where(values[lowest] < values[first] - slack, lowest, first)
    moved = jnp.any(good)
    log_w = jnp.where(moved, trials[best], log_w)
    value = jnp.where(moved, values[best], value)
    gradient, root = expand(log_w)
    gap = certificate(log_w, gradient)
    return log_w, value, gradient, root, gap, iteration + 1, moved

  def go_on(carry):
    _, value, _, _, gap, iteration, moved = carry
    return ~is_done(gap, value) & (iteration < max_iterations) & moved

  gradient, root = expand(log_prior)
  start = (
    log_prior,
    objective(log_prior),
    gradient,
    root,
    certificate(log_prior, gradient),
    jnp.zeros((), jnp.int32),
    jnp.ones((), bool),
  )
  log_w, value, _, _, gap, iterations, _ = jax.lax.while_loop(
    go_on, body, start
  )
  return UserState(log_w, value, gap, iterations, is_done(gap, value))
