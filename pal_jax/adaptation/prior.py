"""The population that a new user starts from, learned from the seen users.

Two descriptions of the same people. The *discrete* prior has atoms on the
simplex with masses; its posterior, predictions, intervals and questions are
sums over atoms, for every form of the model (`posterior`). The *centre and
strength* belong to the certified point estimate, F = f + lambda KL(w || w0).
Both are fitted on the seen users' held-out comparisons (empirical Bayes):
unseen users have no part in it.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pal_jax.adaptation.point import fit_users
from pal_jax.adaptation.statistics import (
  TINY,
  Statistics,
  atom_logits,
  weight_logits,
)
from pal_jax.losses import logistic
from pal_jax.mixtures import class_log_likelihoods
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.numerics import log_mean_weights

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Near 0 where what people answer on some items says little of others.
EVIDENCES = (0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0)
POOLINGS = (0.0, 0.1, 0.2, 0.3, 0.5)
COUNTS = (0, 1, 2, 5, 10, 20)  # comparisons that these are chosen for
MAX_ATOMS = 256
MAX_USERS = 512  # users that they are chosen on
# Share of the prior that is spread evenly over the atoms: people that no seen
# user resembled stay possible.
SPREAD = 0.1
# Log-weights of an atom at a vertex: finite, and so low that an answer which
# its class does not explain is not explained by the others' shares.
MIN_LOG_ATOM = -1000.0


@flax.struct.dataclass
class Prior:
  """What is known of a user before the first comparison."""

  log_weights: jax.Array  # [K] log w0, the mean of the seen users' weights
  strength: jax.Array  # () lambda of KL(w || w0), nats
  log_atoms: jax.Array  # [M, K] points of the simplex
  log_masses: jax.Array  # [M] log probabilities
  # () eta: the likelihood counts to this power in the posterior. 1 is Bayes'
  # rule; other values answer for what the likelihood has wrong (SafeBayes,
  # Gruenwald and van Ommen 2017).
  evidence: jax.Array
  # () alpha in [0, 1]: share of the logarithmic pool in predictions. Averages
  # of probabilities are too timid where atoms disagree (Ranjan and Gneiting
  # 2010), averages of logits too bold.
  pooling: jax.Array


def has_classes(model: IdealPointModel) -> bool:
  """Whether users are one of K classes, so that atoms are the vertices."""
  return model.membership == 'partition' or model.user_level


def vertices(num_prototypes: int) -> jax.Array:
  """[K, K] log-weights of the corners of the simplex."""
  corners = jnp.where(jnp.eye(num_prototypes, dtype=bool), 0.0, MIN_LOG_ATOM)
  return jax.nn.log_softmax(corners, axis=-1)


def choose_atoms(
  model: IdealPointModel, seen: jax.Array, max_atoms: int = MAX_ATOMS
) -> jax.Array:
  """[M, K] atoms: the seen users' weights, the vertices and the centre.

  Args:
    model: decides whether there are other atoms than the vertices.
    seen: [U, K] log-weights of the seen users.
    max_atoms: with more seen users, this many of them, evenly spaced.
  """
  corners = vertices(model.num_prototypes)
  if has_classes(model) or model.num_prototypes == 1:
    return corners
  num_users = seen.shape[0]
  rows = np.unique(
    np.linspace(0, num_users - 1, min(num_users, max_atoms)).astype(int)
  )
  atoms = jnp.concatenate([seen[rows], corners, log_mean_weights(seen)[None]])
  return jax.nn.log_softmax(jnp.maximum(atoms, MIN_LOG_ATOM), axis=-1)


@functools.partial(jax.jit, static_argnames=('model', 'rule', 'chunk'))
def atom_log_likelihoods(
  model: IdealPointModel,
  variables,
  rule: str,
  log_atoms: jax.Array,
  stats: Statistics,
  label: jax.Array,
  mask: jax.Array,
  *,
  chunk: int = 64,
) -> jax.Array:
  """log p(answers | atom), the sufficient statistic of a discrete prior.

  They add up over comparisons: a user with more of them needs only the new
  ones.

  Args:
    model, variables, rule: the frozen model.
    log_atoms: [M, K].
    stats: [U, N].
    label, mask: [U, N].
    chunk: users at a time, so that no [U, N, M] is ever held.

  Returns:
    [U, M] nats.
  """

  def one(args):
    stats_, label, mask = args
    if stats.shared_basis:
      stats_ = stats_.replace(basis=stats.basis)
    # Padding may hold anything: it is replaced, not multiplied by 0.
    stats_ = stats_.map(
      lambda x: jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0.0)
    )
    z = atom_logits(model, variables, rule, log_atoms, stats_)  # [N, M]
    return class_log_likelihoods(z, jnp.where(mask, label, 0.0), mask)

  pieces = stats.replace(basis=None) if stats.shared_basis else stats
  return jax.lax.map(one, (pieces, label, mask), batch_size=chunk)


@functools.partial(jax.jit, static_argnames=('max_iterations',))
def fit_masses(
  log_likelihoods: jax.Array,
  *,
  max_iterations: int = 2000,
  tolerance: float = 1e-3,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Nonparametric maximum likelihood of the masses, by EM.

  Maximises L(pi) = mean_i log sum_m pi_m p(D_i | m), concave in pi. At the
  optimum no atom is better for the users than their mixture, and
  max_m mean_i p(D_i | m) / p(D_i) - 1 bounds max L - L(pi) elsewhere
  (Lindsay, 1983).

  Args:
    log_likelihoods: [U, M] from `atom_log_likelihoods`.
    max_iterations: of EM.
    tolerance: of the bound, nats a user.

  Returns:
    log masses [M], the bound (), iterations ().
  """
  num_users, num_atoms = log_likelihoods.shape
  likelihood = jnp.exp(log_likelihoods - log_likelihoods.max(1, keepdims=True))

  def ratio(masses):
    """mean_i p(D_i | m) / p(D_i), [M]."""
    return (1.0 / (likelihood @ masses)) @ likelihood / num_users

  def body(carry):
    masses, ratios, number = carry
    masses = masses * ratios
    masses = masses / jnp.sum(masses)
    return masses, ratio(masses), number + 1

  def go_on(carry):
    _, ratios, number = carry
    return (jnp.max(ratios) - 1.0 > tolerance) & (number < max_iterations)

  uniform = jnp.full((num_atoms,), 1.0 / num_atoms)
  masses, ratios, number = jax.lax.while_loop(
    go_on, body, (uniform, ratio(uniform), 0)
  )
  return jnp.log(masses), jnp.max(ratios) - 1.0, number


def fit_prior(
  model: IdealPointModel,
  variables,
  seen: jax.Array,
  support: tuple[Statistics, jax.Array, jax.Array],
  held_out: tuple[Statistics, jax.Array, jax.Array],
  *,
  strength: float = 0.0,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
) -> tuple[Prior, dict]:
  """Fits centre, strength, atoms and masses.

  Args:
    model, variables: the frozen model.
    seen: [U, K] log-weights of the seen users; [K] for the user-level mixture,
      whose users have none.
    support: (statistics, label, mask) [U, N] of their training comparisons;
      only the strength needs them.
    held_out: the same of their validation comparisons.
    strength: lambda; 0.0 chooses it by `choose_strength`.
    max_iterations, tolerance: of the solver.

  Returns:
    (prior, what a person may want to know of the fit).
  """
  seen = jnp.atleast_2d(seen)
  center = log_mean_weights(seen)
  log_atoms = choose_atoms(model, seen)
  log_masses, bound, iterations = fit_masses(
    atom_log_likelihoods(
      model, variables, model.adaptation_rule, log_atoms, *held_out
    )
  )
  log_masses = jnp.log(
    (1.0 - SPREAD) * jnp.exp(log_masses) + SPREAD / log_masses.size
  )
  if has_classes(model):
    center = log_masses
  (evidence, pooling), losses = choose_belief(
    model, variables, support, held_out, log_atoms, log_masses
  )
  curve = {}
  if not strength:
    strength, curve = choose_strength(
      model,
      variables,
      support,
      held_out,
      center,
      max_iterations=max_iterations,
      tolerance=tolerance,
    )
  prior = Prior(
    log_weights=center,
    strength=jnp.asarray(strength, jnp.float32),
    log_atoms=log_atoms,
    log_masses=log_masses,
    evidence=jnp.asarray(evidence, jnp.float32),
    pooling=jnp.asarray(pooling, jnp.float32),
  )
  masses = np.exp(np.asarray(log_masses, np.float64))
  summary = {
    'strength': float(strength),
    'strength_curve': {f'{k:g}': v for k, v in curve.items()},
    'atoms': int(log_atoms.shape[0]),
    # Of a uniform prior it would be their number.
    'effective_atoms': float(np.exp(-np.sum(masses * np.log(masses)))),
    'evidence': evidence,
    'pooling': pooling,
    'belief_curve': losses,
    'mass_bound': float(bound),
    'mass_iterations': int(iterations),
  }
  return prior, summary


def _first_users(part):
  stats, label, mask = part
  return (
    stats.map(lambda x: x[:MAX_USERS]),
    jnp.asarray(label[:MAX_USERS]),
    jnp.asarray(mask[:MAX_USERS]),
  )


def power_posterior(log_masses, evidence, log_likelihoods):
  """log of pi_m p(D | m)^eta, normalised: [M], (), [..., M] -> [..., M]."""
  return jax.nn.log_softmax(log_masses + evidence * log_likelihoods, axis=-1)


def pool(log_belief: jax.Array, pooling: jax.Array, z: jax.Array) -> jax.Array:
  """Predictive log odds: [..., M], (), [..., N, M] -> [..., N].

  (1 - alpha) logit(sum_m gamma_m sigma(z_m)) + alpha sum_m gamma_m z_m: with
  alpha = 0 the posterior predictive of Bayes.
  """
  belief = jnp.exp(log_belief)[..., None]  # [..., M, 1]
  first = (jax.nn.sigmoid(z) @ belief)[..., 0]
  second = (jax.nn.sigmoid(-z) @ belief)[..., 0]
  linear = jnp.log(jnp.maximum(first, TINY))
  linear -= jnp.log(jnp.maximum(second, TINY))
  return (1.0 - pooling) * linear + pooling * (z @ belief)[..., 0]


@functools.partial(jax.jit, static_argnames=('model', 'rule'))
def _belief_losses(
  model, variables, rule, support, held_out, log_atoms, log_masses, grid, counts
):
  """Mean nats per held-out comparison, [G] of the grid, over [C] counts."""
  stats, label, mask = support
  queries, query_label, query_mask = held_out

  def one(count):
    evidence = atom_log_likelihoods(
      model,
      variables,
      rule,
      log_atoms,
      stats,
      label,
      mask & (jnp.arange(mask.shape[1]) < count),
    )

    def users(args):
      queries_, evidence, label, mask = args
      if queries.shared_basis:
        queries_ = queries_.replace(basis=queries.basis)
      z = atom_logits(model, variables, rule, log_atoms, queries_)

      def setting(pair):
        belief = power_posterior(log_masses, pair[0], evidence)
        each = logistic(pool(belief, pair[1], z), label)
        return jnp.sum(jnp.where(mask, each, 0.0))

      return jax.vmap(setting)(grid)

    pieces = queries.replace(basis=None) if queries.shared_basis else queries
    losses = jax.lax.map(
      users, (pieces, evidence, query_label, query_mask), batch_size=64
    )
    return jnp.sum(losses, 0) / jnp.sum(query_mask)

  return jnp.mean(jax.lax.map(one, counts), 0)


def choose_belief(
  model: IdealPointModel,
  variables,
  support: tuple[Statistics, jax.Array, jax.Array],
  held_out: tuple[Statistics, jax.Array, jax.Array],
  log_atoms: jax.Array,
  log_masses: jax.Array,
  *,
  counts: tuple[int, ...] = COUNTS,
) -> tuple[tuple[float, float], dict[str, float]]:
  """The evidence power and pooling with the best held-out likelihood.

  On *seen* users treated as new, as `choose_strength` does.

  Returns:
    (evidence, pooling), {'evidence/pooling': mean nats a comparison}. With
    K = 1 there is nothing to choose: (1.0, 0.0), {}.
  """
  if model.num_prototypes == 1:
    return (1.0, 0.0), {}
  grid = [(e, p) for e in EVIDENCES for p in POOLINGS]
  counts = [n for n in counts if n <= support[1].shape[1]]
  losses = _belief_losses(
    model,
    variables,
    model.adaptation_rule,
    _first_users(support),
    _first_users(held_out),
    log_atoms,
    log_masses,
    jnp.asarray(grid, jnp.float32),
    jnp.asarray(counts, jnp.int32),
  )
  losses = np.asarray(losses).tolist()
  best = grid[int(np.argmin(losses))]
  return best, {
    f'{e:g}/{p:g}': v for (e, p), v in zip(grid, losses, strict=True)
  }


@functools.partial(
  jax.jit, static_argnames=('model', 'rule', 'max_iterations', 'tolerance')
)
def _held_out_loss(
  model,
  variables,
  rule,
  support,
  held_out,
  center,
  strengths,
  counts,
  max_iterations,
  tolerance,
):
  """Mean nats per held-out comparison, [S] strengths, over [C] counts."""
  stats, label, mask = support
  queries, query_label, query_mask = held_out

  def one(setting):
    strength, count = setting
    users = fit_users(
      model,
      variables,
      rule,
      stats,
      label,
      mask & (jnp.arange(mask.shape[1]) < count),
      center,
      strength,
      max_iterations=max_iterations,
      tolerance=tolerance,
    )
    z = jax.vmap(
      lambda w, s: weight_logits(model, variables, rule, w, s),
      in_axes=(0, queries.axes),
    )(users.log_weights, queries)
    each = jnp.where(query_mask, logistic(z, query_label), 0.0)
    return jnp.sum(each) / jnp.sum(query_mask)

  num = counts.shape[0]
  grid = jnp.repeat(strengths, num), jnp.tile(counts, strengths.shape[0])
  return jax.lax.map(one, grid).reshape((-1, num)).mean(1)


def choose_strength(
  model: IdealPointModel,
  variables,
  support: tuple[Statistics, jax.Array, jax.Array],
  held_out: tuple[Statistics, jax.Array, jax.Array],
  log_center: jax.Array,
  *,
  counts: tuple[int, ...] = COUNTS,
  strengths: tuple[float, ...] = STRENGTHS,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
) -> tuple[float, dict[float, float]]:
  """The lambda with the best held-out likelihood on *seen* users.

  Each seen user is treated as new: fitted to its first n training comparisons
  and measured on its validation ones, for every n of `counts`. Unseen users
  have no part in it.

  Args:
    model, variables: the frozen model.
    support, held_out: as in `fit_prior`; the first 4,096 users are used.
    log_center: [K] w0.
    counts: numbers of comparisons to adapt from.
    strengths: the grid.
    max_iterations, tolerance: of the solver.

  Returns:
    (lambda, {lambda: mean nats per validation comparison}). Classes and K = 1
    have no strength: (1.0, {}).
  """
  if has_classes(model) or model.num_prototypes == 1:
    return 1.0, {}

  support, held_out = _first_users(support), _first_users(held_out)
  counts = [n for n in counts if n <= support[1].shape[1]]
  losses = _held_out_loss(
    model,
    variables,
    model.adaptation_rule,
    support,
    held_out,
    log_center,
    jnp.asarray(strengths, jnp.float32),
    jnp.asarray(counts, jnp.int32),
    max_iterations,
    tolerance,
  )
  curve = dict(zip(strengths, np.asarray(losses).tolist(), strict=True))
  return min(curve, key=curve.get), curve
