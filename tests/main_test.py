"""main: what a person sees on the command line."""

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

  other = main(f'--workdir={workdir}', '--config.train.num_steps=30')
  assert_refused(other, 'train.num_steps was 20, now 30', str(workdir))


def test_an_unknown_variant_is_one_line(tmp_path):
  workdir = tmp_path / 'run'
  done = main(f'--workdir={workdir}', '--config.model.preference=euclidean')
  assert_refused(done, "model.preference='euclidean'", 'squared_distance')
  assert not workdir.exists()


def test_an_unquoted_tuple_is_one_name_with_a_comma(tmp_path):
  """ml_collections makes ('a,b',) of it without a word."""
  workdir = tmp_path / 'run'
  done = main(
    f'--workdir={workdir}',
    '--config.data.behaviors=risk-seeking,extraversion',
    config='configs/persona.py',
  )
  assert_refused(done, "'risk-seeking,extraversion'", 'comma', 'quote')
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    (
      ['--config.model.num_prototype=3', '--workdir=/nowhere/run'],
      ['model.num_prototype', 'num_prototypes'],
    ),
    (['--config.train.num_steps=many', '--workdir=/nowhere/run'], ['many']),
    (['--config.train.num_steps=3'], ['--workdir']),
    (['--workdir=/nowhere/run', 'extra'], ["['extra']"]),
  ],
  ids=['unknown key', 'wrong type', 'no workdir', 'stray argument'],
)
def test_flags_that_cannot_be_are_named(args, words):
  done = main(*args)
  assert done.returncode != 0
  assert done.stdout.startswith('{') is False
  for word in words:
    assert word in done.stderr + done.stdout
  assert not Path('/nowhere').exists()


def test_an_unknown_name_of_a_config_is_refused(tmp_path):
  done = main(f'--workdir={tmp_path}/run', config='configs/tiny.py:imagenet')
  assert done.returncode != 0
  assert "expected 'persona' or 'simulation'" in done.stderr


def test_the_entry_point_imports_no_other_framework():
  """They are optional, for some encoders, and cost seconds and gigabytes."""
  done = python(
    '-c',
    'import sys, pal_jax.main; print(*sorted(sys.modules))',
  )
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
