"""Losses: logits x labels -> one loss per comparison, unreduced.

All take soft labels: y in [0, 1] is the probability that the first candidate
is preferred (a tie is 0.5), and the loss is the expectation over it. All are
finite, with finite gradients, at logits of +-1000.
"""

import jax
import jax.numpy as jnp


def logistic(logit: jax.Array, label: jax.Array) -> jax.Array:
  """-log sigma(z) for label 1, -log sigma(-z) for label 0; in nats."""
  return label * jax.nn.softplus(-logit) + (1.0 - label) * jax.nn.softplus(
    logit
  )


def cross_entropy(rewards: jax.Array, label: jax.Array) -> jax.Array:
  """Two-way softmax cross-entropy of rewards [..., 2]; in nats.

  Equal to `logistic(r_a - r_b, label)`; kept because PAL-B is stated so.
  """
  log_p = jax.nn.log_softmax(rewards, axis=-1)
  return -(label * log_p[..., 0] + (1.0 - label) * log_p[..., 1])


def hinge(logit: jax.Array, label: jax.Array, margin: float = 1.0) -> jax.Array:
  """relu(margin - z) for label 1, relu(margin + z) for label 0."""
  return label * jax.nn.relu(margin - logit) + (1.0 - label) * jax.nn.relu(
    margin + logit
  )


def smoothed_hinge(
  logit: jax.Array, label: jax.Array, gamma: float = 5.0
) -> jax.Array:
  """Hinge with margin 1, quadratic over a stretch of length `gamma`.

  With s = 1 - z: 0 for s <= 0, s^2 / (2 gamma) for s <= gamma, s - gamma / 2
  beyond. Continuously differentiable.
  """

  def one_sided(z):
    s = jnp.maximum(1.0 - z, 0.0)
    # The minimum keeps the unused quadratic from overflowing at huge s.
    quadratic = jnp.square(jnp.minimum(s, gamma)) / (2.0 * gamma)
    # Strictly: at s = gamma the minimum would halve the slope.
    return jnp.where(s < gamma, quadratic, s - gamma / 2.0)

  return label * one_sided(logit) + (1.0 - label) * one_sided(-logit)


def _cross_entropy_of_logit(logit, label):
  return cross_entropy(jnp.stack([logit, jnp.zeros_like(logit)], -1), label)


LOSSES = {
  'logistic': logistic,
  'cross_entropy': _cross_entropy_of_logit,
  'hinge': hinge,
  'smoothed_hinge': smoothed_hinge,
}


def ideal_point_bound(
  norm: jax.Array, radius: float, weight: float
) -> jax.Array:
  """weight * relu(norm - radius), the bound on ideal points (METHOD 2).

  Args:
    norm: [...] ||u_i|| of the user of each comparison.
    radius: beta, in units of the preference space.
    weight: lambda, in nats per unit of distance.
  """
  return weight * jax.nn.relu(norm - radius)


def token_weights(tokens: jax.Array, mask: jax.Array, kind: str) -> jax.Array:
  """Weights over token positions for models that score every token.

  The window runs from the first position where the two responses differ (by
  token, or by one having ended) to the last real token of the longer one. If
  they never differ it is that last position alone. METHOD section 2.

  Args:
    tokens: [..., 2, T] token ids of both responses, padded on the right.
    mask: [..., 2, T] True at real tokens. No pad id is assumed.
    kind: 'mean', uniform over the window; 'last', its last position;
      'cumulative', proportional to 1, 2, 3, ... along it (the reference's
      default, sum_t t * l_t / (T (T + 1) / 2)).

  Returns:
    [..., T] weights that sum to 1, or to 0 if there is no real token.

  Raises:
    ValueError: if `kind` is not one of the three.
  """
  if kind not in ('mean', 'last', 'cumulative'):
    raise ValueError(
      f"token weighting {kind!r} is not one of 'mean', 'last', 'cumulative'"
    )
  position = jnp.arange(tokens.shape[-1])
  both = jnp.all(mask, axis=-2)
  differs = jnp.any(mask, axis=-2) & (
    ~both | (tokens[..., 0, :] != tokens[..., 1, :])
  )
  last = jnp.max(jnp.where(mask, position, -1), axis=(-2, -1), keepdims=False)[
    ..., None
  ]
  first = jnp.where(
    jnp.any(differs, axis=-1), jnp.argmax(differs, axis=-1), last[..., 0]
  )[..., None]
  window = (position >= first) & (position <= last)
  if kind == 'last':
    weight = (window & (position == last)).astype(jnp.float32)
  elif kind == 'mean':
    weight = window.astype(jnp.float32)
  else:
    weight = jnp.where(window, position - first + 1, 0).astype(jnp.float32)
  return weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1.0)


def token_loss(
  rewards: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  label: jax.Array,
  loss,
  kind: str,
) -> jax.Array:
  """Loss of a comparison from a reward per token, weighted over the window.

  A response that ended holds its last real token's reward, so that no padded
  position is ever read.

  Args:
    rewards: [..., 2, T] a reward at every token.
    tokens, mask, kind: as in `token_weights`.
    label: [...] in [0, 1].
    loss: a function of (logit, label), for example `logistic`.

  Returns:
    [...] one loss per comparison.
  """
  position = jnp.arange(tokens.shape[-1])
  last = jnp.max(jnp.where(mask, position, 0), axis=-1, keepdims=True)
  held = jnp.take_along_axis(rewards, jnp.minimum(position, last), axis=-1)
  weight = token_weights(tokens, mask, kind)
  # Positions without weight may hold anything, infinity included: they are
  # replaced before the loss, or their gradient would be 0 * NaN.
  logit = jnp.where(weight > 0, held[..., 0, :] - held[..., 1, :], 0.0)
  return jnp.sum(weight * loss(logit, label[..., None]), axis=-1)
