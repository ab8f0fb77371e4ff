"""`rfm`: learned reward features, free weights a user."""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from pal_jax.methods.base import Pairs, Task, gather
from pal_jax.methods.homogeneous import fit_linear
from pal_jax.methods.newton import choose_scale, fit_gaussian, fit_users
from pal_jax.methods.per_user import SCALES as USER_SCALES
from pal_jax.methods.training import (
  TaskArrays,
  Trained,
  minimise,
  task_arrays,
)

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@flax.struct.dataclass
class Features:
  net: dict
  mean: jax.Array  # [P] of the seen users' weights
  scale: jax.Array  # () of their deviations
  seen: jax.Array  # [U, P]


@dataclasses.dataclass(frozen=True)
class RewardFeatures(Trained):
  """r_i(h) = <phi(h), w_i>, w_i free with an l2 penalty.

  Barreto et al. 2025 (arXiv 2503.17338): phi and the weights of seen users are
  trained jointly; a new user's weights are a regularised logistic regression
  with phi frozen, here with the variance of maximal marginal likelihood.
  `svd` starts phi from the leading singular directions of linear rewards
  fitted to each user (PReF, Shenfeld et al. 2025, arXiv 2503.06358); it needs
  a linear phi.
  """

  num_features: int = 8
  hidden: int = 0  # 0: phi is linear
  svd: bool = False
  l2: float = 1e-3  # of w, per comparison
  num_steps: int = 2000

  def _phi(self):
    layers = [nn.Dense(self.hidden), nn.gelu] if self.hidden else []
    return nn.Sequential([*layers, nn.Dense(self.num_features, use_bias=False)])

  def init(self, data: TaskArrays, key):
    init_key, weight_key = jax.random.split(key)
    size = (data.train.label.shape[0], self.num_features)
    weights = 0.1 * jax.random.normal(weight_key, size)
    return {
      'net': self._phi().init(init_key, data.table.items[:1]),
      # With a column of ones everybody starts as one score.
      'w': weights.at[:, 0].add(1.0),
    }

  def logit_of_rows(self, parameters, pairs: Pairs, user):
    f = self._phi().apply(parameters['net'], pairs.items)
    return jnp.sum((f[:, 0] - f[:, 1]) * parameters['w'][user], -1)

  def loss(self, parameters, data, batch, key, progress):
    w = parameters['w'][batch.user]
    penalty = self.l2 * jnp.mean(jnp.sum(jnp.square(w), -1))
    return super().loss(parameters, data, batch, key, progress) + penalty

  def optimizer(self):
    # Weight decay is phi's; users have their own penalty.
    return optax.adamw(
      self.schedule(),
      weight_decay=self.weight_decay,
      mask={'net': True, 'w': False},
    )

  def fit(self, task: Task, key: jax.Array) -> Features:
    data = task_arrays(task)
    init_key, key = jax.random.split(key)
    params = self.init(data, init_key)
    if self.svd and not self.hidden:
      kernel, params['w'] = _spectral_start(task, self.num_features)
      params['net'] = {'params': {'layers_0': {'kernel': kernel}}}
    found, _, _ = minimise(self, params, data, key)
    mean = found['w'].mean(0)
    # On validation items: on training items phi has already adapted to w.
    pairs = gather(task.table, task.validation)
    f = self._phi().apply(found['net'], pairs.items)
    x = jnp.where(pairs.mask[..., None], f[..., 0, :] - f[..., 1, :], 0.0)
    scale, _ = choose_scale(x, x @ mean, pairs.label, pairs.mask, SCALES)
    return Features(found['net'], mean, jnp.float32(scale), found['w'])

  def adapt(self, parameters: Features, support: Pairs) -> jax.Array:
    f = self._phi().apply(parameters.net, support.items)
    x = f[:, 0] - f[:, 1]
    fit = fit_gaussian(
      x, x @ parameters.mean, support.label, support.mask, parameters.scale
    )
    return parameters.mean + fit.v

  def logit(self, parameters: Features, state, prompt, a, b):
    del prompt
    f = self._phi().apply(parameters.net, jnp.stack([a, b]))
    return (f[0] - f[1]) @ state

  def seen_states(self, parameters: Features, task: Task) -> jax.Array:
    del task
    return parameters.seen


def _spectral_start(task: Task, size: int):
  """phi [D, P] and w [U, P] of the best rank-P fit to users' linear rewards.

  Features beyond the rank, which there are if P > D, start and stay at 0.
  """
  v = fit_linear(task)
  pairs = gather(task.table, task.train)
  args = pairs.difference, pairs.difference @ v, pairs.label, pairs.mask
  scale, _ = choose_scale(*args, USER_SCALES)
  rewards = v + fit_users(*args, scale)
  left, values, right = jnp.linalg.svd(rewards, full_matrices=False)
  root = jnp.sqrt(values[:size])
  beyond = ((0, 0), (0, size - root.size))
  return (
    jnp.pad(right[:size].T * root, beyond),
    jnp.pad(left[:, :size] * root, beyond),
  )
