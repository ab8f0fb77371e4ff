"""An experiment's state, and what training does to it in one step."""

import jax
import jax.numpy as jnp

from pal_jax import models, optimizer, parallel, starts, user_solves
from pal_jax import train_step as steps
from pal_jax.data.batching import Batcher, weight_by_user
from pal_jax.experiment import Experiment
from pal_jax.prefetch import Prefetch
from pal_jax.shared_rows import measure_room
from pal_jax.user_rows import ROW_MULTIPLE, trim


def due(step: int, every: int, last: int) -> bool:
  """Whether something that happens every `every` steps is due after `step`.

  Steps count from 1; the last step is always due, step 0 never.
  """
  return step > 0 and (step % every == 0 or step == last)


def variables_of(state: steps.TrainState) -> dict:
  """What `model.apply` takes."""
  return {'params': state.params, **state.model_state}


def _trained_model(experiment: Experiment) -> models.IdealPointModel:
  """The model, with rows for every device where the user table is split."""
  if not experiment.config.train.shard_users:
    return experiment.model
  return experiment.model.clone(row_multiple=ROW_MULTIPLE)


def _initial_state(experiment: Experiment, key):
  config = experiment.config
  return steps.create_state(
    _trained_model(experiment),
    lambda params: optimizer.create(
      config.optimizer, params, config.train.num_steps
    ),
    key,
    experiment.table,
  )


def _batcher(experiment: Experiment) -> Batcher:
  config = experiment.config
  return Batcher(
    weight_by_user(experiment.dataset.train, config.train.user_weighting),
    config.train.batch_size,
    config.seed,
    by_user=config.train.batching == 'users',
  )


def start_users(experiment: Experiment, params) -> dict:
  """Parameters whose users begin as `train.start` says."""
  config = experiment.config
  if config.train.start == 'random':
    return params
  num_users = experiment.model.num_users
  found = starts.spectral_log_weights(
    experiment.dataset.train,
    experiment.table,
    num_users,
    experiment.model.num_prototypes,
    config.seed,
  )
  users = jnp.asarray(params['user_logits'])
  return params | {'user_logits': users.at[:num_users].set(found)}


class Steps:
  """state, metrics = steps(state, step): what training does in one step.

  The compiled step on its batch and then, when it is due, the users' weights
  solved for: a function of state and step, so that a resumed run does the
  same. The optimiser's moments stay: a solve changes where the users are, not
  how steep the loss is, and resetting them would forget the scale of a step.

  States are those of `place`, and each is given away to the next.
  """

  def __init__(self, experiment: Experiment, optimizer, key, like):
    config = experiment.config
    model = _trained_model(experiment)
    self._experiment, self._key = experiment, key
    self._mode, self._splits = config.parallel, config.train.shard_users
    on_host = experiment.on_host
    self._table = (
      None if on_host else parallel.place(experiment.table, self._mode)
    )
    self._batcher = _batcher(experiment)
    self._run = parallel.compile_step(
      steps.bind(model, optimizer, experiment.objective, model.axis_name),
      self._mode,
      room=measure_room([self._batcher], parallel.num_devices()),
      source=experiment.table if on_host else None,
      by_user_row=config.train.sparse_users,
      split_table_of=like if self._splits else None,
    )
    self._support = _solve_support(experiment)

  def batches(self, start: int, last: int) -> Prefetch:
    """Those of steps start .. last, made ahead where that pays; close it."""
    return Prefetch(
      self._prepare,
      range(start, last),
      parallel.batches_ahead(self._experiment.on_host),
    )

  def _prepare(self, step: int):
    return self._run.prepare(self._batcher(step))

  def __call__(self, state, step: int, batch=None):
    """Takes step number `step`, on its batch if it was made ahead."""
    if batch is None:
      batch = self._prepare(step)
    state, metrics = self._run.step(state, batch, self._table, self._key)
    train = self._experiment.config.train
    if self._support is not None and due(
      step + 1, train.solve_every, train.num_steps
    ):
      state = self.solve(state)
    return state, metrics

  def place(self, state):
    """A state on the devices, as the compiled step expects it."""
    if self._splits:
      return parallel.place_split(state)
    return parallel.place(state, self._mode)

  def whole(self, state):
    """A state, each of whose arrays every process has."""
    return parallel.gather_table(state) if self._splits else state

  def variables(self, whole) -> dict:
    """What `experiment.model` takes, on one device of this process.

    They are the own arrays of what `whole` gave, and gone with the next step.
    """
    found = parallel.localize(variables_of(whole))
    return trim(found, self._experiment.model.num_users)

  def solve(self, state):
    """The state with all users' weights solved for.

    Every process solves for itself, on one device, as it validates.
    """
    table = self._table
    found = user_solves.solve_users(
      self._experiment.model,
      parallel.localize(variables_of(state)),
      self._experiment.table if table is None else parallel.localize(table),
      self._support,
      self._experiment.config.train.solve_strength,
    )
    placed = parallel.place(found, self._mode)
    return state.replace(params={**state.params, 'user_logits': placed})


def _solve_support(experiment: Experiment):
  """[U, N] what users are solved from; None without solves."""
  if experiment.config.train.user_solver == 'adam':
    return None
  dataset = experiment.dataset
  return user_solves.group_training(dataset.train, dataset.num_users)


def begin(experiment: Experiment) -> tuple[steps.TrainState, Steps]:
  """The state before the first step, not placed yet, and the steps."""
  init_key, step_key = jax.random.split(jax.random.key(experiment.config.seed))
  state, tx = _initial_state(experiment, init_key)
  state = state.replace(params=start_users(experiment, state.params))
  return state, Steps(experiment, tx, step_key, state)


def check_training(experiment: Experiment) -> None:
  """Refuses what `train` would refuse, by shapes alone.

  Raises:
    InputError: from the optimiser, the model's shapes, the batches or the
      weights of comparisons.
  """
  _batcher(experiment)
  _solve_support(experiment)
  jax.eval_shape(
    lambda key: _initial_state(experiment, key)[0], jax.random.key(0)
  )
