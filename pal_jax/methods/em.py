"""`em`: soft latent classes of users, each with a linear reward."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic
from pal_jax.methods.base import Method, Pairs, Task, flat_rows, gather
from pal_jax.methods.homogeneous import RIDGES, fit_linear
from pal_jax.mixtures import (
  class_log_likelihoods,
  comparison_log_likelihoods,
  mixture_logit,
)


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
  The M step climbs by `num_climbs` steps only (generalised EM, Dempster, Laird
  and Rubin 1977). The ridge, then the best of `num_starts`, are those with the
  lowest validation loss.
  """

  num_classes: int = 4
  num_iterations: int = 30
  num_climbs: int = 3
  num_starts: int = 3
  hard: bool = False

  def fit(self, task: Task, key: jax.Array) -> Classes:
    # Flat: where a few people answered most, padding would be all the work.
    train, check = (_answers(task, c) for c in (task.train, task.validation))
    basis, curvature = _principal_axes(train.x)
    start = fit_linear(task)
    first, *others = jax.random.split(key, self.num_starts)

    def run(ridge, key):
      found, loss = _expectation_maximisation(
        self,
        task.num_users,
        train,
        check,
        basis,
        curvature,
        start,
        ridge,
        key,
      )
      return float(loss), ridge, found

    tried = []
    for ridge in reversed(RIDGES[:-1]):
      tried.append(run(ridge, first))
      if len(tried) > 1 and tried[-1][0] > tried[-2][0]:
        break  # weaker ones fit noise
    ridge = min(tried, key=lambda each: each[0])[1]
    tried += [run(ridge, key) for key in others]
    return min(tried, key=lambda each: each[0])[2]

  def adapt(self, parameters: Classes, support: Pairs) -> jax.Array:
    """[K] log posterior over classes."""
    return jax.nn.log_softmax(_log_joint(parameters, support))

  def logit(self, parameters: Classes, state, prompt, a, b):
    del prompt
    return mixture_logit(state, parameters.v @ (a - b))


@flax.struct.dataclass
class _Answers:
  """Comparisons of all users, one after another."""

  x: jax.Array  # [R, D] h_a - h_b
  label: jax.Array  # [R]
  user: jax.Array  # [R]


def _answers(task: Task, comparisons) -> _Answers:
  rows = flat_rows(comparisons)
  pairs = gather(task.table, rows)
  return _Answers(pairs.difference, pairs.label, rows.user)


@jax.jit
def _principal_axes(x: jax.Array):
  """Eigenvectors [D, D] and eigenvalues [D] of X^T X, X [R, D]."""
  values, vectors = jnp.linalg.eigh(x.T @ x)
  return vectors, jnp.maximum(values, 0.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _expectation_maximisation(
  method: Em,
  num_users: int,
  train: _Answers,
  check: _Answers,
  basis,
  curvature,
  start,
  ridge,
  key,
):
  size = method.num_classes
  x, user = train.x @ basis, train.user

  def log_joint(v, log_share):
    each = comparison_log_likelihoods(x @ v.T, train.label)  # [R, K]
    return log_share + jax.ops.segment_sum(each, user, num_users)

  def climb(carry, _):
    """A step along axes in which the bound on the Hessian is diagonal.

    sigma' <= 1/4 (Boehning and Lindsay 1988), and a class with a share of the
    users has about that share of the curvature.
    """
    v, belief = carry
    residual = jax.nn.sigmoid(x @ v.T) - train.label[:, None]
    gradient = (residual * belief[user]).T @ x + ridge * v
    bound = 0.25 * curvature * (1.5 * belief.mean(0) + 0.05)[:, None] + ridge
    return (v - gradient / bound, belief), None

  def iterate(carry, _):
    v, belief = carry
    (v, _), _ = jax.lax.scan(climb, (v, belief), None, length=method.num_climbs)
    joint = log_joint(v, _log_share(belief))
    new = jax.nn.softmax(joint)
    if method.hard:
      new = jax.nn.one_hot(jnp.argmax(joint, -1), size)
    return (v, new), None

  # Random soft assignments break the symmetry.
  belief = jax.random.dirichlet(key, jnp.full(size, 0.3), (num_users,))
  v = jnp.tile(start @ basis, (size, 1))
  (v, belief), _ = jax.lax.scan(
    iterate, (v, belief), None, length=method.num_iterations
  )
  log_share = _log_share(belief)
  state = jax.nn.log_softmax(log_joint(v, log_share))
  v = v @ basis.T
  z = mixture_logit(state[check.user], check.x @ v.T)
  loss = jnp.sum(logistic(z, check.label)) / max(len(check.label), 1)
  return Classes(v, log_share), loss


def _log_share(belief: jax.Array) -> jax.Array:
  """[K] with one user more in each class, so that none is empty."""
  users, size = belief.shape
  return jnp.log((belief.sum(0) + 1.0) / (users + size))
