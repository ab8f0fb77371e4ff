"""Compiles less: most of the tests' time is XLA's."""

import os

import jax
import pytest

# Files that take a minute or more: first, so that no worker is left alone with
# one at the end. (A file is one worker's: its fixtures are made once.)
LONG = (
  'notebook_test.py',
  'preemption_test.py',
  'multiprocess_test.py',
  'train_test.py',
  'end_to_end_test.py',
  'tiny_test.py',
  'main_test.py',
  'pal_test.py',
  'selection_test.py',
  'splits_test.py',
  'tldr_test.py',
  'pickapic_test.py',
  'export_test.py',
  'reward_model_test.py',
)


def pytest_collection_modifyitems(items):
  def place(item):
    name = item.path.name
    return LONG.index(name) if name in LONG else len(LONG)

  items.sort(key=place)  # stable: tests of a file stay in their order


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """Kept for the session's workers and the processes that tests start."""
  # Workers' folders stand side by side in the session's.
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  settings = {
    'jax_compilation_cache_dir': str(folder / 'compiled'),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  for name, value in settings.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture(scope='module', autouse=True)
def quick_compilation(request):
  """Without most optimisations, for programs that run for a millisecond.

  A module that says AS_COMPILED = True has all of them, as users do; so have
  the processes that tests start.
  """
  full = getattr(request.module, 'AS_COMPILED', False)
  jax.config.update('jax_disable_most_optimizations', not full)
