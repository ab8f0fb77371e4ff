"""user_cache: where things are kept, and that programs are compiled once."""

import os
import subprocess
import sys
from pathlib import Path

from pal_jax.user_cache import user_cache_dir

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import jax
from absl import logging
from pal_jax import cli

def main():
  import jax.numpy as jnp
  f = jax.jit(lambda x: sum(jnp.sin(i * x) @ jnp.cos(x) for i in range(60)))
  print(float(f(jnp.eye(8)).sum()))

jax.config.update('jax_logging_level', 'DEBUG')
cli.run(main)
"""


def test_folder_is_xdg_s_or_in_the_home(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert user_cache_dir('features') == tmp_path / 'pal_jax' / 'features'
  monkeypatch.setenv('HOME', str(tmp_path))
  expected = tmp_path / '.cache' / 'pal_jax' / 'features'
  for ignored in ('', 'relative/path'):
    monkeypatch.setenv('XDG_CACHE_HOME', ignored)
    assert user_cache_dir('features') == expected


def run(**variables):
  env = {k: v for k, v in os.environ.items() if 'CACHE' not in k}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    cwd=ROOT,
    env=env | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)} | variables,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done


def hits(done) -> int:
  return done.stderr.count('cache hit for')


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
  first, second = (run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
  assert hits(first) == 0 and hits(second) > 0
  assert first.stdout == second.stdout
  assert list((tmp_path / 'pal_jax' / 'compiled').iterdir())


def test_jax_s_own_variable_comes_first(tmp_path):
  other = tmp_path / 'mine'
  run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(other))
  assert not (tmp_path / 'pal_jax').exists() and other.exists()


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
  (tmp_path / 'pal_jax').write_text('a file')
  done = run(XDG_CACHE_HOME=str(tmp_path))
  assert float(done.stdout) and 'Error' not in done.stdout
