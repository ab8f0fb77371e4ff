"""Users per second and bytes per user of adaptation, side by side in one run.

  python -m benchmarks.adaptation --out=results/benchmarks/adaptation.json

Methods, on the same planted users (Dirichlet mixtures of K prototypes, answers
drawn from the logistic model, a table of 2,000 items placed by an mlp2):

- `solver`: certified MAP weights, the compiled call of `adapt_stream`;
- `solver_one_at_a_time`: the same solver, a call a user;
- `reference`: the reference's recipe (AdamW 5e-3 on the logits from N(0, 1),
  20 epochs, batches of 4), vmapped on the same statistics;
- `reference_one_at_a_time`: the same recipe through the network, a user after
  another, a compiled step a batch;
- `posterior`: the discrete prior of 208 atoms, in closed form;
- `end_to_end`: `adapt_stream` from ids and labels on disk to weights on disk,
  in a process of its own: bytes are the peak of its memory over its number of
  users.

The JSON is a list of rows {method, num_prototypes, n, users, users_per_second,
bytes_per_user, query_accuracy}; a table with certificates stands beside it, in
a file of the same name that ends in .md. Bytes are those of the compiled
call's arguments, results and temporary arrays, a user. Timings are the best of
three after a warm-up.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks.timing import best_of, describe_devices, peak_bytes
from pal_jax import adaptation, cli, parallel
from pal_jax.adaptation import reference
from pal_jax.adaptation.stream import Support, adapt_stream, compile_stream
from pal_jax.losses import logistic
from pal_jax.models.pal_a import PalA
from pal_jax.structs import FeatureTable
from pal_jax.writer import write_json, write_text

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.', required=True)
_DEVICES = flags.DEFINE_integer(
  'cpu_devices', os.cpu_count(), 'Devices that the CPU is split into.'
)
_MAX_USERS = flags.DEFINE_integer(
  'max_users', 1_000_000, 'The largest number of users.', lower_bound=1
)
# For the process of its own: the folder with the inputs.
_STREAM = flags.DEFINE_string('stream', '', 'Internal.')

FEATURES, WIDTH, NUM_ITEMS, NUM_QUERIES = 384, 64, 2000, 50
LOGIT_SCALE = 4.0  # standard deviation of the prototypes' logits
BASE = {'num_prototypes': 8, 'n': 20, 'users': 100_000}
CHUNK = 65536
NUM_MEASURED = 5000  # users whose query accuracy is measured


class Problem:
  """A frozen model, an item table, and planted users."""

  def __init__(self, num_prototypes: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    self.model = PalA(
      num_users=1,
      num_prototypes=num_prototypes,
      point='Pw',
      width=WIDTH,
      feature_width=FEATURES,
    )
    items = rng.normal(size=(NUM_ITEMS, FEATURES)).astype(np.float32)
    self.table = FeatureTable(items, np.ones((1, FEATURES), np.float32))
    self.variables = dict(
      self.model.init(
        jax.random.key(seed),
        np.zeros(1, np.int32),
        items[None, :2],
        items[:1],
      )
    )
    params = dict(self.variables['params'])
    # Prototypes among the items, and logits of a trained model's size.
    placed = adaptation.place(self.model, self.variables, self.table)
    params['prototypes'] = placed.x[:num_prototypes]
    self.variables = {'params': params}
    rewards = self._rewards()
    spread = np.std(rewards - np.roll(rewards, 1, 0))
    params['log_scale'] = jnp.log(jnp.float32(LOGIT_SCALE / spread))
    self.rewards = self._rewards()
    self.prior = self._fit_prior(rng)

  def _rewards(self) -> np.ndarray:
    placed = adaptation.place(self.model, self.variables, self.table)
    self.placed = placed
    return np.asarray(
      adaptation.reward_table(self.model, self.variables, placed, 'convex')
    )

  def draw(self, users: int, n: int, seed: int) -> dict[str, np.ndarray]:
    """Weights [U, K], items [U, n, 2] and labels [U, n] of planted users."""
    rng = np.random.default_rng([seed, users, n])
    size = self.model.num_prototypes
    weights = rng.dirichlet(np.full(size, 0.3), users).astype(np.float32)
    items = rng.integers(0, NUM_ITEMS, (users, n, 2), dtype=np.int32)
    delta = self.rewards[items[..., 0]] - self.rewards[items[..., 1]]
    logit = np.einsum('unk,uk->un', delta, weights)
    label = rng.random((users, n)) < 1.0 / (1.0 + np.exp(-logit))
    return {'weights': weights, 'items': items, 'label': label, 'logit': logit}

  def statistics(self, drawn) -> tuple:
    items = drawn['items']
    delta = self.rewards[items[..., 0]] - self.rewards[items[..., 1]]
    label = jnp.asarray(drawn['label'], jnp.float32)
    return (
      adaptation.Statistics(jnp.asarray(delta), None, None),
      label,
      jnp.ones(label.shape, bool),
    )

  def _fit_prior(self, rng):
    """From 200 seen users, as an experiment would learn it."""
    seen = self.draw(200, 60, 1)
    stats, label, mask = self.statistics(seen)
    halves = [
      (stats.map(lambda x, s=s: x[:, s]), label[:, s], mask[:, s])
      for s in (slice(0, 40), slice(40, None))
    ]
    log_w = jnp.log(jnp.maximum(jnp.asarray(seen['weights']), 1e-12))
    return adaptation.fit_prior(self.model, self.variables, log_w, *halves)[0]

  def query_accuracy(self, log_weights, weights, seed: int) -> float:
    """Agreement with the true utilities on fresh pairs."""
    log_weights = np.asarray(log_weights)[:NUM_MEASURED]
    rng = np.random.default_rng([seed, 5])
    items = rng.integers(0, NUM_ITEMS, (len(log_weights), NUM_QUERIES, 2))
    delta = self.rewards[items[..., 0]] - self.rewards[items[..., 1]]
    guess = np.einsum('unk,uk->un', delta, np.exp(log_weights))
    truth = np.einsum('unk,uk->un', delta, weights[: len(log_weights)])
    return float(np.mean((guess > 0) == (truth > 0)))


def bytes_of(compiled) -> int:
  """Arguments, results and temporary arrays of a compiled call."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
  )


def pad_users(x, size: int):
  return np.pad(x, ((0, size - len(x)),) + ((0, 0),) * (x.ndim - 1))


def measure_stream(problem: Problem, n: int, users: int, method: str) -> dict:
  """The compiled call of `adapt_stream`, chunk after chunk, on the device."""
  run, multiple = compile_stream(
    problem.model,
    problem.variables,
    problem.placed,
    problem.prior,
    method='map' if method == 'solver' else method,
  )
  size = -(-min(CHUNK, users) // multiple) * multiple
  drawn = problem.draw(users, n, 2)
  chunks = [
    jax.device_put(
      {
        'items': pad_users(drawn['items'][i : i + size], size),
        'prompt': np.zeros((size, n), np.int32),
        'label': pad_users(
          drawn['label'][i : i + size].astype(np.float32), size
        ),
        'mask': pad_users(np.ones((users, n), bool)[i : i + size], size),
      }
    )
    for i in range(0, users, size)
  ]
  seconds = best_of(lambda: [run(chunk) for chunk in chunks])
  states = [jax.tree.map(np.asarray, run(chunk)) for chunk in chunks]
  state = jax.tree.map(lambda *x: np.concatenate(x)[:users], *states)
  relative = state.gap / np.maximum(1.0, np.abs(state.objective))
  memory = jax.jit(run).lower(chunks[0]).compile()
  return {
    'users_per_second': users / seconds,
    'bytes_per_user': bytes_of(memory) / size,
    'query_accuracy': problem.query_accuracy(
      state.log_weights, drawn['weights'], 2
    ),
    'not_converged': int(np.sum(~state.converged)),
    'above_1e-5': float(np.mean(relative > 1e-5)),
    'largest_relative_gap': float(relative.max()),
    'mean_iterations': float(state.iterations.mean()),
  }


def measure_one_at_a_time(problem: Problem, n: int, users: int) -> dict:
  drawn = problem.draw(users, n, 2)
  stats, label, mask = problem.statistics(drawn)
  rows = [
    (stats.map(lambda x, i=i: x[i : i + 1]), label[i : i + 1], mask[i : i + 1])
    for i in range(users)
  ]

  def fit(row):
    return adaptation.adapt(
      problem.model, problem.variables, *row, problem.prior, method='map'
    )

  # Each is waited for, as a service that answers one user would.
  seconds = best_of(lambda: [jax.block_until_ready(fit(row)) for row in rows])
  log_weights = np.concatenate([fit(row).log_weights for row in rows])
  compiled = jax.jit(fit).lower(rows[0]).compile()
  return {
    'users_per_second': users / seconds,
    'bytes_per_user': bytes_of(compiled),
    'query_accuracy': problem.query_accuracy(log_weights, drawn['weights'], 2),
  }


def measure_reference(problem: Problem, n: int, users: int) -> dict:
  """Split over the same devices as the solver."""
  drawn = problem.draw(users, n, 2)
  stats, label, mask = problem.statistics(drawn)
  start = jax.random.normal(
    jax.random.key(0), (users, problem.model.num_prototypes)
  )

  def fit(variables, parts):
    stats, label, mask, start, seed = parts
    return reference.fit_reference(
      problem.model,
      variables,
      'convex',
      stats,
      label,
      mask,
      start,
      jax.random.key(seed[0]),
    )

  run, multiple = parallel.map_users(fit)
  size = users // multiple * multiple
  parts = (
    stats.map(lambda x: x[:size]),
    label[:size],
    mask[:size],
    start[:size],
    jnp.arange(size),
  )
  seconds = best_of(lambda: run(problem.variables, parts))
  compiled = run.lower(problem.variables, parts).compile()
  return {
    'users_per_second': size / seconds,
    'bytes_per_user': bytes_of(compiled) / size,
    'query_accuracy': problem.query_accuracy(
      run(problem.variables, parts), drawn['weights'], 2
    ),
  }


def measure_reference_one_at_a_time(
  problem: Problem, n: int, users: int
) -> dict:
  """The recipe as it is: items go through the projector at every step."""
  drawn = problem.draw(users, n, 2)
  features = jnp.asarray(problem.table.items)
  optimizer = optax.adamw(
    reference.LEARNING_RATE, weight_decay=reference.WEIGHT_DECAY
  )
  model, variables = problem.model, problem.variables
  basis = model.apply(variables, features[:1], method='basis')

  def loss(logits, h, label):
    x = model.apply(variables, h, method='embed')
    log_w = jnp.broadcast_to(
      jax.nn.log_softmax(logits), (len(label), logits.size)
    )
    z = model.apply(variables, log_w, x, basis, 'convex', method='logits')
    return jnp.mean(logistic(z, label))

  @jax.jit
  def step(logits, state, h, label):
    gradient = jax.grad(loss)(logits, h, label)
    updates, state = optimizer.update(gradient, state, logits)
    return optax.apply_updates(logits, updates), state

  rng = np.random.default_rng(0)

  def fit(i):
    logits = jnp.asarray(rng.normal(size=model.num_prototypes), jnp.float32)
    state = optimizer.init(logits)
    label = jnp.asarray(drawn['label'][i], jnp.float32)
    for _ in range(reference.NUM_EPOCHS):
      order = rng.permutation(n)
      for begin in range(0, n, reference.BATCH_SIZE):
        rows = order[begin : begin + reference.BATCH_SIZE]
        h = features[drawn['items'][i, rows]]
        logits, state = step(logits, state, h, label[rows])
    return jax.nn.log_softmax(logits)

  jax.block_until_ready(fit(0))
  begin = time.perf_counter()
  fitted = jax.block_until_ready([fit(i) for i in range(users)])
  seconds = time.perf_counter() - begin
  logits = jnp.zeros(model.num_prototypes)
  compiled = step.lower(
    logits,
    optimizer.init(logits),
    features[drawn['items'][0, : reference.BATCH_SIZE]],
    jnp.zeros(min(reference.BATCH_SIZE, n)),
  ).compile()
  return {
    'users_per_second': users / seconds,
    'bytes_per_user': bytes_of(compiled),
    'query_accuracy': problem.query_accuracy(fitted, drawn['weights'], 2),
  }


def measure_end_to_end(problem: Problem, n: int, users: int) -> dict:
  """A process of its own, so that its peak of memory is its own."""
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    items = np.lib.format.open_memmap(
      folder / 'items.npy', 'w+', np.int32, (users, n, 2)
    )
    label = np.lib.format.open_memmap(
      folder / 'label.npy', 'w+', np.uint8, (users, n)
    )
    weights = []
    for start in range(0, users, CHUNK):
      drawn = problem.draw(min(CHUNK, users - start), n, 2 + start)
      rows = slice(start, start + len(drawn['label']))
      items[rows], label[rows] = drawn['items'], drawn['label']
      weights.append(drawn['weights'])
    items.flush()
    label.flush()
    np.savez(
      folder / 'model.npz',
      num_prototypes=problem.model.num_prototypes,
      items=problem.table.items,
    )
    subprocess.run(
      [
        sys.executable,
        '-m',
        'benchmarks.adaptation',
        f'--out={folder / "out.json"}',
        f'--stream={folder}',
        f'--cpu_devices={_DEVICES.value}',
      ],
      check=True,
    )
    found = json.loads((folder / 'out.json').read_text())
    log_weights = np.load(folder / 'users' / 'log_weights.npy', mmap_mode='r')
    accuracy = problem.query_accuracy(
      log_weights, np.concatenate(weights)[:NUM_MEASURED], 2
    )
  return {
    'users_per_second': users / found['seconds'],
    'bytes_per_user': found['peak_bytes'] / users,
    'query_accuracy': accuracy,
    'seconds': found['seconds'],
    'peak_bytes': found['peak_bytes'],
    **found['summary'],
  }


def stream_in_this_process(folder: Path) -> dict:
  """What `measure_end_to_end` starts; compilation is inside the time."""
  with np.load(folder / 'model.npz') as file:
    problem = Problem(int(file['num_prototypes']))
  begin = time.perf_counter()
  summary = adapt_stream(
    problem.model,
    problem.variables,
    problem.placed,
    Support(
      np.load(folder / 'items.npy', mmap_mode='r'),
      np.load(folder / 'label.npy', mmap_mode='r'),
    ),
    problem.prior,
    folder / 'users',
    progress=False,
  )
  seconds = time.perf_counter() - begin
  return {
    'seconds': seconds,
    'peak_bytes': peak_bytes(),
    'summary': {
      'not_converged': summary.not_converged,
      'largest_relative_gap': summary.largest_relative_gap,
      'mean_iterations': summary.mean_iterations,
    },
  }


MEASURES = {
  'solver': lambda *a: measure_stream(*a, 'solver'),
  'posterior': lambda *a: measure_stream(*a, 'posterior'),
  'solver_one_at_a_time': measure_one_at_a_time,
  'reference': measure_reference,
  'reference_one_at_a_time': measure_reference_one_at_a_time,
  'end_to_end': measure_end_to_end,
}


def plan(max_users: int) -> list[tuple[str, dict]]:
  """What is measured: one thing varied at a time, around BASE."""
  base = {**BASE, 'users': min(BASE['users'], max_users)}
  rows = [
    ('solver', base),
    ('reference', {**base, 'users': min(20_000, max_users)}),
    ('solver_one_at_a_time', {**base, 'users': min(300, max_users)}),
    ('reference_one_at_a_time', {**base, 'users': min(20, max_users)}),
    ('posterior', {**base, 'users': min(20_000, max_users)}),
  ]
  rows += [('solver', {**base, 'num_prototypes': k}) for k in (2, 4, 16)]
  rows += [('solver', {**base, 'n': n}) for n in (1, 5, 50)]
  sizes = [u for u in (10_000, 1_000_000) if u <= max_users]
  rows += [('solver', {**base, 'users': u}) for u in sizes]
  rows += [('end_to_end', {**base, 'users': max_users})]
  return rows


def render(rows: list[dict], command: str) -> str:
  """The table beside the JSON."""
  columns = (
    ('method', '{}'),
    ('num_prototypes', '{}'),
    ('n', '{}'),
    ('users', '{:,}'),
    ('users_per_second', '{:,.0f}'),
    ('bytes_per_user', '{:,.0f}'),
    ('query_accuracy', '{:.3f}'),
    ('mean_iterations', '{:.1f}'),
    ('largest_relative_gap', '{:.1e}'),
    ('above_1e-5', '{:.1e}'),
    ('not_converged', '{}'),
    ('seconds', '{:.1f}'),
  )
  lines = [
    '# Adaptation: users per second',
    '',
    f'{describe_devices()}; jax {jax.__version__}.',
    '',
    '| ' + ' | '.join(name for name, _ in columns) + ' |',
    '|' + '---|' * len(columns),
  ]
  for row in rows:
    cells = [f.format(row[name]) if name in row else '' for name, f in columns]
    lines.append('| ' + ' | '.join(cells) + ' |')
  base = {row['method']: row for row in rows[:5]}
  solver = base['solver']['users_per_second']
  lines += ['', 'Ratios at K = 8, n = 20, users per second of `solver` over:']
  lines += [
    f'- `{name}`: {solver / row["users_per_second"]:,.1f}'
    for name, row in base.items()
    if name != 'solver'
  ]
  return '\n'.join(lines) + f'\n\nMade by `{command}`.\n'


KEYS = (
  'method',
  'num_prototypes',
  'n',
  'users',
  'users_per_second',
  'bytes_per_user',
  'query_accuracy',
)


def main():
  # Before JAX starts: one XLA device uses one core for these small loops.
  jax.config.update('jax_num_cpu_devices', max(_DEVICES.value, 1))
  out = Path(_OUT.value)
  if _STREAM.value:
    write_json(out, stream_in_this_process(Path(_STREAM.value)))
    return
  out.parent.mkdir(parents=True, exist_ok=True)
  problems, rows = {}, []
  for method, setting in plan(_MAX_USERS.value):
    size = setting['num_prototypes']
    if size not in problems:
      problems[size] = Problem(size)
    found = MEASURES[method](problems[size], setting['n'], setting['users'])
    rows.append({'method': method, **setting, **found})
    print(
      f'{method}, K = {size}, n = {setting["n"]}, {setting["users"]:,} users: '
      f'{found["users_per_second"]:,.0f} users/s, accuracy '
      f'{found["query_accuracy"]:.3f}',
      flush=True,
    )
    # After each row: a run that is cut short keeps what it measured.
    write_json(out, [{key: row[key] for key in KEYS} for row in rows])
  command = f'python -m benchmarks.adaptation --out={_OUT.value}'
  write_text(out.with_suffix('.md'), render(rows, command))


if __name__ == '__main__':
  cli.run(main)
