"""Folders for what can be made again: features, compiled programs."""

import os
from pathlib import Path

import jax


def user_cache_dir(name: str) -> Path:
  """$XDG_CACHE_HOME/pal_jax/NAME, or ~/.cache/pal_jax/NAME."""
  base = os.environ.get('XDG_CACHE_HOME', '')
  # The XDG specification says to ignore a relative path.
  root = Path(base) if os.path.isabs(base) else Path.home() / '.cache'
  return root / 'pal_jax' / name


def keep_compiled() -> None:
  """Keeps what JAX compiles on disk, so that the next process starts sooner.

  JAX_COMPILATION_CACHE_DIR names another folder; empty, nothing is kept.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return  # JAX reads it
  try:
    folder = user_cache_dir('compiled')
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # no home, or one that cannot be written
    return
  if not os.access(folder, os.W_OK):
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  # Below this a program is compiled faster than it is worth a file.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
