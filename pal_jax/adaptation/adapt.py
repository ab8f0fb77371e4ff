"""Adapting users the model never saw: everything frozen but their K weights."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from pal_jax.adaptation.solver import UserState, fit_weights
from pal_jax.adaptation.statistics import (
  Placed,
  Statistics,
  score,
  statistics,
  weight_logits,
)
from pal_jax.losses import logistic
from pal_jax.mixtures import class_log_posterior
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.structs import Comparisons

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@flax.struct.dataclass
class Prior:
  """The population that a new user starts from."""

  log_weights: jax.Array  # [K] log of the mean of the seen users' weights
  strength: jax.Array  # () lambda, nats


@functools.partial(
  jax.jit,
  static_argnames=('model', 'rule', 'max_iterations', 'tolerance'),
)
def _fit_users(
  model, variables, stats, label, mask, prior, rule, max_iterations, tolerance
):
  def one(stats, label, mask):
    return fit_weights(
      lambda log_w: weight_logits(model, variables, rule, log_w, stats),
      label,
      mask,
      prior.log_weights,
      prior.strength,
      max_iterations=max_iterations,
      tolerance=tolerance,
    )

  return jax.vmap(one)(stats, label, mask)


@jax.jit
def _class_posteriors(delta, label, mask, prior):
  log_w = class_log_posterior(prior.log_weights, delta, label, mask)
  zero = jnp.zeros(log_w.shape[:-1])
  return UserState(
    log_weights=log_w,
    objective=zero,
    gap=zero,
    iterations=zero.astype(jnp.int32),
    converged=jnp.ones(log_w.shape[:-1], bool),
  )


def has_closed_form(model: IdealPointModel) -> bool:
  """Whether a new user's weights are a posterior over classes."""
  return model.membership == 'partition' or model.user_level


def adapt(
  model: IdealPointModel,
  variables,
  stats: Statistics,
  label: jax.Array,
  mask: jax.Array,
  prior: Prior,
  *,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
) -> UserState:
  """Fits many users in one compiled call.

  Latent classes (`partition`, and the user-level mixture) have their
  posterior in closed form; the others are solved to convergence.

  Args:
    model, variables: the frozen model.
    stats: of the support, leading axes [U, N]; `statistics` with the model's
      `adaptation_rule`.
    label: [U, N] in [0, 1].
    mask: [U, N]; users may have different numbers of comparisons, or none.
    prior: the population.
    max_iterations, tolerance: of the solver.

  Returns:
    UserState with leading axis [U].
  """
  if has_closed_form(model):
    return _class_posteriors(stats.delta, label, mask, prior)
  return _fit_users(
    model,
    variables,
    stats,
    label,
    mask,
    prior,
    model.adaptation_rule,
    max_iterations,
    tolerance,
  )


def choose_strength(
  model: IdealPointModel,
  variables,
  placed: Placed,
  support: Comparisons,
  query: Comparisons,
  log_prior: jax.Array,
  *,
  counts: tuple[int, ...] = (1, 2, 5, 10, 20),
  strengths: tuple[float, ...] = STRENGTHS,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
) -> tuple[float, dict[float, float]]:
  """The lambda with the best held-out likelihood on *seen* users.

  Each seen user is treated as new: fitted to its first n training comparisons
  and measured on its validation ones, for every n of `counts`. Unseen users
  have no part in it.

  Args:
    model, variables, placed: the frozen model over the feature table.
    support: [U, N] training comparisons of the seen users.
    query: [U, Q] their validation comparisons.
    log_prior: [K] the population.
    counts: numbers of comparisons to adapt from.
    strengths: the grid.
    max_iterations, tolerance: of the solver.

  Returns:
    (lambda, {lambda: mean nats per validation comparison}). Latent classes
    have no strength: (1.0, {}).
  """
  if has_closed_form(model) or model.num_prototypes == 1:
    return 1.0, {}
  rule = model.adaptation_rule
  stats = statistics(model, variables, placed, support, rule)
  counts = tuple(n for n in counts if n <= support.shape[1])
  curve = {}
  for strength in strengths:
    prior = Prior(log_prior, jnp.asarray(strength, jnp.float32))
    losses = []
    for n in counts:
      mask = support.mask & (jnp.arange(support.shape[1]) < n)
      users = adapt(
        model,
        variables,
        stats,
        jnp.asarray(support.label),
        mask,
        prior,
        max_iterations=max_iterations,
        tolerance=tolerance,
      )
      logit = score(model, variables, placed, users.log_weights, query, rule)
      each = jnp.where(query.mask, logistic(logit, query.label), 0.0)
      losses.append(float(jnp.sum(each) / jnp.sum(query.mask)))
    curve[strength] = sum(losses) / len(losses)
  return min(curve, key=curve.get), curve
