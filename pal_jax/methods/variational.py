"""`vpl`: a latent variable a user, inferred by an encoder of its answers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pal_jax.losses import logistic
from pal_jax.methods.base import Method, Pairs, Task, gather
from pal_jax.methods.context import (
  Attention,
  PairEncoder,
  first_of,
  sample_users,
)
from pal_jax.methods.training import minimise


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
class Variational(Method):
  """Poddar et al. 2024 (arXiv 2408.10075), variational preference learning.

  r(h, z) = MLP([h, z]), z ~ q(z | at most `context` answered pairs), a
  self-attention encoder; trained on the evidence lower bound with its KL
  weighted by beta, annealed over `cycles` cycles. A new user is one forward
  pass; without comparisons z is the prior's mean. More than `context`
  comparisons are not looked at.
  """

  latent: int = 512
  width: int = 512
  context: int = 8
  targets: int = 16
  users: int = 32
  beta: float = 3e-6
  cycles: int = 4
  learning_rate: float = 1e-4
  weight_decay: float = 1e-3
  num_steps: int = 1500

  def _net(self):
    return _Net(self.width, self.latent)

  def fit(self, task: Task, key: jax.Array):
    init_key, key = jax.random.split(key)
    net = self._net()
    example, _ = sample_users(task, init_key, 1, self.context, self.targets)
    params = net.init(init_key, jax.tree.map(lambda x: x[0], example))

    def loss(params, batch, key, progress):
      # Cyclic annealing (Fu et al. 2019): up in the first half of each cycle.
      beta = self.beta * jnp.minimum(
        2.0 * ((progress * self.cycles) % 1.0), 1.0
      )

      def one(context, targets, key):
        mean, log_variance = net.apply(params, context, method='encode')
        noise = jax.random.normal(key, mean.shape)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        r = net.apply(params, z, targets.items, method='reward')
        each = logistic(r[:, 0] - r[:, 1], targets.label)
        kl = 0.5 * jnp.sum(
          jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance
        )
        return _masked_mean(each, targets.mask) + beta * kl

      context, targets = batch
      keys = jax.random.split(key, self.users)
      return jnp.mean(jax.vmap(one)(context, targets, keys))

    return minimise(
      loss,
      params,
      lambda key: sample_users(
        task, key, self.users, self.context, self.targets
      ),
      lambda params: validation_loss(self, params, task),
      optimizer=optax.adamw(self.learning_rate, weight_decay=self.weight_decay),
      num_steps=self.num_steps,
      check_every=100,
      key=key,
    )[0]

  def adapt(self, parameters, support: Pairs) -> jax.Array:
    context = first_of(support, self.context)
    return self._net().apply(parameters, context, method='encode')[0]

  def logit(self, parameters, state, prompt, a, b):
    del prompt
    r = self._net().apply(parameters, state, jnp.stack([a, b]), method='reward')
    return r[0] - r[1]


def _masked_mean(x, mask):
  return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def validation_loss(method: Method, params, task: Task) -> jax.Array:
  """Of seen users' validation items, inferred from 0 and from all answers."""

  def one(args):
    support, queries = (gather(task.table, c) for c in args)

    def loss(support):
      state = method.adapt(params, support)
      z = jax.vmap(
        lambda prompt, items: method.logit(
          params, state, prompt, items[0], items[1]
        )
      )(queries.prompt, queries.items)
      return jnp.sum(jnp.where(queries.mask, logistic(z, queries.label), 0.0))

    nobody = support.replace(mask=jnp.zeros_like(support.mask))
    return 0.5 * (loss(support) + loss(nobody))

  total = jax.lax.map(one, (task.train, task.validation), batch_size=32)
  return jnp.sum(total) / jnp.maximum(jnp.sum(task.validation.mask), 1)
