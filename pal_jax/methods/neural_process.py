"""`np_btl`: a neural process over users, the pairwise form of GPO."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic
from pal_jax.methods.base import Pairs
from pal_jax.methods.context import Attention, Inferred, PairEncoder


class _Net(nn.Module):
  width: int

  def setup(self):
    self.encode_pair = PairEncoder(self.width)
    self.attend = Attention(self.width)
    self.features = nn.Dense(self.width)
    self.decoder = nn.Sequential([nn.Dense(self.width), nn.gelu, nn.Dense(1)])

  def encode(self, context: Pairs):
    """[width], the sum over the pairs of a context; 0 if it is empty."""
    x = self.attend(self.encode_pair(context), context.mask)
    return jnp.sum(jnp.where(context.mask[:, None], x, 0.0), 0)

  def reward(self, z, items):
    f = self.features(items)
    z = jnp.broadcast_to(z, (*items.shape[:-1], z.shape[-1]))
    return self.decoder(jnp.concatenate([f, z], -1))[..., 0]

  def __call__(self, context: Pairs):
    return self.reward(self.encode(context), context.items)


@dataclasses.dataclass(frozen=True)
class NeuralProcess(Inferred):
  """NP-BTL: a conditional neural process with a Bradley-Terry-Luce likelihood.

  After Garnelo et al. 2018 (arXiv 1807.01613) and group preference
  optimisation (Zhao et al. 2023, arXiv 2310.11523): r(h, z) = MLP([f(h), z]),
  z a sum by attention over 0 to `context` answered pairs, trained on `targets`
  others. More than `context` comparisons are not looked at.
  """

  width: int = 256
  context: int = 10
  targets: int = 20
  learning_rate: float = 3e-4
  weight_decay: float = 1e-3
  num_steps: int = 1500

  def _net(self):
    return _Net(self.width)

  def loss(self, parameters, data, batch, key, progress):
    del data, key, progress
    net = self._net()

    def one(context, targets):
      z = net.apply(parameters, context, method='encode')
      r = net.apply(parameters, z, targets.items, method='reward')
      each = logistic(r[:, 0] - r[:, 1], targets.label)
      return jnp.sum(jnp.where(targets.mask, each, 0.0)), targets.mask.sum()

    losses, counts = jax.vmap(one)(*batch)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counts), 1)

  def adapt(self, parameters, support: Pairs) -> jax.Array:
    return self.read(parameters, support)
