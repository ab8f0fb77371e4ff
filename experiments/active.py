"""Which comparison to ask next: BALD, D-optimality, uncertainty, random.

  python -m experiments.active

Simulated users answer one question after another, each chosen from their own
pool of pairs; accuracy is measured on unseen items after every answer. Planted
simulations, the Persona data with users who mix personas, and homogeneous
data, on which nothing can be learned about a user. Writes results.json,
table.md and a figure to results/active. With real statements:

  python -m experiments.active --out=FOLDER --data_path=FOLDER \
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

from configs import few_shot, simulation
from pal_jax import adaptation, cli
from pal_jax.adaptation.queries import STRATEGIES, simulate_questions
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.evaluate import labels, learn_prior
from pal_jax.metrics import bootstrap_interval, user_accuracies
from pal_jax.sweep import create_experiments, train_runs, with_seed
from pal_jax.writer import write_json, write_text

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

_OUT = flags.DEFINE_string('out', 'results/active', 'Folder.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Number of seeds.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 20, 'Questions.', lower_bound=1)
_PATH = flags.DEFINE_string('data_path', '', 'Folder with persona/*.jsonl.')
_BEHAVIORS = flags.DEFINE_list('behaviors', [], 'Names of behaviours.')

REPEATS = 5  # of each user, with other random numbers
# Where a curve is flat, a hundredth of a point decides when it is "reached";
# the number of answers to within this is shown beside the strict one.
MARGIN = 0.002
# `homogeneous` has one planted prototype, and a model with four.
SETTINGS = (
  'simulation, partition',
  'simulation, mixture',
  'persona, mixture',
  'simulation, homogeneous',
)
TITLES = {
  'bald': 'BALD',
  'd_optimality': 'D-optimality',
  'uncertainty': 'uncertainty',
  'random': 'random',
}


def make_config(setting: str):
  family, kind = setting.split(', ')
  if family == 'persona':
    config = few_shot.get_config(kind)
    with config.unlocked():
      config.data.path = _PATH.value
      if _BEHAVIORS.value:
        config.data.behaviors = tuple(_BEHAVIORS.value)
  else:
    config = simulation.get_config(
      'mixture' if kind == 'mixture' else 'partition'
    )
  with config.unlocked():
    config.data.unseen_support = 100  # the pool
    config.data.unseen_query = 100
    config.data.num_unseen_users = 200
    config.train.population_rate = 0.05
    if kind == 'homogeneous':
      config.data.num_personas = 1
  return config


def run_seed(experiment, variables, seed: int, steps: int) -> dict:
  """{strategy: accuracy [V, steps + 1]} of one seed's unseen users."""
  model, dataset = experiment.model, experiment.dataset
  rule = model.adaptation_rule
  placed = adaptation.place(model, variables, experiment.table)
  prior, _ = learn_prior(
    model, variables, placed, dataset, experiment.config.adaptation
  )
  queries = dataset.unseen[UNSEEN_ITEMS]

  def at_atoms(comparisons):
    stats = adaptation.statistics(model, variables, placed, comparisons, rule)
    return adaptation.atom_logits(
      model, variables, rule, prior.log_atoms, stats
    )

  pool, query = at_atoms(dataset.support), at_atoms(queries)
  curves = {}
  for strategy in STRATEGIES:
    accuracies = []
    for repeat in range(REPEATS):
      _, logits = simulate_questions(
        strategy,
        prior,
        pool,
        jnp.asarray(dataset.support.label),
        query,
        steps,
        jax.random.key(1000 * seed + repeat),
      )
      accuracies.append(
        [user_accuracies(z, labels(queries)) for z in np.asarray(logits)]
      )
    curves[strategy] = np.mean(accuracies, 0).T
  return curves


def run_setting(setting: str, num_seeds: int, steps: int) -> dict:
  """{strategy: accuracy [users of all seeds, steps + 1]}."""
  config = make_config(setting)
  experiments = create_experiments(
    [with_seed(config, seed) for seed in range(num_seeds)]
  )
  with tqdm(total=config.train.num_steps, desc=f'{setting}: train') as bar:
    runs = train_runs(experiments, lambda s, *_: bar.update(s - bar.n))
  seeds = [
    run_seed(experiment, run.variables, seed, steps)
    for seed, (experiment, run) in enumerate(
      zip(experiments, runs, strict=True)
    )
  ]
  return {s: np.concatenate([c[s] for c in seeds]) for s in STRATEGIES}


def questions_needed(curve: np.ndarray, target: float) -> int:
  """First n whose accuracy reaches the target; one more than there are if
  none does. `curve` is [steps + 1]."""
  reached = curve >= target
  return int(np.argmax(reached)) if reached.any() else len(curve)


def summarise(setting: str, curves: dict, seed: int = 0) -> list[dict]:
  """Questions that each strategy needs for random's last accuracy.

  Intervals resample users, the same for all strategies; the target is
  computed anew in each resample, so `saved` is paired.
  """
  rng = np.random.default_rng([seed, 4])
  users, width = curves['random'].shape
  draws = rng.integers(0, users, (1000, users))
  rows = []
  for strategy in STRATEGIES:

    def needed(draw, margin, curve=curves[strategy]):
      # The same sum as the curve's: rounding must not make random miss itself.
      target = curves['random'][draw].mean(0)[-1] - margin
      return questions_needed(curve[draw].mean(0), target)

    def interval(margin, needed=needed):
      each = [needed(draw, margin) for draw in draws]
      return np.percentile(each, [2.5, 97.5]).tolist()

    gap = curves[strategy] - curves['random']
    everybody = np.arange(users)
    rows.append(
      {
        'setting': setting,
        'strategy': strategy,
        'needed': needed(everybody, 0.0),
        'needed_interval': interval(0.0),
        'needed_within_margin': needed(everybody, MARGIN),
        'needed_within_margin_interval': interval(MARGIN),
        'random_steps': width - 1,
        'accuracy': curves[strategy].mean(0).tolist(),
        # Paired differences of accuracy to random after each question.
        'minus_random': [
          {'mean': g.mean(), 'interval': bootstrap_interval(g, seed)}
          for g in gap.T
        ],
      }
    )
  return rows


def render(rows: list[dict], command: str, num_seeds: int, steps: int) -> str:
  shown = [n for n in (0, 1, 2, 4, 8, 12, steps) if n <= steps]
  lines = [
    '# Which comparison to ask next',
    '',
    f'Simulated users answer {steps} questions from their own pools of 100 '
    f'pairs; {num_seeds} seeds, 200 unseen users each. Accuracy on unseen '
    "items after n answers, and the number of answers after which random's "
    f'accuracy at n = {steps} is reached ({steps + 1}: never), strictly and to '
    f'within {MARGIN:g}. Brackets: 95% intervals by bootstrap over users, '
    'paired for differences.',
    '',
    '| setting | strategy | '
    + ' | '.join(f'n = {n}' for n in shown)
    + f' | answers needed | to within {MARGIN:g} '
    f'| minus random at n = {min(5, steps)} |',
    '|---|---|' + '---|' * (len(shown) + 3),
  ]
  for row in rows:
    gap = row['minus_random'][min(5, steps)]
    low, high = gap['interval']
    cells = [f'{row["accuracy"][n]:.3f}' for n in shown]
    lines.append(
      f'| {row["setting"]} | {TITLES[row["strategy"]]} | '
      + ' | '.join(cells)
      + f' | {_count(row, "needed")} | {_count(row, "needed_within_margin")} '
      f'| {gap["mean"]:+.3f} [{low:+.3f}, {high:+.3f}] |'
    )
  return '\n'.join(lines) + f'\n\nMade by `{command}`.\n'


def _count(row: dict, name: str) -> str:
  low, high = row[f'{name}_interval']
  return f'{row[name]} [{low:.0f}, {high:.0f}]'


def draw(path: Path, rows: list[dict]) -> None:
  """Accuracy against the number of answers, a panel for each setting."""
  settings = list(dict.fromkeys(r['setting'] for r in rows))
  figure, axes = plt.subplots(
    1, len(settings), figsize=(4.2 * len(settings), 3.6), squeeze=False
  )
  for axis, setting in zip(axes[0], settings, strict=True):
    for row in rows:
      if row['setting'] == setting:
        axis.plot(row['accuracy'], '.-', label=TITLES[row['strategy']])
    axis.set_title(setting)
    axis.set_xlabel('answers, n')
    axis.grid(alpha=0.3)
  # Nothing is to be learned there: noise should not fill the panel.
  axes[0, -1].set_ylim(axes[0, -1].get_ylim()[0] - 0.02, 1.0)
  axes[0, 0].set_ylabel('accuracy on unseen items')
  axes[0, 0].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=130)
  plt.close(figure)


def main():
  rows = []
  for setting in SETTINGS:
    curves = run_setting(setting, _SEEDS.value, _STEPS.value)
    rows += summarise(setting, curves)
  out = Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  command = f'python -m experiments.active {shlex.join(sys.argv[1:])}'.strip()
  text = render(rows, command, _SEEDS.value, _STEPS.value)
  write_text(out / 'table.md', text)
  draw(out / 'active.png', rows)
  write_json(out / 'results.json', {'command': command, 'rows': rows})
  print(text)


if __name__ == '__main__':
  cli.run(main)
