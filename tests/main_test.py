"""main: what a person sees on the command line."""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(*args, **env):
  flags = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=0'
  return subprocess.run(
    [sys.executable, *args],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': flags,
      'PYTHONPATH': str(ROOT),
      **env,
    },
    capture_output=True,
    text=True,
    timeout=600,
  )


def main(*args, config='configs/tiny.py:simulation'):
  return python('-m', 'pal_jax.main', f'--config={config}', *args)


def assert_refused(done, *words):
  """Status 2, one line, no traceback, nothing printed as a result."""
  assert done.returncode == 2, done.stderr
  lines = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  assert len(lines) == 1, done.stderr
  assert 'Traceback' not in done.stderr
  assert done.stdout == ''
  for word in words:
    assert word in lines[0]


def test_a_run_prints_its_results_as_json_and_again_when_finished(tmp_path):
  workdir = tmp_path / 'run'
  args = (f'--workdir={workdir}', '--config.train.num_steps=20')
  done = main(*args)
  assert done.returncode == 0, done.stderr
  start, end = done.stdout.index('{'), done.stdout.rindex('}') + 1
  printed = json.loads(done.stdout[start:end])
  assert list(printed) == [
    'seen',
    'unseen',
    'ari',
    'ari_dominant',
    'num_prototypes',
    'train',
  ]
  saved = json.loads((workdir / 'results.json').read_text())
  timing = json.loads((workdir / 'timing.json').read_text())
  assert set(timing) == {'seconds', 'comparisons_per_second'}
  saved['train'] |= timing
  assert printed == {key: saved[key] for key in printed}
  assert done.stdout[end:].strip() == f'report: {workdir}/report.md'
  assert (workdir / 'report.md').exists()
  assert saved['train']['steps'] == 20  # the flag reached the loop
  for word in ('train:', '20/20', 'accuracy', 'comparisons/s'):
    assert word in done.stderr  # the progress bar
  assert 'Traceback' not in done.stderr and 'Warning' not in done.stderr

  again = main(*args)
  assert again.returncode == 0, again.stderr
  start, end = again.stdout.index('{'), again.stdout.rindex('}') + 1
  assert 'is finished' in again.stdout[:start]
  assert json.loads(again.stdout[start:end]) == printed


IMPORTED = 'import sys, pal_jax.main; print(*sorted(sys.modules))'

REFUSED = {
  'variant': ['--config.model.preference=euclidean'],
  # ml_collections makes ('a,b',) of it without a word.
  'comma': ['--config.data.behaviors=risk-seeking,extraversion'],
  'key': ['--config.model.num_prototype=3'],
  'key of another config': [
    '--config=configs/table.py',
    '--config.data.pth=mine.csv',
  ],
  'config': ['--config=configs/nowhere.py'],
  'argument': ['extra'],
}


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
  """What each of REFUSED ended with, and the modules that `main` imports."""
  workdir = tmp_path_factory.mktemp('refused') / 'run'
  calls = {
    name: [
      '-m',
      'pal_jax.main',
      '--config=configs/persona.py',
      f'--workdir={workdir}',
      *args,
    ]
    for name, args in REFUSED.items()
  }
  calls['imports'] = ['-c', IMPORTED]
  # Each takes seconds to import what it does not use.
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    done = dict(
      zip(
        calls,
        pool.map(lambda args: python(*args), calls.values()),
        strict=True,
      )
    )
  assert not workdir.exists()
  return done


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('variant', ["model.preference='euclidean'", 'squared_distance']),
    ('comma', ["'risk-seeking,extraversion'", 'comma', 'quote']),
    ('key', ["'num_prototype'", 'num_prototypes', 'config.model']),
    (
      'key of another config',
      ["config.data has no field 'pth' (did you mean 'path'?)", 'on_problem'],
    ),
    ('argument', ["['extra']"]),
  ],
)
def test_a_mistake_is_one_line_and_status_2(outcomes, name, words):
  assert_refused(outcomes[name], *words)


def test_a_config_file_that_is_not_there_is_named(outcomes):
  done = outcomes['config']
  assert done.returncode == 2
  assert done.stderr.startswith('error: ')
  assert 'configs/nowhere.py' in done.stderr
  assert 'Traceback' not in done.stderr


def test_the_entry_point_imports_no_other_framework(outcomes):
  """They are optional, for some encoders, and cost seconds and gigabytes."""
  done = outcomes['imports']
  assert done.returncode == 0, done.stderr
  loaded = {name.split('.')[0] for name in done.stdout.split()}
  assert {'jax', 'flax', 'orbax', 'pal_jax'} <= loaded
  assert not loaded & {
    'datasets',
    'sentence_transformers',
    'tensorflow',
    'tensorflow_datasets',
    'tokenizers',
    'torch',
    'transformers',
  }
