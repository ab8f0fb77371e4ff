"""The point estimate: certified MAP weights of many users in one call."""

import functools

import jax
import jax.numpy as jnp

from pal_jax.adaptation.solver import (
  CHUNK,
  UserState,
  expand_by_autodiff,
  fit_chunk,
)
from pal_jax.adaptation.statistics import (
  Statistics,
  is_convex,
  is_linear,
  weight_logits,
)
from pal_jax.models.ideal_point_model import IdealPointModel


def _expand_linear(delta):
  def expand(log_w):
    w = jnp.exp(log_w)
    z = w[0] * delta[:, 0]
    for k in range(1, delta.shape[1]):
      z = z + w[k] * delta[:, k]
    return z, delta

  return expand


def _expand_mixture(delta, mask):
  positive, negative = jax.nn.log_sigmoid(delta), jax.nn.log_sigmoid(-delta)

  def expand(log_w):
    p = jax.nn.logsumexp(log_w + positive, axis=1)  # [N, U]
    q = jax.nn.logsumexp(log_w + negative, axis=1)
    jac = jnp.exp(positive - p[:, None]) - jnp.exp(negative - q[:, None])
    return p - q, jnp.where(mask[:, None], jac, 0.0)

  return expand


def _expand_any(model, variables, rule, stats, mask):
  """By automatic differentiation; `stats` [U, N] has users first."""

  def one(stats, log_w, mask):
    return expand_by_autodiff(
      lambda log_w: weight_logits(model, variables, rule, log_w, stats),
      log_w,
      mask,
    )

  def expand(log_w):
    z, jac = jax.vmap(one, in_axes=(stats.axes, 0, 0))(stats, log_w.T, mask)
    return z.T, jac.transpose(1, 2, 0)

  return expand


@functools.partial(
  jax.jit,
  static_argnames=('model', 'rule', 'max_iterations', 'tolerance', 'chunk'),
)
def fit_users(
  model: IdealPointModel,
  variables,
  rule: str,
  stats: Statistics,
  label: jax.Array,
  mask: jax.Array,
  log_prior: jax.Array,
  strength: jax.Array,
  *,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
  chunk: int = CHUNK,
) -> UserState:
  """MAP weights of U users; `solver.fit_chunk` says what is solved.

  Args:
    model, variables: the frozen model.
    rule: how weights become a logit.
    stats: of the support, leading axes [U, N].
    label: [U, N] in [0, 1].
    mask: [U, N] False for padding; users may have none at all.
    log_prior: [K], or [U, K].
    strength: () or [U], nats, > 0.
    max_iterations, tolerance: of the solver.
    chunk: users that are fitted together; the slowest of a chunk decides.

  Returns:
    UserState with leading axis [U].
  """
  num_users = label.shape[0]
  # A chunk with fewer users than it has room for costs as much as a full one.
  chunk = min(chunk, num_users)
  count = -(-num_users // chunk)

  def split(x):
    missing = count * chunk - num_users
    # Padding repeats the last user, who converges as before.
    x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, 0)]) if missing else x
    return x.reshape((count, chunk, *x.shape[1:]))

  log_prior = jnp.broadcast_to(log_prior, (num_users, log_prior.shape[-1]))
  strength = jnp.broadcast_to(strength, (num_users,))

  def fit(args):
    stats_, label, mask, log_prior, strength = args
    if stats.shared_basis:
      stats_ = stats_.replace(basis=stats.basis)
    if stats.delta is None:
      expand = _expand_any(model, variables, rule, stats_, mask)
    else:
      delta = stats_.delta.transpose(1, 2, 0)
      # Before anything is computed from it: padding may be NaN.
      delta = jnp.where(mask.T[:, None], delta, 0.0)
      if is_linear(model, rule):
        expand = _expand_linear(delta)
      else:
        expand = _expand_mixture(delta, mask.T)
    users = fit_chunk(
      expand,
      label.T,
      mask.T,
      log_prior.T,
      strength,
      convex=is_convex(model, rule),
      mixes=rule == 'mixture',
      max_iterations=max_iterations,
      tolerance=tolerance,
    )
    return users.replace(log_weights=users.log_weights.T)

  pieces = stats.map(split)
  if stats.shared_basis:
    pieces = pieces.replace(basis=None)
  args = (pieces, *(split(x) for x in (label, mask, log_prior, strength)))
  users = jax.lax.map(fit, args)
  return jax.tree.map(
    lambda x: x.reshape((-1, *x.shape[2:]))[:num_users], users
  )
