"""One score for everybody, and scores that know nothing of preferences."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pal_jax.losses import logistic
from pal_jax.methods.base import (
  Method,
  Pairs,
  Task,
  flat_rows,
  gather,
)
from pal_jax.methods.training import minimise
from pal_jax.models.bradley_terry import fit_bradley_terry

RIDGES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


def fit_linear(task: Task) -> jax.Array:
  """v [D] of the linear Bradley-Terry model, its ridge by validation."""
  train = gather(task.table, flat_rows(task.train))
  check = gather(task.table, flat_rows(task.validation))
  best = None
  for ridge in RIDGES:
    v, _ = fit_bradley_terry(
      train.difference, train.label, jnp.ones_like(train.label), ridge
    )
    loss = float(jnp.mean(logistic(check.difference @ v, check.label)))
    if best is None or loss < best[0]:
      best = loss, v
  return best[1]


@dataclasses.dataclass(frozen=True)
class BradleyTerry(Method):
  """`btl`: v . h by Newton's method (Bradley and Terry 1952), or an MLP of h.

  The MLP (`hidden` > 0) is trained by AdamW and stopped on validation items.
  """

  hidden: int = 0
  learning_rate: float = 1e-3
  weight_decay: float = 1e-2
  batch_size: int = 256
  num_steps: int = 1000

  def _reward(self):
    return nn.Sequential([nn.Dense(self.hidden), nn.gelu, nn.Dense(1)])

  def fit(self, task: Task, key: jax.Array):
    if not self.hidden:
      return fit_linear(task)
    init_key, key = jax.random.split(key)
    net = self._reward()
    rows, check = flat_rows(task.train), flat_rows(task.validation)

    def mean_loss(params, comparisons):
      pairs = gather(task.table, comparisons)
      r = net.apply(params, pairs.items)[..., 0]
      return jnp.mean(logistic(r[:, 0] - r[:, 1], pairs.label))

    def sample(key):
      return rows[
        jax.random.randint(key, (self.batch_size,), 0, rows.label.shape[0])
      ]

    params, _, _ = minimise(
      lambda params, batch, key, progress: mean_loss(params, batch),
      net.init(init_key, task.table.items[:1]),
      sample,
      lambda params: mean_loss(params, check),
      optimizer=optax.adamw(self.learning_rate, weight_decay=self.weight_decay),
      num_steps=self.num_steps,
      check_every=50,
      key=key,
    )
    return params

  def adapt(self, parameters, support: Pairs):
    del parameters, support
    return jnp.zeros(())

  def logit(self, parameters, state, prompt, a, b):
    del state, prompt
    if not self.hidden:
      return (a - b) @ parameters
    r = self._reward().apply(parameters, jnp.stack([a, b]))[:, 0]
    return r[0] - r[1]


@dataclasses.dataclass(frozen=True)
class Random(Method):
  """Chance, and even odds: a coin for every comparison."""

  def fit(self, task: Task, key: jax.Array):
    return jax.random.normal(key, task.table.items.shape[-1:])

  def adapt(self, parameters, support: Pairs):
    del parameters, support
    return jnp.zeros(())

  def logit(self, parameters, state, prompt, a, b):
    del state, prompt
    # The sign of a hash of both candidates; swapping them swaps it.
    coin = jnp.sin(1e4 * (a @ parameters)) - jnp.sin(1e4 * (b @ parameters))
    return 1e-3 * jnp.sign(coin)
