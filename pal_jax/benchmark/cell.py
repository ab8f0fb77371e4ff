"""One cell of the benchmark: a method on a dataset with one seed.

What is kept are log odds, from which every table and figure follows. Nothing
is chosen here: the method comes with its hyper-parameters, and learns from
seen users alone.
"""

import dataclasses
import time

import jax
import numpy as np
from scipy.optimize import minimize_scalar

from pal_jax.data.dataset import (
  SEEN_ITEMS,
  UNSEEN_ITEMS,
  Dataset,
  check_disjoint,
)
from pal_jax.errors import InputError
from pal_jax.evaluate import labels, other_users, support_ranks
from pal_jax.methods import Method, adapt_users, make_task, predict_users
from pal_jax.metrics import negative_log_likelihood
from pal_jax.structs import Comparisons, FeatureTable

WHERE = (SEEN_ITEMS, UNSEEN_ITEMS)
# Controls at the largest n: what must be lost if answers make the difference.
CONTROLS = ('swapped_users', 'shuffled_support', 'flipped_labels')


@dataclasses.dataclass(frozen=True)
class Protocol:
  """What all methods have in common."""

  num_support: tuple[int, ...]  # n of the few-shot curve
  resamples: int = 5  # random orders of each unseen user's support


def support_sizes(dataset: Dataset, protocol: Protocol) -> list[int]:
  """The n that every unseen user can be given, 0 always among them."""
  most = int(dataset.support.mask.sum(-1).min())
  return sorted({n for n in protocol.num_support if n <= most} | {0})


def check_sets(dataset: Dataset) -> None:
  """Refuses support among queries, or tests among what is learnt from.

  Raises:
    InputError: naming both sets.
  """
  for where, queries in dataset.unseen.items():
    check_disjoint('unseen support', dataset.support, f'query {where}', queries)
  for where, queries in dataset.seen.items():
    for name, known in (
      ('train', dataset.train),
      ('validation', dataset.validation),
    ):
      check_disjoint(name, known, f'test {where}', queries)
  known = set(dataset.user_ids) & set(dataset.unseen_user_ids)
  if known:
    raise InputError(
      f'{len(known)} users are seen and unseen, the first {min(known)!r}: a '
      'user belongs to one side'
    )


def run_cell(
  method: Method,
  dataset: Dataset,
  table: FeatureTable,
  protocol: Protocol,
  seed: int,
) -> dict[str, np.ndarray]:
  """Fits, adapts unseen users to n of their comparisons, and predicts.

  Args:
    method: with its hyper-parameters.
    dataset: with its splits; sets it lacks are left out.
    table: its features.
    protocol: n and resamples.
    seed: of the fit and of the resamples, which all methods share.

  Returns:
    Arrays by name: 'num_support' [C]; for each set `where` of unseen users
    'unseen/where/logit' [C, R, V, Q], 'unseen/where/label' [V, Q] (NaN for
    padding) and 'unseen/where/items' [V, Q, 2]; for seen users, adapted to all
    they were trained on, 'seen/where/logit' [U, Q], label and items;
    'control/name' [V, Q] on unseen items; 'temperature' (); 'seconds' [2] of
    fitting and of the rest.

  Raises:
    InputError: if sets overlap or the method cannot be fitted.
  """
  check_sets(dataset)
  begin = time.perf_counter()
  task = make_task(dataset, method.view(dataset, table))
  parameters = method.fit(task, jax.random.key(seed))
  jax.block_until_ready(parameters)
  fitted = time.perf_counter()

  def states(support):
    return adapt_users(method, parameters, task.table, support)

  def predict(states, queries):
    z = predict_users(method, parameters, states, task.table, queries)
    return np.asarray(z)

  support = dataset.support
  counts = support_sizes(dataset, protocol)
  ranks = support_ranks(support.mask, protocol.resamples, seed)
  out = {'num_support': np.array(counts)}
  logits = {where: [] for where in dataset.unseen}
  for n in counts:
    # Without comparisons all orders are the same.
    used = ranks if n else ranks[:1]
    adapted = [
      states(support.replace(mask=support.mask & (rank < n))) for rank in used
    ]
    for where, queries in dataset.unseen.items():
      z = np.stack([predict(s, queries) for s in adapted])
      logits[where].append(np.broadcast_to(z, (len(ranks), *z.shape[1:])))
  for where, queries in dataset.unseen.items():
    out |= _known('unseen', where, queries, np.stack(logits[where]))
  asked = dataset.unseen[UNSEEN_ITEMS]
  largest = support.replace(mask=support.mask & (ranks[0] < counts[-1]))
  out |= _controls(states, predict, largest, asked, seed)
  if dataset.seen:
    seen = method.seen_states(parameters, task)
    for where, queries in dataset.seen.items():
      out |= _known('seen', where, queries, predict(seen, queries))
    check = task.validation
    out['temperature'] = fit_temperature(
      predict(seen, check), labels(jax.tree.map(np.asarray, check))
    )
  out['seconds'] = np.array([fitted - begin, time.perf_counter() - fitted])
  _check_finite(out)
  return out


def _known(who, where, queries: Comparisons, logit) -> dict:
  return {
    f'{who}/{where}/logit': logit.astype(np.float32),
    f'{who}/{where}/label': labels(queries).astype(np.float32),
    f'{who}/{where}/items': np.asarray(queries.items, np.int32),
  }


def _controls(states, predict, support, queries, seed) -> dict:
  """Answers that are somebody else's, anybody's, or the opposite."""
  rng = np.random.default_rng([seed, 4])
  other = other_users(rng, support.label.shape[0])
  # As many answers as before, each somebody's.
  pool = support.flatten()
  live = np.flatnonzero(pool.mask)
  anybody = support
  if live.size:
    drawn = pool[rng.choice(live, support.label.shape)]
    anybody = drawn.replace(mask=support.mask, user=support.user)
  mine = states(support)
  variants = {
    'swapped_users': jax.tree.map(lambda x: x[other], mine),
    'shuffled_support': states(anybody),
    'flipped_labels': states(support.replace(label=1 - support.label)),
  }
  return {
    f'control/{name}': predict(variant, queries).astype(np.float32)
    for name, variant in variants.items()
  }


def fit_temperature(logit: np.ndarray, label: np.ndarray) -> np.ndarray:
  """() T > 0 that minimises the NLL of logit / T; 1 if nothing is known."""
  known = np.isfinite(label)
  z, y = logit[known].astype(float), label[known]
  if not known.any() or not np.any(z):
    return np.float64(1.0)
  found = minimize_scalar(
    lambda log_t: negative_log_likelihood(z * np.exp(-log_t), y).mean(),
    bounds=(-7.0, 7.0),
    method='bounded',
  )
  return np.float64(np.exp(found.x))


def _check_finite(out: dict) -> None:
  for name, x in out.items():
    if not name.endswith('label') and not np.isfinite(x).all():
      raise InputError(
        f'{name}: {int(np.sum(~np.isfinite(x)))} of {x.size} values are not '
        'finite'
      )
