"""adaptation.stream: from disk to disk, as `adapt` does in memory.

Run as a script, with a path, this file streams on eight made-up devices and
on one of them, and writes what came out; pytest starts it so and reads that.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from pal_jax.adaptation import Prior, adapt, place, reward_table, statistics
from pal_jax.adaptation import stream as streams
from pal_jax.adaptation.stream import OUTPUTS, Support, adapt_stream
from pal_jax.errors import InputError
from pal_jax.models.pal_a import PalA
from pal_jax.models.pal_b import PalB
from pal_jax.structs import FeatureTable, make_comparisons

ROOT = Path(__file__).resolve().parents[2]
NUM_DEVICES = 8
K, P, M, Q, ATOMS = 3, 4, 20, 5, 6
U, N = 11, 6  # neither chunks of 4 nor eight devices divide the users

MODELS = {
  'linear': (PalA, {'point': 'Pw', 'feature_width': P}),
  'mixture': (
    PalA,
    {'point': 'Pw', 'feature_width': P, 'membership': 'mixture_likelihood'},
  ),
  'prompts': (PalB, {}),
  'cosine': (PalB, {'preference': 'cosine'}),
}
# The first two gather rewards, the others come by `statistics`.
CASES = [
  ('linear', 'posterior'),
  ('linear', 'map'),
  ('mixture', 'posterior'),
  ('prompts', 'map'),
  ('cosine', 'posterior'),
]


@functools.cache
def make_case(name='linear'):
  """(model, variables, placed), support, prior."""
  cls, fields = MODELS[name]
  projector = 'mlp0' if cls is PalB else 'identity'
  model = cls(
    num_users=2, num_prototypes=K, width=P, projector=projector, **fields
  )
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    np.zeros(2, np.int32),
    np.zeros((2, 2, P), np.float32),
    np.zeros((2, P), np.float32),
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: np.float32(rng.normal(size=x.shape)), shapes['params']
  )
  params['log_scale'] = np.float32(0.5)
  table = FeatureTable(
    items=np.float32(rng.normal(size=(M, P))),
    prompts=np.float32(rng.normal(size=(Q, P))),
  )
  variables = {'params': params}
  label = rng.integers(0, 2, (U, N)).astype(np.float32)
  label[:, ::5] = rng.random(label[:, ::5].shape)
  support = Support(
    items=np.argsort(rng.random((U, N, M)), -1)[..., :2],
    label=label,
    count=np.arange(U) % (N + 1),
    prompt=rng.integers(0, Q, (U, N)) if cls is PalB else None,
  )
  prior = Prior(
    log_weights=jnp.float32(log_softmax(rng.normal(size=K))),
    strength=jnp.float32(0.5),
    log_atoms=jnp.float32(log_softmax(2 * rng.normal(size=(ATOMS, K)), -1)),
    log_masses=jnp.float32(log_softmax(rng.normal(size=ATOMS))),
    evidence=jnp.float32(1.5),
    pooling=jnp.float32(0.2),
  )
  return (model, variables, place(model, variables, table)), support, prior


def run(folder, name='linear', support=None, **kwargs):
  frozen, full, prior = make_case(name)
  support = full if support is None else support
  kwargs = {'method': 'posterior', 'progress': False, 'chunk': 4, **kwargs}
  return adapt_stream(*frozen, support, prior, folder, **kwargs)


def read(folder):
  return {path.stem: np.load(path) for path in sorted(Path(folder).iterdir())}


@functools.cache
def in_memory(name, method, whole=False):
  """Every user by one call of `adapt`, by way of `statistics`."""
  (model, variables, placed), support, prior = make_case(name)
  comparisons = make_comparisons(
    0, support.items, support.label, prompt=support.prompt
  )
  stats = statistics(
    model, variables, placed, comparisons, model.adaptation_rule
  )
  mask = whole | (np.arange(N) < support.count[:, None])
  return adapt(
    model, variables, stats, support.label, mask, prior, method=method
  )


def assert_close(found, expected, names=OUTPUTS):
  # Gaps and residuals are rounding errors of zero, and the solver's last step
  # may be one more or less.
  rough = {'gap': 1e-4, 'residual': 3e-4, 'iterations': 1, 'log_weights': 1e-4}
  for name in names:
    wanted = np.asarray(getattr(expected, name))
    assert found[name].dtype == wanted.dtype
    np.testing.assert_allclose(
      found[name], wanted, rtol=1e-5, atol=rough.get(name, 1e-5)
    )


def changed(**fields):
  """The support with some arrays replaced."""
  return dataclasses.replace(make_case()[1], **fields)


# The same numbers as in memory.


def test_the_models_take_both_ways_to_statistics():
  for name in MODELS:
    (model, variables, placed), *_ = make_case(name)
    rewards = reward_table(model, variables, placed, model.adaptation_rule)
    assert (rewards is not None) == (name in ('linear', 'mixture'))


@pytest.mark.parametrize('name, method', CASES)
def test_a_stream_is_adapt_in_memory(name, method, tmp_path):
  expected = in_memory(name, method)
  summary = run(tmp_path / 'out', name, method=method, keep_belief=True)
  found = read(tmp_path / 'out')
  belief = () if method == 'map' else ('log_belief',)
  assert set(found) == {*OUTPUTS, *belief}
  assert found['log_weights'].shape == (U, K)
  assert found['converged'].dtype == bool
  assert_close(found, expected, (*OUTPUTS, *belief))
  assert summary.users == U and summary.not_converged == 0
  # Users differ, or equal would mean nothing.
  assert np.ptp(np.exp(found['log_weights']), 0).max() > 0.1


def test_prompts_matter_to_a_model_that_has_them(tmp_path):
  _, support, _ = make_case('prompts')
  other = dataclasses.replace(support, prompt=(support.prompt + 1) % Q)
  run(tmp_path / 'out', 'prompts', other)
  found = read(tmp_path / 'out')['log_weights']
  expected = in_memory('prompts', 'posterior').log_weights
  assert np.abs(found - expected).max() > 0.01


@pytest.mark.parametrize('chunk', [1, 11, 1000])
def test_the_size_of_chunks_does_not_matter(chunk, tmp_path):
  run(tmp_path / 'out', chunk=chunk, keep_belief=True)
  found = read(tmp_path / 'out')
  assert_close(
    found, in_memory('linear', 'posterior'), (*OUTPUTS, 'log_belief')
  )


def test_memory_maps_are_inputs_and_outputs(tmp_path):
  _, support, _ = make_case('prompts')
  types = {'items': np.int32, 'label': np.float16, 'count': np.uint8}
  maps = {}
  for name, value in vars(support).items():
    value = value.astype(types.get(name, np.int64))
    np.save(tmp_path / f'{name}.npy', value)
    maps[name] = np.load(tmp_path / f'{name}.npy', mmap_mode='r')
    assert isinstance(maps[name], np.memmap)
  run(tmp_path / 'maps', 'prompts', Support(**maps))
  label = support.label.astype(np.float16)
  same = dataclasses.replace(support, label=label)
  run(tmp_path / 'arrays', 'prompts', same)
  found, expected = read(tmp_path / 'maps'), read(tmp_path / 'arrays')
  for name in OUTPUTS:
    np.testing.assert_array_equal(found[name], expected[name])
  mapped = np.load(tmp_path / 'maps' / 'log_weights.npy', mmap_mode='r')
  np.testing.assert_array_equal(mapped, found['log_weights'])


@pytest.mark.parametrize('name', ['linear', 'cosine'])
def test_what_is_beyond_a_users_count_may_be_anything(name, tmp_path):
  _, support, _ = make_case(name)
  dead = np.arange(N) >= support.count[:, None]
  items, label = support.items.copy(), support.label.copy()
  items[dead], label[dead] = (-1, 10**9), np.nan
  dirty = dataclasses.replace(support, items=items, label=label)
  if support.prompt is not None:
    prompt = np.where(dead, -7, support.prompt)
    dirty = dataclasses.replace(dirty, prompt=prompt)
  run(tmp_path / 'dirty', name, dirty)
  assert_close(read(tmp_path / 'dirty'), in_memory(name, 'posterior'))


def test_without_counts_all_comparisons_count(tmp_path):
  run(tmp_path / 'out', support=changed(count=None))
  expected = in_memory('linear', 'posterior', whole=True)
  assert_close(read(tmp_path / 'out'), expected)
  fewer = in_memory('linear', 'posterior')
  assert np.any(expected.log_weights != fewer.log_weights)


def test_users_without_comparisons_are_the_population(tmp_path):
  run(tmp_path / 'out', support=changed(count=np.zeros(U, int)))
  found = read(tmp_path / 'out')
  _, _, prior = make_case()
  mean = np.exp(prior.log_masses) @ np.exp(prior.log_atoms)
  np.testing.assert_allclose(
    np.exp(found['log_weights']), np.tile(mean, (U, 1)), rtol=1e-5
  )
  assert found['converged'].all() and not found['iterations'].any()


def test_prompts_are_ignored_by_a_model_without_them(tmp_path):
  run(tmp_path / 'out', support=changed(prompt=np.full((U, N), Q - 1)))
  assert_close(read(tmp_path / 'out'), in_memory('linear', 'posterior'))


def test_a_ragged_last_chunk_compiles_nothing_new(tmp_path, monkeypatch):
  traced = []

  def counting(*args, **kwargs):
    traced.append(1)
    return adapt(*args, **kwargs)

  monkeypatch.setattr(streams, 'adapt', counting)
  run(tmp_path / 'out', chunk=4)
  assert len(traced) == 1


# Nobody.


def test_zero_users_make_empty_arrays(tmp_path):
  nobody = Support(np.zeros((0, N, 2), int), np.zeros((0, N)))
  summary = run(tmp_path / 'out', support=nobody, keep_belief=True)
  found = read(tmp_path / 'out')
  assert set(found) == {*OUTPUTS, 'log_belief'}
  assert found['log_weights'].shape == (0, K)
  assert found['log_belief'].shape == (0, ATOMS)
  assert found['converged'].shape == (0,)
  assert summary == streams.StreamSummary(0, 0, 0.0, 0.0, 0.0)


# The summary.


def test_users_who_did_not_converge_are_flagged_and_counted(tmp_path):
  summary = run(tmp_path / 'out', method='map', max_iterations=1)
  found = read(tmp_path / 'out')
  silent = make_case()[1].count == 0
  assert found['converged'][silent].all()
  assert not found['converged'].all()
  assert summary.not_converged == np.sum(~found['converged']) > 0
  assert summary.users == U
  relative = found['gap'] / np.maximum(1, np.abs(found['objective']))
  np.testing.assert_allclose(summary.largest_relative_gap, relative.max())
  np.testing.assert_allclose(summary.largest_residual, found['residual'].max())
  np.testing.assert_allclose(
    summary.mean_iterations, found['iterations'].mean()
  )
  assert summary.largest_relative_gap > 1e-5
  assert 0 < summary.mean_iterations <= 1


def test_a_belief_is_written_only_if_asked_for(tmp_path):
  run(tmp_path / 'out')
  assert set(read(tmp_path / 'out')) == set(OUTPUTS)


# Errors. Nothing is left behind.


def wrong_supports():
  _, support, _ = make_case()
  full = dataclasses.replace(support, count=np.full(U, N))

  def put(name, row, value):
    array = getattr(full, name).copy()
    array[row] = value
    return dataclasses.replace(full, **{name: array})

  big = np.int64(2**32 + 3)  # 3, once it is an int32
  return {
    'item': (put('items', (9, 2, 1), M), 'user 9: items .*outside 0 to 19'),
    'negative item': (put('items', (8, 0, 0), -1), 'user 8: items'),
    'item of 64 bits': (put('items', (9, 2, 1), big), 'user 9: items'),
    'label': (put('label', (10, 3), 1.5), 'user 10, comparison 3: label 1.5'),
    'nan': (put('label', (9, 5), np.nan), 'user 9, comparison 5: label nan'),
    'count': (put('count', 9, N + 1), 'user 9: count 7, .* 0 to 6'),
    'negative count': (put('count', 10, -1), 'user 10: count -1'),
  }


@pytest.mark.parametrize('wrong', wrong_supports())
def test_errors_in_a_late_chunk_name_the_user_and_leave_nothing(
  wrong, tmp_path
):
  support, message = wrong_supports()[wrong]
  with pytest.raises(InputError, match=message):
    run(tmp_path / 'out', support=support)
  assert not list(tmp_path.iterdir())


def test_wrong_prompts_name_the_user(tmp_path):
  _, support, _ = make_case('prompts')
  prompt = support.prompt.copy()
  prompt[10, 1] = Q
  wrong = dataclasses.replace(support, prompt=prompt)
  with pytest.raises(InputError, match='user 10: prompt .*outside 0 to 4'):
    run(tmp_path / 'out', 'prompts', wrong)
  with pytest.raises(InputError, match='the model has prompts'):
    none = dataclasses.replace(support, prompt=None)
    run(tmp_path / 'out', 'prompts', none)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'items': np.zeros((U, N), int)}, r'expected \[U, N, 2\]'),
    ({'items': np.zeros((U, N, 3), int)}, r'expected \[U, N, 2\]'),
    ({'items': np.zeros((U - 1, N, 2), int)}, r'expected \[U, N, 2\]'),
    ({'label': np.zeros(U)}, r'labels \(11,\): expected'),
    ({'count': np.zeros(U + 1, int)}, r'count is \(12,\), expected \(11,\)'),
    ({'prompt': np.zeros(U, int)}, r'prompt is \(11,\), expected \(11, 6\)'),
  ],
)
def test_wrong_shapes_are_refused(fields, message, tmp_path):
  with pytest.raises(InputError, match=message):
    run(tmp_path / 'out', support=changed(**fields))
  assert not list(tmp_path.iterdir())


def test_wrong_settings_are_refused(tmp_path):
  with pytest.raises(InputError, match='chunk=0'):
    run(tmp_path / 'out', chunk=0)
  with pytest.raises(InputError, match="'mean' is unknown.*'map'"):
    run(tmp_path / 'out', method='mean')
  assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path):
  folder = tmp_path / 'out'
  folder.mkdir()
  (folder / 'mine').write_text('keep')
  with pytest.raises(InputError, match='out exists: name a new folder'):
    run(folder)
  assert [path.name for path in tmp_path.rglob('*')] == ['out', 'mine']
  assert (folder / 'mine').read_text() == 'keep'


def test_the_folder_appears_when_everything_is_in_it(tmp_path, monkeypatch):
  folder = tmp_path / 'new' / 'out'
  seen = []

  class Watching(streams._Writer):
    def write(self, rows, state):
      seen.append(folder.exists())
      return super().write(rows, state)

    def close(self):
      seen.append(folder.exists())
      return super().close()

  monkeypatch.setattr(streams, '_Writer', Watching)
  run(folder)
  assert seen == [False] * 4  # three chunks
  assert set(read(folder)) == set(OUTPUTS)
  assert [path.name for path in folder.parent.iterdir()] == ['out']


def test_what_an_interrupted_stream_left_is_cleared(tmp_path, monkeypatch):
  def interrupt(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(streams._Writer, 'close', interrupt)
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path / 'out')
  assert not list(tmp_path.iterdir())
  run(tmp_path / 'out')
  assert_close(read(tmp_path / 'out'), in_memory('linear', 'posterior'))


# Eight devices.

DEVICE_CASES = [('linear', 'map'), ('cosine', 'posterior')]


def main(folder: str) -> None:
  assert len(jax.devices()) == NUM_DEVICES
  for name, method in DEVICE_CASES:
    run(Path(folder) / name, name, method=method, chunk=U, keep_belief=True)


@pytest.fixture(scope='module')
def device_results(tmp_path_factory):
  folder = tmp_path_factory.mktemp('stream')
  flags = (
    f'--xla_force_host_platform_device_count={NUM_DEVICES} '
    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
  )
  done = subprocess.run(
    [sys.executable, __file__, str(folder)],
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
  return folder


@pytest.mark.parametrize('name, method', DEVICE_CASES)
def test_eight_devices_equal_one(device_results, tmp_path, name, method):
  assert len(jax.devices()) == 1
  run(tmp_path / 'one', name, method=method, chunk=U, keep_belief=True)
  one = read(tmp_path / 'one')
  many = read(device_results / name)
  assert one.keys() == many.keys()
  for key, value in one.items():
    assert len(value) == U
    np.testing.assert_allclose(many[key], value, rtol=1e-5, atol=1e-5)
  assert_close(many, in_memory(name, method))


if __name__ == '__main__':
  main(sys.argv[1])
