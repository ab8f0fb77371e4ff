"""`micro`: K rewards mixed by a router that sees the context."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic
from pal_jax.methods.base import Pairs, gather
from pal_jax.methods.training import TaskArrays, Trained
from pal_jax.mixtures import comparison_log_likelihoods, mixture_logit


class _Net(nn.Module):
  num_rewards: int
  hidden: int

  def setup(self):
    self.rewards = nn.Dense(self.num_rewards, use_bias=False)
    self.router = nn.Sequential(
      [nn.Dense(self.hidden), nn.gelu, nn.Dense(self.num_rewards)]
    )

  def __call__(self, prompt, items):
    """[..., D], [..., 2, D] -> log pi [..., K], delta [..., K]."""
    r = self.rewards(items)
    return jax.nn.log_softmax(self.router(prompt)), r[..., 0, :] - r[..., 1, :]


@dataclasses.dataclass(frozen=True)
class ContextRouter(Trained):
  """MiCRo (Shen et al. 2025, arXiv 2505.24846).

  log sum_k pi_k(c) sigma(delta r_k), an entropy bonus on the mean routing
  keeps all K in use. A user multiplies the router's weights by Hedge (Freund
  and Schapire 1997): weight_k *= exp(-eta loss_k) after every answer.
  """

  num_rewards: int = 10
  hidden: int = 64
  entropy: float = 0.5
  eta: float = 1.0
  num_steps: int = 1500

  def _net(self):
    return _Net(self.num_rewards, self.hidden)

  def init(self, data: TaskArrays, key):
    table = data.table
    return self._net().init(key, table.prompts[0], table.items[:2])

  def _parts(self, parameters, data: TaskArrays, rows):
    pairs = gather(data.table, rows)
    log_pi, delta = self._net().apply(parameters, pairs.prompt, pairs.items)
    z = jax.vmap(mixture_logit)(log_pi, delta)
    return jnp.mean(logistic(z, pairs.label)), log_pi

  def loss(self, parameters, data, batch, key, progress):
    del key, progress
    value, log_pi = self._parts(parameters, data, batch)
    share = jnp.mean(jnp.exp(log_pi), 0)
    return value + self.entropy * jnp.sum(jax.scipy.special.xlogy(share, share))

  def validate(self, parameters, data):
    return self._parts(parameters, data, data.validation_rows)[0]

  def adapt(self, parameters, support: Pairs) -> jax.Array:
    """[K] log factors by which the user changes the router's weights."""
    _, delta = self._net().apply(parameters, support.prompt, support.items)
    each = comparison_log_likelihoods(delta, support.label)
    return self.eta * jnp.sum(jnp.where(support.mask[:, None], each, 0.0), 0)

  def logit(self, parameters, state, prompt, a, b):
    log_pi, delta = self._net().apply(parameters, prompt, jnp.stack([a, b]))
    return mixture_logit(jax.nn.log_softmax(log_pi + state), delta)
