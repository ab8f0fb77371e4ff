"""Training beside the reference's recipe and beside the counted floor.

  python -m benchmarks.training --out=results/benchmarks/training.json

On the default run's people and features (configs/persona.py), side by side in
one process:

- `jit`, `pmap`: this library's compiled step at several batch sizes;
- `reference_torch`: the reference's recipe (benchmarks/reference_torch.py) at
  its own batch size, 4, and at larger ones; only where torch is installed;
- `jit_few_shot`, `reference_torch_few_shot`: unseen users with ten answers;
  theirs one after another, as there, ours by the posterior, all in one call;
- `floor_float32`, `floor_bfloat16`: benchmarks/roofline.py.

Seconds to accuracy are those of training from its first batch until the
validation accuracy of seen users reaches the target: compilation included,
validation and the reading of data not. Both sides check it after equal numbers
of comparisons. Comparisons per second are those of whole steps, batches
included, after the first tenth.

The JSON is a list of rows {method, batch_size, users, comparisons_per_second,
seconds_to_accuracy, flops_fraction}; `flops_fraction` is the counted
operations a second over the measured rate of matrix products. A page and the
curves stand beside it, in files of the same name.
"""

import dataclasses
import importlib.util
import os
import shlex
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks import reference_torch, roofline
from benchmarks.timing import best_of, describe_devices
from configs import persona
from pal_jax import adaptation, cli, optimizer, parallel
from pal_jax import train as training
from pal_jax import train_step as steps
from pal_jax.data.batching import Batcher
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.shared_rows import measure_room
from pal_jax.writer import write_json, write_text

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Of training.', lower_bound=1)
_TARGET = flags.DEFINE_float('target', 0.9, 'Validation accuracy to reach.')
_LONGEST = flags.DEFINE_float(
  'longest', 120.0, 'Seconds after which a run that is not there is given up.'
)

SIZES = (4, 256, 2048)
NUM_COMPARISONS = 512_000  # of the default run: the length of our schedule
CHECK_EVERY = 8192  # comparisons
SUPPORT = 10  # answers of an unseen user
FLOOR_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Row:
  method: str
  batch_size: int
  users: int
  comparisons_per_second: float
  seconds_to_accuracy: float | None = None
  flops_fraction: float | None = None


class Stopwatch:
  """Accuracy over seconds of training, until the target or out of time."""

  def __init__(self, target: float, longest: float):
    self._target, self._longest = target, longest
    self.curve: list[tuple[int, float, float]] = []  # steps, seconds, accuracy

  def stop(self, number: int, seconds: float, accuracy: float) -> bool:
    self.curve.append((number, seconds, accuracy))
    return accuracy >= self._target or seconds > self._longest

  @property
  def reached(self) -> float | None:
    _, seconds, accuracy = self.curve[-1]
    return seconds if accuracy >= self._target else None

  def rate(self, batch_size: int) -> float:
    """Comparisons a second after the first check, which has the compiling."""
    (first, begin, _), (last, end, _) = self.curve[0], self.curve[-1]
    if last == first:
      return first * batch_size / begin
    return (last - first) * batch_size / (end - begin)


def check_every(batch_size: int) -> int:
  """Steps between two looks at the accuracy."""
  return max(1, CHECK_EVERY // batch_size)


def num_steps(batch_size: int) -> int:
  """Of our schedule: the default run's comparisons, at least 500 updates."""
  return max(NUM_COMPARISONS // batch_size, 500)


def train_ours(experiment, mode: str, batch_size: int, seed: int, watch):
  """The default recipe at a batch size; returns the state."""
  config = experiment.config
  last = num_steps(batch_size)
  state, tx = steps.create_state(
    experiment.model,
    lambda params: optimizer.create(config.optimizer, params, last),
    jax.random.key(seed),
    experiment.table,
  )
  key = jax.random.key(seed)
  spent, begin = 0.0, time.perf_counter()
  batcher = Batcher(experiment.dataset.train, batch_size, seed)
  table = parallel.place(experiment.table, mode)
  state = parallel.place(state, mode)
  run = parallel.compile_step(  # of its own: it is compiled again
    steps.bind(
      experiment.model, tx, experiment.objective, parallel.axis_name(mode)
    ),
    mode,
    room=measure_room([batcher], parallel.num_devices()),
  )
  pending = None
  for step in range(last):
    state, metrics = run(state, batcher(step), table, key)
    if pending is not None:
      float(pending.loss)  # a step late, as the loop of training does
    pending = metrics
    if (step + 1) % check_every(batch_size) == 0 or step + 1 == last:
      jax.block_until_ready(state)
      spent += time.perf_counter() - begin
      variables = training.variables_of(parallel.fetch(state))
      accuracy = training.validate(experiment, variables)['accuracy']
      if watch.stop(step + 1, spent, accuracy):
        break
      begin = time.perf_counter()
  return state


def make_experiment(mode: str):
  config = persona.get_config().copy_and_resolve_references()
  with config.unlocked():
    config.parallel = mode
  return training.create_experiment(config)


def measure_ours(mode: str, batch_size: int, seeds: int, new_watch):
  experiment = make_experiment(mode)
  watches = []
  for seed in range(seeds):
    watches.append(new_watch())
    train_ours(experiment, mode, batch_size, seed, watches[-1])
  return summarise(mode, batch_size, experiment, watches), watches


def measure_theirs(batch_size: int, seeds: int, new_watch):
  experiment = make_experiment('jit')
  dataset = experiment.dataset
  watches = []
  for seed in range(seeds):
    model = _reference(experiment, seed)
    watch = new_watch()

    def check(number, seconds, model=model, watch=watch):
      accuracy = model.accuracy(dataset.validation)
      return watch.stop(number, seconds, accuracy)

    model.train(dataset.train, batch_size, check, check_every(batch_size))
    watches.append(watch)
  return summarise('reference_torch', batch_size, experiment, watches), watches


def _reference(experiment, seed: int) -> reference_torch.Reference:
  return reference_torch.Reference(
    np.asarray(experiment.table.items, np.float32),
    experiment.dataset.num_users,
    experiment.config.model.num_prototypes,
    seed,
  )


def summarise(method, batch_size, experiment, watches) -> Row:
  seconds = [watch.reached for watch in watches]
  return Row(
    method,
    batch_size,
    experiment.dataset.num_users,
    float(np.median([watch.rate(batch_size) for watch in watches])),
    None if None in seconds else float(np.median(seconds)),
  )


def few_shot(target: float, longest: float, with_torch: bool):
  """Unseen users with ten answers: rows, and accuracies on unseen items."""
  experiment = make_experiment('jit')
  dataset, model = experiment.dataset, experiment.model
  support = dataset.support[:, :SUPPORT]
  queries = dataset.unseen[UNSEEN_ITEMS]
  users = support.label.shape[0]
  state = train_ours(experiment, 'jit', 256, 0, Stopwatch(2.0, longest))
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
    theirs = _reference(experiment, 0)
    watch = Stopwatch(target, longest)
    theirs.train(
      dataset.train,
      256,
      lambda n, s: watch.stop(n, s, theirs.accuracy(dataset.validation)),
      check_every(256),
    )
    seconds, right = theirs.adapt(support, queries)
    row = Row(
      'reference_torch_few_shot',
      reference_torch.NEW_USER['batch_size'],
      users,
      users * SUPPORT / seconds,
    )
    found.append((row, right))
  return found


def draw(curves, path: Path, target: float) -> None:
  """Validation accuracy over seconds of training, a line a seed."""
  figure = Figure(figsize=(7, 4), layout='constrained')
  axes = figure.subplots()
  styles = {'jit': '-', 'pmap': '--', 'reference_torch': ':'}
  for (method, size), watches in curves.items():
    for i, watch in enumerate(watches):
      _, seconds, accuracy = np.array(watch.curve).T
      axes.plot(
        seconds,
        accuracy,
        styles[method],
        color=f'C{SIZES.index(size)}',
        label=None if i else f'{method}, batches of {size}',
        linewidth=1,
      )
  axes.axhline(target, color='grey', linewidth=0.5)
  axes.set(
    xscale='log',
    xlabel='seconds of training, compilation included',
    ylabel='validation accuracy of seen users',
  )
  axes.legend(fontsize=7, loc='upper left')
  figure.savefig(path, dpi=150)


def _seconds(row: Row) -> str:
  found = row.seconds_to_accuracy
  return 'not reached' if found is None else f'{found:.1f}'


def render(rows, few, floors, machine, made_by) -> str:
  lines = [
    '# Training',
    '',
    f'{describe_devices()}, {os.cpu_count()} cores; jax {jax.__version__}. '
    f'Matrix products {machine.flops / 1e9:.0f} GFLOP/s, '
    f'copies {machine.bandwidth / 1e9:.1f} GB/s, measured in this run.',
    '',
    f'Seconds to {_TARGET.value:g} validation accuracy of seen users '
    f'(configs/persona.py): the median of {_SEEDS.value} seeds, compilation '
    'included, validation not. Given up where a seed is not there after '
    f'{_LONGEST.value:g} s or at the end of our schedule.',
    '',
    '| method | batch | comparisons/s | seconds to accuracy |',
    '|---|---|---|---|',
    *(
      f'| `{r.method}` | {r.batch_size} | {r.comparisons_per_second:,.0f} | '
      f'{_seconds(r)} |'
      for r in rows
    ),
    '',
    f'Unseen users with {SUPPORT} answers:',
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
    f'Made by `{made_by}`.',
    '',
  ]
  return '\n'.join(lines)


def main() -> None:
  # Every seed compiles, as the first run of a machine does.
  jax.config.update('jax_enable_compilation_cache', False)
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  target, seeds, longest = _TARGET.value, _SEEDS.value, _LONGEST.value
  with_torch = importlib.util.find_spec('torch') is not None
  if not with_torch:
    print('reference_torch is left out: torch is missing', file=sys.stderr)

  def new_watch():
    return Stopwatch(target, longest)

  machine = roofline.measure_machine()
  floors = [
    roofline.measure_floor(machine, compute, FLOOR_SECONDS)
    for compute in ('float32', 'bfloat16')
  ]
  rows, curves = [], {}
  for size in SIZES:
    measured = [
      measure_ours(mode, size, seeds, new_watch) for mode in parallel.MODES
    ]
    if with_torch:
      measured.append(measure_theirs(size, seeds, new_watch))
    for row, watches in measured:
      rows.append(row)
      curves[row.method, size] = watches
      print(row, file=sys.stderr, flush=True)
  few = few_shot(target, longest, with_torch)
  floor_rows = [
    Row(
      f'floor_{f.compute}',
      roofline.BATCH_SIZE,
      roofline.NUM_USERS,
      roofline.BATCH_SIZE / f.seconds,
      None,
      f.flops_fraction,
    )
    for f in floors
  ]
  every = [*rows, *(row for row, _ in few), *floor_rows]
  write_json(out, [dataclasses.asdict(row) for row in every])
  draw(curves, out.with_suffix('.png'), target)
  made_by = shlex.join(['python', '-m', 'benchmarks.training', *sys.argv[1:]])
  page = render(rows, few, floors, machine, made_by)
  write_text(out.with_suffix('.md'), page)
  print(page)


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  cli.run(main)
