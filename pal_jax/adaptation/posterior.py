"""What is known of a user after some comparisons, as sums over atoms.

A belief is the posterior over the atoms of a discrete prior, in closed form

  gamma_m = pi_m prod_j p(y_j | w_m)^eta / (the same, summed over atoms),

exact for every form of the model, because atoms are finitely many. With
eta = 1 it is Bayes' rule; eta is learned (`prior.choose_belief`). It is the
one model of uncertainty here: predictions, intervals and questions follow from
it and from `z`, the logits of comparisons at the atoms
(`statistics.atom_logits`).
"""

import jax
import jax.numpy as jnp

from pal_jax.adaptation.prior import Prior, pool, power_posterior
from pal_jax.adaptation.solver import UserState


def believe(prior: Prior, log_likelihoods: jax.Array) -> UserState:
  """The posterior of users with log-likelihoods [U, M] under the atoms.

  Without comparisons these are 0 and the belief is the prior. `log_weights`
  is the posterior mean of the weights, `objective` minus the log evidence.
  """
  log_belief = power_posterior(
    prior.log_masses, prior.evidence, log_likelihoods
  )
  log_w = jax.nn.logsumexp(log_belief[..., None] + prior.log_atoms, axis=-2)
  evidence = jax.nn.logsumexp(prior.log_masses + log_likelihoods, axis=-1)
  zero = jnp.zeros_like(evidence)
  return UserState(
    log_weights=jax.nn.log_softmax(log_w, axis=-1),
    objective=-evidence,
    gap=zero,
    residual=zero,
    iterations=zero.astype(jnp.int32),
    converged=jnp.isfinite(evidence),
    log_belief=log_belief,
  )


def predict(prior: Prior, log_belief: jax.Array, z: jax.Array) -> jax.Array:
  """Predictive log odds, the posterior integrated out.

  Args:
    prior: whose atoms `z` was computed at.
    log_belief: [..., M].
    z: [..., N, M] logits of each comparison at the atoms.

  Returns:
    [..., N] log odds; of sum_m gamma_m sigma(z_m) if `prior.pooling` is 0.
  """
  return pool(log_belief, prior.pooling, z)


def credible_interval(
  log_belief: jax.Array, z: jax.Array, level: float = 0.9
) -> tuple[jax.Array, jax.Array]:
  """Central credible interval of a reward difference, in logits.

  Args:
    log_belief: [..., M].
    z: [..., N, M] reward differences (log odds) at the atoms.
    level: probability inside, in (0, 1).

  Returns:
    (low, high), [..., N] each: the smallest atoms' values with at least
    (1 - level) / 2 and (1 + level) / 2 of the mass at or below them.
  """
  order = jnp.argsort(z, axis=-1)
  values = jnp.take_along_axis(z, order, axis=-1)
  mass = jnp.broadcast_to(jnp.exp(log_belief)[..., None, :], z.shape)
  below = jnp.cumsum(jnp.take_along_axis(mass, order, axis=-1), axis=-1)
  below = below / below[..., -1:]

  def quantile(level):
    first = jnp.argmax(below >= level - 1e-6, axis=-1)
    return jnp.take_along_axis(values, first[..., None], axis=-1)[..., 0]

  return quantile((1.0 - level) / 2.0), quantile((1.0 + level) / 2.0)
