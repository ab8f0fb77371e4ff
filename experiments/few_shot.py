"""The few-shot curve: this adapter against the reference's recipe.

  python -m experiments.few_shot

Trains over five seeds for users who hold one persona (partition), users who mix
them, and users with stances of their own, for whom one score for everybody does
well. Adapts the same unseen users from the same 20 resamples of their
comparisons with every method, and writes results.json, table.md and a figure
to results/few_shot. With real statements:

  python -m experiments.few_shot --out=FOLDER --data_path=FOLDER \
    --behaviors=NAME,NAME,...
"""

import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import flags
from tqdm import tqdm

from configs import few_shot
from pal_jax import adaptation, cli
from pal_jax.adaptation.reference import fit_reference
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.evaluate import (
  homogeneous_logits,
  labels,
  learn_prior,
  support_ranks,
)
from pal_jax.metrics import (
  bootstrap_interval,
  evaluate_logits,
  negative_log_likelihood,
  user_accuracies,
)
from pal_jax.sweep import create_experiments, train_runs, with_seed
from pal_jax.writer import write_json, write_text

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

_OUT = flags.DEFINE_string('out', 'results/few_shot', 'Folder.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Number of seeds.', lower_bound=1)
_PATH = flags.DEFINE_string('data_path', '', 'Folder with persona/*.jsonl.')
_BEHAVIORS = flags.DEFINE_list('behaviors', [], 'Names of behaviours.')

SETTINGS = ('partition', 'mixture', 'own')
TITLES = {
  'posterior': 'posterior (pal_jax)',
  'map': 'point estimate (pal_jax)',
  'reference_population': 'reference recipe, from the population',
  'reference': 'reference recipe, random start',
  'none': 'no adaptation (w = population)',
  'homogeneous': 'homogeneous (K = 1)',
  'bradley_terry': 'homogeneous (linear Bradley-Terry)',
}
PREVIOUS = 'previous n'
STYLES = dict(
  zip(TITLES, ('C0o-', 'C2s-', 'C1^-', 'C3v-', 'C7:', 'k--', 'k:'), strict=True)
)


def make_config(which: str):
  config = few_shot.get_config(which)
  with config.unlocked():
    config.data.path = _PATH.value
    if _BEHAVIORS.value:
      config.data.behaviors = tuple(_BEHAVIORS.value)
  return config


class Adapters:
  """Every method's log odds of one experiment's unseen users."""

  def __init__(self, experiment, variables):
    self.model, self.dataset = experiment.model, experiment.dataset
    self.config, self.table = experiment.config, experiment.table
    self.variables = variables
    placed = adaptation.place(self.model, self.variables, self.table)
    self.prior, self.summary = learn_prior(
      self.model, self.variables, placed, self.dataset, self.config.adaptation
    )

    def reduced(comparisons):
      return adaptation.statistics(
        self.model,
        self.variables,
        placed,
        comparisons,
        self.model.adaptation_rule,
      )

    self.support = reduced(self.dataset.support)
    self.query = reduced(self.dataset.unseen[UNSEEN_ITEMS])

  def logits(self, method: str, mask, key) -> np.ndarray:
    """[V, Q] after the comparisons that `mask` [V, N] leaves."""
    model, prior = self.model, self.prior
    label = jnp.asarray(self.dataset.support.label)
    if method in adaptation.METHODS:
      users = adaptation.adapt(
        model,
        self.variables,
        self.support,
        label,
        mask,
        prior,
        method=method,
      )
    else:
      population = jnp.broadcast_to(
        prior.log_weights, (len(label), model.num_prototypes)
      )
      users = _plain_state(population)
      if method != 'none':
        start_key, order_key = jax.random.split(key)
        temperature = model.apply(self.variables, method='temperature')
        start = population * temperature
        if method == 'reference':
          start = jax.random.normal(start_key, population.shape)
        users = _plain_state(
          fit_reference(
            model,
            self.variables,
            model.adaptation_rule,
            self.support,
            label,
            mask,
            start,
            order_key,
          )
        )
    return np.asarray(
      adaptation.predict_users(model, self.variables, users, self.query, prior)
    )


def _plain_state(log_weights):
  zero = jnp.zeros(log_weights.shape[:1])
  return adaptation.UserState(
    log_weights, zero, zero, zero, zero.astype(jnp.int32), zero == 0
  )


def measure(logit, label, **row) -> tuple[dict, dict]:
  """A row of results, and accuracy and NLL of each user [V]."""
  metrics = evaluate_logits(logit, label)
  stacked = np.asarray(logit).reshape((-1, *label.shape))
  users = {
    'accuracy': user_accuracies(logit, label),
    'nll': np.nanmean(negative_log_likelihood(stacked, label), (0, -1)),
  }
  low, high = bootstrap_interval(users['accuracy'], row['seed'])
  return {**row, **metrics, 'low': low, 'high': high}, users


def run_seed(which, experiment, run, single, single_run, bar):
  """Rows, and {(method, n): per-user metrics} of one seed."""
  adapters, one = (
    Adapters(experiment, run.variables),
    Adapters(single, single_run.variables),
  )
  dataset, config = experiment.dataset, experiment.config
  label = labels(dataset.unseen[UNSEEN_ITEMS])
  ranks = support_ranks(
    dataset.support.mask, config.evaluation.resamples, config.seed
  )
  linear, _ = homogeneous_logits(experiment.table, dataset)
  constant = {
    'homogeneous': one.logits('none', None, None),
    'bradley_terry': linear(dataset.unseen[UNSEEN_ITEMS]),
    'none': adapters.logits('none', None, None),
  }
  rows, users = [], {}
  for n in config.evaluation.num_support:
    for method in TITLES:
      if method in constant:
        logit = constant[method]
      else:
        logit = np.stack(
          [
            adapters.logits(
              method,
              jnp.asarray(dataset.support.mask & (rank < n)),
              jax.random.key(1000 * config.seed + r),
            )
            for r, rank in enumerate(ranks)
          ]
        )
      row, each = measure(
        logit, label, setting=which, seed=config.seed, method=method, n=n
      )
      rows.append(row)
      users[method, n] = each
      bar.update()
  return rows, users, adapters.summary


def run_setting(which: str, num_seeds: int):
  """All seeds of a setting; per-user metrics are joined over seeds."""
  config = make_config(which)
  alone = config.copy_and_resolve_references()
  with alone.unlocked():
    alone.model.num_prototypes = 1
  experiments, singles = (
    create_experiments([with_seed(c, seed) for seed in range(num_seeds)])
    for c in (config, alone)
  )
  with tqdm(total=config.train.num_steps, desc=f'{which}: train') as bar:
    runs = train_runs(experiments, lambda s, *_: bar.update(s - bar.n))
  single_runs = train_runs(singles)
  rows, users, priors = [], {}, []
  total = num_seeds * len(config.evaluation.num_support) * len(TITLES)
  with tqdm(total=total, desc=f'{which}: adapt') as bar:
    for each in zip(experiments, runs, singles, single_runs, strict=True):
      found, per_user, summary = run_seed(which, *each, bar)
      rows += found
      priors.append({'setting': which, **summary})
      for key, metrics in per_user.items():
        users.setdefault(key, []).append(metrics)
  joined = {
    key: {m: np.concatenate([p[m] for p in parts]) for m in parts[0]}
    for key, parts in users.items()
  }
  return rows, joined, priors


def compare(which, users, counts) -> list[dict]:
  """Paired differences of the posterior to every other method at the same n,
  and to itself at the n before."""
  pairs = [(n, m, (m, n)) for n in counts for m in TITLES if m != 'posterior']
  pairs += [
    (n, PREVIOUS, ('posterior', before))
    for before, n in zip(counts, counts[1:], strict=False)
  ]
  out = []
  for n, name, other in pairs:
    for metric in ('accuracy', 'nll'):
      gap = users['posterior', n][metric] - users[other][metric]
      low, high = bootstrap_interval(gap)
      out.append(
        {
          'setting': which,
          'n': n,
          'metric': metric,
          'minus': name,
          'mean': float(gap.mean()),
          'low': low,
          'high': high,
        }
      )
  return out


def render(rows, comparisons, command: str, num_seeds: int) -> str:
  counts = sorted({r['n'] for r in rows})
  parts = [
    '# Few-shot adaptation of unseen users',
    f'Mean over {num_seeds} seeds, which draw personas, users, splits and '
    'initialisation; each unseen user adapts from 20 random draws of n '
    'comparisons, the same for every method, and is measured on other '
    'statements. Brackets: 95% intervals by bootstrap over users, paired for '
    'differences.',
  ]
  for which in dict.fromkeys(r['setting'] for r in rows):
    here = [r for r in rows if r['setting'] == which]
    for metric, title in (
      ('accuracy', 'accuracy'),
      ('nll', 'NLL, nats'),
      ('ece', 'ECE'),
    ):
      parts += [f'## {which}: {title}', _metric_table(here, metric, counts)]
    parts += [
      f'## {which}: posterior minus the others',
      _difference_table(
        [c for c in comparisons if c['setting'] == which], counts
      ),
    ]
  parts.append(f'Made by `{command}`.')
  return '\n\n'.join(parts) + '\n'


def _metric_table(rows, metric, counts) -> str:
  lines = [
    '| | ' + ' | '.join(f'n = {n}' for n in counts) + ' |',
    '|---|' + '---|' * len(counts),
  ]
  for method, title in TITLES.items():
    cells = [
      np.mean([r[metric] for r in rows if (r['method'], r['n']) == (method, n)])
      for n in counts
    ]
    lines.append(f'| {title} | ' + ' | '.join(f'{c:.3f}' for c in cells) + ' |')
  return '\n'.join(lines)


def _difference_table(comparisons, counts) -> str:
  lines = [
    '| minus | metric | ' + ' | '.join(f'n = {n}' for n in counts) + ' |',
    '|---|---|' + '---|' * len(counts),
  ]
  for other, title in {**TITLES, PREVIOUS: 'posterior at the n before'}.items():
    for metric in ('accuracy', 'nll'):
      here = {
        c['n']: c
        for c in comparisons
        if (c['minus'], c['metric']) == (other, metric)
      }
      if here:
        cells = [
          f'{here[n]["mean"]:+.3f} [{here[n]["low"]:+.3f}, '
          f'{here[n]["high"]:+.3f}]'
          if n in here
          else ''
          for n in counts
        ]
        lines.append(f'| {title} | {metric} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def draw(path: Path, rows, users) -> None:
  """Accuracy and NLL against n, a column for each setting."""
  settings = list(users)
  figure, axes = plt.subplots(
    2, len(settings), figsize=(5.5 * len(settings), 7.5), squeeze=False
  )
  for column, which in enumerate(settings):
    counts = sorted({n for _, n in users[which]})
    x = np.arange(len(counts))
    for row, metric in enumerate(('accuracy', 'nll')):
      axis = axes[row, column]
      for method, title in TITLES.items():
        values = [users[which][method, n][metric] for n in counts]
        bounds = np.array([bootstrap_interval(v) for v in values])
        mean = [v.mean() for v in values]
        axis.plot(x, mean, STYLES[method], ms=4, label=title)
        axis.fill_between(
          x, *bounds.T, color=axis.lines[-1].get_color(), alpha=0.15
        )
      axis.set_xticks(x, counts)
      axis.grid(alpha=0.3)
      axis.set_ylabel('accuracy' if metric == 'accuracy' else 'NLL, nats')
      if metric == 'nll':
        axis.set_ylim(0, 1.0)
        axis.set_xlabel('comparisons of the unseen user, n')
      else:
        axis.set_title(f'users: {which}')
  axes[0, -1].legend(fontsize=7, loc='lower right')
  figure.tight_layout()
  figure.savefig(path, dpi=130)
  plt.close(figure)


def main():
  rows, comparisons, users, priors = [], [], {}, []
  for which in SETTINGS:
    found, joined, learned = run_setting(which, _SEEDS.value)
    rows += found
    users[which] = joined
    priors += learned
    comparisons += compare(which, joined, sorted({r['n'] for r in found}))
  out = Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  command = f'python -m experiments.few_shot {shlex.join(sys.argv[1:])}'.strip()
  text = render(rows, comparisons, command, _SEEDS.value)
  write_text(out / 'table.md', text)
  draw(out / 'few_shot.png', rows, users)
  write_json(
    out / 'results.json',
    {
      'command': command,
      'runs': rows,
      'comparisons': comparisons,
      'priors': priors,
    },
  )
  print(text)


if __name__ == '__main__':
  cli.run(main)
