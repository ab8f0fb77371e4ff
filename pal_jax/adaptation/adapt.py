"""Adapting users the model never saw: everything frozen but their weights."""

import functools

import jax
import jax.numpy as jnp

from pal_jax.adaptation.point import fit_users
from pal_jax.adaptation.posterior import believe, predict
from pal_jax.adaptation.prior import Prior, atom_log_likelihoods, has_classes
from pal_jax.adaptation.solver import UserState
from pal_jax.adaptation.statistics import (
  Statistics,
  atom_logits,
  weight_logits,
)
from pal_jax.errors import InputError
from pal_jax.models.ideal_point_model import IdealPointModel

METHODS = ('posterior', 'map')


def check_method(method: str) -> None:
  """Raises InputError if the method is unknown."""
  if method not in METHODS:
    raise InputError(
      f'adaptation.method={method!r} is unknown: expected one of {METHODS}'
    )


def adapt(
  model: IdealPointModel,
  variables,
  stats: Statistics,
  label: jax.Array,
  mask: jax.Array,
  prior: Prior,
  *,
  method: str = 'posterior',
  max_iterations: int = 500,
  tolerance: float = 1e-5,
) -> UserState:
  """Fits many users in one compiled call.

  Args:
    model, variables: the frozen model.
    stats: of the support, leading axes [U, N]; `statistics` with the model's
      `adaptation_rule`.
    label: [U, N] in [0, 1].
    mask: [U, N]; users may have different numbers of comparisons, or none.
    prior: the population.
    method: 'posterior', over the atoms of the prior, in closed form and exact
      for every form; 'map', the certified point estimate. Latent classes
      (`partition`, and the user-level mixture) have no point estimate.
    max_iterations, tolerance: of the solver of 'map'.

  Returns:
    UserState with leading axis [U].

  Raises:
    InputError: if the method is unknown.
  """
  check_method(method)
  rule = model.adaptation_rule
  label, mask = jnp.asarray(label), jnp.asarray(mask)
  if method == 'posterior' or has_classes(model):
    return believe(
      prior,
      atom_log_likelihoods(
        model, variables, rule, prior.log_atoms, stats, label, mask
      ),
    )
  return fit_users(
    model,
    variables,
    rule,
    stats,
    label,
    mask,
    prior.log_weights,
    prior.strength,
    max_iterations=max_iterations,
    tolerance=tolerance,
  )


@functools.partial(jax.jit, static_argnames='model')
def predict_users(
  model: IdealPointModel,
  variables,
  users: UserState,
  stats: Statistics,
  prior: Prior,
) -> jax.Array:
  """Predictive log odds [U, N] of each user's own comparisons.

  Integrated over the belief where there is one, else plugged in.

  Args:
    model, variables: the frozen model.
    users: [U], from `adapt`.
    stats: [U, N] of the comparisons to predict.
    prior: the one that `users` were adapted with.
  """
  rule = model.adaptation_rule
  if users.log_belief is None:
    return jax.vmap(
      lambda w, s: weight_logits(model, variables, rule, w, s),
      in_axes=(0, stats.axes),
    )(users.log_weights, stats)

  def one(args):
    belief, stats_ = args
    if stats.shared_basis:
      stats_ = stats_.replace(basis=stats.basis)
    z = atom_logits(model, variables, rule, prior.log_atoms, stats_)
    return predict(prior, belief, z)

  pieces = stats.replace(basis=None) if stats.shared_basis else stats
  return jax.lax.map(one, (users.log_belief, pieces), batch_size=64)
