"""The reference implementation's recipe for new users, to compare with.

AdamW at 5e-3 on the K logits of a softmax, 20 epochs, batches of 4, from
N(0, 1) (METHOD sections 2 and 3). It runs on the same statistics as everything
else here, vmapped over users. With n = 20 it takes 100 steps of at most 0.005:
too small to leave its start.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from pal_jax.adaptation.statistics import Statistics, weight_logits
from pal_jax.losses import logistic
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.numerics import masked_mean

LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.01  # torch's default for AdamW
NUM_EPOCHS = 20
BATCH_SIZE = 4


@functools.partial(jax.jit, static_argnames=('model', 'rule'))
def fit_reference(
  model: IdealPointModel,
  variables,
  rule: str,
  stats: Statistics,
  label: jax.Array,
  mask: jax.Array,
  start: jax.Array,
  key: jax.Array,
) -> jax.Array:
  """Log-weights [U, K] after the reference's recipe.

  Args:
    model, variables, rule: the frozen model; users' logits are divided by its
      temperature, as in training.
    stats: of the support, [U, N].
    label, mask: [U, N]. An epoch of a user with n comparisons has ceil(n / 4)
      steps; without comparisons the start comes back.
    start: [U, K] initial logits: N(0, 1) in the reference.
    key: of the order of comparisons, drawn anew each epoch.
  """
  temperature = model.apply(variables, method='temperature')
  optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
  num_batches = -(-label.shape[1] // BATCH_SIZE)

  def log_weights(logits):
    return jax.nn.log_softmax(logits / temperature)

  def one(stats, label, mask, start, key):
    def loss(logits, rows):
      z = weight_logits(
        model,
        variables,
        rule,
        log_weights(logits),
        stats.map(lambda x: x[rows]),
      )
      return masked_mean(logistic(z, label[rows]), mask[rows])

    def step(carry, rows):
      logits, state = carry
      gradient = jax.grad(loss)(logits, rows)
      updates, new_state = optimizer.update(gradient, state, logits)
      new = optax.apply_updates(logits, updates), new_state
      # A batch of padding is no step.
      live = jnp.any(mask[rows])
      return jax.tree.map(lambda a, b: jnp.where(live, a, b), new, carry), None

    def epoch(carry, key):
      # Padding sorts behind everything.
      order = jnp.argsort(jax.random.uniform(key, mask.shape) + ~mask)
      batches = order.reshape((num_batches, BATCH_SIZE))
      return jax.lax.scan(step, carry, batches)[0], None

    carry = start, optimizer.init(start)
    keys = jax.random.split(key, NUM_EPOCHS)
    (logits, _), _ = jax.lax.scan(epoch, carry, keys)
    return log_weights(logits)

  # Whole batches; masked rows add nothing to a short one.
  missing = ((0, 0), (0, num_batches * BATCH_SIZE - label.shape[1]))
  stats = stats.map(lambda x: jnp.pad(x, missing + ((0, 0),) * (x.ndim - 2)))
  keys = jax.random.split(key, label.shape[0])
  return jax.vmap(one, in_axes=(stats.axes, 0, 0, 0, 0))(
    stats,
    jnp.pad(label, missing),
    jnp.pad(jnp.asarray(mask), missing),
    start,
    keys,
  )
