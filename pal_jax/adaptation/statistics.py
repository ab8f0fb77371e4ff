"""What a user's weights see of comparisons, computed once.

Fitting K weights need not touch the encoder's features again: where the logit
is linear in the weights, or likelihoods are mixed, K numbers a comparison are
enough (METHOD section 1, "An identity worth using").
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from pal_jax.mixtures import mixture_logit
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.structs import Comparisons, FeatureTable

LINEAR_PREFERENCES = ('squared_distance', 'inner_product')


@flax.struct.dataclass
class Placed:
  """Every item and prompt of a table, through the frozen network once."""

  x: jax.Array  # [M, P] placed items
  basis: jax.Array  # [K, :], or [Q, K, P] if it depends on the prompt


@flax.struct.dataclass
class Statistics:
  """Comparisons as a function of the user's weights; leading axes [...].

  Either `delta`, or `x` and `basis` for the forms that have no K-dimensional
  statistic here.
  """

  delta: jax.Array | None  # [..., K]
  x: jax.Array | None  # [..., 2, P]
  basis: jax.Array | None  # [..., K, :]


@functools.partial(jax.jit, static_argnames='model')
def place(model: IdealPointModel, variables, table: FeatureTable) -> Placed:
  """Runs the frozen network over a feature table, in evaluation mode."""
  x = model.apply(variables, table.items.astype(jnp.float32), method='embed')
  prompts = table.prompts.astype(jnp.float32)
  basis = model.apply(variables, prompts, method='basis')
  return Placed(x, basis)


def _gather(placed: Placed, comparisons: Comparisons):
  x = placed.x[comparisons.items]  # [..., 2, P]
  basis = placed.basis
  if basis.ndim == 3:
    basis = basis[comparisons.prompt]  # [..., K, P]
  return x, basis


def is_linear(model: IdealPointModel, rule: str) -> bool:
  """Whether logit = weights @ delta, so that the fit is convex."""
  return (
    rule == 'convex'
    and model.preference in LINEAR_PREFERENCES
    and getattr(model, 'point', '') != 'f(Pw)'
  )


@functools.partial(jax.jit, static_argnames=('model', 'rule'))
def statistics(
  model: IdealPointModel,
  variables,
  placed: Placed,
  comparisons: Comparisons,
  rule: str,
) -> Statistics:
  """Reduces comparisons [...] to what the weights need.

  Args:
    model, variables: the frozen model.
    placed: from `place`, over the table the comparisons' ids point to.
    comparisons: [...].
    rule: how weights become a logit, `IdealPointModel.logits`.
  """
  x, basis = _gather(placed, comparisons)
  if rule == 'mixture' or is_linear(model, rule):
    delta = model.apply(variables, x, basis, method='deltas')
    return Statistics(delta, None, None)
  if placed.basis.ndim == 2:
    basis = jnp.broadcast_to(basis, (*comparisons.label.shape, *basis.shape))
  return Statistics(None, x, basis)


def weight_logits(
  model: IdealPointModel,
  variables,
  rule: str,
  log_weights: jax.Array,
  stats: Statistics,
) -> jax.Array:
  """Logits [N] of one user's comparisons at log-weights [K]."""
  if rule == 'mixture':
    return mixture_logit(log_weights, stats.delta)
  if stats.delta is not None:
    return stats.delta @ jnp.exp(log_weights)
  rows = jnp.broadcast_to(
    log_weights, (*stats.x.shape[:-2], log_weights.shape[-1])
  )
  if getattr(model, 'point', '') == 'f(Pw)':
    # One pass of the network for the user, not one for each comparison.
    u = model.apply(
      variables, jnp.exp(log_weights), stats.basis[0], method='ideal_points'
    )
    u = jnp.broadcast_to(u, (*rows.shape[:-1], u.shape[-1]))
    return model.apply(variables, stats.x, u, method='convex_logits')
  return model.apply(
    variables, rows, stats.x, stats.basis, rule, method='logits'
  )


@functools.partial(jax.jit, static_argnames=('model', 'rule'))
def score(
  model: IdealPointModel,
  variables,
  placed: Placed,
  log_weights: jax.Array,
  comparisons: Comparisons,
  rule: str,
) -> jax.Array:
  """Log odds of users' comparisons, each user by its own weights.

  Args:
    model, variables, placed: as in `statistics`.
    log_weights: [U, K], row i for `comparisons[i]`.
    comparisons: [U, N].
    rule: 'convex', 'argmax' or 'mixture'.

  Returns:
    [U, N].
  """
  x, basis = _gather(placed, comparisons)
  rows = jnp.broadcast_to(
    log_weights[:, None], (*comparisons.label.shape, log_weights.shape[-1])
  )
  return model.apply(variables, rows, x, basis, rule, method='logits')
