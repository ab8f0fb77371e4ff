"""`vpl`: a latent variable a user, inferred by an encoder of its answers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic
from pal_jax.methods.base import Pairs
from pal_jax.methods.context import Attention, Inferred, PairEncoder


class _Net(nn.Module):
  width: int
  latent: int

  def setup(self):
    self.encode_pair = PairEncoder(self.width)
    self.attend = Attention(self.width)
    self.head = nn.Dense(2 * self.latent)
    self.decoder = nn.Sequential(
      [
        nn.Dense(self.width),
        nn.gelu,
        nn.Dense(self.width),
        nn.gelu,
        nn.Dense(1),
      ]
    )

  def encode(self, context: Pairs):
    """Mean and log variance [Z]; the standard normal of an empty context."""
    x = self.attend(self.encode_pair(context), context.mask)
    live = context.mask[:, None]
    pooled = jnp.sum(jnp.where(live, x, 0.0), 0) / jnp.maximum(live.sum(), 1)
    mean, log_variance = jnp.split(self.head(pooled), 2)
    some = context.mask.any()
    return jnp.where(some, mean, 0.0), jnp.where(some, log_variance, 0.0)

  def reward(self, z, items):
    """[..., D] -> [...]."""
    z = jnp.broadcast_to(z, (*items.shape[:-1], z.shape[-1]))
    return self.decoder(jnp.concatenate([items, z], -1))[..., 0]

  def __call__(self, context: Pairs):
    mean, _ = self.encode(context)
    return self.reward(mean, context.items)


@dataclasses.dataclass(frozen=True)
class Variational(Inferred):
  """Poddar et al. 2024 (arXiv 2408.10075), variational preference learning.

  r(h, z) = MLP([h, z]), z ~ q(z | at most `context` answered pairs), a
  self-attention encoder; trained on the evidence lower bound with its KL
  weighted by beta, annealed over `cycles` cycles. A new user is one forward
  pass; without comparisons z is the prior's mean. More than `context`
  comparisons are not looked at.
  """

  latent: int = 512
  width: int = 256  # of the encoder and of the reward
  beta: float = 3e-6
  cycles: int = 4
  learning_rate: float = 3e-4
  weight_decay: float = 1e-3
  num_steps: int = 1500

  def _net(self):
    return _Net(self.width, self.latent)

  def loss(self, parameters, data, batch, key, progress):
    del data
    net = self._net()
    # Cyclic annealing (Fu et al. 2019): up in the first half of each cycle.
    beta = self.beta * jnp.minimum(2.0 * ((progress * self.cycles) % 1.0), 1.0)

    def one(context, targets, key):
      mean, log_variance = net.apply(parameters, context, method='encode')
      noise = jax.random.normal(key, mean.shape)
      z = mean + jnp.exp(0.5 * log_variance) * noise
      r = net.apply(parameters, z, targets.items, method='reward')
      each = logistic(r[:, 0] - r[:, 1], targets.label)
      kl = 0.5 * jnp.sum(
        jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance
      )
      return _masked_mean(each, targets.mask) + beta * kl

    context, targets = batch
    keys = jax.random.split(key, self.users)
    return jnp.mean(jax.vmap(one)(context, targets, keys))

  def adapt(self, parameters, support: Pairs) -> jax.Array:
    mean, _ = self.read(parameters, support)
    return mean


def _masked_mean(x, mask):
  return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
