"""`em`: soft latent classes of users, each with a linear reward."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic
from pal_jax.methods.base import Method, Pairs, Task, gather
from pal_jax.methods.homogeneous import RIDGES, fit_linear
from pal_jax.mixtures import class_log_likelihoods, mixture_logit
from pal_jax.models.bradley_terry import fit_bradley_terry


@flax.struct.dataclass
class Classes:
  v: jax.Array  # [K, D]
  log_share: jax.Array  # [K]


def _log_joint(parameters: Classes, pairs: Pairs) -> jax.Array:
  """[..., K] log share_k + log p(answers | k)."""
  z = pairs.difference @ parameters.v.T
  return parameters.log_share + class_log_likelihoods(
    z, pairs.label, pairs.mask
  )


@dataclasses.dataclass(frozen=True)
class Em(Method):
  """p(D_i) = sum_k pi_k prod_j sigma(v_k . d_j), by expectation maximisation.

  Latent-class conjoint analysis (Kamakura and Russell 1989); MaxMin-RLHF
  (Chakraborty et al. 2024, arXiv 2402.08925, algorithm 2) assigns users hard.
  The M step is a weighted Bradley-Terry model a class, by Newton's method. The
  ridge and the best of `num_starts` are those with the lowest validation loss.
  """

  num_classes: int = 4
  num_iterations: int = 30
  num_starts: int = 3
  hard: bool = False

  def fit(self, task: Task, key: jax.Array) -> Classes:
    best = None
    start = fit_linear(task)
    for ridge in RIDGES[:-1]:
      for k in jax.random.split(key, self.num_starts):
        found, loss = self._run(task, start, ridge, k)
        if best is None or loss < best[0]:
          best = loss, found
    return best[1]

  def _run(self, task, start, ridge, key):
    pairs, check = (
      gather(task.table, c) for c in (task.train, task.validation)
    )
    return _expectation_maximisation(self, pairs, check, start, ridge, key)

  def adapt(self, parameters: Classes, support: Pairs) -> jax.Array:
    """[K] log posterior over classes."""
    return jax.nn.log_softmax(_log_joint(parameters, support))

  def logit(self, parameters: Classes, state, prompt, a, b):
    del prompt
    return mixture_logit(state, parameters.v @ (a - b))


@jax.jit
def _maximise(x, label, weight, ridge, v):
  """[K, R] weights of comparisons -> [K, D]; two Newton steps from v.

  More would be thrown away: the next E step moves the weights.
  """
  return jax.lax.map(
    lambda args: fit_bradley_terry(
      x, label, args[0], ridge, max_iterations=2, start=args[1]
    )[0],
    (weight, v),
  )


def _expectation_maximisation(method: Em, pairs, check, start, ridge, key):
  size = method.num_classes
  x = pairs.difference.reshape(-1, pairs.difference.shape[-1])
  label, mask = pairs.label.reshape(-1), pairs.mask.reshape(-1)
  # Random soft assignments break the symmetry.
  belief = jax.random.dirichlet(key, jnp.full(size, 0.3), pairs.label.shape[:1])
  parameters = Classes(jnp.tile(start, (size, 1)), jnp.zeros(size))
  for _ in range(method.num_iterations):
    weight = jnp.repeat(belief, pairs.label.shape[1], axis=0) * mask[:, None]
    share = (belief.sum(0) + 1.0) / (belief.shape[0] + size)
    parameters = Classes(
      _maximise(x, label, weight.T, ridge, parameters.v), jnp.log(share)
    )
    log_joint = _log_joint(parameters, pairs)
    new = jax.nn.softmax(log_joint)
    if method.hard:
      new = jax.nn.one_hot(jnp.argmax(log_joint, -1), size)
    change, belief = jnp.abs(new - belief).max(), new
    if change < 1e-3:
      break
  state = jax.nn.log_softmax(_log_joint(parameters, pairs))
  z = check.difference @ parameters.v.T  # [U, N, K]
  z = jax.vmap(jax.vmap(mixture_logit, (None, 0)))(state, z)
  each = jnp.where(check.mask, logistic(z, check.label), 0.0)
  return parameters, float(jnp.sum(each) / jnp.maximum(jnp.sum(check.mask), 1))
