"""The one loop of all methods that are trained by gradient descent."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pal_jax.errors import InputError
from pal_jax.losses import logistic
from pal_jax.methods.base import (
  Method,
  Pairs,
  Parameters,
  Task,
  flat_rows,
  gather,
)
from pal_jax.structs import Comparisons, FeatureTable


@flax.struct.dataclass
class TaskArrays:
  """What of a task lives on the device."""

  table: FeatureTable
  train: Comparisons  # [U, N]
  validation: Comparisons  # [U, N']
  train_rows: Comparisons  # [R], without padding
  validation_rows: Comparisons  # [R']


def task_arrays(task: Task) -> TaskArrays:
  return TaskArrays(
    task.table,
    task.train,
    task.validation,
    flat_rows(task.train),
    flat_rows(task.validation),
  )


@dataclasses.dataclass(frozen=True)
class Trained(Method):
  """AdamW with a cosine schedule; the best of validation is kept.

  A subclass says how parameters begin, what a batch is and what it costs.
  `logit_of_rows` is enough where batches are comparisons.
  """

  learning_rate: float = 1e-3
  weight_decay: float = 1e-2
  num_steps: int = 1000
  check_every: int = 100  # steps between validations
  patience: int = 5  # validations without a new best, after which it stops
  batch_size: int = 256

  def init(self, data: TaskArrays, key: jax.Array) -> Parameters:
    raise NotImplementedError

  def logit_of_rows(
    self, parameters: Parameters, pairs: Pairs, user: jax.Array
  ) -> jax.Array:
    """[R] log odds of comparisons [R] of seen users [R]."""
    raise NotImplementedError

  def sample(self, data: TaskArrays, key: jax.Array):
    """A batch: comparisons [B] drawn with replacement."""
    rows = data.train_rows
    return rows[
      jax.random.randint(key, (self.batch_size,), 0, rows.label.shape[0])
    ]

  def _mean(self, parameters, data, rows: Comparisons) -> jax.Array:
    pairs = gather(data.table, rows)
    z = self.logit_of_rows(parameters, pairs, rows.user)
    return jnp.mean(logistic(z, pairs.label))

  def loss(self, parameters, data: TaskArrays, batch, key, progress):
    """() of one batch; `progress` in [0, 1] is the share of steps done."""
    del key, progress
    return self._mean(parameters, data, batch)

  def validate(self, parameters, data: TaskArrays) -> jax.Array:
    """() nats, what is stopped on."""
    return self._mean(parameters, data, data.validation_rows)

  def schedule(self) -> optax.Schedule:
    return optax.cosine_decay_schedule(self.learning_rate, self.num_steps)

  def optimizer(self) -> optax.GradientTransformation:
    return optax.adamw(self.schedule(), weight_decay=self.weight_decay)

  def descend(self, task: Task, key: jax.Array) -> Parameters:
    init_key, key = jax.random.split(key)
    data = task_arrays(task)
    return minimise(self, self.init(data, init_key), data, key)[0]

  def fit(self, task: Task, key: jax.Array) -> Parameters:
    return self.descend(task, key)


# One program for all tasks of equal shapes: the data are arguments.
@functools.partial(jax.jit, static_argnums=0)
def _run(method: Trained, carry, data: TaskArrays, key, numbers):
  optimizer = method.optimizer()

  def step(carry, number):
    parameters, state = carry
    batch_key, loss_key = jax.random.split(jax.random.fold_in(key, number))
    gradient = jax.grad(method.loss)(
      parameters,
      data,
      method.sample(data, batch_key),
      loss_key,
      number / method.num_steps,
    )
    updates, state = optimizer.update(gradient, state, parameters)
    return (optax.apply_updates(parameters, updates), state), None

  carry, _ = jax.lax.scan(step, carry, numbers)
  return carry, method.validate(carry[0], data)


def minimise(method: Trained, parameters, data: TaskArrays, key: jax.Array):
  """Keeps the parameters with the lowest validation loss.

  Args:
    method: its losses, optimizer and number of steps.
    parameters: to start from.
    data: to learn from.
    key: of batches and losses.

  Returns:
    (parameters, their validation loss, the step they are from).

  Raises:
    InputError: if the validation loss is not finite.
  """
  carry = parameters, method.optimizer().init(parameters)
  best = np.inf, parameters, 0
  for start in range(0, method.num_steps, method.check_every):
    stop = min(start + method.check_every, method.num_steps)
    carry, value = _run(method, carry, data, key, jnp.arange(start, stop))
    if not np.isfinite(value):
      raise InputError(
        f'the validation loss is {value} after step {stop}: lower the '
        'learning rate'
      )
    if value < best[0]:
      best = float(value), carry[0], stop
    elif stop - best[2] >= method.patience * method.check_every:
      break
  return best[1], best[0], best[2]
