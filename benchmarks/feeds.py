"""How batches get their features, and what each way costs.

  python -m benchmarks.feeds --out=results/benchmarks/feeds.json

- `feed`: a table of two million rows (1.5 GB of float16, in a file of --folder
  that is made if it is missing), random pairs of it in batches of 4096, and
  the step of benchmarks/roofline.py (P = 512) or that of the default run
  (P = 64). Features on the device; on the host, gathered from the mapped file
  by a thread (`ahead` = 2); and the same without the thread (`ahead` = 0).
  Each in a process of its own, in turns; the faster of two is kept. The file
  was read or written just before, so it comes from the page cache.
- `small_batch`: the default run's steps, features on the device, with a thread
  and without, in turns.
- `compute`: the default run (configs/persona.py) with its products in float32
  and in bfloat16, by validation of the selected parameters, seed by seed.

The JSON is a list of rows; the page beside it has the same name. `traces`
says how often the step was traced, hence compiled.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks import roofline
from benchmarks.timing import (
  describe_devices,
  made_by,
  measure_apart,
  peak_bytes,
  save,
)
from configs import persona
from pal_jax import cli, parallel
from pal_jax import train as training
from pal_jax.data.batching import Batcher
from pal_jax.features.rows import FileRows
from pal_jax.features.table import normalize_rows
from pal_jax.prefetch import Prefetch
from pal_jax.shared_rows import measure_room
from pal_jax.structs import FeatureTable, make_comparisons

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_FOLDER = flags.DEFINE_string('folder', '', 'Of the file; temporary if empty.')
_ROWS = flags.DEFINE_integer('rows', 2_000_000, 'Of the file.')
_SECONDS = flags.DEFINE_float('seconds', 6.0, 'Of one measurement.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Of `compute`.')
_CELL = flags.DEFINE_string('cell', '', 'One measurement; for the processes.')

BATCH_SIZE = roofline.BATCH_SIZE
NUM_COMPARISONS = 500_000
WAYS = (('device', 0), ('host', 2), ('host', 0))
ROUNDS = 2
SMALL = (4, 64, 512)


@dataclasses.dataclass(frozen=True)
class Feed:
  """A way to feed the step, and what it cost."""

  width: int  # P
  placement: str
  ahead: int  # batches that a thread makes ahead
  steps_per_second: float
  peak_rss_gb: float  # pages of the mapped file included
  own_gb: float  # when done, of memory that is not a file's
  traces: int
  measure: str = 'feed'


@dataclasses.dataclass(frozen=True)
class SmallBatch:
  batch_size: int
  ahead: int
  milliseconds: float  # a step
  prepare_milliseconds: float  # of it, drawing the batch and sharing rows
  measure: str = 'small_batch'


@dataclasses.dataclass(frozen=True)
class Compute:
  dtype: str
  seed: int
  nll: float
  accuracy: float
  seconds: float
  measure: str = 'compute'


def write_vectors(path: Path, rows: int) -> None:
  """Random vectors, not all different: their numbers do not matter."""
  if path.exists():
    return
  some = np.random.default_rng(0).normal(size=(2**14, roofline.FEATURES))
  some = some.astype(np.float16)
  shape = rows, roofline.FEATURES
  out = np.lib.format.open_memmap(path, 'w+', np.float16, shape)
  for start in range(0, rows, len(some)):
    out[start : start + len(some)] = some[: rows - start]
  out.flush()


def open_table(path: Path) -> FeatureTable:
  """As `features.feature_table` leaves it in its file, scaled when read."""
  with path.open('rb') as file:  # into the page cache, not into our memory
    while file.read(2**24):
      pass
  mapped = np.load(path, mmap_mode='r').view(np.ndarray)

  def scale(vectors):
    return normalize_rows(vectors, 'rms')

  items = FileRows(mapped.__getitem__, mapped.shape, np.float32, scale)
  return FeatureTable(items, np.zeros((1, roofline.FEATURES), np.float32))


def time_loop(run, batcher, state, table, ahead: int, seconds: float):
  """(seconds a step, the state after them), as `train.train` takes them."""
  batches = Prefetch(lambda i: run.prepare(batcher(i)), range(10**9), ahead)
  key, pending, begin = jax.random.key(0), None, None
  try:
    for step, batch in enumerate(batches):
      state, metrics = run.step(state, batch, table, key)
      if pending is not None:
        float(pending.loss)  # a step late, as the loop of training does
      pending = metrics
      if step == 4:  # compiled, and the thread is ahead
        jax.block_until_ready(state)
        begin = time.perf_counter()
      elif step > 4 and time.perf_counter() - begin > seconds:
        break
    jax.block_until_ready(state)
    return (time.perf_counter() - begin) / (step - 4), state
  finally:
    batches.close()


def _own_gigabytes() -> float:
  """Of this process now, files' pages not counted."""
  with open('/proc/self/status', encoding='ascii') as file:
    found = dict(line.split(':', 1) for line in file)
  return 1024 * int(found['RssAnon'].split()[0]) / 1e9


def measure_feed(path: Path, width: int, placement: str, ahead: int) -> Feed:
  config = roofline.wide_config()
  if width != roofline.WIDTH:
    config = persona.get_config()
  on_host = placement == 'host'
  table = open_table(path)
  rng = np.random.default_rng(0)
  batcher = Batcher(
    make_comparisons(
      rng.integers(0, roofline.NUM_USERS, NUM_COMPARISONS),
      rng.integers(0, len(table.items), (NUM_COMPARISONS, 2)),
      rng.random(NUM_COMPARISONS) < 0.5,
    ),
    BATCH_SIZE,
    0,
  )
  _, state, step = roofline.create_step(config, table)
  traces = []

  def counted(*args):
    traces.append(1)
    return step(*args)

  run = parallel.compile_step(
    counted,
    'jit',
    room=measure_room([batcher]),
    source=table if on_host else None,
  )
  state = parallel.place(state, 'jit')
  placed = None if on_host else parallel.place(table, 'jit')
  del table
  each, _ = time_loop(run, batcher, state, placed, ahead, _SECONDS.value)
  return Feed(
    width,
    placement,
    ahead,
    1 / each,
    peak_bytes() / 1e9,
    _own_gigabytes(),
    len(traces),
  )


def measure_feeds(path: Path) -> list[Feed]:
  found: dict[tuple, Feed] = {}
  for width in (roofline.WIDTH, persona.get_config().model.width):
    for way in ROUNDS * WAYS:
      found_apart = measure_apart(
        'benchmarks.feeds',
        ','.join(map(str, (width, *way))),
        [f'--folder={path.parent}', f'--seconds={_SECONDS.value}'],
      )
      feed = Feed(**found_apart)
      print(feed, file=sys.stderr, flush=True)
      before = found.get((width, *way), feed)
      found[width, *way] = max(before, feed, key=lambda f: f.steps_per_second)
  return list(found.values())


def hidden_share(feeds: list[Feed], width: int) -> float:
  """Of what the host's features cost without a thread, what it hides."""
  device, ahead, alone = (
    1 / feed.steps_per_second
    for way in WAYS
    for feed in feeds
    if (feed.width, feed.placement, feed.ahead) == (width, *way)
  )
  return (alone - ahead) / (alone - device)


def measure_small(experiment) -> list[SmallBatch]:
  rows = []
  for size in SMALL:
    batcher = Batcher(experiment.dataset.train, size, 0)
    _, state, step = roofline.create_step(experiment.config, experiment.table)
    run = parallel.compile_step(step, 'jit', room=measure_room([batcher]))
    state, table = parallel.place((state, experiment.table), 'jit')
    begin, number = time.perf_counter(), 300
    for i in range(number):
      run.prepare(batcher(i))
    prepare = (time.perf_counter() - begin) / number
    times: dict[int, list[float]] = {0: [], 2: []}
    for _ in range(5):
      for ahead, found in times.items():
        each, state = time_loop(run, batcher, state, table, ahead, 0.6)
        found.append(each)
    rows += [
      SmallBatch(size, ahead, 1e3 * float(np.median(found)), 1e3 * prepare)
      for ahead, found in times.items()
    ]
  return rows


def measure_compute(experiment) -> list[Compute]:
  rows = []
  for seed in range(_SEEDS.value):
    for dtype in ('float32', 'bfloat16'):
      config = experiment.config.copy_and_resolve_references()
      with config.unlocked():
        config.seed, config.model.compute_dtype = seed, dtype
      this = training.create_experiment(config, experiment)
      with tempfile.TemporaryDirectory() as folder:
        state, _, timing = training.train(
          this, Path(folder), progress=False, say=lambda line: None
        )
      variables = training.variables_of(parallel.fetch(state))
      found = training.validate(this, variables)
      rows.append(
        Compute(dtype, seed, found['nll'], found['accuracy'], timing['seconds'])
      )
      print(rows[-1], file=sys.stderr, flush=True)
  return rows


def _difference(rows: list[Compute], field: str) -> str:
  """'-0.0012 (standard error 0.0034)': of bfloat16, the mean over seeds."""
  single, half = (
    np.array([getattr(r, field) for r in rows if r.dtype == dtype])
    for dtype in ('float32', 'bfloat16')
  )
  each = half - single
  error = np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else 0.0
  return f'{each.mean():+.4f} (standard error {error:.4f})'


def render(feeds, small, compute, command: str) -> str:
  size = _ROWS.value * roofline.FEATURES * 2 / 1e9
  shares = {f.width: hidden_share(feeds, f.width) for f in feeds}
  lines = [
    '# Feeds',
    '',
    f'{describe_devices()}, {os.cpu_count()} cores; jax {jax.__version__}.',
    '',
    f'{_ROWS.value:,} rows of D = {roofline.FEATURES} ({size:.2f} GB of '
    f'float16 in a file, in the page cache), batches of {BATCH_SIZE} random '
    'pairs:',
    '',
    '| P | features | made ahead | steps/s | peak RSS, GB | own memory, GB '
    '| compilations |',
    '|---|---|---|---|---|---|---|',
    *(
      f'| {f.width} | {f.placement} | {f.ahead} | {f.steps_per_second:.2f} | '
      f'{f.peak_rss_gb:.2f} | {f.own_gb:.2f} | {f.traces} |'
      for f in feeds
    ),
    '',
    'Peak RSS counts the pages of the mapped file that were touched, which '
    'the system may take back; own memory does not, and is that at the end.',
    '',
    *(
      f'P = {width}: the thread hides {share:.0%} of what features on the '
      'host cost a step.'
      for width, share in shares.items()
    ),
    '',
    "The default run's steps, features on the device:",
    '',
    '| batch | made ahead | ms a step | of it, to prepare a batch |',
    '|---|---|---|---|',
    *(
      f'| {s.batch_size} | {s.ahead} | {s.milliseconds:.3f} | '
      f'{s.prepare_milliseconds:.3f} |'
      for s in small
    ),
    '',
    'The default run, products in float32 and in bfloat16; validation of the '
    'selected parameters:',
    '',
    '| products in | seed | NLL | accuracy | seconds |',
    '|---|---|---|---|---|',
    *(
      f'| {c.dtype} | {c.seed} | {c.nll:.4f} | {c.accuracy:.4f} | '
      f'{c.seconds:.1f} |'
      for c in compute
    ),
    '',
    f'bfloat16 less float32, paired by seed: NLL {_difference(compute, "nll")}'
    f', accuracy {_difference(compute, "accuracy")}.',
    '',
    f'Made by `{command}`.',
    '',
  ]
  return '\n'.join(lines)


def main() -> None:
  if _CELL.value:
    width, placement, ahead = _CELL.value.split(',')
    path = Path(_FOLDER.value) / 'vectors.npy'
    feed = measure_feed(path, int(width), placement, int(ahead))
    print(json.dumps(dataclasses.asdict(feed)))
    return
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(_FOLDER.value or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    write_vectors(folder / 'vectors.npy', _ROWS.value)
    feeds = measure_feeds(folder / 'vectors.npy')
  experiment = training.create_experiment(persona.get_config())
  small = measure_small(experiment)
  compute = measure_compute(experiment)
  every = [*feeds, *small, *compute]
  page = render(feeds, small, compute, made_by('benchmarks.feeds'))
  save(out, [dataclasses.asdict(row) for row in every], page)


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  cli.run(main)
