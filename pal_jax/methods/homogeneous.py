"""One score for everybody, and scores that know nothing of preferences."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic
from pal_jax.methods.base import (
  Method,
  Pairs,
  Task,
  flat_rows,
  gather,
)
from pal_jax.methods.training import TaskArrays, Trained
from pal_jax.models.bradley_terry import fit_bradley_terry

RIDGES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


def fit_linear(task: Task) -> jax.Array:
  """v [D] of the linear Bradley-Terry model, its ridge by validation."""
  train = gather(task.table, flat_rows(task.train))
  check = gather(task.table, flat_rows(task.validation))
  best, v = None, None
  # From the strongest, each from the one before: few steps each.
  for ridge in reversed(RIDGES):
    v, _ = fit_bradley_terry(
      train.difference, train.label, jnp.ones_like(train.label), ridge, start=v
    )
    loss = float(jnp.mean(logistic(check.difference @ v, check.label)))
    if best is not None and loss > best[0]:
      break  # weaker ones fit noise
    best = loss, v
  return best[1]


@dataclasses.dataclass(frozen=True)
class BradleyTerry(Method):
  """`btl`: v . h by Newton's method (Bradley and Terry 1952)."""

  def fit(self, task: Task, key: jax.Array) -> jax.Array:
    del key
    return fit_linear(task)

  def logit(self, parameters, state, prompt, a, b):
    del state, prompt
    return (a - b) @ parameters


@dataclasses.dataclass(frozen=True)
class BradleyTerryMlp(Trained):
  """`btl_mlp`: an MLP of h, trained by AdamW (Ouyang et al. 2022, eq. 1)."""

  hidden: int = 64

  def _reward(self):
    return nn.Sequential([nn.Dense(self.hidden), nn.gelu, nn.Dense(1)])

  def init(self, data: TaskArrays, key):
    return self._reward().init(key, data.table.items[:1])

  def logit_of_rows(self, parameters, pairs: Pairs, user):
    del user
    r = self._reward().apply(parameters, pairs.items)[..., 0]
    return r[..., 0] - r[..., 1]

  def logit(self, parameters, state, prompt, a, b):
    del state, prompt
    r = self._reward().apply(parameters, jnp.stack([a, b]))[:, 0]
    return r[0] - r[1]


@dataclasses.dataclass(frozen=True)
class Random(Method):
  """Chance, and even odds: a coin for every comparison."""

  def fit(self, task: Task, key: jax.Array):
    return jax.random.normal(key, task.table.items.shape[-1:])

  def logit(self, parameters, state, prompt, a, b):
    del state, prompt
    # The sign of a hash of both candidates; swapping them swaps it.
    coin = jnp.sin(1e4 * (a @ parameters)) - jnp.sin(1e4 * (b @ parameters))
    return 1e-3 * jnp.sign(coin)
