"""Which comparison to ask a user next.

Everything follows from the belief over a prior's atoms and from `z`, the
logits of the candidate pairs at the atoms. Functions are of one user; `vmap`
them over users. With p_m = sigma(z_m) and gamma the belief:

- 'bald': expected information gain, H(sum_m gamma_m p_m) - sum_m gamma_m
  H(p_m), in nats (Houlsby et al. 2011): what the answer is expected to tell
  about the user. A batch takes pairs greedily by the *joint* information of
  their answers (BatchBALD, Kirsch et al. 2019), computed exactly.
- 'd_optimality': log(1 + p (1 - p) Var(z)), the gain in log determinant of
  the information about the rewards under a Gaussian approximation; a batch
  conditions the variance on the pairs taken.
- 'uncertainty': H(sum_m gamma_m p_m). It also asks what nobody could answer.
- 'random'.
"""

import functools

import jax
import jax.numpy as jnp

from pal_jax.adaptation.posterior import predict
from pal_jax.adaptation.prior import Prior, power_posterior
from pal_jax.errors import InputError
from pal_jax.mixtures import comparison_log_likelihoods

STRATEGIES = ('bald', 'd_optimality', 'uncertainty', 'random')
# 2^m joint answers are enumerated; a larger batch is better asked in parts.
MAX_BALD_BATCH = 10


def check_strategy(strategy: str) -> None:
  """Raises InputError if the strategy is unknown."""
  if strategy not in STRATEGIES:
    raise InputError(
      f'strategy={strategy!r} is unknown: expected one of {STRATEGIES}'
    )


def entropy(z: jax.Array) -> jax.Array:
  """Entropy in nats of an answer with log odds z; accurate at +-1000."""
  # Of the rarer answer: the same for z and -z, and without cancellation.
  z = -jnp.abs(z)
  return jax.nn.softplus(z) - jax.nn.sigmoid(z) * z


def _plain_predictive(log_belief, z):
  """log odds of sum_m gamma_m sigma(z_m), [Q]."""
  belief = jnp.exp(log_belief)
  tiny = jnp.finfo(z.dtype).tiny
  first = jnp.log(jnp.maximum(jax.nn.sigmoid(z) @ belief, tiny))
  return first - jnp.log(jnp.maximum(jax.nn.sigmoid(-z) @ belief, tiny))


def score_questions(
  strategy: str, log_belief: jax.Array, z: jax.Array, key: jax.Array
) -> jax.Array:
  """How much each pair of a pool is worth asking one user next.

  Args:
    strategy: one of STRATEGIES.
    log_belief: [M] of the user.
    z: [Q, M] logits of the pool at the atoms.
    key: of 'random', which alone uses it.

  Returns:
    [Q] scores; the largest is asked. Relabelling atoms changes nothing, and
    neither does swapping the candidates of a pair.

  Raises:
    InputError: if the strategy is unknown.
  """
  check_strategy(strategy)
  if strategy == 'random':
    return jax.random.uniform(key, z.shape[:1])
  mean = _plain_predictive(log_belief, z)
  if strategy == 'uncertainty':
    return entropy(mean)
  belief = jnp.exp(log_belief)
  if strategy == 'bald':
    return jnp.maximum(entropy(mean) - entropy(z) @ belief, 0.0)
  p = jax.nn.sigmoid(mean)
  return jnp.log1p(p * (1.0 - p) * _covariance(belief, z)[1])


def _covariance(belief, z):
  """Centred logits [Q, M], and their variances [Q] under the belief."""
  centred = z - (z @ belief)[:, None]
  return centred, jnp.square(centred) @ belief


@functools.partial(jax.jit, static_argnames=('strategy', 'size'))
def choose_questions(
  strategy: str,
  log_belief: jax.Array,
  z: jax.Array,
  size: int,
  key: jax.Array,
  available: jax.Array | None = None,
) -> jax.Array:
  """A batch of pairs to ask one user at once, best first.

  Args:
    strategy, log_belief, z, key: as in `score_questions`.
    size: m, at most MAX_BALD_BATCH for 'bald'.
    available: [Q] False for pairs that must not be asked, all True by default.
      If fewer than m are available, the rest is -1.

  Returns:
    [m] int32 rows of the pool, without repetition.

  Raises:
    InputError: if the strategy is unknown or m is out of range.
  """
  check_strategy(strategy)
  largest = z.shape[0]
  if strategy == 'bald':
    largest = min(largest, MAX_BALD_BATCH)
  if not 1 <= size <= largest:
    raise InputError(
      f'size={size} must be from 1 to {largest} (the pool has {z.shape[0]} '
      f"pairs; 'bald' enumerates the answers of at most {MAX_BALD_BATCH}): ask "
      'in several batches'
    )
  if available is None:
    available = jnp.ones(z.shape[:1], bool)
  if strategy == 'bald':
    gain_of = _joint_gain(log_belief, z)
  elif strategy == 'd_optimality':
    gain_of = _conditional_gain(log_belief, z)
  else:
    fixed = score_questions(strategy, log_belief, z, key)

    def gain_of(last):
      del last
      return fixed

  chosen, row = [], None
  for _ in range(size):
    gain = gain_of(row)
    row = jnp.argmax(jnp.where(available, gain, -jnp.inf))
    found = jnp.any(available)
    available = available.at[row].set(False)
    chosen.append(jnp.where(found, row, -1))
  return jnp.stack(chosen).astype(jnp.int32)


def _joint_gain(log_belief, z):
  """A function of the row taken last -> [Q] joint information, exact.

  I(y_1..y_j; m) = H(y_1..y_j) - sum_m gamma_m sum_i H(p_im); `weights` holds
  gamma_m times the likelihood of every joint answer to those taken.
  """
  belief = jnp.exp(log_belief)
  p = jax.nn.sigmoid(z)
  noise = entropy(z) @ belief  # [Q]
  weights, spent = belief[None], 0.0  # [2^j, M]

  def gain(row):
    nonlocal weights, spent
    if row is not None:
      weights = jnp.concatenate([weights * p[row], weights * (1.0 - p[row])])
      spent = spent + noise[row]
    joint = jnp.concatenate([weights @ p.T, weights @ (1.0 - p).T])  # [., Q]
    total = -jnp.sum(jax.scipy.special.xlogy(joint, joint), axis=0)
    return total - spent - noise

  return gain


def _conditional_gain(log_belief, z):
  """A function of the row taken last -> [Q] gain in log determinant."""
  belief = jnp.exp(log_belief)
  centred, variance = _covariance(belief, z)
  p = jax.nn.sigmoid(_plain_predictive(log_belief, z))
  information = p * (1.0 - p)
  covariance = (centred * belief) @ centred.T  # [Q, Q]

  def gain(row):
    nonlocal covariance
    if row is not None:
      column = covariance[:, row]
      weight = information[row] / (1.0 + information[row] * column[row])
      covariance = covariance - weight * column[:, None] * column[None]
    spread = jnp.maximum(jnp.diagonal(covariance), 0.0)
    return jnp.log1p(information * spread)

  return gain


@functools.partial(jax.jit, static_argnames=('strategy', 'steps'))
def simulate_questions(
  strategy: str,
  prior: Prior,
  z_pool: jax.Array,
  answers: jax.Array,
  z_query: jax.Array,
  steps: int,
  key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Users who are asked one pair after another, chosen from their own pools.

  Args:
    strategy: one of STRATEGIES.
    prior: everybody starts from it.
    z_pool: [U, Q, M] logits of each user's pool at the atoms.
    answers: [U, Q] in [0, 1], revealed when asked.
    z_query: [U, T, M] logits of the comparisons to predict.
    steps: questions, at most Q.
    key: of 'random', and of the order of equal scores.

  Returns:
    asked [U, steps] rows of the pools, and predictive log odds
    [steps + 1, U, T] after 0, 1, ..., steps answers.

  Raises:
    InputError: if the strategy is unknown or the pools are too small.
  """
  check_strategy(strategy)
  if steps > z_pool.shape[1]:
    raise InputError(
      f'steps={steps} but a pool has only {z_pool.shape[1]} pairs'
    )

  def user(z, label, queries, key):
    evidence = comparison_log_likelihoods(z, label)  # [Q, M]

    def predicted(total):
      belief = power_posterior(prior.log_masses, prior.evidence, total)
      return belief, predict(prior, belief, queries)

    def step(carry, key):
      total, available = carry
      belief, logit = predicted(total)
      score = score_questions(strategy, belief, z, key)
      # Ties, as on homogeneous data where nothing is to be learned, must not
      # always fall on the first pair.
      score += 1e-6 * jax.random.uniform(key, score.shape)
      row = jnp.argmax(jnp.where(available, score, -jnp.inf))
      carry = total + evidence[row], available.at[row].set(False)
      return carry, (row, logit)

    start = jnp.zeros(z.shape[1:]), jnp.ones(z.shape[:1], bool)
    keys = jax.random.split(key, steps)
    (total, _), (rows, logits) = jax.lax.scan(step, start, keys)
    return rows, jnp.concatenate([logits, predicted(total)[1][None]])

  keys = jax.random.split(key, z_pool.shape[0])
  asked, logits = jax.lax.map(
    lambda args: user(*args), (z_pool, answers, z_query, keys), batch_size=32
  )
  return asked, logits.transpose(1, 0, 2)
