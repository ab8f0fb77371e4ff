"""How the benchmarks take time, and what they say of the machine."""

import json
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from pal_jax.writer import write_json, write_text


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


def peak_bytes() -> int:
  """The largest resident set of this process."""
  status = Path('/proc/self/status')
  if status.exists():
    # What getrusage says on Linux begins with the size of the parent.
    line = re.search(r'^VmHWM:\s+(\d+) kB', status.read_text(), re.MULTILINE)
    return int(line.group(1)) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak * (1 if sys.platform == 'darwin' else 1024)


def measure_apart(module: str, cell: str, flags: Sequence[str]) -> dict:
  """What a benchmark prints as JSON of one cell, in a process of its own.

  Args:
    module: 'benchmarks.feeds'.
    cell: its flag --cell.
    flags: its other flags.
  """
  done = subprocess.run(
    [sys.executable, '-m', module, f'--cell={cell}', '--out=-', *flags],
    stdout=subprocess.PIPE,
    check=True,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def made_by(module: str) -> str:
  """The command of this process, as a person would write it."""
  return shlex.join(['python', '-m', module, *sys.argv[1:]])


def save(out: Path, rows: list[dict], page: str) -> None:
  """Writes rows as JSON and the page beside it, and prints the page."""
  write_json(out, rows)
  write_text(out.with_suffix('.md'), page)
  print(page)
