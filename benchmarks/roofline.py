"""A step that the projector dominates, beside the floor that was counted.

The floor is what the step's operations and bytes would take at the rate of
matrix products and at the bandwidth of copies, both measured in the same
process just before. Counts are lower bounds: nothing is counted but the
projector's products, the reads and writes of features and activations that no
fusion can avoid, and Adam's.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import best_of
from configs import persona
from pal_jax import models, optimizer, parallel
from pal_jax import train_step as steps
from pal_jax.shared_rows import share_rows
from pal_jax.structs import FeatureTable, make_comparisons

BATCH_SIZE = 4096
NUM_USERS = 1000
NUM_ITEMS = 100_000
FEATURES = 384  # D
WIDTH = 512  # P


@dataclasses.dataclass(frozen=True)
class Machine:
  """What the device was measured to do."""

  flops: float  # float32 operations a second in matrix products
  bandwidth: float  # bytes a second, read and written, of a copy


@dataclasses.dataclass(frozen=True)
class Floor:
  """A step's counts, and its time beside that which they would take."""

  compute: str  # 'float32' or 'bfloat16'
  rows: int  # distinct candidates of a batch
  operations: float
  bytes: float
  seconds: float
  ideal_seconds: float
  flops_fraction: float  # of the measured rate


def measure_machine() -> Machine:
  size = 2048
  a = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  x = jnp.ones((2**26,), jnp.float32)
  copy = jax.jit(lambda x: x + 1.0)
  return Machine(
    2 * size**3 / best_of(lambda: product(a), 5),
    2 * x.nbytes / best_of(lambda: copy(x), 5),
  )


def count_step(model, rows: int, features: int, parameters: int):
  """(operations, bytes) that a step needs at least.

  Operations: of the projector's layers forward, and twice those backward less
  the gradient of the first layer's input. Bytes: the features of the rows are
  gathered (read and written) and read again for the first layer's gradient;
  each layer's activations are written forward, and they and their gradients
  read backward; Adam reads parameters, gradients and two moments and writes
  all but the gradients.

  Args:
    model: with a projector `mlp2`.
    rows: distinct candidates of a batch.
    features: D.
    parameters: their number.
  """
  layers = [(features, model.width)] + 2 * [(model.width, model.width)]
  products = [2 * rows * a * b for a, b in layers]
  operations = 3 * sum(products) - products[0]
  moved = 3 * rows * features + 3 * len(layers) * rows * model.width
  return operations, 4 * (moved + 7 * parameters)


def time_step(run, state, batches, table, key, seconds: float) -> float:
  """Seconds of the fastest call of `run`, of those that fit in the time."""
  for batch in batches[:2]:  # compiles
    state, metrics = run(state, batch, table, key)
  jax.block_until_ready(metrics.loss)
  stop, found, number = time.perf_counter() + seconds, [], 0
  while time.perf_counter() < stop:
    begin = time.perf_counter()
    state, metrics = run(state, batches[number % len(batches)], table, key)
    jax.block_until_ready((state, metrics))
    found.append(time.perf_counter() - begin)
    number += 1
  return min(found)


def wide_config(compute: str = 'float32'):
  """The default recipe with a wider projector and without dropout."""
  config = persona.get_config().copy_and_resolve_references()
  with config.unlocked():
    config.model.width = WIDTH
    config.model.dropout = 0.0
    config.model.compute_dtype = compute
  return config


def create_step(config, table: FeatureTable):
  """(model, initial state, the step of `train_step.bind`)."""
  model = models.create(
    config.model, num_users=NUM_USERS, feature_width=table.items.shape[-1]
  )
  state, tx = steps.create_state(
    model,
    lambda params: optimizer.create(config.optimizer, params, 1000),
    jax.random.key(0),
    table,
  )
  objective = steps.create_objective(config.train, config.model)
  return model, state, steps.bind(model, tx, objective)


def measure_floor(machine: Machine, compute: str, seconds: float) -> Floor:
  """The step of `wide_config`."""
  rng = np.random.default_rng(0)
  table = FeatureTable(
    rng.normal(size=(NUM_ITEMS, FEATURES)).astype(np.float32),
    np.zeros((1, FEATURES), np.float32),
  )
  model, state, step = create_step(wide_config(compute), table)
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  run = parallel.compile_step(step, 'jit')
  state, table = parallel.place((state, table), 'jit')
  batches = [
    make_comparisons(
      rng.integers(0, NUM_USERS, BATCH_SIZE),
      rng.integers(0, NUM_ITEMS, (BATCH_SIZE, 2)),
      rng.random(BATCH_SIZE) < 0.5,
    )
    for _ in range(4)
  ]
  measured = time_step(run, state, batches, table, jax.random.key(0), seconds)
  rows = share_rows(batches[0]).items.size
  operations, moved = count_step(model, rows, FEATURES, parameters)
  return Floor(
    compute,
    rows,
    operations,
    moved,
    measured,
    operations / machine.flops + moved / machine.bandwidth,
    operations / measured / machine.flops,
  )
