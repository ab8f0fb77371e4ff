"""Runs per minute of a sweep, beside the same runs one at a time.

  python -m benchmarks.sweep --out=results/benchmarks/sweep.json

A small planted simulation (dimension 4, 50 users with 50 comparisons each, 300
steps of 128 comparisons, validated every 100) over a grid of learning rates,
decays, weights of the bound and seeds: 1,024 runs. Methods, side by side in
one process:

- `sweep`: all of them by `sweep.train_runs`;
- `one_at_a_time`: some of them by the same compiled program with one run in a
  call, hence compiled once;
- `each_compiled`: a few of them, each by a call of its own after everything
  that is compiled was forgotten, as in processes of their own (whose start,
  data and imports are not counted).

The JSON is a list of rows {method, runs, seconds, first_seconds,
runs_per_minute, largest_difference}: `first_seconds` is the first call, with
compilation, and `seconds` the best of `--repeats` after it. `each_compiled`
has first calls alone. Differences are those of the validation NLL (nats) from
the sweep's. A table stands beside it, in a file of the same name that ends in
.md.
"""

import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks.timing import describe_devices
from configs import simulation
from pal_jax import cli, grid, sweep
from pal_jax.sweep_program import compile_program
from pal_jax.writer import write_json, write_text

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.', required=True)
_DEVICES = flags.DEFINE_integer(
  'cpu_devices', 1, 'Devices that the CPU is split into.', lower_bound=1
)
_AT_ONCE = flags.DEFINE_integer(
  'at_once', 0, 'Runs of a call; 0: by their size.', lower_bound=0
)
_RATES = flags.DEFINE_integer(
  'rates', 16, 'Learning rates: a sixteenth of the runs.', lower_bound=1
)
_REPEATS = flags.DEFINE_integer('repeats', 2, 'Timed calls.', lower_bound=1)

SINGLE_RUNS, COMPILED_RUNS = 32, 3


def make_config():
  """`configs/simulation.py:partition`, smaller."""
  config = simulation.get_config('partition')
  with config.unlocked():
    config.data.num_personas = config.model.num_prototypes = 3
    config.data.dimension = config.model.width = 4
    config.data.num_items = 500
    config.data.num_seen_users = 50
    config.data.num_unseen_users = 20
    config.data.comparisons_per_user = 50
    config.train.batch_size = 128
    config.train.num_steps = 300
    config.optimizer.warmup_steps = 15
  return config


def make_axes(rates: int) -> dict:
  return {
    'optimizer.groups.points.learning_rate': np.geomspace(0.01, 0.5, rates),
    'optimizer.groups.points.weight_decay': [0.0, 1e-3, 1e-2, 1e-1],
    'train.bound_weight': [0.0, 1.0],
    ('seed', 'data.seed'): range(8),
  }


def measure(train, repeats: int):
  """(what the last call returned, seconds of the first, best of the rest)."""
  times = []
  for _ in range(1 + repeats):
    begin = time.perf_counter()
    found = train()
    times.append(time.perf_counter() - begin)
  return found, times[0], min(times[1:])


def largest_difference(some, others) -> float:
  """Of the NLL of two lists of the same runs."""
  return max(
    abs(float(a.nll) - float(b.nll)) for a, b in zip(some, others, strict=True)
  )


def train_each(experiments) -> tuple[list, float]:
  """(what stands for each, seconds), nothing compiled before."""
  found, seconds = [], 0.0
  for experiment in experiments:
    compile_program.cache_clear()
    jax.clear_caches()
    begin = time.perf_counter()
    found += sweep.train_runs([experiment])
    seconds += time.perf_counter() - begin
  return found, seconds


def render(rows: list[dict], size: str, command: str) -> str:
  """The table beside the JSON."""
  lines = [
    '# Sweeps: runs per minute',
    '',
    f'{size} {describe_devices()}; jax {jax.__version__}. Seconds are those of '
    'all the runs of a row; differences are of the validation NLL (nats) from '
    'those of the sweep.',
    '',
    '| method | runs | seconds | first call, with compilation | runs per '
    'minute | largest difference |',
    '|---|---|---|---|---|---|',
  ]
  for row in rows:
    seconds = f'{row["seconds"]:.2f}' if 'seconds' in row else ''
    lines.append(
      f'| `{row["method"]}` | {row["runs"]:,} | {seconds} '
      f'| {row["first_seconds"]:.1f} | {row["runs_per_minute"]:,.0f} '
      f'| {row["largest_difference"]:.1e} |'
    )
  whole = rows[0]
  lines += [
    '',
    f'With its compilation the sweep made '
    f'{60 * whole["runs"] / whole["first_seconds"]:,.0f} runs a minute.',
  ]
  return '\n'.join(lines) + f'\n\nMade by `{command}`.\n'


def main():
  # Before JAX starts.
  jax.config.update('jax_num_cpu_devices', _DEVICES.value)
  # Or `each_compiled` would find what others left on disk.
  jax.config.update('jax_enable_compilation_cache', False)
  experiments = sweep.create_experiments(
    grid.make_configs(make_config(), make_axes(_RATES.value))
  )
  count = len(experiments)
  rows = []
  command = f'python -m benchmarks.sweep --out={_OUT.value}'
  for flag in (_DEVICES, _AT_ONCE, _RATES, _REPEATS):
    if flag.present:
      command += f' --{flag.name}={flag.value}'
  config = experiments[0].config.train
  size = f'{config.num_steps} steps of {config.batch_size} comparisons a run.'
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)

  def report(method, runs, per_minute, **row):
    row = {'method': method, 'runs': runs, 'runs_per_minute': per_minute, **row}
    rows.append(row)
    print(f'{method}: {per_minute:,.0f} runs a minute', flush=True)
    # After each row: a run that is cut short keeps what it measured.
    write_json(out, rows)
    write_text(out.with_suffix('.md'), render(rows, size, command))

  together, first, best = measure(
    lambda: sweep.train_runs(experiments, at_once=_AT_ONCE.value),
    _REPEATS.value,
  )
  report(
    'sweep',
    count,
    60 * count / best,
    seconds=best,
    first_seconds=first,
    largest_difference=0.0,
  )
  # Spread over the grid, so that every value of a field is among them.
  some = np.linspace(0, count - 1, min(SINGLE_RUNS, count)).astype(int)
  found, first, best = measure(
    lambda: sweep.train_runs([experiments[i] for i in some], at_once=1),
    _REPEATS.value,
  )
  report(
    'one_at_a_time',
    len(some),
    60 * len(some) / best,
    seconds=best,
    first_seconds=first,
    largest_difference=largest_difference(found, [together[i] for i in some]),
  )
  some = some[:: max(1, len(some) // COMPILED_RUNS)][:COMPILED_RUNS]
  found, seconds = train_each([experiments[i] for i in some])
  report(
    'each_compiled',
    len(some),
    60 * len(some) / seconds,
    first_seconds=seconds,
    largest_difference=largest_difference(found, [together[i] for i in some]),
  )


if __name__ == '__main__':
  cli.run(main)
