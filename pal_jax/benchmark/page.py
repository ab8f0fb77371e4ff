"""Tables and the report of a benchmark, from its cells."""

import dataclasses

import numpy as np

from pal_jax.benchmark.cell import CONTROLS
from pal_jax.benchmark.intervals import person_weights, ratio_of_sums
from pal_jax.benchmark.summary import (
  Clusters,
  Finished,
  clusters,
  paired,
  people,
  pooled,
)
from pal_jax.errors import InputError

PAL = ('pal_a', 'pal_b')
METRICS = {'user_accuracy': 'accuracy', 'nll': 'NLL'}
# Whether a larger value is better.
SIGN = {'user_accuracy': 1.0, 'nll': -1.0}


@dataclasses.dataclass(frozen=True)
class Scores:
  """One dataset: every method's pooled metrics, all on the same users."""

  dataset: str
  counts: list[int]
  seeds: list[int]
  weights: np.ndarray  # [draws, U]
  who: Clusters  # of C comparisons
  # {metric: {method: [(total [C], count [C]) by n]}}
  values: dict[str, dict[str, list]]
  cells: dict[str, list[Finished]]  # by method, in the order of the seeds

  def mean(self, metric: str, method: str, i: int):
    """(mean, low, high) over all seeds' users, people drawn."""
    users = self.weights.shape[1]
    sums = (
      np.bincount(self.who.row, x, minlength=users)
      for x in self.values[metric][method][i]
    )
    return ratio_of_sums(*sums, self.weights)

  def difference(self, metric: str, a: str, b: str, i: int):
    """(mean, low, high) of a - b, people and items counted."""
    values = self.values[metric]
    return paired(values[a][i], values[b][i], self.who)

  def verdict(self, metric: str, a: str, b: str, i: int) -> str:
    """'win', 'tie' or 'loss' of a against b by the paired 95% interval."""
    _, low, high = self.difference(metric, a, b, i)
    if not np.isfinite([low, high]).all() or low <= 0 <= high:
      return 'tie'
    return 'win' if (low > 0) == (SIGN[metric] > 0) else 'loss'

  def best(self, metric: str, i: int) -> str:
    """The method with the best mean."""

    def value(method):
      total, count = self.values[metric][method][i]
      return SIGN[metric] * total.sum() / count.sum()

    return max(self.values[metric], key=value)


def score(dataset: str, cells: list[Finished]) -> Scores:
  """Pools the cells of one dataset; seeds that a method lacks are left out."""
  by_method: dict[str, dict[int, Finished]] = {}
  for cell in cells:
    by_method.setdefault(cell.method, {})[cell.seed] = cell
  seeds = sorted(set.intersection(*(set(c) for c in by_method.values())))
  if not seeds:
    raise InputError(
      f'{dataset}: no seed has been run with every method; run more, or name '
      'fewer methods'
    )
  ordered = {m: [c[s] for s in seeds] for m, c in by_method.items()}
  first = next(iter(ordered.values()))
  for method, mine in ordered.items():
    for a, b in zip(first, mine, strict=True):
      if a.meta['unseen_users'] != b.meta['unseen_users']:
        raise ValueError(f'{dataset}: {method} has other users than the rest')
  counts = sorted(
    set.intersection(*(set(c.arrays['num_support'].tolist()) for c in first))
  )
  values = {
    metric: {
      method: [pooled(mine, n, metric) for n in counts]
      for method, mine in ordered.items()
    }
    for metric in METRICS
  }
  weights = person_weights(people(first))
  return Scores(
    dataset, counts, seeds, weights, clusters(first), values, ordered
  )


def dataset_table(scores: Scores, command: str) -> str:
  """Markdown: accuracy and NLL by n, the best in bold where it is clear."""
  lines = [
    f'# {scores.dataset}',
    '',
    f'Unseen users, unseen items, seeds {", ".join(map(str, scores.seeds))}: '
    'mean [95% bootstrap interval over people]. **Bold**: better than every '
    'other method by the paired interval over people and items; †: not told '
    'from the best. n comparisons of each new user were known.',
    '',
    f'    {command}',
    '',
  ]
  for metric, title in METRICS.items():
    lines += [
      f'## {title}',
      '',
      _row('method', *(f'n = {n}' for n in scores.counts)),
    ]
    lines.append(_row('---', *('---:' for _ in scores.counts)))
    marks = [_marks(scores, metric, i) for i in range(len(scores.counts))]
    for method in scores.values[metric]:
      cells = []
      for i in range(len(scores.counts)):
        mean, low, high = scores.mean(metric, method, i)
        text = f'{mean:.3f}'
        text = {'best': f'**{text}**', 'tied': f'{text}†'}.get(
          marks[i].get(method), text
        )
        cells.append(f'{text} [{low:.3f}, {high:.3f}]')
      lines.append(_row(method, *cells))
    lines.append('')
  return '\n'.join(lines)


def _marks(scores: Scores, metric: str, i: int) -> dict[str, str]:
  best = scores.best(metric, i)
  tied = [
    m
    for m in scores.values[metric]
    if m != best and scores.verdict(metric, best, m, i) == 'tie'
  ]
  if not tied:
    return {best: 'best'}
  return dict.fromkeys([best, *tied], 'tied')


def _row(*cells) -> str:
  return '| ' + ' | '.join(cells) + ' |'


def choose_pal(tuned: dict[str, dict]) -> str | None:
  """PAL-A or PAL-B, by validation users' NLL; None if neither was run.

  Args:
    tuned: {method: {'nll': [...], 'index': int}} of one dataset.
  """
  known = {m: t['nll'][t['index']] for m, t in tuned.items() if m in PAL}
  return min(known, key=known.get) if known else None


def verdicts(scores: Scores, pal: str) -> list[str]:
  """Sentences: where PAL wins, ties and loses."""
  out = []
  others = [m for m in scores.values['nll'] if m not in PAL and m != 'random']
  for metric, title in METRICS.items():
    found = {'win': [], 'tie': [], 'loss': []}
    for other in others:
      by_n: dict[str, list[int]] = {'win': [], 'tie': [], 'loss': []}
      for i, n in enumerate(scores.counts):
        by_n[scores.verdict(metric, pal, other, i)].append(n)
      for verdict, ns in by_n.items():
        if ns:
          every = len(ns) == len(scores.counts)
          where = 'all n' if every else 'n = ' + ', '.join(map(str, ns))
          found[verdict].append(f'{other} ({where})')
    names = {'win': 'wins against', 'tie': 'ties with', 'loss': 'loses to'}
    for verdict, listed in found.items():
      text = '; '.join(listed) if listed else 'none'
      out.append(f'- {title}: {names[verdict]} {text}.')
  return out


def totals(all_scores: list[Scores], chosen: dict[str, str]) -> list[str]:
  """A table: PAL against each method, over datasets and n."""
  methods = list(
    dict.fromkeys(
      m for s in all_scores for m in s.values['nll'] if m not in PAL
    )
  )
  lines = [
    _row(
      'against',
      'accuracy: wins',
      'ties',
      'losses',
      'NLL: wins',
      'ties',
      'losses',
    ),
    _row('---', *['---:'] * 6),
  ]
  for method in methods:
    counts = []
    for metric in METRICS:
      each = [
        s.verdict(metric, chosen[s.dataset], method, i)
        for s in all_scores
        if chosen.get(s.dataset) and method in s.values[metric]
        for i in range(len(s.counts))
      ]
      counts += [each.count(v) for v in ('win', 'tie', 'loss')]
    lines.append(_row(method, *map(str, counts)))
  return lines


def _by_seed(rows: list[dict]) -> dict[tuple, list[float]]:
  """{(method, metric, n): means of the seeds}."""
  values: dict[tuple, list[float]] = {}
  for row in rows:
    key = row['method'], row['metric'], row['n']
    values.setdefault(key, []).append(row['mean'])
  return values


def grid_table(rows: list[dict]) -> list[str]:
  """Accuracy in the four quarters of seen and unseen users and items.

  Args:
    rows: of one dataset, of `cell_rows`. Unseen users have the largest n.
  """
  largest = max(r['n'] for r in rows if r['n'] is not None)
  quarters = {
    f'{who} users, {where} items': (
      f'accuracy at {who}_users, {where}_items',
      largest if who == 'unseen' else None,
    )
    for who in ('seen', 'unseen')
    for where in ('seen', 'unseen')
  }
  # What the rows call accuracy, without more.
  quarters['unseen users, unseen items'] = ('accuracy', largest)
  values = _by_seed(rows)
  lines = [_row('method', *quarters), _row('---', *['---:'] * len(quarters))]
  for method in dict.fromkeys(r['method'] for r in rows):
    found = [values.get((method, *place)) for place in quarters.values()]
    lines.append(
      _row(
        method,
        *(f'{np.mean(x):.3f} ± {np.std(x):.3f}' if x else '' for x in found),
      )
    )
  return lines


def control_table(rows: list[dict]) -> list[str]:
  """What is left of each method's accuracy under each control.

  Args:
    rows: of one dataset, of `cell_rows`.
  """
  largest = max(r['n'] for r in rows if r['n'] is not None)

  values = _by_seed(rows)

  def mean(*key):
    return f'{np.mean(values[key]):.3f}' if key in values else ''

  lines = [
    _row(
      'method',
      f'n = {largest}',
      'no adaptation',
      *(name.replace('_', ' ') for name in CONTROLS),
      'majority',
      'minority',
    ),
    _row('---', *['---:'] * 7),
  ]
  for method in dict.fromkeys(r['method'] for r in rows):
    lines.append(
      _row(
        method,
        mean(method, 'user_accuracy', largest),
        mean(method, 'user_accuracy', 0),
        *(mean(method, f'user_accuracy, {name}', largest) for name in CONTROLS),
        mean(method, 'majority_accuracy', largest),
        mean(method, 'minority_accuracy', largest),
      )
    )
  return lines
