"""Maximum a posteriori weights on the simplex, by a damped Newton method.

Minimises over each user's weights w

  F(w) = sum_j m_j loss(z_j(w), y_j) + lambda KL(w || w0)

with logits z_j that are a function of w. In log-weights the Newton equation
is (A W + (lambda + mu) I) d = -s, with W = diag(w), s the gradient projected
to the tangent space of the simplex, and A the curvature of the likelihood
projected likewise. It stays well conditioned at the vertices of the simplex,
where one step sends a vanishing weight to its final value. The damping mu
follows Levenberg and Marquardt: a step that does not decrease F is refused and
mu grows; full Newton steps are not safe at large logits (METHOD section 3).

Users are the *last* axis inside, in chunks of a few hundred: every operation
then is a loop over contiguous users, and the K x K factorisation is unrolled
over scalars that are rows of users. On CPU this is several times faster than
a vmapped library factorisation (`benchmarks/adaptation.py`).
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

CHUNK = 256  # users; their statistics stay in the cache
BLOCK = 10  # comparisons whose terms are summed without a loop
ARMIJO = 1e-4  # share of the predicted decrease that a step must reach
# Rounding error of F, relative to max(1, |F|), that a decrease may hide in.
ROUNDING = 1e-6
# Keeps weights and their products with gradients out of underflow.
MIN_LOG_WEIGHT = -60.0
# The first step may change log-weights by about this much.
FIRST_STEP = 4.0
RAISE, LOWER = 3.0, 5.0  # factors of the damping
MAX_DAMPING = 1e8  # no step decreases F any more
# The KKT residual is a difference of gradients, which float32 gives to about
# six digits, not a second-order quantity like the gap.
RESIDUAL_TOLERANCE = 1e-4


@flax.struct.dataclass
class UserState:
  """A fitted user, or [U] of them with a leading axis.

  `gap` and `residual` both vanish where, and only where, w is stationary.
  `gap` bounds F(w) - min F if f is convex in w (`statistics.is_convex`);
  elsewhere only `residual` means something, and a stationary point need not
  be the minimum.
  """

  log_weights: jax.Array  # [..., K], on the simplex
  objective: jax.Array  # [...] F(w), nats; minus log evidence for a posterior
  # [...] nats, lambda KL(w || softmax(log w0 - grad f / lambda)).
  gap: jax.Array
  # [...] nats per unit of weight: the largest component of the gradient of F
  # in w within the simplex's tangent space.
  residual: jax.Array
  iterations: jax.Array  # [...] int32
  # [...] bool: gap <= tolerance * max(1, F) where f is convex, else
  # residual <= RESIDUAL_TOLERANCE * max(1, largest |grad f|).
  converged: jax.Array
  # [..., M] the posterior over a discrete prior's atoms; None for a point
  # estimate.
  log_belief: jax.Array | None = None


def _total(terms):
  """Sum of equal-shaped arrays, without a reduction over a leading axis."""
  total = None
  for term in terms:
    total = term if total is None else total + term
  return total


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """[K, U], [K, U] -> [U]."""
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=0)


def _normalize(log_w: jax.Array) -> jax.Array:
  log_w = jax.nn.log_softmax(log_w, axis=0)
  return jax.nn.log_softmax(jnp.maximum(log_w, MIN_LOG_WEIGHT), axis=0)


def _loss_terms(z, label, mask, mixes):
  """Loss, its slope and curvature in the logit; all [N, U], 0 where masked."""
  z = jnp.where(mask, z, 0.0)
  e = jnp.exp(-jnp.abs(z))
  p = jnp.where(z >= 0, 1.0, e) / (1.0 + e)
  q = jnp.where(z >= 0, e, 1.0) / (1.0 + e)  # 1 - p without cancellation
  loss = jnp.maximum(z, 0.0) - label * z + jnp.log1p(e)
  # -log sum_k w_k sigma_k has the curvature a a^T, a = sigma_k / p, which is
  # q^2 of that of the logit within the tangent space; p q would overstate it
  # at confident answers and slow the solver down.
  curvature = label * q * q + (1.0 - label) * p * p if mixes else p * q
  live = mask.astype(z.dtype)
  slope = (1.0 - label) * p - label * q
  return live * loss, live * slope, live * curvature


def _sums(loss, slope, curvature, jac):
  """F's likelihood [U], gradient [K, U] and rows of A, [k + 1, U] each."""
  num_weights = jac.shape[1]

  def block(terms):
    loss, slope, curvature, jac = terms
    steps = range(jac.shape[0])
    rows = [
      _total((curvature[n] * jac[n, k])[None] * jac[n, : k + 1] for n in steps)
      for k in range(num_weights)
    ]
    gradient = _total(slope[n][None] * jac[n] for n in steps)
    return _total(loss[n] for n in steps), gradient, rows

  # The loop keeps the sums out of the fusions that use them: XLA would
  # compute them again for each entry of the factorisation.
  count = jac.shape[0]
  size = min(BLOCK, -(-count // 2))
  missing = -count % size

  def split(x):
    x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape((-1, size, *x.shape[1:]))

  terms = tuple(split(x) for x in (loss, slope, curvature, jac))
  zero = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(block, jax.tree.map(lambda x: x[0], terms)),
  )
  return jax.lax.scan(
    lambda carry, x: (jax.tree.map(jnp.add, carry, block(x)), None),
    zero,
    terms,
  )[0]


def _solve(matrix, side):
  """Cholesky, unrolled: lower rows of [U] scalars, K of [U] -> K of [U].

  Divisions rather than products with inverses: XLA does not duplicate a
  division into everything that uses it.
  """
  size = len(side)
  low = [[None] * size for _ in range(size)]
  for j in range(size):
    pivot = matrix[j][j]
    for p in range(j):
      pivot = pivot - low[j][p] * low[j][p]
    low[j][j] = jnp.sqrt(pivot)
    for i in range(j + 1, size):
      entry = matrix[i][j]
      for p in range(j):
        entry = entry - low[i][p] * low[j][p]
      low[i][j] = entry / low[j][j]
  forward = []
  for i in range(size):
    entry = side[i]
    for p in range(i):
      entry = entry - low[i][p] * forward[p]
    forward.append(entry / low[i][i])
  out = [None] * size
  for i in reversed(range(size)):
    entry = forward[i]
    for p in range(i + 1, size):
      entry = entry - low[p][i] * out[p]
    out[i] = entry / low[i][i]
  return out


def _tangent(log_w, gradient, log_prior, strength):
  """Gradient of F within the tangent space, [K, U]."""
  slope = gradient + strength * (log_w - log_prior)
  w = jnp.exp(log_w)
  return slope - jnp.sum(w * slope, axis=0) / jnp.sum(w, axis=0)


def _step(log_w, slope, rows, strength, damping):
  """Damped Newton step [K, U] and the decrease it promises, [U] <= 0."""
  size = len(rows)
  w, root = jnp.exp(log_w), jnp.exp(0.5 * log_w)
  mass = _total(w[k] for k in range(size))

  def entry(i, j):
    return rows[i][j] if j <= i else rows[j][i]

  # A - a 1' - 1 a' + c with a = A w, c = w' A w: adding a constant to the
  # logits' Jacobian changes nothing on the simplex, and this one makes the
  # step keep the mass, so that no multiplier is needed.
  a = [
    _total(entry(i, j) * w[j] for j in range(size)) / mass for i in range(size)
  ]
  half = _total(a[i] * w[i] for i in range(size)) / (2.0 * mass)
  a = [a[i] - half for i in range(size)]
  weight = strength + damping
  matrix = [
    [
      root[i] * (rows[i][j] - a[i] - a[j]) * root[j]
      + (weight if i == j else 0.0)
      for j in range(i + 1)
    ]
    for i in range(size)
  ]
  scaled = jnp.stack(_solve(matrix, [root[k] * slope[k] for k in range(size)]))
  step = -scaled / root
  promised = 0.5 * jnp.sum(w * slope * step, axis=0)
  promised -= 0.5 * damping * jnp.sum(jnp.square(scaled), axis=0)
  return step, promised


def fit_chunk(
  expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  label: jax.Array,
  mask: jax.Array,
  log_prior: jax.Array,
  strength: jax.Array,
  *,
  convex: bool,
  mixes: bool = False,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
) -> UserState:
  """Fits the users of a chunk together; users are the last axis.

  The loss is the logistic likelihood whatever the model was trained with,
  because its logits are read as log odds. Without comparisons the result is
  the prior, in no iteration.

  Args:
    expand: log-weights [K, U] -> logits [N, U] and their Jacobian
      d z / d w [N, K, U], up to a constant for each comparison and 0 where
      masked.
    label: [N, U] in [0, 1].
    mask: [N, U] False for padding; what is padded may be anything.
    log_prior: [K, U] log w0, the population; also the starting point.
    strength: [U] lambda > 0, nats.
    convex: whether the likelihood is convex in w, so that the gap is a bound
      and decides convergence; else the KKT residual does.
    mixes: whether z is the logit of mixed likelihoods, whose curvature is
      then exact.
    max_iterations: each is one evaluation of `expand`.
    tolerance: of the gap, relative to max(1, F).

  Returns:
    UserState with users as the last axis. `converged` is False if the
    iterations ran out or no step decreased F; the best point so far is
    returned.
  """
  log_prior = _normalize(log_prior)
  measure = 0 if convex else 1  # of `certify`: the gap, or the residual

  def evaluate(log_w):
    """F, its slope in the tangent space, rows of A, and largest |grad f|."""
    z, jac = expand(log_w)
    terms = _loss_terms(z, jnp.where(mask, label, 0.0), mask, mixes)
    likelihood, gradient, rows = _sums(*terms, jac)
    slope = _tangent(log_w, gradient, log_prior, strength)
    scale = None if convex else jnp.abs(gradient).max(0)
    value = likelihood + strength * _kl(log_w, log_prior)
    return value, slope, rows, scale

  def certify(log_w, value, slope, scale):
    # log w - log softmax(log w0 - grad f / lambda) is slope / lambda up to a
    # constant, so the divergence is that constant.
    excess = jnp.sum(jnp.exp(log_w) * jnp.expm1(-slope / strength), axis=0)
    gap = jnp.maximum(strength * jnp.log1p(excess), 0.0)
    # A weight at the floor may only want to grow.
    floored = log_w <= MIN_LOG_WEIGHT + 1.0
    residual = jnp.where(floored, jnp.maximum(-slope, 0.0), jnp.abs(slope))
    residual = residual.max(0)
    if convex:
      done = gap <= tolerance * jnp.maximum(1.0, jnp.abs(value))
    else:
      done = residual <= RESIDUAL_TOLERANCE * jnp.maximum(1.0, scale)
    return gap, residual, done

  def body(carry):
    """Judges the trial point, then takes the next step from the best."""
    trial, point, quality, promised, damping, stuck, *counts = carry
    iterations, number = counts
    value, slope = point[1:3]
    first = jnp.isinf(value)  # the trial is the prior
    active = ~quality[2] & ~stuck
    new = (trial, *evaluate(trial))
    new_quality = certify(trial, new[1], new[2], new[4])
    lower = new[1] <= value + ARMIJO * promised
    # Near the end F no longer tells steps apart, but its slope does.
    slack = ROUNDING * jnp.maximum(1.0, jnp.abs(value))
    level = (jnp.abs(new[1] - value) <= slack) & (
      new_quality[measure] < quality[measure]
    )
    kept = active & jnp.isfinite(new[1]) & (lower | level | first)
    share = (new[1] - value) / jnp.minimum(promised, -1e-30)
    well = kept & ((share > 0.5) | level)
    poor = ~kept | (share < 0.1)
    point, quality = jax.tree.map(
      lambda new, old: jnp.where(kept, new, old),
      (new, new_quality),
      (point, quality),
    )
    log_w, value, slope, rows, _ = point
    raised = RAISE * jnp.maximum(damping, 0.1 * strength)
    damping = jnp.where(well, damping / LOWER, jnp.where(poor, raised, damping))
    start = jnp.abs(slope).max(0) / FIRST_STEP - strength
    damping = jnp.where(first, start, damping)
    damping = jnp.where(damping < 0.01 * strength, 0.0, damping)
    stuck = stuck | (damping > MAX_DAMPING)
    step, promised = _step(log_w, slope, rows, strength, damping)
    trial = _normalize(log_w + step)
    iterations = iterations + (active & ~first)
    state = trial, point, quality, promised, damping, stuck
    return (*state, iterations, number + 1)

  def go_on(carry):
    done, stuck, number = carry[2][2], carry[5], carry[-1]
    return jnp.any(~done & ~stuck) & (number <= max_iterations)

  zero = jnp.zeros_like(strength)
  no = jnp.zeros(strength.shape, bool)
  shapes = jax.eval_shape(evaluate, log_prior)
  _, slope, rows, scale = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), shapes
  )
  point = log_prior, jnp.full_like(strength, jnp.inf), slope, rows, scale
  count = jnp.zeros(strength.shape, jnp.int32)
  start = log_prior, point, (zero, zero, no), zero, zero, no, count, 0
  _, point, quality, *_, iterations, _ = jax.lax.while_loop(go_on, body, start)
  gap, residual, done = quality
  return UserState(*point[:2], gap, residual, iterations, done)


def fit_weights(
  logits_of: Callable[[jax.Array], jax.Array],
  label: jax.Array,
  mask: jax.Array,
  log_prior: jax.Array,
  strength: jax.Array,
  *,
  convex: bool = True,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
) -> UserState:
  """Fits one user by any differentiable logits; `vmap` it over users.

  `adapt` does the same for whole models and many users, faster.

  Args:
    logits_of: log-weights [K] -> logits [N] of the support.
    label: [N] in [0, 1].
    mask: [N] False for padding.
    log_prior: [K] log w0.
    strength: () lambda > 0, nats.
    convex: as in `fit_chunk`; say False unless the logits are linear in the
      weights.
    max_iterations, tolerance: as in `fit_chunk`.

  Returns:
    UserState without a leading axis.
  """

  def expand(log_w):
    return expand_by_autodiff(logits_of, log_w[:, 0], mask)

  users = fit_chunk(
    lambda log_w: jax.tree.map(lambda x: x[..., None], expand(log_w)),
    jnp.asarray(label)[:, None],
    jnp.asarray(mask)[:, None],
    jnp.asarray(log_prior)[:, None],
    jnp.asarray(strength)[None],
    convex=convex,
    max_iterations=max_iterations,
    tolerance=tolerance,
  )
  return jax.tree.map(lambda x: x[..., 0], users)


def expand_by_autodiff(logits_of, log_w: jax.Array, mask: jax.Array):
  """Logits [N] of one user at [K], and d z / d w [N, K], 0 where masked."""
  z, jvp = jax.linearize(logits_of, log_w)
  columns = jax.vmap(jvp, out_axes=1)(jnp.eye(log_w.shape[0]))
  # Columns are d z / d log w_k = w_k d z / d w_k.
  return z, jnp.where(mask[:, None], columns / jnp.exp(log_w), 0.0)
