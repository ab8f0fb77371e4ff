"""The pure training and evaluation steps; `parallel` compiles them."""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pal_jax import losses
from pal_jax.errors import InputError
from pal_jax.mixtures import comparison_log_likelihoods
from pal_jax.models.ideal_point_model import IdealPointModel, Outputs, Rows
from pal_jax.numerics import is_known
from pal_jax.structs import Batch, Comparisons, FeatureTable
from pal_jax.user_rows import put_rows, take_rows


@flax.struct.dataclass
class TrainState:
  """Everything a step changes, arrays only."""

  step: jax.Array  # () int32, steps taken
  params: dict  # the model's parameters
  model_state: dict  # running statistics of batch norm, often empty
  opt_state: optax.OptState


@flax.struct.dataclass
class StepMetrics:
  """Mergeable sums over comparisons; divide once, at the end."""

  loss: jax.Array  # () sum of weight * loss, nats
  bound: jax.Array  # () sum of weight * bound on ideal points
  weight: jax.Array  # () sum of weights
  correct: jax.Array  # () comparisons on the label's side, a logit of 0 half
  decided: jax.Array  # () comparisons without a tie, of users as themselves
  count: jax.Array  # () comparisons
  gradient_norm: jax.Array  # () of this step, before clipping

  def __add__(self, other: 'StepMetrics') -> 'StepMetrics':
    return jax.tree.map(lambda a, b: a + b, self, other)

  def summary(self, steps: int = 1) -> dict[str, float]:
    """Means over comparisons; the gradient norm over `steps`."""
    weight = max(float(self.weight), 1e-12)
    return {
      'loss': (float(self.loss) + float(self.bound)) / weight,
      'likelihood_loss': float(self.loss) / weight,
      'accuracy': float(self.correct) / max(float(self.decided), 1.0),
      'gradient_norm': float(self.gradient_norm) / max(steps, 1),
    }


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised: one loss per comparison and the bound."""

  loss: Callable[[jax.Array, jax.Array], jax.Array]
  bound_weight: float = 0.0  # lambda
  bound_radius: float = 4.0  # beta
  population_rate: float = 0.0  # share of examples shown to the population


def create_objective(train_config, model_config) -> Objective:
  """The objective of `config.train`.

  Raises:
    InputError: if the loss is unknown, or a mixture of likelihoods is asked
      to train without a likelihood.
  """
  name = train_config.loss
  if name not in losses.LOSSES:
    raise InputError(
      f'train.loss={name!r} is unknown: expected one of {sorted(losses.LOSSES)}'
    )
  if model_config.membership == 'mixture_likelihood' and 'hinge' in name:
    raise InputError(
      f'train.loss={name!r} has no likelihood to mix: '
      "model.membership='mixture_likelihood' needs 'logistic' or "
      "'cross_entropy'"
    )
  user_level = (
    model_config.membership == 'mixture_likelihood'
    and model_config.mixture_level == 'user'
  )
  if user_level and train_config.batching != 'users':
    raise InputError(
      "model.mixture_level='user' weighs all comparisons of a user together: "
      'it needs --config.train.batching=users'
    )
  if user_level and model_config.matryoshka:
    raise InputError(
      f'model.matryoshka={tuple(model_config.matryoshka)} has no user-level '
      "form: use model.mixture_level='comparison', or matryoshka=()"
    )
  rate = train_config.population_rate
  if not 0.0 <= rate < 1.0:
    raise InputError(
      f'train.population_rate={rate} must be in [0, 1): the share of examples '
      'whose user is replaced by the population'
    )
  if train_config.sparse_users and user_level:
    raise InputError(
      'train.sparse_users=True works on rows of the user table, which '
      "model.mixture_level='user' has none of: leave it False"
    )
  if train_config.sparse_users and rate:
    raise InputError(
      f'train.population_rate={rate} needs the mean of all users at each step, '
      'and train.sparse_users=True leaves most of them alone: set one of the '
      'two to 0.0 or False'
    )
  return Objective(
    losses.LOSSES[name],
    train_config.bound_weight,
    train_config.bound_radius,
    rate,
  )


def _sum_over_devices(x, axis_name):
  return x if axis_name is None else jax.lax.psum(x, axis_name)


def _user_level_loss(out: Outputs, batch: Comparisons, num_users, axis_name):
  """Per-comparison terms whose gradient is that of the latent-class model.

  d/dtheta of -log sum_k pi_k prod_j p_jk is the posterior-weighted gradient
  of the terms (Fisher's identity), so with gamma held constant
  sum_k gamma_k (-log p_jk - log(pi_k) / n_i) has the exact gradient for whole
  users, and splits over comparisons, hence over devices.

  Returns:
    surrogate [B], whose gradient is right, and value [B], which adds up to
    the negative log-likelihood of each user.
  """
  log_p = comparison_log_likelihoods(out.delta, batch.label)  # [B, K]
  live = batch.mask[:, None]
  evidence = jax.ops.segment_sum(
    jnp.where(live, jax.lax.stop_gradient(log_p), 0.0), batch.user, num_users
  )
  number = jax.ops.segment_sum(
    batch.mask.astype(log_p.dtype), batch.user, num_users
  )
  evidence, number = _sum_over_devices((evidence, number), axis_name)
  joint = jax.lax.stop_gradient(out.log_weights) + evidence[batch.user]
  share = 1.0 / jnp.maximum(number[batch.user], 1.0)  # [B], 1 / n_i
  gamma = jax.nn.softmax(joint, axis=-1)
  surrogate = -jnp.sum(
    gamma * (log_p + share[:, None] * out.log_weights), axis=-1
  )
  value = -share * jax.nn.logsumexp(joint, axis=-1)
  return surrogate, value


def _comparison_losses(model, objective, out, batch, axis_name):
  """(differentiable [B], reported [B]) loss of each comparison."""
  if model.user_level:
    return _user_level_loss(out, batch, model.num_users, axis_name)
  loss = objective.loss(out.logit, batch.label)
  if out.nested:
    nested = [objective.loss(z, batch.label) for z in out.nested]
    # Matryoshka: the mean over prefixes, the whole space included, so that
    # rates keep their meaning whatever their number.
    return (loss + sum(nested)) / (1 + len(nested)), loss
  return loss, loss


def apply_model(model, params, model_state, batch: Batch, table, **kwargs):
  """Runs the model on ids: gathers features and casts them to float32.

  Where the batch brings its features along, the table is not used.
  """
  found = batch.features
  if found is None:
    found = FeatureTable(table.items[batch.items], table.prompts[batch.prompts])
  return model.apply(
    {'params': params, **model_state},
    batch.comparisons.user,
    found.items.astype(jnp.float32),
    found.prompts.astype(jnp.float32),
    rows=Rows(
      batch.comparisons.items,
      batch.item_count,
      batch.comparisons.prompt,
      batch.prompt_count,
    ),
    **kwargs,
  )


def step_metrics(
  out, batch, loss, bound, gradient_norm, anonymous=None
) -> StepMetrics:
  """Local sums of one batch; accuracy is that of users as themselves."""
  weight = jnp.where(batch.mask, batch.weight, 0.0)
  decided = batch.mask & (batch.label != 0.5)
  if anonymous is not None:
    decided &= ~anonymous
  right = jnp.where(batch.label > 0.5, out.logit > 0, out.logit < 0)
  correct = jnp.where(out.logit == 0.0, 0.5, right.astype(jnp.float32))

  def total(x):
    return jnp.sum(jnp.where(batch.mask, x, 0.0))

  return StepMetrics(
    loss=total(weight * loss),
    bound=total(weight * bound),
    weight=total(weight),
    correct=jnp.sum(jnp.where(decided, correct, 0.0)),
    decided=jnp.sum(decided.astype(jnp.float32)),
    count=jnp.sum(batch.mask.astype(jnp.float32)),
    gradient_norm=gradient_norm,
  )


def train_step(
  state: TrainState,
  shared: Batch,
  table: FeatureTable,
  key: jax.Array,
  *,
  model: IdealPointModel,
  optimizer: optax.GradientTransformation,
  objective: Objective,
  axis_name: str | None = None,
) -> tuple[TrainState, StepMetrics]:
  """One step on a batch, or on this device's share of it under pmap.

  Sums and the global count are combined over devices and divided once, so
  that uneven masks change nothing. A batch that names its users is worked on
  with their rows of the table alone (`user_rows`).

  Args:
    state: before the step.
    shared: [B] comparisons, padding masked, and their distinct texts.
    table: features of all items and prompts; None if the batch brings its.
    key: of the run; the step is folded in, so a resumed run draws the same.
    model, optimizer, objective: static.
    axis_name: the pmap axis; None under jit, where sums are global already.

  Returns:
    The next state, and sums over the global batch.
  """
  batch = shared.comparisons
  users, params, opt_state = shared.users, state.params, state.opt_state
  if users is not None:
    if axis_name is not None:
      users = jax.lax.all_gather(users, axis_name, tiled=True)
    params, opt_state = take_rows((params, opt_state), users)
    model = model.clone(num_users=len(users), row_multiple=1)
  key = jax.random.fold_in(key, state.step)
  if axis_name is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
  dropout_key, gumbel_key, anonymous_key = jax.random.split(key, 3)
  anonymous = None
  rate = objective.population_rate
  if (not is_known(rate) or rate) and not model.user_level:
    anonymous = jax.random.bernoulli(anonymous_key, rate, batch.mask.shape)
  total_weight = _sum_over_devices(
    jnp.sum(jnp.where(batch.mask, batch.weight, 0.0)), axis_name
  )

  def local_loss(params):
    out, new_state = apply_model(
      model,
      params,
      state.model_state,
      shared,
      table,
      train=True,
      anonymous=anonymous,
      rngs={'dropout': dropout_key, 'gumbel': gumbel_key},
      mutable=['batch_stats'],
    )
    loss, reported = _comparison_losses(model, objective, out, batch, axis_name)
    bound = losses.ideal_point_bound(
      out.norm, objective.bound_radius, objective.bound_weight
    )
    weight = jnp.where(batch.mask, batch.weight, 0.0)
    each = jnp.where(batch.mask, weight * (loss + bound), 0.0)
    mean = jnp.sum(each) / jnp.maximum(total_weight, 1e-12)
    return mean, (out, new_state, reported, bound)

  grads, (out, new_state, reported, bound) = jax.grad(local_loss, has_aux=True)(
    params
  )
  grads = _sum_over_devices(grads, axis_name)
  metrics = _sum_over_devices(
    step_metrics(out, batch, reported, bound, jnp.zeros(()), anonymous),
    axis_name,
  )
  metrics = metrics.replace(gradient_norm=optax.tree.norm(grads))
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  if users is not None:
    params, opt_state = put_rows(
      (state.params, state.opt_state), (params, opt_state), users
    )
  return (
    TrainState(
      step=state.step + 1,
      params=params,
      model_state=dict(new_state),
      opt_state=opt_state,
    ),
    metrics,
  )


def create_state(model, optimizer_of, key, table: FeatureTable):
  """Initial state and its optimiser.

  Args:
    model: the module.
    optimizer_of: params -> optimiser (its groups depend on the names).
    key: PRNG key of the initialisation.
    table: any table of the right widths.

  Returns:
    (TrainState, optimiser).
  """
  user = jnp.zeros((1,), jnp.int32)
  items = jnp.zeros((1, 2, table.items.shape[-1]))
  prompts = jnp.zeros((1, table.prompts.shape[-1]))
  variables = dict(model.init(key, user, items, prompts))
  params = variables.pop('params')
  optimizer = optimizer_of(params)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=variables,
    opt_state=optimizer.init(params),
  )
  return state, optimizer


def bind(model, optimizer, objective, axis_name=None):
  """train_step(state, batch, table, key) with the static parts bound."""
  return functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    objective=objective,
    axis_name=axis_name,
  )
