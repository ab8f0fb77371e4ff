"""What the tests here share beside `oracle`."""

import jax
import pytest


@pytest.fixture(scope='module')
def quick_compilation():
  """Halves the time of compiling programs that then run for a millisecond.

  `solver_test` goes without it: rounding is what it is about.
  """
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
