"""How the benchmarks take time, and what they say of the machine."""

import platform
import time
from collections.abc import Callable

import jax


def best_of(call: Callable[[], object], repeats: int = 3) -> float:
  """Seconds of the fastest of some calls, after one that is not counted."""
  jax.block_until_ready(call())
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - begin)
  return min(times)


def describe_devices() -> str:
  """'2 cpu devices (x86_64)'."""
  device = jax.devices()[0]
  kind = platform.processor() or platform.machine()
  if device.platform != 'cpu':
    kind = device.device_kind
  return f'{len(jax.devices())} {device.platform} devices ({kind})'
