"""Training with tables of a thousand to ten million users.

  python -m benchmarks.many_users --out=results/benchmarks/many_users.json

Planted people: each holds one of four prototypes in R^8 and has answered ten
comparisons of random items, the nearer item wins. Each measurement is a process
of its own, so that its memory is its own:

- `dense`, `sparse`: steps a second of the compiled step, with every row of the
  user table in each step, or with those of the batch (`train.sparse_users`);
  `sparse_by_user` draws whole users instead of comparisons;
- `train`: passes over all comparisons of the most users, in the library's
  step, optimiser and batches, and its accuracy on comparisons that a sample of
  the users did not train on.

The JSON is a list of rows {method, batch_size, users, comparisons_per_second,
seconds_to_accuracy, flops_fraction, milliseconds, peak_gb, data_gb,
bytes_per_user, accuracy, one_score}: seconds and accuracy are of `train`, whose
passes end there; peak memory is that of the process, `data_gb` the comparisons
in it; bytes per user are those of the table and its moments, counted.
`one_score` is the accuracy of the users' mean. A page and a figure stand beside
it, in files of the same name.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks.timing import (
  describe_devices,
  made_by,
  measure_apart,
  peak_bytes,
  save,
)
from configs import simulation
from pal_jax import cli, models, optimizer, parallel
from pal_jax import train_step as steps
from pal_jax.data.batching import Batcher
from pal_jax.prefetch import Prefetch
from pal_jax.shared_rows import measure_room
from pal_jax.structs import Comparisons, FeatureTable
from pal_jax.user_rows import is_table

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_MOST = flags.DEFINE_integer(
  'most', 10_000_000, 'Users of the largest table.', lower_bound=1000
)
_SECONDS = flags.DEFINE_float('seconds', 5.0, 'Of steps, in each measurement.')
_PASSES = flags.DEFINE_integer('passes', 3, 'Of `train`.', lower_bound=1)
_CELL = flags.DEFINE_string('cell', '', 'One measurement; for the processes.')

METHODS = ('dense', 'sparse', 'sparse_by_user')
ANSWERS = 10  # comparisons of a user
ITEMS, DIMENSION, PROTOTYPES = 2000, 8, 4
STEP_SIZE, TRAIN_SIZE = 8192, 65_536  # comparisons of a batch
SAMPLE = 50_000  # users who are asked what they did not train on
QUERIES = 10
CHUNK = 2**20  # users whose answers are made at once


@dataclasses.dataclass(frozen=True)
class Row:
  method: str
  batch_size: int
  users: int
  comparisons_per_second: float
  milliseconds: float  # a step
  peak_gb: float
  data_gb: float
  bytes_per_user: float
  seconds_to_accuracy: float | None = None
  flops_fraction: float | None = None
  accuracy: float | None = None
  one_score: float | None = None


@dataclasses.dataclass(frozen=True)
class Planted:
  """Who holds which prototype, and how far each item is from it."""

  items: np.ndarray  # [M, P]
  distance: np.ndarray  # [K, M]
  group: np.ndarray  # [U] int8

  def answers(self, users: np.ndarray, per_user: int, seed: int) -> Comparisons:
    """[U * N] comparisons, user after user."""
    total = len(users) * per_user
    items = np.empty((total, 2), np.int32)
    label = np.empty(total, np.float32)
    user = np.repeat(users.astype(np.int32), per_user)
    rng = np.random.default_rng([seed, 1])
    for begin in range(0, total, CHUNK):
      part = slice(begin, min(begin + CHUNK, total))
      first = rng.integers(0, ITEMS, part.stop - begin)
      # Never the same: the second is so many further on.
      second = (first + rng.integers(1, ITEMS, first.size)) % ITEMS
      items[part, 0], items[part, 1] = first, second
      group = self.group[user[part]]
      label[part] = self.distance[group, first] < self.distance[group, second]
    same = np.broadcast_to
    return Comparisons(
      user,
      same(np.int32(0), total),  # one number each, however many there are
      items,
      label,
      same(np.float32(1), total),
      same(np.bool_(True), total),
    )


def plant(num_users: int, seed: int) -> Planted:
  rng = np.random.default_rng(seed)
  items = rng.normal(size=(ITEMS, DIMENSION)).astype(np.float32)
  prototypes = rng.normal(size=(PROTOTYPES, DIMENSION))
  distance = np.square(prototypes[:, None] - items).sum(-1)
  group = rng.integers(0, PROTOTYPES, num_users).astype(np.int8)
  return Planted(items, distance, group)


class Training:
  """The library's step on planted people."""

  def __init__(self, planted: Planted, data: Comparisons, size, method, last):
    config = simulation.get_config('partition')
    with config.unlocked():
      config.optimizer.warmup_steps = min(50, last // 10)
    users = len(planted.group)
    self.sparse = method != 'dense'
    self.batcher = Batcher(data, size, 0, by_user=method == 'sparse_by_user')
    self.model = models.create(
      config.model, num_users=users, feature_width=DIMENSION
    )
    table = FeatureTable(planted.items, np.zeros((1, DIMENSION), np.float32))
    self.state, tx = steps.create_state(
      self.model,
      lambda params: optimizer.create(config.optimizer, params, last),
      jax.random.key(0),
      table,
    )
    self.run = parallel.compile_step(
      steps.bind(
        self.model, tx, steps.create_objective(config.train, config.model)
      ),
      'jit',
      room=measure_room([self.batcher]),
      by_user_row=self.sparse,
    )
    self.state, self.table = parallel.place((self.state, table), 'jit')
    self.key = jax.random.key(1)

  def table_bytes(self) -> int:
    """Of the user table and its moments."""
    return sum(
      x.nbytes
      for path, x in jax.tree_util.tree_leaves_with_path(self.state)
      if is_table(path)
    )

  def take(self, start: int, stop: int) -> float:
    """Comparisons that these steps saw; ends when they are done."""
    seen, pending = 0.0, None
    batches = Prefetch(
      lambda step: self.run.prepare(self.batcher(step)),
      range(start, stop),
      parallel.batches_ahead(False),
    )
    try:
      for batch in batches:
        self.state, metrics = self.run.step(
          self.state, batch, self.table, self.key
        )
        if pending is not None:
          seen += float(pending.count)  # a step late, as the loop does
        pending = metrics
      return seen + float(pending.count)
    finally:
      batches.close()

  def accuracy(self, data: Comparisons, anonymous: bool) -> float:
    """On comparisons, of users as themselves or as their mean."""
    variables = {'params': self.state.params, **self.state.model_state}

    @jax.jit
    def right(variables, user, items, label):
      log_w = self.model.apply(variables, user, method='user_log_weights')
      if anonymous:
        mean = self.model.apply(variables, method='population_log_weights')
        log_w = jax.numpy.broadcast_to(mean, log_w.shape)
      x = self.model.apply(variables, self.table.items[items], method='embed')
      basis = self.model.apply(variables, None, method='basis')
      logit = self.model.apply(
        variables, log_w, x, basis, 'convex', method='logits'
      )
      return ((logit > 0) == (label > 0.5)).mean()

    return float(right(variables, data.user, data.items, data.label))


def measure_step(method: str, users: int) -> Row:
  planted = plant(users, 0)
  data = planted.answers(np.arange(users), ANSWERS, 0)
  training = Training(planted, data, STEP_SIZE, method, 1000)
  training.take(0, 2)  # compiles
  number, done, stop = 2, 0.0, time.perf_counter() + _SECONDS.value
  begin = time.perf_counter()
  while time.perf_counter() < stop:
    done += training.take(number, number + 5)
    number += 5
  seconds = time.perf_counter() - begin
  return make_row(
    method,
    training,
    data,
    STEP_SIZE,
    done / seconds,
    1e3 * seconds / (number - 2),
  )


def measure_training(users: int) -> Row:
  """Some passes; the last batch may begin another."""
  planted = plant(users, 0)
  data = planted.answers(np.arange(users), ANSWERS, 0)
  sample = np.linspace(0, users - 1, min(users, SAMPLE)).astype(np.int32)
  asked = planted.answers(sample, QUERIES, 1)
  last = -(-_PASSES.value * len(data.label) // TRAIN_SIZE)
  training = Training(planted, data, TRAIN_SIZE, 'sparse', last)
  begin = time.perf_counter()
  done = training.take(0, last)
  seconds = time.perf_counter() - begin
  row = make_row(
    'train',
    training,
    data,
    TRAIN_SIZE,
    done / seconds,
    1e3 * seconds / last,
  )
  return dataclasses.replace(
    row,
    seconds_to_accuracy=seconds,
    accuracy=training.accuracy(asked, False),
    one_score=training.accuracy(asked, True),
  )


def make_row(method, training, data, size, rate, milliseconds) -> Row:
  held = data.user.nbytes + data.items.nbytes + data.label.nbytes
  users = training.model.num_users
  return Row(
    method,
    size,
    users,
    rate,
    milliseconds,
    peak_bytes() / 1e9,
    held / 1e9,
    training.table_bytes() / users,
  )


def cells() -> list[tuple[str, int]]:
  sizes = [10**e for e in range(3, 8) if 10**e <= _MOST.value]
  return [
    *((method, users) for users in sizes for method in METHODS),
    ('train', sizes[-1]),
  ]


def run_cell(method: str, users: int) -> Row:
  """In a process of its own."""
  found = measure_apart(
    'benchmarks.many_users',
    f'{method},{users}',
    [f'--seconds={_SECONDS.value}', f'--passes={_PASSES.value}'],
  )
  row = Row(**found)
  print(row, file=sys.stderr, flush=True)
  return row


def draw(rows: list[Row], path: Path) -> None:
  """Milliseconds a step over the number of users."""
  figure = Figure(figsize=(6, 4), layout='constrained')
  axes = figure.subplots()
  for method in METHODS:
    mine = [r for r in rows if r.method == method]
    axes.plot(
      [r.users for r in mine],
      [r.milliseconds for r in mine],
      'o-',
      label=method,
    )
  axes.set(
    xscale='log',
    yscale='log',
    xlabel='users in the table',
    ylabel=f'ms a step of {STEP_SIZE:,} comparisons',
  )
  axes.legend()
  figure.savefig(path, dpi=150)


def render(rows: list[Row], command: str) -> str:
  train = rows[-1]
  lines = [
    '# Many users',
    '',
    f'{describe_devices()}, {os.cpu_count()} cores; jax {jax.__version__}. '
    f'K = {PROTOTYPES}; table and moments take '
    f'{train.bytes_per_user:.0f} bytes a user.',
    '',
    '| method | users | batch | ms a step | comparisons/s | comparisons in '
    'memory, GB | peak memory, GB |',
    '|---|---|---|---|---|---|---|',
    *(
      f'| `{r.method}` | {r.users:,} | {r.batch_size:,} | '
      f'{r.milliseconds:.2f} | {r.comparisons_per_second:,.0f} | '
      f'{r.data_gb:.2f} | {r.peak_gb:.2f} |'
      for r in rows
    ),
    '',
    f'`train` is {_PASSES.value} passes over {train.users:,} users x {ANSWERS} '
    'comparisons: '
    f'{train.seconds_to_accuracy:.0f} s, compilation included. On '
    f'{QUERIES} other comparisons of each of {min(train.users, SAMPLE):,} '
    'users '
    f'its accuracy is {train.accuracy:.3f}; the mean of all users has '
    f'{train.one_score:.3f}.',
    '',
    f'Made by `{command}`.',
    '',
  ]
  return '\n'.join(lines)


def main() -> None:
  if _CELL.value:
    method, users = _CELL.value.split(',')
    row = (
      measure_training(int(users))
      if method == 'train'
      else measure_step(method, int(users))
    )
    print(json.dumps(dataclasses.asdict(row)))
    return
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  rows = [run_cell(*cell) for cell in cells()]
  draw(rows, out.with_suffix('.png'))
  page = render(rows, made_by('benchmarks.many_users'))
  save(out, [dataclasses.asdict(row) for row in rows], page)


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  cli.run(main)
