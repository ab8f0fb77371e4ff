"""The protocol: seen and unseen users x seen and unseen items, and controls.

Nothing is chosen on the query sets: the parameters are those of the best
validation loss of the seen users, the prior's strength is chosen on the seen
users, and unseen users give nothing but their support.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pal_jax import recovery
from pal_jax.adaptation import (
  Placed,
  Prior,
  adapt,
  fit_prior,
  has_classes,
  is_convex,
  place,
  predict_users,
  score,
  statistics,
)
from pal_jax.data.dataset import SEEN_ITEMS, UNSEEN_ITEMS, Dataset
from pal_jax.ideal_points import PREFERENCES
from pal_jax.metrics import bootstrap_interval, evaluate_logits, user_accuracies
from pal_jax.mixtures import class_log_posterior
from pal_jax.models.bradley_terry import fit_bradley_terry
from pal_jax.structs import Comparisons, FeatureTable

# Comparisons of a seen user that the prior is learned from: some people of
# Pick-a-Pic have thousands, and everybody is padded to the one who has most.
MOST_OF_A_USER = 1000
_SHOWN_ITEMS = 20_000  # in figures
RIDGES = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)


def group_by_user(
  comparisons: Comparisons, num_users: int, most: int = 0
) -> Comparisons:
  """[N] comparisons in any order -> [U, N_max], padded and masked.

  Args:
    comparisons: [N].
    num_users: U.
    most: N_max is at most this: of a user who has more, the first. 0: all.
  """
  order = np.argsort(comparisons.user, kind='stable')
  user = comparisons.user[order]
  count = np.bincount(user, minlength=num_users)
  start = np.concatenate([[0], np.cumsum(count)[:-1]])
  column = np.arange(user.size) - start[user]
  if most and count.max(initial=0) > most:
    first = column < most
    order, user, column = order[first], user[first], column[first]
    count = np.minimum(count, most)
  rows = np.zeros((num_users, max(int(count.max(initial=0)), 1)), np.int64)
  live = np.zeros(rows.shape, bool)
  rows[user, column] = order
  live[user, column] = True
  grouped = comparisons[rows]
  return grouped.replace(
    user=np.broadcast_to(
      np.arange(num_users, dtype=np.int32)[:, None], rows.shape
    ),
    mask=live & np.asarray(grouped.mask),
  )


def seen_log_weights(model, variables, placed, dataset: Dataset) -> jax.Array:
  """[U, K] of the users of the table.

  Under the user-level mixture, the posterior over classes given a user's
  training comparisons.
  """
  support = None
  if model.user_level:
    support = group_by_user(dataset.train, dataset.num_users)
  return table_log_weights(model, variables, placed, support)


def table_log_weights(
  model, variables, placed, support: Comparisons | None
) -> jax.Array:
  """`seen_log_weights` from training comparisons by user.

  Args:
    model, variables, placed: trained.
    support: [U, N]; only the user-level mixture reads them.
  """
  users = jnp.arange(model.num_users)
  log_w = model.apply(variables, users, method='user_log_weights')
  if not model.user_level:
    return log_w
  stats = statistics(model, variables, placed, support, 'mixture')
  return class_log_posterior(
    log_w[0], stats.delta, jnp.asarray(support.label), support.mask
  )


def learn_prior(
  model, variables, placed: Placed, dataset: Dataset, config
) -> tuple[Prior, dict]:
  """The population, from the seen users' training and validation sets.

  Args:
    model, variables, placed: trained.
    dataset: nothing of its unseen users is used.
    config: `config.adaptation`.

  Returns:
    As `adaptation.fit_prior`.
  """

  def reduced(comparisons):
    grouped = group_by_user(comparisons, dataset.num_users, MOST_OF_A_USER)
    stats = statistics(model, variables, placed, grouped, model.adaptation_rule)
    return stats, jnp.asarray(grouped.label), jnp.asarray(grouped.mask)

  return fit_prior(
    model,
    variables,
    seen_log_weights(model, variables, placed, dataset),
    reduced(dataset.train),
    reduced(dataset.validation),
    strength=config.strength,
    max_iterations=config.max_iterations,
    tolerance=config.tolerance,
  )


def labels(comparisons: Comparisons) -> np.ndarray:
  """What `metrics` measures against: NaN for padding."""
  return np.where(comparisons.mask, comparisons.label, np.nan)


def support_ranks(mask: np.ndarray, resamples: int, seed: int) -> np.ndarray:
  """Random orders of each user's support, [R, V, N]: a rank below n is in.

  Shared by everything that is compared, and nested in n. Padding of `mask`
  [V, N] comes last.
  """
  rng = np.random.default_rng([seed, 1])
  rank = np.argsort(rng.random((resamples, *mask.shape)), axis=-1)
  last = np.where(mask, rank, rank + mask.shape[1])
  return np.argsort(np.argsort(last, axis=-1), axis=-1)


def evaluate_unseen(
  model, variables, placed, dataset: Dataset, prior: Prior, config
):
  """Adapts to n support comparisons and measures on disjoint queries.

  Returns:
    ({where: {n: logits [R, V, Q]}}, log-weights [V, K] at the largest n in
    the first resample, diagnostics of the solver).
  """
  support, rule = dataset.support, model.adaptation_rule
  stats = statistics(model, variables, placed, support, rule)
  queries = {
    where: statistics(model, variables, placed, comparisons, rule)
    for where, comparisons in dataset.unseen.items()
  }
  ranks = support_ranks(support.mask, config.evaluation.resamples, config.seed)
  counts = sorted(
    {n for n in config.evaluation.num_support if n <= support.shape[1]} | {0}
  )
  logits = {where: {} for where in dataset.unseen}
  last, fits = None, []
  for n in counts:
    each = {where: [] for where in dataset.unseen}
    for rank in ranks:
      users = adapt(
        model,
        variables,
        stats,
        support.label,
        support.mask & (rank < n),
        prior,
        method=config.adaptation.method,
        max_iterations=config.adaptation.max_iterations,
        tolerance=config.adaptation.tolerance,
      )
      if not each[UNSEEN_ITEMS]:  # the first resample
        last = users.log_weights
      fits.append(users)
      for where, asked in queries.items():
        each[where].append(
          np.asarray(predict_users(model, variables, users, asked, prior))
        )
    for where in each:
      logits[where][n] = np.stack(each[where])
  return logits, last, _solver_summary(model, config, fits)


def _solver_summary(model, config, fits) -> dict:
  """How the fits went; nothing is hidden."""
  rule = model.adaptation_rule
  closed = config.adaptation.method == 'posterior' or has_classes(model)

  def gather(get):
    return np.stack([np.asarray(get(users)) for users in fits])

  converged = gather(lambda u: u.converged)
  iterations = gather(lambda u: u.iterations)
  return {
    'method': 'posterior' if closed else 'map',
    'convex': bool(is_convex(model, rule)),
    'fits': int(converged.size),
    'not_converged': int(np.sum(~converged)),
    'largest_relative_gap': float(
      gather(lambda u: u.gap / jnp.maximum(1.0, jnp.abs(u.objective))).max()
    ),
    'largest_residual': float(gather(lambda u: u.residual).max()),
    'mean_iterations': float(iterations.mean()),
    'max_iterations': int(iterations.max()),
  }


def homogeneous_logits(table: FeatureTable, dataset: Dataset):
  """The linear Bradley-Terry control on the same pairs.

  Its ridge is chosen on validation comparisons.

  Returns:
    A function of comparisons [...] -> logits [...], and (ridge, relative
    gradient norm).
  """

  def difference(c):
    a, b = (table.items[c.items[..., i]] for i in range(2))
    return np.asarray(a, np.float32) - np.asarray(b, np.float32)

  flat = dataset.train.flatten()
  weight = flat.weight * flat.mask
  check = dataset.validation.flatten()
  x, x_check = difference(flat), difference(check)
  best = None
  for ridge in RIDGES:
    v, gradient = fit_bradley_terry(x, flat.label, weight, ridge)
    v = np.asarray(v)
    nll = evaluate_logits((x_check @ v)[None], check.label[None])['nll']
    if best is None or nll < best[0]:
      best = (nll, ridge, v, float(gradient))
  _, ridge, v, gradient = best
  return lambda c: difference(c) @ v, (ridge, gradient)


def length_controls(dataset: Dataset) -> dict:
  """Metrics of a scorer that knows nothing but how long a response is.

  One weight for everybody, fitted as `homogeneous_logits`; {} where the
  dataset has no lengths.
  """
  if dataset.item_lengths is None:
    return {}
  x = np.asarray(dataset.item_lengths, np.float32)[:, None]
  scaled = (x - x.mean()) / max(float(x.std()), 1e-6)
  scorer, _ = homogeneous_logits(FeatureTable(scaled, scaled), dataset)
  return {
    f'length_{who}': evaluate_logits(
      scorer(sets[UNSEEN_ITEMS]), labels(sets[UNSEEN_ITEMS])
    )
    for who, sets in (('seen', dataset.seen), ('unseen', dataset.unseen))
  }


def evaluate(
  model,
  variables,
  table: FeatureTable,
  dataset: Dataset,
  config,
  learned: tuple[Prior, dict] | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
  """Everything `results.json` holds, and arrays for the figures.

  Args:
    model, variables: trained.
    table: features of the dataset.
    dataset: with its splits.
    config: the experiment's.
    learned: from `learn_prior`, if it is there already.

  Returns:
    (results, arrays). `seen` and `unseen` are on unseen items; `grid` has all
    four quarters.
  """
  placed = place(model, variables, table)
  seen = seen_log_weights(model, variables, placed, dataset)
  rule = model.evaluation_rule

  def score_seen(log_w, where):
    queries = dataset.seen[where]
    return np.asarray(score(model, variables, placed, log_w, queries, rule))

  prior, summary = learned or learn_prior(
    model, variables, placed, dataset, config.adaptation
  )
  unseen, adapted, diagnostics = evaluate_unseen(
    model, variables, placed, dataset, prior, config
  )
  linear, (ridge, gradient) = homogeneous_logits(table, dataset)

  seen_logits = {where: score_seen(seen, where) for where in dataset.seen}
  seen_grid = {
    where: evaluate_logits(z, labels(dataset.seen[where]))
    for where, z in seen_logits.items()
  }
  unseen_grid = {
    where: {
      str(n): evaluate_logits(z, labels(dataset.unseen[where]))
      for n, z in by_n.items()
    }
    for where, by_n in unseen.items()
  }
  groups = dataset.truth.group
  weights = np.exp(np.asarray(seen, np.float64))
  results = {
    'seen': seen_grid[UNSEEN_ITEMS],
    'unseen': unseen_grid[UNSEEN_ITEMS],
    **recovery.cluster_recovery(
      weights,
      None if groups is None else groups[: dataset.num_users],
      config.seed,
    ),
    'num_prototypes': model.num_prototypes,
    'given_splits': dataset.given_splits,
    'sizes': {
      'seen_users': dataset.num_users,
      'unseen_users': len(dataset.unseen_user_ids),
      'train_comparisons': int(np.sum(dataset.train.mask)),
    },
    'grid': {'seen_users': seen_grid, 'unseen_users': unseen_grid},
    'intervals': _intervals(seen_logits, unseen, dataset, config.seed),
    'controls': {
      'homogeneous_seen': evaluate_logits(
        linear(dataset.seen[UNSEEN_ITEMS]), labels(dataset.seen[UNSEEN_ITEMS])
      ),
      'homogeneous_unseen': evaluate_logits(
        linear(dataset.unseen[UNSEEN_ITEMS]),
        labels(dataset.unseen[UNSEEN_ITEMS]),
      ),
      **length_controls(dataset),
      'homogeneous_ridge': ridge,
      'homogeneous_gradient': gradient,
      'swapped_users': evaluate_logits(
        score_seen(_swap(seen, config.seed), UNSEEN_ITEMS),
        labels(dataset.seen[UNSEEN_ITEMS]),
      ),
    },
    'adaptation': {**summary, **diagnostics},
    # People's own labels: how noisy they are is not known.
    'noise': None
    if 'label_noise' not in config.data
    else _noise(config, model, variables, placed, dataset, seen, seen_logits),
    'population': np.exp(np.asarray(prior.log_weights, np.float64)).tolist(),
    'recovery': _planted(model, variables, table, placed, seen, dataset),
    'bayes_accuracy': None
    if dataset.truth.bayes_accuracy is None
    else {
      n: dataset.truth.bayes_accuracy[int(n)] for n in unseen_grid[UNSEEN_ITEMS]
    },
  }
  arrays = _arrays(model, variables, placed, weights, adapted, dataset)
  return results, arrays


def other_users(rng: np.random.Generator, number: int) -> np.ndarray:
  """[number] the row of another user for each, a cycle in random order."""
  order = rng.permutation(number)
  other = np.empty(number, np.int64)
  other[order] = np.roll(order, 1)
  return other


def _swap(log_w: jax.Array, seed: int) -> jax.Array:
  """Every user gets the weights of another one, drawn at random."""
  return log_w[other_users(np.random.default_rng([seed, 2]), len(log_w))]


def _intervals(seen_logits, unseen, dataset, seed) -> dict:
  """95% bootstrap intervals over users of the mean accuracy of a user."""
  return {
    'seen': bootstrap_interval(
      user_accuracies(
        seen_logits[UNSEEN_ITEMS], labels(dataset.seen[UNSEEN_ITEMS])
      ),
      seed,
    ),
    'unseen': {
      str(n): bootstrap_interval(
        user_accuracies(z, labels(dataset.unseen[UNSEEN_ITEMS])), seed
      )
      for n, z in unseen[UNSEEN_ITEMS].items()
    },
  }


def _noise(config, model, variables, placed, dataset, seen, seen_logits):
  """How label noise bounds what can be measured.

  Training labels are flipped with probability e, test labels are clean.
  Against noisy labels nobody passes 1 - e; the expected metrics against noisy
  test labels follow from soft labels, exactly.
  """
  noise = float(config.data.get('label_noise', 0.0))
  # Each comparison as a user of its own: nothing is padded.
  train = dataset.train[np.asarray(dataset.train.mask)]
  logit = np.asarray(
    score(
      model,
      variables,
      placed,
      seen[train.user],
      train[:, None],
      model.evaluation_rule,
    )
  )
  fit = evaluate_logits(logit.T, train.label[None])
  clean = labels(dataset.seen[UNSEEN_ITEMS])
  soft = clean * (1 - noise) + (1 - clean) * noise
  noisy = evaluate_logits(seen_logits[UNSEEN_ITEMS], soft)
  accuracy = evaluate_logits(seen_logits[UNSEEN_ITEMS], clean)['accuracy']
  return {
    'label_noise': noise,
    'ceiling': 1.0 - noise,
    'train_accuracy': fit['accuracy'],
    'train_nll': fit['nll'],
    'noisy_accuracy': accuracy * (1 - noise) + (1 - accuracy) * noise,
    'noisy_nll': noisy['nll'],
    'noisy_ece': noisy['ece'],
  }


def _user_points(model, variables, placed, weights):
  """Ideal points [U, P] at the first prompt, and the vertices [K, P]."""
  basis = placed.basis if placed.basis.ndim == 2 else placed.basis[0]
  if model.evaluation_rule == 'argmax':
    weights = np.eye(weights.shape[1])[np.argmax(weights, axis=-1)]
  points = model.apply(
    variables, jnp.asarray(weights, jnp.float32), basis, method='ideal_points'
  )
  vertices = model.apply(variables, basis, method='finish')
  return np.asarray(points), np.asarray(vertices)


def _planted(model, variables, table, placed, seen, dataset) -> dict:
  """What a simulation identifies (METHOD section 4), where it is known."""
  truth = dataset.truth
  if truth.ideal_points is None:
    return {}
  weights = np.exp(np.asarray(seen, np.float64))
  points, vertices = _user_points(model, variables, placed, weights)
  planted = truth.ideal_points[: dataset.num_users]
  test = dataset.item_split == 2
  reward = PREFERENCES[model.preference](
    placed.x[test][None], jnp.asarray(points)[:, None]
  )
  items = np.asarray(table.items[np.flatnonzero(test)])
  utility = -np.sum((items[None] - planted[:, None]) ** 2, axis=-1)
  out = {
    'rank_correlation': recovery.rank_correlation(np.asarray(reward), utility)
  }
  if model.projector == 'identity' and points.shape == planted.shape:
    out['ideal_point_error'] = recovery.relative_error(points, planted)
    if len(vertices) == len(truth.prototypes):
      out['prototype_error'] = recovery.matched_error(
        vertices, truth.prototypes
      )
  return out


def _arrays(model, variables, placed, weights, adapted, dataset):
  """For figures: weights, and the preference space."""
  points, vertices = _user_points(model, variables, placed, weights)
  group = dataset.truth.group
  # All of them, unless that would be gigabytes for a picture.
  number = len(dataset.item_split)
  shown = np.linspace(0, number - 1, min(number, _SHOWN_ITEMS)).astype(int)
  names, item_group = np.unique(
    np.array(dataset.item_groups), return_inverse=True
  )
  return {
    'weights': weights,
    'unseen_weights': np.exp(np.asarray(adapted, np.float64)),
    'group': np.full(len(dataset.user_ids), -1)
    if group is None
    else group[: dataset.num_users],
    'unseen_group': np.full(len(dataset.unseen_user_ids), -1)
    if group is None
    else group[dataset.num_users :],
    'items': np.asarray(placed.x[shown]),
    'item_group': item_group[shown],
    'item_group_names': names,
    'item_split': dataset.item_split[shown],
    'user_points': points,
    'prototypes': vertices,
    'notes': np.array(dataset.notes),
  }


__all__ = ['SEEN_ITEMS', 'UNSEEN_ITEMS', 'evaluate', 'group_by_user']
