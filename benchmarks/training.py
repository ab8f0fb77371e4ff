"""Training beside the reference's recipe and beside the counted floor.

  python -m benchmarks.training --out=results/benchmarks/training.json

On two sets of the default run's people (benchmarks/race.py), side by side in
one process:

- `jit`, `pmap`: this library's compiled step at several batch sizes;
- `reference_torch`: the reference's recipe (benchmarks/reference_torch.py) at
  its own batch size, 4, and at larger ones; only where torch is installed;
- `jit_few_shot`, `reference_torch_few_shot`: unseen users with ten answers;
  theirs one after another, as there, ours by the posterior, all in one call;
- `floor_float32`, `floor_bfloat16`: benchmarks/roofline.py.

Seconds to an accuracy are those of training from its first batch until the
validation accuracy of seen users is that; validation and the reading of data do
not count, compilation is told apart. Both sides check it after equal numbers of
comparisons. The accuracy is one that the reference reached at its own batch
size with each seed, as a mean of three checks; where its best is chance, its
runs are given up and there is no such accuracy. Comparisons per second are
those of whole steps, batches included, after the first check.

The JSON is a list of rows {method, batch_size, users, comparisons_per_second,
seconds_to_accuracy, flops_fraction, data, accuracy, seconds_compiling}:
`accuracy` is the one that the seconds lead to, compilation included;
`flops_fraction` is the counted operations a second over the measured rate of
matrix products. A page and the curves stand beside it, in files of the same
name.
"""

import dataclasses
import importlib.util
import math
import os
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks import race, reference_torch, roofline
from benchmarks.race import SIZES, People, Stopwatch
from benchmarks.timing import best_of, describe_devices, made_by, save
from pal_jax import adaptation, cli, parallel
from pal_jax import train as training
from pal_jax.data.dataset import UNSEEN_ITEMS

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Of training.', lower_bound=1)
_TARGET = flags.DEFINE_float(
  'target', 0.9, 'Validation accuracy of people who contradict each other.'
)
_LONGEST = flags.DEFINE_float(
  'longest', 120.0, 'Seconds after which a run that is not there is given up.'
)

CHANCE = 0.6  # an accuracy below it is no sign of having learnt two sides
SUPPORT = 10  # answers of an unseen user
FLOOR_SECONDS = 20.0
STYLES = {'jit': '-', 'pmap': '--', 'reference_torch': ':'}


@dataclasses.dataclass(frozen=True)
class Row:
  method: str
  batch_size: int
  users: int
  comparisons_per_second: float
  seconds_to_accuracy: float | None = None
  flops_fraction: float | None = None
  data: str = ''
  accuracy: float | None = None
  seconds_compiling: float | None = None


Curves = dict[tuple[str, int], list[Stopwatch]]


def all_people() -> list[People]:
  return [
    People('signed', 20, 8192, _TARGET.value, _LONGEST.value),
    # Both sides are there soon. (Of the items two differ too seldom for more
    # validation comparisons.) The target is out of reach: it ends no run.
    People('own', 15, 2048, 1.0, _LONGEST.value / 5),
  ]


def measure(people: People, seeds: int, with_torch: bool) -> Curves:
  curves = {}
  for size in SIZES:
    for mode in parallel.MODES:
      curves[mode, size] = race.run_ours(people, mode, size, seeds)
    if with_torch:
      theirs = race.run_theirs(people, size, seeds)
      curves['reference_torch', size] = theirs
    print(f'{people.stances}: batches of {size} are done', file=sys.stderr)
  return curves


def median_seconds(watches, accuracy: float) -> float | None:
  """None unless all of them get there."""
  seconds = [watch.seconds_to(accuracy) for watch in watches]
  return None if None in seconds else float(np.median(seconds))


def accuracy_to_reach(people: People, curves: Curves) -> float:
  """What the reference reached at its own batch size, in whole percents.

  The target, where that is chance or nothing is known of it.
  """
  watches = curves.get(('reference_torch', SIZES[0]), [])
  best = min((watch.best for watch in watches), default=0.0)
  return people.target if best < CHANCE else math.floor(100 * best) / 100


def summarise(people: People, curves: Curves) -> list[Row]:
  accuracy = accuracy_to_reach(people, curves)
  users = race.make_experiment(people, 'jit').dataset.num_users
  return [
    Row(
      method,
      size,
      users,
      float(np.median([watch.rate(size) for watch in watches])),
      median_seconds(watches, accuracy),
      data=people.stances,
      accuracy=accuracy,
      seconds_compiling=float(np.median([w.compiling for w in watches])),
    )
    for (method, size), watches in curves.items()
  ]


def few_shot(people: People, with_torch: bool):
  """Unseen users with ten answers: rows, and accuracies on unseen items."""
  experiment = race.make_experiment(people, 'jit')
  dataset, model = experiment.dataset, experiment.model
  support = dataset.support[:, :SUPPORT]
  queries = dataset.unseen[UNSEEN_ITEMS]
  users = support.label.shape[0]
  every = race.check_every(people, 256)
  watch = Stopwatch(2.0, people.longest)
  state = race.train_ours(experiment, 'jit', 256, 0, every, watch)
  variables = training.variables_of(state)
  prior, _ = training.population(experiment, variables)
  placed = adaptation.place(model, variables, experiment.table)

  @jax.jit
  def adapt(support, variables, placed, prior):
    stats = adaptation.statistics(
      model, variables, placed, support, model.adaptation_rule
    )
    return adaptation.adapt(
      model, variables, stats, support.label, support.mask, prior
    )

  seconds = best_of(lambda: adapt(support, variables, placed, prior), 5)
  fitted = adapt(support, variables, placed, prior)
  logit = adaptation.predict_users(
    model,
    variables,
    fitted,
    adaptation.statistics(
      model, variables, placed, queries, model.adaptation_rule
    ),
    prior,
  )
  right = np.mean((np.asarray(logit) > 0) == (queries.label > 0.5))
  found = [
    (Row('jit_few_shot', users, users, users * SUPPORT / seconds), right)
  ]
  if with_torch:
    watch = Stopwatch(people.target, people.longest)
    theirs = race.train_theirs(experiment, people, 256, 0, watch.stop)
    seconds, right = theirs.adapt(support, queries)
    row = Row(
      'reference_torch_few_shot',
      reference_torch.NEW_USER['batch_size'],
      users,
      users * SUPPORT / seconds,
    )
    found.append((row, right))
  return found


def draw(measured: list[tuple[People, Curves]], path: Path) -> None:
  """Validation accuracy over seconds of training, a line a seed."""
  figure = Figure(figsize=(11, 4), layout='constrained')
  panels = figure.subplots(1, len(measured), squeeze=False)[0]
  for axes, (people, curves) in zip(panels, measured, strict=True):
    for (method, size), watches in curves.items():
      for i, watch in enumerate(watches):
        _, seconds, accuracy = np.array(watch.curve).T
        axes.plot(
          seconds,
          accuracy,
          STYLES[method],
          color=f'C{SIZES.index(size)}',
          label=None if i else f'{method}, batches of {size}',
          linewidth=1,
        )
    axes.axhline(accuracy_to_reach(people, curves), color='grey', linewidth=0.5)
    axes.set(
      title=f'stances={people.stances}',
      xscale='log',
      xlabel='seconds of training, compilation included',
      ylabel='validation accuracy of seen users',
    )
  figure.legend(
    *panels[0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=len(SIZES),
    fontsize=8,
  )
  figure.savefig(path, dpi=150)


def _seconds(found: float | None) -> str:
  return 'not reached' if found is None else f'{found:.2f}'


def _times(row: Row, rows: list[Row], compiling: bool) -> str:
  """The reference's time at its own batch size over that of a row."""
  reference = next(
    (r for r in rows if (r.method, r.batch_size) == ('reference_torch', 4)),
    None,
  )
  if not reference or None in (
    row.seconds_to_accuracy,
    reference.seconds_to_accuracy,
  ):
    return ''
  mine = row.seconds_to_accuracy - (0 if compiling else row.seconds_compiling)
  return f'{reference.seconds_to_accuracy / mine:.1f}'


def render_race(rows: list[Row], curves: Curves) -> list[str]:
  return [
    f'| method | batch | comparisons/s | seconds to {rows[0].accuracy:.2f} | '
    f'of them compiling | times as fast as the reference at {SIZES[0]} | the '
    'same without compiling | best accuracy |',
    '|---|---|---|---|---|---|---|---|',
    *(
      f'| `{r.method}` | {r.batch_size} | {r.comparisons_per_second:,.0f} | '
      f'{_seconds(r.seconds_to_accuracy)} | {r.seconds_compiling:.2f} | '
      f'{_times(r, rows, True)} | {_times(r, rows, False)} | '
      f'{np.median([w.best for w in watches]):.3f} |'
      for r, watches in zip(rows, curves.values(), strict=True)
    ),
    '',
  ]


def render(races, few, floors, machine, command) -> str:
  lines = [
    '# Training',
    '',
    f'{describe_devices()}, {os.cpu_count()} cores; jax {jax.__version__}. '
    f'Matrix products {machine.flops / 1e9:.0f} GFLOP/s, '
    f'copies {machine.bandwidth / 1e9:.1f} GB/s, measured in this run.',
    '',
    'Seconds of training until the validation accuracy of seen users is there, '
    f'the median of {_SEEDS.value} seeds. Best: the highest mean of three '
    'checks.',
    '',
  ]
  for people, rows, curves in races:
    lines += [
      f'**configs/persona.py, stances={people.stances}** (a look every '
      f'{people.check_every} comparisons; given up after {people.longest:g} s, '
      'or at the end of our schedule)',
      '',
      *render_race(rows, curves),
    ]
  lines += [
    f'Unseen users with {SUPPORT} answers (signed):',
    '',
    '| method | users | users/s | accuracy on new statements |',
    '|---|---|---|---|',
    *(
      f'| `{r.method}` | {r.users} | {r.comparisons_per_second / SUPPORT:,.0f} '
      f'| {accuracy:.3f} |'
      for r, accuracy in few
    ),
    '',
    f'A step on {roofline.BATCH_SIZE} comparisons of {roofline.NUM_ITEMS:,} '
    f'items, D = {roofline.FEATURES}, P = {roofline.WIDTH}, `mlp2`, beside '
    'what its operations and bytes take at those rates:',
    '',
    '| products in | GFLOP | GB | floor, ms | measured, ms | ratio |',
    '|---|---|---|---|---|---|',
    *(
      f'| {f.compute} | {f.operations / 1e9:.1f} | {f.bytes / 1e9:.2f} | '
      f'{1e3 * f.ideal_seconds:.0f} | {1e3 * f.seconds:.0f} | '
      f'{f.seconds / f.ideal_seconds:.2f} |'
      for f in floors
    ),
    '',
    f'Made by `{command}`.',
    '',
  ]
  return '\n'.join(lines)


def main() -> None:
  # Every seed compiles, as the first run of a machine does.
  jax.config.update('jax_enable_compilation_cache', False)
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  with_torch = importlib.util.find_spec('torch') is not None
  if not with_torch:
    print('reference_torch is left out: torch is missing', file=sys.stderr)
  machine = roofline.measure_machine()
  floors = [
    roofline.measure_floor(machine, compute, FLOOR_SECONDS)
    for compute in ('float32', 'bfloat16')
  ]
  measured = [
    (people, measure(people, _SEEDS.value, with_torch))
    for people in all_people()
  ]
  few = few_shot(all_people()[0], with_torch)
  floor_rows = [
    Row(
      f'floor_{f.compute}',
      roofline.BATCH_SIZE,
      roofline.NUM_USERS,
      roofline.BATCH_SIZE / f.seconds,
      flops_fraction=f.flops_fraction,
    )
    for f in floors
  ]
  races = [(people, summarise(people, c), c) for people, c in measured]
  every = [
    *(row for _, rows, _ in races for row in rows),
    *(row for row, _ in few),
    *floor_rows,
  ]
  draw(measured, out.with_suffix('.png'))
  page = render(races, few, floors, machine, made_by('benchmarks.training'))
  save(out, [dataclasses.asdict(row) for row in every], page)


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  cli.run(main)
