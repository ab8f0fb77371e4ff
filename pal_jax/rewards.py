"""Rewards of any number of candidates for any number of users.

A user is a belief over atoms, points of the simplex. Its reward of a candidate
is the mean over the belief. Rewards of one user (and, for PAL-B, one prompt)
have no origin: only differences mean something. Where they are affine in the
ideal point (squared distance, inner product) the origin is the reward of x = 0,
so that a user folds to one ideal point: r = scale * (2 <x, u> - ||x||^2), and
r = scale * <x, u>.
"""

import functools

import jax
import jax.numpy as jnp

from pal_jax.adaptation.statistics import (
  LINEAR_PREFERENCES,
  Placed,
  is_convex,
)
from pal_jax.ideal_points import PREFERENCES
from pal_jax.models.ideal_point_model import IdealPointModel


@functools.partial(jax.jit, static_argnames='model')
def expected_rewards(
  model: IdealPointModel,
  variables,
  placed: Placed,
  log_atoms: jax.Array,
  log_belief: jax.Array,
) -> jax.Array:
  """Posterior means of rewards, as one matrix product.

  Where the logit is linear in the weights, or classes are mixed, it is of N
  candidates under K prototypes with U users' mean weights; else of N
  candidates at A atoms with U beliefs.

  Args:
    model, variables: the frozen model.
    placed: N candidates, and where the prototypes depend on the prompt the
      basis [N, K, P] of the prompt of each.
    log_atoms: [A, K].
    log_belief: [U, A], -inf where an atom is out of the question.

  Returns:
    [N, U] in log odds. For one known point of a convex model a difference of
    two is the logit of the preference; else it is the mean logit, which the
    probability (`adaptation.predict`, the mean of probabilities) need not
    agree with.
  """
  x, basis = placed.x, placed.basis
  belief, weights = jnp.exp(log_belief), jnp.exp(log_atoms)
  if is_convex(model, model.adaptation_rule):
    points = model.apply(variables, basis, method='finish')
    belief = belief @ weights
  else:
    basis = basis[:, None] if basis.ndim == 3 else basis
    points = model.apply(variables, weights, basis, method='ideal_points')
  preference = PREFERENCES[model.preference]
  reward = preference(x[:, None], points)
  if model.preference in LINEAR_PREFERENCES:
    reward = reward - preference(jnp.zeros_like(points), points)
  return model.apply(variables, method='scale') * reward @ belief.T
