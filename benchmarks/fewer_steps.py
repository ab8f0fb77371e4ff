"""Steps and seconds to a validation likelihood: joint Adam and what is faster.

  python -m benchmarks.fewer_steps --out=results/benchmarks/fewer_steps.json

with --persona=FOLDER (that has persona/*.jsonl) and --polis=FOLDER also on the
published statements and on votes; without them on the corpus that ships here
and on simulations. Variants, side by side in one process:

- `joint`: the config as it stands, all by Adam;
- `joint_spectral`: the same, users start in spectral clusters;
- `raised_spectral`: that at three times the rates of projectors and
  temperatures (configs/fewer_steps.py:raise_rates);
- `raised_spectral_solved`: that, and all users' weights are solved for every
  ten steps;
- `short`: configs/fewer_steps.py:shorten, a third of the steps, higher rates;
- `short_spectral`: that from spectral clusters (configs/fewer_steps.py);
- `short_solved`: `short`, all users' weights solved for every ten steps;
- `short_spectral_solved`: both;
- `short_spectral_frozen`: the same, nothing else moves the users.

The target of a dataset and seed is fixed by a rule: 1.02 times the lowest
validation NLL that `joint` reaches in all of its steps. Nothing of the test
sets is read. Every run is validated after equal numbers of steps (every 10 to
100, then every 25), which is not timed. Seconds are those of the start, of
steps and of solves; `seconds` has the compilation of both in it,
`warm_seconds` has not: before its clock each is called once and thrown away.

The JSON is a list of rows {dataset, variant, seeds, reached, and median and
range over seeds of steps, seconds, warm_seconds, best_nll, best_step}; where a
seed does not reach the target it counts as infinite (null). A page and the
curves stand beside it, in files of the same name.
"""

import dataclasses
import math
import os
import shlex
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks.timing import describe_devices
from configs import base, fewer_steps, persona, polis, simulation
from pal_jax import cli, parallel, stepping
from pal_jax import train as training
from pal_jax.writer import write_json, write_text

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_PERSONA = flags.DEFINE_string('persona', '', 'Folder of persona/*.jsonl.')
_POLIS = flags.DEFINE_string('polis', '', 'Folder of Polis conversations.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Of training.', lower_bound=1)
_ONLY = flags.DEFINE_list('only', [], 'Datasets; all that there are if empty.')

BEHAVIORS = (
  'politically-liberal',
  'politically-conservative',
  'subscribes-to-Atheism',
  'subscribes-to-Christianity',
)
MARGIN = 1.02  # of the NLL that joint Adam ends with


def _persona(mixture: float):
  config = persona.get_config()
  with config.unlocked():
    config.data.mixture = mixture
    if _PERSONA.value:
      config.data.path = _PERSONA.value
      config.data.behaviors = BEHAVIORS
  return config


def _polis():
  config = base.get_config()  # configs/polis.py is shortened already
  config.data = polis.get_config().data
  config.data.path = _POLIS.value
  return config


DATASETS = {
  'persona_partition': lambda: _persona(0.0),
  'persona_mixture': lambda: _persona(1.0),
  'polis': _polis,
  'simulation_partition': simulation.get_config,
  'simulation_mixture': lambda: simulation.get_config('mixture'),
}


def _raised_spectral(config):
  return fewer_steps.begin_in_clusters(fewer_steps.raise_rates(config))


def _short_solved(config):
  return fewer_steps.solve(fewer_steps.shorten(config))


VARIANTS = {
  'joint': lambda config: config,
  'joint_spectral': fewer_steps.begin_in_clusters,
  'raised_spectral': _raised_spectral,
  'raised_spectral_solved': lambda config: fewer_steps.solve(
    _raised_spectral(config)
  ),
  'short': fewer_steps.shorten,
  'short_spectral': lambda config: fewer_steps.begin_in_clusters(
    fewer_steps.shorten(config)
  ),
  'short_solved': _short_solved,
  'short_spectral_solved': lambda config: fewer_steps.begin_in_clusters(
    _short_solved(config)
  ),
  'short_spectral_frozen': lambda config: fewer_steps.begin_in_clusters(
    fewer_steps.solve(fewer_steps.shorten(config), freeze=True)
  ),
}


@dataclasses.dataclass(frozen=True)
class Point:
  """A look at the validation set."""

  step: int
  warm_seconds: float  # of the start, steps and solves before it
  seconds: float  # and of their compilation
  nll: float
  accuracy: float


def validates(step: int, last: int) -> bool:
  every = 10 if step <= 100 else 25
  return training.due(step, every, last)


def train_curve(experiment) -> list[Point]:
  """Trains to the end of the schedule, with a look now and then."""
  begin = time.perf_counter()
  first, take = training.begin(experiment)
  first = parallel.fetch(first)  # a step is given its state: one for each use
  used, metrics = take(take.place(first), 0)
  if experiment.config.train.user_solver != 'adam':
    used = take.solve(used)
  jax.block_until_ready((used, metrics))
  cold = time.perf_counter() - begin
  begin = time.perf_counter()
  jax.block_until_ready(stepping.start_users(experiment, first.params))
  warm = time.perf_counter() - begin
  curve = []
  last = experiment.config.train.num_steps
  state = take.place(first)
  begin = time.perf_counter()
  for step in range(last):
    state, metrics = take(state, step)
    if not validates(step + 1, last):
      if step % 2:  # not too many in flight; a read a step costs little
        float(metrics.loss)
      continue
    jax.block_until_ready(state)
    spent = time.perf_counter() - begin
    warm, cold = warm + spent, cold + spent
    found = training.validate(experiment, take.variables(take.whole(state)))
    curve.append(Point(step + 1, warm, cold, found['nll'], found['accuracy']))
    begin = time.perf_counter()
  return curve


def best(curve) -> Point:
  return min(curve, key=lambda point: point.nll)


def reach(curve, target: float) -> Point | None:
  """The first look at or below the target."""
  return next((point for point in curve if point.nll <= target), None)


def _spread(values) -> dict[str, float | None]:
  """Median and range; a value that is not finite is written as null."""
  found = {
    'median': float(np.median(values)),
    'low': float(np.min(values)),
    'high': float(np.max(values)),
  }
  return {k: v if math.isfinite(v) else None for k, v in found.items()}


def summarise(dataset: str, variant: str, curves, targets) -> dict:
  hits = [
    reach(curve, target) for curve, target in zip(curves, targets, strict=True)
  ]

  def of_hits(name):
    return _spread(
      [math.inf if hit is None else getattr(hit, name) for hit in hits]
    )

  bests = [best(curve) for curve in curves]
  return {
    'dataset': dataset,
    'variant': variant,
    'seeds': len(curves),
    'reached': sum(hit is not None for hit in hits),
    'target_nll': _spread(targets),
    'steps': of_hits('step'),
    'seconds': of_hits('seconds'),
    'warm_seconds': of_hits('warm_seconds'),
    'best_nll': _spread([point.nll for point in bests]),
    'best_step': _spread([point.step for point in bests]),
    'accuracy_at_best': _spread([point.accuracy for point in bests]),
    'all_warm_seconds': _spread([curve[-1].warm_seconds for curve in curves]),
  }


def measure(dataset: str, seeds: int) -> dict[str, list[list[Point]]]:
  """Curves of every variant, a list a seed; variants take turns."""
  like = None
  curves = {variant: [] for variant in VARIANTS}
  for seed in range(seeds):
    for variant, change in VARIANTS.items():
      config = change(DATASETS[dataset]().copy_and_resolve_references())
      with config.unlocked():
        config.seed = seed
      like = training.create_experiment(config, like)
      jax.clear_caches()
      curves[variant].append(train_curve(like))
      found = best(curves[variant][-1])
      print(dataset, seed, variant, found, file=sys.stderr, flush=True)
  return curves


def draw(curves: dict, targets: dict, path: Path) -> None:
  """Validation NLL over seconds, a panel a dataset, a line a seed."""
  size = len(curves)
  figure = Figure(figsize=(4.2 * size, 4.2), layout='constrained')
  panels = figure.subplots(1, size, squeeze=False)[0]
  for axes, (dataset, by_variant) in zip(panels, curves.items(), strict=True):
    for i, (variant, runs) in enumerate(by_variant.items()):
      for seed, curve in enumerate(runs):
        axes.plot(
          [point.warm_seconds for point in curve],
          [point.nll for point in curve],
          '--' if variant.startswith('joint') else '-',
          color=f'C{i}',
          label=None if seed else variant,
          linewidth=1,
        )
    axes.axhline(np.median(targets[dataset]), color='grey', linewidth=0.5)
    axes.set(
      title=dataset.replace('_', ', '),
      xscale='log',
      yscale='log',
      xlabel='seconds, compilation excluded',
    )
  panels[0].set_ylabel('validation NLL, nats')
  figure.legend(
    *panels[0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=len(VARIANTS),
    fontsize=8,
  )
  figure.savefig(path, dpi=110)


def _cell(spread: dict, digits: int) -> str:
  if spread['median'] is None:
    return 'not reached'
  high = spread['high']
  high = 'never' if high is None else f'{high:.{digits}f}'
  return f'{spread["median"]:.{digits}f} ({spread["low"]:.{digits}f}, {high})'


def render(rows: list[dict], command: str) -> str:
  """The page beside the JSON."""
  lines = [
    '# Fewer steps',
    '',
    f'{describe_devices()}, {os.cpu_count()} cores; jax {jax.__version__}. '
    f'Steps and seconds until the validation NLL of seen users is within '
    f'{MARGIN - 1:.0%} of the lowest that `joint` reaches with the same seed, '
    'and the lowest that each variant reaches: the median of '
    f'{rows[0]["seeds"]} seeds, in parentheses the lowest and highest. '
    'Validation is not timed.',
  ]
  for dataset in dict.fromkeys(row['dataset'] for row in rows):
    mine = [row for row in rows if row['dataset'] == dataset]
    lines += [
      '',
      f'## {dataset.replace("_", ", ")}',
      '',
      f'Target {_cell(mine[0]["target_nll"], 4)} nats.',
      '',
      '| variant | reached | steps | seconds | seconds with compilation | '
      'lowest NLL | its step | its accuracy | seconds of the whole schedule |',
      '|---|---|---|---|---|---|---|---|---|',
    ]
    lines += [
      f'| `{r["variant"]}` | {r["reached"]} of {r["seeds"]} '
      f'| {_cell(r["steps"], 0)} | {_cell(r["warm_seconds"], 2)} '
      f'| {_cell(r["seconds"], 1)} | {_cell(r["best_nll"], 4)} '
      f'| {_cell(r["best_step"], 0)} | {_cell(r["accuracy_at_best"], 3)} '
      f'| {_cell(r["all_warm_seconds"], 1)} |'
      for r in mine
    ]
  return '\n'.join(lines) + f'\n\nMade by `{command}`.\n'


def main() -> None:
  # Every run compiles, as the first of a machine does.
  jax.config.update('jax_enable_compilation_cache', False)
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  command = shlex.join(
    ['python', '-m', 'benchmarks.fewer_steps', *sys.argv[1:]]
  )
  rows, curves, targets = [], {}, {}
  for dataset in DATASETS:
    if dataset == 'polis' and not _POLIS.value:
      continue
    if _ONLY.value and dataset not in _ONLY.value:
      continue
    found = curves[dataset] = measure(dataset, _SEEDS.value)
    goal = targets[dataset] = [
      MARGIN * best(curve).nll for curve in found['joint']
    ]
    rows += [summarise(dataset, v, c, goal) for v, c in found.items()]
    # After each: a benchmark that is cut short keeps what it measured.
    write_json(out, rows)
    write_text(out.with_suffix('.md'), render(rows, command))
    draw(curves, targets, out.with_suffix('.png'))
  print(render(rows, command))


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  cli.run(main)
