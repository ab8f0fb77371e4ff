"""Membership: how K prototypes become one user, and mixture likelihoods.

Plain functions of arrays. Likelihoods are mixed in log space, so that logits
of +-1000 lose nothing (METHOD section 1).
"""

import jax
import jax.numpy as jnp


def mixture_logit(log_weights: jax.Array, delta: jax.Array) -> jax.Array:
  """The logit of sum_k w_k sigma(delta_k).

  Args:
    log_weights: [..., K] logarithms of points on the simplex.
    delta: [..., K] logits of each prototype, r_k(a) - r_k(b).

  Returns:
    [...] log(p) - log(1 - p). `logistic(mixture_logit(.), y)` is then exactly
    the comparison-level mixture likelihood, because sum_k w_k sigma(-delta_k)
    = 1 - p. Swapping the candidates negates it.
  """
  positive = jax.nn.logsumexp(log_weights + jax.nn.log_sigmoid(delta), axis=-1)
  negative = jax.nn.logsumexp(log_weights + jax.nn.log_sigmoid(-delta), axis=-1)
  return positive - negative


def comparison_log_likelihoods(delta: jax.Array, label: jax.Array) -> jax.Array:
  """log p(y | class k) per comparison: [..., K], [...] -> [..., K].

  A label strictly between 0 and 1 gives the expected log-likelihood.
  """
  label = label[..., None]
  return label * jax.nn.log_sigmoid(delta) + (1.0 - label) * jax.nn.log_sigmoid(
    -delta
  )


def class_log_likelihoods(
  delta: jax.Array, label: jax.Array, mask: jax.Array
) -> jax.Array:
  """log prod_j p(y_j | class k) of one user: [N, K], [N], [N] -> [K]."""
  each = comparison_log_likelihoods(delta, label)
  return jnp.sum(jnp.where(mask[..., None], each, 0.0), axis=-2)


def user_log_likelihood(
  log_prior: jax.Array, delta: jax.Array, label: jax.Array, mask: jax.Array
) -> jax.Array:
  """User-level mixture likelihood, log sum_k pi_k prod_j p(y_j | k).

  Args:
    log_prior: [K] log pi, the population's class weights.
    delta: [..., N, K] logits of the user's comparisons under each class.
    label: [..., N] in [0, 1].
    mask: [..., N] bool.

  Returns:
    [...] nats, over all comparisons of the user.
  """
  return jax.nn.logsumexp(
    log_prior + class_log_likelihoods(delta, label, mask), axis=-1
  )


def class_log_posterior(
  log_prior: jax.Array, delta: jax.Array, label: jax.Array, mask: jax.Array
) -> jax.Array:
  """log gamma_k, the closed-form posterior over a user's class.

  Shapes as in `user_log_likelihood`; returns [..., K]. Without comparisons it
  is the prior.
  """
  return jax.nn.log_softmax(
    log_prior + class_log_likelihoods(delta, label, mask), axis=-1
  )


def harden(log_weights: jax.Array) -> jax.Array:
  """One-hot weights of the largest log-weight: [..., K] -> [..., K].

  NaN stays NaN: arg-max would make an unknown user the first class.
  """
  num_classes = log_weights.shape[-1]
  hard = jax.nn.one_hot(jnp.argmax(log_weights, axis=-1), num_classes)
  unknown = jnp.any(jnp.isnan(log_weights), axis=-1, keepdims=True)
  return jnp.where(unknown, jnp.nan, hard)


def gumbel_straight_through(
  key: jax.Array, log_weights: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """A one-hot sample forward, the soft sample's gradient backward.

  Straight-through Gumbel-softmax (Jang et al., arXiv 1611.01144). Only for
  training: evaluation uses `harden`, without noise.

  Args:
    key: a PRNG key.
    log_weights: [..., K] log-probabilities of the classes.
    temperature: of the soft sample, > 0.

  Returns:
    [..., K] one-hot weights.
  """
  noise = jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
  soft = jax.nn.softmax((log_weights + noise) / temperature, axis=-1)
  hard = harden(soft)
  # Not `soft + stop_gradient(hard - soft)`: that leaves rounding errors, and
  # the sample is meant to be exactly one-hot.
  return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))
