"""What methods that infer a user from a context set share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pal_jax.methods.base import Pairs, Task, gather
from pal_jax.structs import Comparisons


class PairEncoder(nn.Module):
  """Answered pairs [N, ...] -> a vector a pair [N, width].

  It sees the preferred candidate before the other; a soft label mixes both
  orders.
  """

  width: int

  @nn.compact
  def __call__(self, pairs: Pairs) -> jax.Array:
    a, b = pairs.items[..., 0, :], pairs.items[..., 1, :]
    net = nn.Sequential([nn.Dense(self.width), nn.gelu, nn.Dense(self.width)])
    y = pairs.label[..., None]
    return y * net(jnp.concatenate([a, b], -1)) + (1.0 - y) * net(
      jnp.concatenate([b, a], -1)
    )


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


def sample_users(
  task: Task, key: jax.Array, num_users: int, context: int, targets: int
):
  """Users with a context of 0 to `context` pairs, and other pairs as targets.

  Returns:
    (context Pairs [B, C], targets Pairs [B, T]).
  """
  user_key, order_key, count_key = jax.random.split(key, 3)
  users = jax.random.randint(user_key, (num_users,), 0, task.num_users)
  mine: Comparisons = jax.tree.map(lambda x: x[users], task.train)
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
  return gather(task.table, first), gather(task.table, rest)
