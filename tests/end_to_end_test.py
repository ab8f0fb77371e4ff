"""A config goes in; results, a report and figures come out."""

import json
import struct
import zlib

import jax
import numpy as np
import pytest

from configs import tiny
from pal_jax.train import train_and_evaluate

METRICS = {
  'accuracy',
  'user_accuracy',
  'worst_decile_accuracy',
  'nll',
  'brier',
  'ece',
}
# What other programs read; a change here is a change of the interface.
INTERFACE = {'seen', 'unseen', 'ari', 'ari_dominant', 'num_prototypes', 'train'}
FIGURES = ('few_shot.png', 'weights.png', 'space.png')

RUNS = {
  'persona': ('persona', {}),
  'simulation': ('simulation', {}),
  # PAL-B, users who hold mixtures, noisy labels, the last parameters.
  'pal_b mixture': (
    'simulation',
    {
      'data.mixture': 1.0,
      'data.label_noise': 0.1,
      'model.name': 'pal_b',
      'model.projector': 'mlp0',
      'model.num_prototypes': 3,
      'model.membership': 'mixture_likelihood',
      'train.select': 'last',
      'adaptation.strength': 1.0,
    },
  ),
  # Latent classes: whole users in a batch, posteriors in closed form.
  'user-level pmap': (
    'simulation',
    {
      'model.membership': 'mixture_likelihood',
      'model.mixture_level': 'user',
      'train.batching': 'users',
      'parallel': 'pmap',
    },
  ),
}


def make_config(name):
  which, fields = RUNS[name]
  config = tiny.get_config(which)
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Each of RUNS, run once: (results, workdir, what was said)."""
  # Compiling is nearly all that these cost.
  before = jax.config.values['jax_disable_most_optimizations']
  jax.config.update('jax_disable_most_optimizations', True)
  done = {}

  def get(name):
    if name not in done:
      workdir = tmp_path_factory.mktemp('run') / 'workdir'
      said = []
      results = train_and_evaluate(
        make_config(name), workdir, progress=False, say=said.append
      )
      done[name] = results, workdir, said
    return done[name]

  yield get
  jax.config.update('jax_disable_most_optimizations', before)


def assert_metrics(metrics):
  assert set(metrics) - {'ties'} == METRICS
  for name in METRICS - {'nll'}:
    assert 0.0 <= metrics[name] <= 1.0, name
  assert metrics['nll'] > 0.0
  assert metrics['worst_decile_accuracy'] <= metrics['user_accuracy']


@pytest.mark.parametrize('name', RUNS)
def test_results_have_the_keys_of_the_interface(finished, name):
  results, workdir, _ = finished(name)
  config = make_config(name)
  assert set(results) >= INTERFACE
  assert_metrics(results['seen'])
  # JSON has no integer keys.
  counts = [str(n) for n in config.evaluation.num_support]
  assert list(results['unseen']) == counts and counts[0] == '0'
  for metrics in results['unseen'].values():
    assert_metrics(metrics)
  assert results['num_prototypes'] == config.model.num_prototypes
  assert results['train']['steps'] == 40
  timing = json.loads((workdir / 'timing.json').read_text(encoding='utf-8'))
  assert timing['seconds'] > 0 and timing['comparisons_per_second'] > 0
  text = (workdir / 'results.json').read_text(encoding='utf-8')
  assert json.loads(text) == results
  assert 'NaN' not in text and 'Infinity' not in text


@pytest.mark.parametrize('name', RUNS)
def test_the_rand_index_is_null_for_mixtures_of_personas(finished, name):
  results, _, _ = finished(name)
  if name == 'pal_b mixture':
    assert results['ari'] is None and results['ari_dominant'] is None
  else:
    assert -1.0 <= results['ari'] <= 1.0
    assert -1.0 <= results['ari_dominant'] <= 1.0


@pytest.mark.parametrize('name', RUNS)
def test_the_grid_repeats_what_stands_at_the_top(finished, name):
  results, _, _ = finished(name)
  grid = results['grid']
  assert grid['seen_users']['unseen_items'] == results['seen']
  assert grid['unseen_users']['unseen_items'] == results['unseen']
  for users in grid.values():
    assert set(users) == {'seen_items', 'unseen_items'}


@pytest.mark.parametrize('name', RUNS)
def test_the_config_is_saved_with_the_run(finished, name):
  _, workdir, _ = finished(name)
  saved = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  assert saved == json.loads(make_config(name).to_json())


@pytest.mark.parametrize('name', RUNS)
def test_the_report_says_what_the_results_say(finished, name):
  results, workdir, _ = finished(name)
  report = (workdir / 'report.md').read_text(encoding='utf-8')
  assert f'{results["seen"]["accuracy"]:.1%}' in report
  for metrics in (results['seen'], *results['unseen'].values()):
    row = ' | '.join(
      f'{metrics[key]:.3f}'
      for key in (
        'accuracy',
        'user_accuracy',
        'worst_decile_accuracy',
        'nll',
        'brier',
        'ece',
      )
    )
    assert row in report
  for word in ('accuracy', 'over users', 'worst 10%', 'NLL', 'Brier', 'ECE'):
    assert word in report
  for n in results['unseen']:
    assert f'n = {n}' in report
  assert f'K = {results["num_prototypes"]}' in report
  timing = json.loads((workdir / 'timing.json').read_text(encoding='utf-8'))
  assert f'{timing["seconds"]:.1f} s' in report
  assert 'comparisons/s' in report
  if results['ari'] is None:
    assert 'Rand index' not in report
  else:
    assert 'Rand index' in report and f'{results["ari"]:.2f}' in report
  for figure in FIGURES:
    assert f']({figure})' in report
  assert 'nan' not in report.lower().replace('finance', '')


def decode_png(path) -> np.ndarray:
  """[height, width * channels] bytes before the rows' filters are undone."""
  data = path.read_bytes()
  assert data[:8] == b'\x89PNG\r\n\x1a\n'
  width, height = struct.unpack('>II', data[16:24])
  position, body = 8, b''
  while position < len(data):
    (length,) = struct.unpack('>I', data[position : position + 4])
    kind = data[position + 4 : position + 8]
    if kind == b'IDAT':
      body += data[position + 8 : position + 8 + length]
    position += 12 + length
  assert kind == b'IEND'
  assert width > 300 and height > 200
  rows = np.frombuffer(zlib.decompress(body), np.uint8)
  return rows.reshape(height, -1)[:, 1:]


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('figure', FIGURES)
def test_figures_are_drawn(finished, name, figure):
  """More than a blank page: many rows have ink, in many values."""
  rows = decode_png(finished(name)[1] / figure)
  inked = (np.ptp(rows.astype(int), axis=1) > 0).mean()
  assert inked > 0.5
  assert len(np.unique(rows)) > 30


@pytest.mark.parametrize('name', RUNS)
def test_messages_say_what_is_going_on(finished, name):
  assert finished(name)[2] == ['adapting to unseen users and evaluating']


def test_a_simulation_is_learned(finished):
  """Planted prototypes, few comparisons: far above one score for all."""
  results, _, _ = finished('simulation')
  control = results['controls']['homogeneous_seen']['accuracy']
  assert results['seen']['accuracy'] > 0.85
  assert results['seen']['accuracy'] > control
  assert results['unseen']['0']['accuracy'] > 0.8
  assert results['adaptation']['not_converged'] == 0


def test_latent_classes_are_found(finished):
  results, _, _ = finished('user-level pmap')
  assert results['adaptation']['method'] == 'posterior'
  assert results['seen']['accuracy'] > 0.85


def test_the_tiny_simulation_is_the_one_of_before(finished):
  """Golden numbers. If one must change, say why where it changes."""
  _, workdir, _ = finished('simulation')
  lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row['step'] for row in rows] == [10, 20, 30, 40]
  np.testing.assert_allclose(
    [row['loss'] for row in rows],
    [0.322918, 0.225803, 0.204221, 0.171837],
    rtol=1e-3,
  )


def test_an_unknown_tiny_config_is_refused():
  with pytest.raises(ValueError, match="expected 'persona' or 'simulation'"):
    tiny.get_config('imagenet')


@pytest.mark.parametrize('which', ['persona', 'simulation'])
def test_tiny_configs_are_locked(which):
  with pytest.raises(AttributeError):
    tiny.get_config(which).num_epochs = 3
