"""From cells to rows {method, dataset, seed, n, metric, mean, low, high}."""

import dataclasses

import numpy as np
from scipy.special import expit

from pal_jax.benchmark.cell import CONTROLS, WHERE
from pal_jax.benchmark.intervals import (
  interval,
  mean_over_users,
  over_users_and_items,
  person_weights,
  ratio_of_sums,
  two_way_interval,
)
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.metrics import (
  NUM_BINS,
  negative_log_likelihood,
  pair_accuracy,
  user_accuracies,
  worst_decile,
)

TEXTS = ('persona', 'polis', 'convarg')  # data with the same items in all seeds
ITEMS_OF_A_SEED = 10**9  # more than anybody has


@dataclasses.dataclass(frozen=True)
class Finished:
  """A cell that was read back."""

  dataset: str
  method: str
  seed: int
  arrays: dict[str, np.ndarray]
  meta: dict  # 'unseen_users', 'seen_users', 'group', 'repeated_people', ...


def people(cells: list[Finished], who: str = 'unseen_users') -> np.ndarray:
  """[U] ids over all cells' users; simulated people are new in every seed."""
  return np.array(
    [
      name if cell.meta['repeated_people'] else f'{cell.seed}: {name}'
      for cell in cells
      for name in cell.meta[who]
    ]
  )


def majority(reference: Finished, label: np.ndarray) -> np.ndarray:
  """[V, Q] 1 where a user sides with one score for all, 0 against it, or NaN.

  Args:
    reference: the cell of `btl` on the same data.
    label: [V, Q].
  """
  z = reference.arrays[f'unseen/{UNSEEN_ITEMS}/logit'][0, 0]
  return pair_accuracy(z, label)


class UserSums:
  """What every metric of one cell at one n needs, by user."""

  def __init__(self, logit: np.ndarray, label: np.ndarray):
    """logit: [R, V, Q]; label: [V, Q]."""
    logit = logit.astype(float)
    # NaN for ties and padding, in every resample alike.
    self.right = pair_accuracy(logit, label[None]).mean(0)  # [V, Q]
    self.user_accuracy = user_accuracies(logit, label)  # [V]
    self.known = np.isfinite(label)
    self.count = self.known.sum(-1).astype(float)  # [V]
    nll = negative_log_likelihood(logit, label).mean(0)
    brier = np.square(expit(logit) - label).mean(0)
    self.nll = np.nansum(nll, -1)
    self.brier = np.nansum(brier, -1)
    self.decided = np.isfinite(self.right).sum(-1).astype(float)
    self.right_sum = np.nansum(self.right, -1)
    self.confidence, self.agreement = self._bins(logit, label)

  def _bins(self, logit, label):
    """[V, bins] sums of confidence, and of how often it was right."""
    p = expit(logit)
    confidence = np.maximum(p, 1 - p)
    agreement = np.where(p > 0.5, label, np.where(p < 0.5, 1 - label, 0.5))
    known = np.broadcast_to(np.isfinite(label), p.shape)
    flat = confidence[known]
    rank = np.empty(flat.size, int)
    rank[np.argsort(flat, kind='stable')] = np.arange(flat.size)
    bins = rank * NUM_BINS // max(flat.size, 1)
    user = np.nonzero(known)[1]
    shape = (label.shape[0], NUM_BINS)
    index = user * NUM_BINS + bins
    return tuple(
      np.bincount(index, x[known], minlength=shape[0] * shape[1]).reshape(shape)
      / len(logit)
      for x in (confidence, agreement)
    )

  def ece(self, weights: np.ndarray) -> tuple[float, float, float]:
    """Over all resamples together; the bins' edges stay those of all users."""
    gap = self.confidence - self.agreement

    def of(w):
      return np.abs(w @ gap).sum(-1) / (w @ self.count)

    ones = np.ones(len(gap))
    with np.errstate(invalid='ignore', divide='ignore'):
      return float(of(ones)), *interval(of(weights))


def _worst(values: np.ndarray, weights: np.ndarray):
  """Worst tenth of the users; its interval from 200 draws."""
  draws = [
    worst_decile(np.repeat(values, w.astype(int))) for w in weights[:200]
  ]
  return worst_decile(values), *interval(np.array(draws))


def metrics_of(sums: UserSums, weights: np.ndarray) -> dict:
  """{metric: (mean, low, high)} of all that need nothing else."""
  return {
    'user_accuracy': mean_over_users(sums.user_accuracy, weights),
    'accuracy': ratio_of_sums(sums.right_sum, sums.decided, weights),
    'worst_decile_accuracy': _worst(sums.user_accuracy, weights),
    'nll': ratio_of_sums(sums.nll, sums.count, weights),
    'brier': ratio_of_sums(sums.brier, sums.count, weights),
    'ece': sums.ece(weights),
  }


def cell_rows(cell: Finished, reference: Finished | None) -> list[dict]:
  """All metrics of one cell.

  Unless the metric's name says otherwise (`accuracy at seen_users,
  unseen_items`), they are of unseen users on unseen items. n is null for seen
  users, who are adapted to all they were trained on.
  """
  arrays, rows = cell.arrays, []
  head = {'method': cell.method, 'dataset': cell.dataset, 'seed': cell.seed}

  def add(n, metric, values):
    mean, low, high = values
    rows.append(
      {**head, 'n': n, 'metric': metric, 'mean': mean, 'low': low, 'high': high}
    )

  person = people([cell])
  weights = person_weights(person)
  label = arrays[f'unseen/{UNSEEN_ITEMS}/label']
  items = arrays[f'unseen/{UNSEEN_ITEMS}/items']
  group = cell.meta['group']
  side = None if reference is None else majority(reference, label)
  temperature = float(arrays.get('temperature', 1.0))
  counts = arrays['num_support'].tolist()
  for i, n in enumerate(counts):
    logit = arrays[f'unseen/{UNSEEN_ITEMS}/logit'][i]
    sums = UserSums(logit, label)
    found = metrics_of(sums, weights)
    for metric, values in found.items():
      add(n, metric, values)
    both = over_users_and_items(sums.right, person, items)
    add(n, 'accuracy, users x items', (found['accuracy'][0], *both))
    fitted = UserSums(logit / temperature, label)
    add(n, 'nll, fitted', ratio_of_sums(fitted.nll, fitted.count, weights))
    add(n, 'ece, fitted', fitted.ece(weights))
    if group is not None:
      add(n, 'worst_group_accuracy', _worst_group(sums, group, weights))
    for name, which in (('majority', 1.0), ('minority', 0.0)):
      if side is not None and (side == which).any():
        of = np.where(side == which, sums.right, np.nan)
        total, count = np.nansum(of, -1), np.isfinite(of).sum(-1)
        add(
          n,
          f'{name}_accuracy',
          ratio_of_sums(total, count.astype(float), weights),
        )
  last = counts[-1]
  for name in CONTROLS:
    accuracy = user_accuracies(arrays[f'control/{name}'], label)
    add(last, f'user_accuracy, {name}', mean_over_users(accuracy, weights))
  for who in ('unseen', 'seen'):
    for where in WHERE:
      if who == 'unseen' and where == UNSEEN_ITEMS:
        continue
      if f'{who}/{where}/logit' not in arrays:
        continue
      w = weights
      if who == 'seen':
        w = person_weights(people([cell], 'seen_users'))
      label_ = arrays[f'{who}/{where}/label']
      logits = arrays[f'{who}/{where}/logit']
      each = enumerate(counts) if who == 'unseen' else [(None, None)]
      for i, n in each:
        z = logits[None] if i is None else logits[i]
        sums = UserSums(z, label_)
        found = metrics_of(sums, w)
        for metric in ('user_accuracy', 'accuracy', 'nll'):
          add(n, f'{metric} at {who}_users, {where}', found[metric])
  return rows


def _worst_group(sums: UserSums, group, weights):
  """The group whose users are served worst, of all."""
  group = np.asarray(group)
  each = {
    g: mean_over_users(
      np.where(group == g, sums.user_accuracy, np.nan), weights
    )
    for g in np.unique(group).tolist()
  }
  return min(each.values(), key=lambda values: values[0])


@dataclasses.dataclass(frozen=True)
class Clusters:
  """Whose each comparison [C] of some cells is, and on what."""

  row: np.ndarray  # [C] of `people`
  person: np.ndarray  # [C] whole numbers
  items: np.ndarray  # [C, 2] whole numbers


def clusters(cells: list[Finished]) -> Clusters:
  """Of the queries of all cells' unseen users, padding among them.

  Items of planted data are new in every seed.
  """
  rows, items, users = [], [], 0
  for cell in cells:
    found = cell.arrays[f'unseen/{UNSEEN_ITEMS}/items'].astype(np.int64)
    rows.append(users + np.repeat(np.arange(len(found)), found.shape[1]))
    users += len(found)
    if cell.meta['data']['name'] not in TEXTS:
      found = found + cell.seed * ITEMS_OF_A_SEED
    items.append(found.reshape(-1, 2))
  row = np.concatenate(rows)
  _, person = np.unique(people(cells), return_inverse=True)
  return Clusters(row, person[row], np.concatenate(items))


def pooled(cells: list[Finished], n: int, metric: str):
  """(total [C], count [C]) of a metric at n, over all seeds of a method.

  C as in `clusters`. `user_accuracy` is a mean over users, so that a
  comparison counts for one by the number of its user's; `nll` is a mean over
  comparisons.
  """
  total, count = [], []
  for cell in cells:
    label = cell.arrays[f'unseen/{UNSEEN_ITEMS}/label']
    # Seeds may have n at different places.
    i = cell.arrays['num_support'].tolist().index(n)
    logit = cell.arrays[f'unseen/{UNSEEN_ITEMS}/logit'][i]
    if metric == 'user_accuracy':
      each = pair_accuracy(logit.astype(float), label[None]).mean(0)
      decided = np.isfinite(each).sum(-1, keepdims=True)
      share = np.isfinite(each) / np.maximum(decided, 1)
    else:
      each = negative_log_likelihood(logit.astype(float), label).mean(0)
      share = np.isfinite(each).astype(float)
    total.append((share * np.nan_to_num(each)).ravel())
    count.append(share.ravel())
  return np.concatenate(total), np.concatenate(count)


def paired(mine, other, who: Clusters) -> tuple[float, float, float]:
  """Difference of two pooled metrics of the same comparisons.

  Returns:
    (mean, low, high), 95% over people and items.
  """
  (a, count), (b, _) = mine, other
  live = count > 0
  weight = count[live] / count.sum()
  part = (a - b)[live] / count.sum()
  mean = float(part.sum())
  centred = part - mean * weight
  return mean, *two_way_interval(
    centred, who.person[live], who.items[live], mean
  )
