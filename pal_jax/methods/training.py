"""The one loop of all methods that are trained by gradient descent."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pal_jax.errors import InputError


def minimise(
  loss: Callable,
  parameters,
  sample: Callable,
  validate: Callable,
  *,
  optimizer: optax.GradientTransformation,
  num_steps: int,
  check_every: int,
  key: jax.Array,
):
  """Keeps the parameters with the lowest validation loss.

  Args:
    loss: (parameters, batch, key, progress in [0, 1]) -> scalar.
    parameters: to start from.
    sample: key -> batch, pure.
    validate: parameters -> scalar.
    optimizer: of optax.
    num_steps, check_every: steps, and steps between validations.
    key: of batches and losses.

  Returns:
    (parameters, their validation loss, the step they are from).

  Raises:
    InputError: if the validation loss is not finite.
  """

  def step(carry, number):
    parameters, state = carry
    batch_key, loss_key = jax.random.split(jax.random.fold_in(key, number))
    gradient = jax.grad(loss)(
      parameters, sample(batch_key), loss_key, number / num_steps
    )
    updates, state = optimizer.update(gradient, state, parameters)
    return (optax.apply_updates(parameters, updates), state), None

  @jax.jit
  def run(carry, numbers):
    carry, _ = jax.lax.scan(step, carry, numbers)
    return carry, validate(carry[0])

  carry = parameters, optimizer.init(parameters)
  best = np.inf, parameters, 0
  for start in range(0, num_steps, check_every):
    stop = min(start + check_every, num_steps)
    carry, value = run(carry, jnp.arange(start, stop))
    if not np.isfinite(value):
      raise InputError(
        f'the validation loss is {value} after step {stop}: lower the '
        'learning rate'
      )
    if value < best[0]:
      best = float(value), carry[0], stop
  return best[1], best[0], best[2]
