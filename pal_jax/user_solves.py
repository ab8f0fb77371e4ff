"""Users' weights given the network, solved inside training.

With the network held still the weights of each user are a small convex problem
of their own (METHOD section 3), which the solver of few-shot adaptation solves
for all users at once. Alternating it with steps of the optimiser is block
coordinate descent on the training loss, KL-regularised towards the population.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pal_jax.adaptation import fit_users, is_convex, place, statistics
from pal_jax.errors import InputError
from pal_jax.evaluate import group_by_user
from pal_jax.models import IdealPointModel
from pal_jax.numerics import log_mean_weights
from pal_jax.structs import Comparisons, FeatureTable

SOLVERS = ('adam', 'alternating')
# Newton steps are few: a solve is one of many, not the last word on a user.
MAX_ITERATIONS = 20


def check_config(config) -> None:
  """Refuses solves that would not be of what `config` trains.

  Raises:
    InputError: naming the field.
  """
  train, model = config.train, config.model
  if train.user_solver not in SOLVERS:
    raise InputError(
      f'train.user_solver={train.user_solver!r} is unknown: expected one of '
      f'{SOLVERS}'
    )
  if train.user_solver == 'adam':
    return
  if train.solve_every < 1 or train.solve_strength <= 0:
    raise InputError(
      f'train.solve_every={train.solve_every} must be at least 1 and '
      f'train.solve_strength={train.solve_strength} positive'
    )
  if 'hinge' in train.loss:
    raise InputError(
      f"train.loss={train.loss!r}: train.user_solver='alternating' solves for "
      "likelihoods; use 'logistic' or 'cross_entropy', or user_solver='adam'"
    )
  for field, plain in (('matryoshka', ()), ('gumbel', False)):
    if model[field]:
      raise InputError(
        f"model.{field}={model[field]}: train.user_solver='alternating' solves "
        f"another objective than this; set it to {plain}, or user_solver='adam'"
      )


def check_model(model: IdealPointModel) -> None:
  """Refuses a model without a user table, or not convex in the weights.

  Raises:
    InputError: naming what would do.
  """
  if model.user_level:
    raise InputError(
      "model.mixture_level='user' has no weights of single users to solve "
      "for: use train.user_solver='adam'"
    )
  if not is_convex(model, model.training_rule):
    raise InputError(
      f'model.preference={model.preference!r} with model.point='
      f'{getattr(model, "point", "")!r} is not convex in the '
      "users' weights: train.user_solver='alternating' needs squared_distance "
      "or inner_product without f(Pw), or membership='mixture_likelihood'; or "
      "use user_solver='adam'"
    )


def group_training(comparisons: Comparisons, num_users: int) -> Comparisons:
  """[N] training comparisons -> [U, N_max], for `solve_users`.

  Raises:
    InputError: if one user's comparisons weigh differently: the solver has no
      weights. (Those that differ between users change no user's solution.)
  """
  low = np.full(num_users, np.inf)
  high = np.full(num_users, -np.inf)
  np.minimum.at(low, comparisons.user, comparisons.weight)
  np.maximum.at(high, comparisons.user, comparisons.weight)
  if (high > low).any():
    raise InputError(
      f'user number {int(np.argmax(high > low))} has comparisons of different '
      "weights, which train.user_solver='alternating' cannot take: leave out "
      "data.columns.weight, or use user_solver='adam'"
    )
  return group_by_user(comparisons, num_users)


@functools.partial(jax.jit, static_argnames='model')
def solve_users(
  model: IdealPointModel,
  variables,
  table: FeatureTable,
  support: Comparisons,
  strength,
) -> jax.Array:
  """The user table with every user's weights solved for.

  Args:
    model: `check_model` has let it pass.
    variables: whose network, without dropout, and population count.
    table: features of all items and prompts.
    support: [U, N] each user's training comparisons.
    strength: lambda of KL(w || population), nats; the population is the mean
      of the weights in `variables`.

  Returns:
    [U, K] `user_logits`, at the temperature of `variables`.
  """
  rule = model.training_rule
  placed = place(model, variables, table)
  stats = statistics(model, variables, placed, support, rule)
  users = jnp.arange(model.num_users)
  before = model.apply(variables, users, method='user_log_weights')
  found = fit_users(
    model,
    variables,
    rule,
    stats,
    support.label,
    support.mask,
    log_mean_weights(before),
    jnp.asarray(strength, jnp.float32),
    max_iterations=MAX_ITERATIONS,
  )
  return found.log_weights * model.apply(variables, method='temperature')
