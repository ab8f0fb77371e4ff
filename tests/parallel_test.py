"""parallel: one device, eight by jit and eight by pmap are one computation.

Run as a script, with a path, this file trains on eight made-up devices and
writes what came out; pytest starts it so and reads that.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from configs import base
from pal_jax import models, parallel
from pal_jax import train_step as steps
from pal_jax.errors import InputError
from pal_jax.structs import FeatureTable, make_comparisons
from pal_jax.user_rows import ROW_MULTIPLE, trim

ROOT = Path(__file__).resolve().parents[1]
NUM_DEVICES, NUM_STEPS = 8, 6
NUM_USERS, NUM_ITEMS, FEATURES = 5, 20, 6

# Dropout and Gumbel noise are left out: under pmap each device draws its own.
CASES = {
  'PAL-A convex': {'point': 'f(P)w', 'membership': 'convex'},
  'PAL-B': {'name': 'pal_b', 'preference': 'cosine'},
  'user-level mixture': {
    'membership': 'mixture_likelihood',
    'mixture_level': 'user',
  },
  'batch norm': {'point': 'f(Pw)', 'batch_norm': True},
  'fewer comparisons than devices': {'projector': 'identity', 'width': 6},
  'rows of users': {'point': 'Pw'},
}
ROWS = 'rows of users'  # a step works on those of its batch alone
# With features here and there, and with dropout.
PLACED = 'PAL-B, placed'
# Neither is a multiple of the number of devices.
BATCH_SIZES = dict.fromkeys([*CASES, PLACED], 21) | {
  'fewer comparisons than devices': 5
}
MODES = {
  'one device': ('jit', 1),
  'jit': ('jit', NUM_DEVICES),
  'pmap': ('pmap', NUM_DEVICES),
}


def batch_of(step: int, size: int):
  """Users in blocks that straddle devices, and a mask of its own each step."""
  rng = np.random.default_rng(step)
  mask = rng.random(size) > 0.4
  # Under pmap rows 0:3 are the first device's: one device has nothing, and
  # the others have different numbers.
  mask[:3], mask[3:6] = False, True
  mask[-1] = True
  return make_comparisons(
    np.sort(rng.integers(0, NUM_USERS, size)),
    np.stack([rng.permutation(NUM_ITEMS)[:2] for _ in range(size)]),
    rng.integers(0, 2, size),
    prompt=rng.integers(0, 3, size),
    weight=rng.uniform(0.5, 2.0, size) if size > 8 else None,
    mask=mask,
  )


def train(
  case: str,
  mode: str,
  num_devices: int,
  on_host: bool = False,
  dropout: float = 0.0,
  splits: bool = False,
) -> dict:
  rng = np.random.default_rng(0)
  table = FeatureTable(
    rng.normal(size=(NUM_ITEMS, FEATURES)).astype(np.float32),
    rng.normal(size=(3, FEATURES)).astype(np.float32),
  )
  config = base.model()
  config.update(
    {
      'num_prototypes': 2,
      'width': 4,
      'projector': 'mlp1',
      'dropout': dropout,
      # With relu two candidates may fall on one point, and the sign of their
      # difference is rounding.
      'activation': 'gelu',
      **CASES[case.removesuffix(', placed')],
    }
  )
  train_config = base.train()
  train_config.batching = 'users'
  train_config.bound_weight, train_config.bound_radius = 0.1, 0.5
  # Under pmap each device would draw its own examples.
  train_config.population_rate = 0.0
  axis = parallel.axis_name(mode)
  model = models.create(
    config, num_users=NUM_USERS, feature_width=FEATURES, axis_name=axis
  ).clone(row_multiple=ROW_MULTIPLE if splits else 1)
  # Not Adam: it divides rounding errors of a zero gradient by themselves.
  optimizer = optax.sgd(0.05, momentum=0.9)
  objective = steps.create_objective(train_config, config)
  key = jax.random.key(0)
  devices = jax.devices()[:num_devices]
  state, _ = steps.create_state(model, lambda params: optimizer, key, table)
  if splits:  # of the longer table the rows that count are those of the others
    short, _ = steps.create_state(
      model.clone(row_multiple=1), lambda params: optimizer, key, table
    )
    users = short.params['user_logits']
    state.params['user_logits'] = (
      state.params['user_logits'].at[:NUM_USERS].set(users)
    )
  like = state if splits else None
  state = (
    parallel.place_split(state, devices)
    if splits
    else parallel.place(state, mode, devices)
  )
  source = table if on_host else None
  table = None if on_host else parallel.place(table, mode, devices)
  bound = steps.bind(model, optimizer, objective, axis)
  traces = []

  def step(*args):
    traces.append(1)
    return bound(*args)

  run = parallel.compile_step(
    step,
    mode,
    devices,
    source=source,
    by_user_row=case == ROWS,
    split_table_of=like,
  )
  sent = sent_rows(run, state, table, key) if splits else []
  history = []
  for i in range(NUM_STEPS):
    batch = batch_of(i, BATCH_SIZES[case])
    state, metrics = run(state, batch, table, key)
    # Read at every step: many in flight abort a process of made-up devices.
    history.append([float(x) for x in jax.tree.leaves(metrics)])
  rows = state.params.get('user_logits', jnp.zeros(0)).addressable_shards
  if splits:
    state = parallel.gather_table(state, devices)
  params = trim(state.params, NUM_USERS)
  flat, _ = ravel_pytree(parallel.fetch((params, state.model_state)))
  used = {len(x.devices()) for x in jax.tree.leaves(state.params)}
  return {
    'metrics': history,
    'state': np.asarray(flat).tolist(),
    'devices': sorted(used),
    'traces': len(traces),
    'step': int(state.step),
    'rows': sorted({len(shard.data) for shard in rows}),
    'sent': sent,
  }


def sent_rows(run, state, table, key) -> list[int]:
  """First axes of all arrays that devices send each other in a step."""
  batch = run.prepare(batch_of(0, BATCH_SIZES[ROWS]))
  text = run.step.lower(state, batch, table, key).compile().as_text()
  found = re.findall(
    r'= (.*?) (?:all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(', text
  )
  return [int(n) for kind in found for n in re.findall(r'\w\[(\d+)', kind)]


def main(path: str) -> None:
  results = {
    case: {name: train(case, *MODES[name]) for name in MODES} for case in CASES
  }
  results[PLACED] = {
    f'{mode}, {where}': train(
      PLACED, mode, NUM_DEVICES, where == 'host', dropout=0.5
    )
    for mode in ('jit', 'pmap')
    for where in ('device', 'host')
  }
  results[ROWS]['split'] = train(ROWS, 'jit', NUM_DEVICES, splits=True)
  Path(path).write_text(json.dumps(results), encoding='utf-8')


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  path = tmp_path_factory.mktemp('parallel') / 'results.json'
  flags = (
    f'--xla_force_host_platform_device_count={NUM_DEVICES} '
    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
  )
  done = subprocess.run(
    [sys.executable, __file__, str(path)],
    env={
      **os.environ,
      'XLA_FLAGS': flags,
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(ROOT),
    },
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_eight_devices_equal_one(results, case, mode):
  one, many = results[case]['one device'], results[case][mode]
  assert one['devices'] == [1] and many['devices'] == [NUM_DEVICES]
  assert one['step'] == many['step'] == NUM_STEPS
  np.testing.assert_allclose(
    many['metrics'], one['metrics'], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(many['state'], one['state'], rtol=1e-5, atol=1e-5)


def test_a_split_table_gives_the_numbers_of_a_whole_one(results):
  one, split = results[ROWS]['one device'], results[ROWS]['split']
  assert split['traces'] == 1
  assert one['rows'] == [NUM_USERS]
  assert split['rows'] == [ROW_MULTIPLE // NUM_DEVICES]
  for part in ('metrics', 'state'):
    np.testing.assert_allclose(split[part], one[part], rtol=1e-5, atol=1e-5)


def test_a_split_table_stays_where_it_is(results):
  """What is sent grows with the batch, not with the table."""
  sent = results[ROWS]['split']['sent']
  assert BATCH_SIZES[ROWS] <= max(sent) < ROW_MULTIPLE // NUM_DEVICES


@pytest.mark.parametrize('case', CASES)
def test_the_runs_that_are_compared_move(results, case):
  """Otherwise equal would mean nothing."""
  losses = np.array(results[case]['one device']['metrics'])[:, 0]
  assert np.ptp(losses) > 0.05


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('mode', MODES)
def test_steps_on_many_devices_trace_once(results, case, mode):
  assert results[case][mode]['traces'] == 1


@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_features_on_the_host_give_the_numbers_of_those_on_devices(
  results, mode
):
  device, host = (results[PLACED][f'{mode}, {w}'] for w in ('device', 'host'))
  assert device['traces'] == host['traces'] == 1
  assert host['devices'] == [NUM_DEVICES]
  for part in ('metrics', 'state'):
    np.testing.assert_allclose(host[part], device[part], rtol=1e-6, atol=1e-6)
  assert np.ptp(np.array(host['metrics'])[:, 0]) > 0.05


def test_features_go_to_the_devices_if_they_fit(monkeypatch):
  monkeypatch.setattr(parallel, '_free_bytes', lambda device: 1000.0)
  assert not parallel.stays_on_host('auto', 500)
  assert parallel.stays_on_host('auto', 501)
  assert not parallel.stays_on_host('device', 10**18)
  assert parallel.stays_on_host('host', 1)


@pytest.mark.parametrize('stats', [None, {}, {'bytes_limit': 900}])
def test_free_memory_is_the_devices_or_a_share_of_the_hosts(monkeypatch, stats):
  class Device:
    def memory_stats(self):
      return stats and {**stats, 'bytes_in_use': 200}

  monkeypatch.setattr(parallel, '_free_host_bytes', lambda: 3000.0)
  monkeypatch.setattr(parallel.jax, 'local_device_count', lambda: 2)
  assert parallel._free_bytes(Device()) == (700.0 if stats else 1000.0)


def test_memory_of_this_machine_is_told():
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  assert 0 < parallel._free_host_bytes() <= total


def test_unknown_modes_are_refused_with_the_known_ones():
  for call in (
    parallel.check_mode,
    parallel.axis_name,
    lambda mode: parallel.compile_step(lambda *args: args, mode),
    lambda mode: parallel.place({}, mode),
  ):
    with pytest.raises(InputError, match="'xmap' is unknown.*'jit', 'pmap'"):
      call('xmap')
  with pytest.raises(InputError, match="'disk' is unknown.*'auto', 'device'"):
    parallel.stays_on_host('disk', 1)


def test_only_pmap_has_an_axis_to_sum_over():
  assert parallel.axis_name('jit') is None
  assert parallel.axis_name('pmap') == parallel.AXIS


def test_fetch_gives_numpy():
  tree = parallel.place({'a': np.arange(3.0), 'b': (np.int32(1),)}, 'jit')
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(tree))
  back = parallel.fetch(tree)
  assert isinstance(back['a'], np.ndarray)
  np.testing.assert_array_equal(back['a'], np.arange(3.0))
  assert int(back['b'][0]) == 1


if __name__ == '__main__':
  main(sys.argv[1])
