"""What methods that infer a user from a context set share."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic
from pal_jax.methods.base import Method, Pairs, gather
from pal_jax.methods.training import TaskArrays, Trained
from pal_jax.structs import Comparisons


class PairEncoder(nn.Module):
  """Answered pairs [N, ...] -> a vector a pair [N, width].

  It sees the preferred candidate before the other. A soft label counts for
  |2 y - 1|: a tie says nothing of which was preferred.
  """

  width: int

  @nn.compact
  def __call__(self, pairs: Pairs) -> jax.Array:
    a, b = pairs.items[..., 0, :], pairs.items[..., 1, :]
    net = nn.Sequential([nn.Dense(self.width), nn.gelu, nn.Dense(self.width)])
    y = pairs.label[..., None]
    chosen, other = jnp.where(y > 0.5, a, b), jnp.where(y > 0.5, b, a)
    sure = jnp.abs(2.0 * y - 1.0)
    return sure * net(jnp.concatenate([chosen, other], -1))


class Attention(nn.Module):
  """Masked self-attention over the pairs of a context, residual."""

  width: int
  num_heads: int = 4

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    attend = nn.MultiHeadDotProductAttention(self.num_heads)
    # A context without pairs attends to itself; what comes out is not used.
    together = (mask[:, None] & mask[None]) | jnp.eye(mask.size, dtype=bool)
    return x + attend(nn.LayerNorm()(x), mask=together[None])


def first_of(support: Pairs, size: int) -> Pairs:
  """At most `size` comparisons, those that count first."""
  order = jnp.argsort(~support.mask, stable=True)[:size]
  return jax.tree.map(lambda x: x[order], support)


@dataclasses.dataclass(frozen=True)
class Inferred(Trained):
  """A user's state is a network's reading of a context of answers.

  A subclass has a net with `encode` (context -> what it reads) and `reward`
  (state [Z], items [..., D] -> [...]).
  """

  context: int = 8  # answered pairs at most; more are not looked at
  targets: int = 16  # pairs that are asked about
  users: int = 16  # in a batch

  def _net(self) -> nn.Module:
    raise NotImplementedError

  def init(self, data: TaskArrays, key):
    return self._net().init(key, _example(data, key, self.context))

  def sample(self, data: TaskArrays, key):
    return sample_users(data, key, self.users, self.context, self.targets)

  def validate(self, parameters, data: TaskArrays):
    return inferred_loss(self, parameters, data)

  def read(self, parameters, support: Pairs):
    """What the net encodes of at most `context` comparisons."""
    context = first_of(support, self.context)
    return self._net().apply(parameters, context, method='encode')

  def logit(self, parameters, state, prompt, a, b):
    del prompt
    r = self._net().apply(parameters, state, jnp.stack([a, b]), method='reward')
    return r[0] - r[1]


def _example(data: TaskArrays, key: jax.Array, size: int) -> Pairs:
  """Of one user, for its shapes."""
  context, _ = sample_users(data, key, 1, size, 1)
  return jax.tree.map(lambda x: x[0], context)


def sample_users(
  data: TaskArrays, key: jax.Array, num_users: int, context: int, targets: int
):
  """Users with a context of 0 to `context` pairs, and other pairs as targets.

  Returns:
    (context Pairs [B, C], targets Pairs [B, T]).
  """
  user_key, order_key, count_key = jax.random.split(key, 3)
  users = jax.random.randint(
    user_key, (num_users,), 0, data.train.label.shape[0]
  )
  mine: Comparisons = jax.tree.map(lambda x: x[users], data.train)
  noise = jax.random.uniform(order_key, mine.label.shape)
  order = jnp.argsort(jnp.where(mine.mask, noise, 2.0), axis=-1)

  def take(columns):
    return jax.tree.map(
      lambda x: jax.vmap(lambda row, i: row[i])(x, order[:, columns]), mine
    )

  # Most users have few comparisons somewhere: half of them may be context.
  size = mine.label.shape[1]
  context = min(context, size // 2)
  targets = min(targets, size - context)
  limit = jnp.minimum(context, jnp.sum(mine.mask, -1) // 2)
  count = jax.random.randint(count_key, (num_users,), 0, limit + 1)
  first, rest = take(slice(0, context)), take(slice(context, context + targets))
  first = first.replace(
    mask=first.mask & (jnp.arange(context) < count[:, None])
  )
  return gather(data.table, first), gather(data.table, rest)


def inferred_loss(method: Method, parameters, data: TaskArrays) -> jax.Array:
  """() nats of validation items, inferred from 0 and from all answers."""

  def one(args):
    support, queries = (gather(data.table, c) for c in args)

    def loss(support):
      state = method.adapt(parameters, support)
      z = jax.vmap(
        lambda prompt, items: method.logit(
          parameters, state, prompt, items[0], items[1]
        )
      )(queries.prompt, queries.items)
      return jnp.sum(jnp.where(queries.mask, logistic(z, queries.label), 0.0))

    nobody = support.replace(mask=jnp.zeros_like(support.mask))
    return 0.5 * (loss(support) + loss(nobody))

  total = jax.lax.map(one, (data.train, data.validation), batch_size=32)
  return jnp.sum(total) / jnp.maximum(jnp.sum(data.validation.mask), 1)
