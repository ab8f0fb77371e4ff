"""Tiny runs in processes of their own, to be stopped, killed and compared."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pal_jax.errors import InputError
from pal_jax.train import RESULTS_FILE

ROOT = Path(__file__).resolve().parents[1]
KILLS_A_RUN = 10
FIELDS = {
  'train.num_steps': 600,
  'train.log_every': 20,
  'train.checkpoint_every': 60,
  'model.dropout': 0.1,  # with noise, so that its key is resumed, too
  'model.projector': 'mlp1',
}
_WRITING = '*.orbax-checkpoint-tmp'
_LONGEST = 600  # seconds of a tiny run


def command(workdir: Path) -> list[str]:
  """Of a tiny run."""
  return [
    sys.executable,
    '-m',
    'pal_jax.main',
    '--config=configs/tiny.py:simulation',
    f'--workdir={workdir}',
    *(f'--config.{name}={value}' for name, value in FIELDS.items()),
  ]


def environment() -> dict[str, str]:
  """Of its process: compiling would be most of a tiny run."""
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': (
      '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=0'
    ),
    'PYTHONPATH': str(ROOT),
    'PYTHONUNBUFFERED': '1',  # what a killed process printed tells where it was
  }


def start(workdir: Path) -> subprocess.Popen:
  """A tiny run in a process of its own."""
  return subprocess.Popen(
    command(workdir),
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def last_step(workdir: Path) -> int:
  """The last that metrics.jsonl tells of; 0 before."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  try:
    return json.loads(lines[-1])['step'] if lines else 0
  except json.JSONDecodeError:  # being written
    return json.loads(lines[-2])['step'] if len(lines) > 1 else 0


def run_undisturbed(workdir: Path) -> float:
  """What the others are compared with; its seconds."""
  begin = time.monotonic()
  finish(workdir)
  return time.monotonic() - begin


def finish(workdir: Path) -> str:
  """Lets a run end; what it printed."""
  process = start(workdir)
  output, _ = process.communicate(timeout=_LONGEST)
  if process.returncode:
    raise RuntimeError(f'exit status {process.returncode}: {output[-3000:]}')
  return output


@dataclasses.dataclass(frozen=True)
class Kill:
  """When and where a run was killed."""

  run: int  # which of them
  seconds: float  # after the start of its process
  during: str
  step: int  # the last that metrics.jsonl tells of


def _unfinished(folder: Path) -> set[tuple[str, int]]:
  """Checkpoints that are being written, or were when a run was killed."""
  found = set()
  for path in folder.glob(_WRITING):
    with contextlib.suppress(FileNotFoundError):  # just finished
      found.add((path.name, path.stat().st_ino))
  return found


def kill(workdir: Path, run: int, after: float, writing: bool) -> Kill | None:
  """Starts a run and kills it; None if it had ended before.

  Args:
    workdir: of the run.
    run: its number.
    after: seconds.
    writing: to wait, then, until a checkpoint is being written.
  """
  folder = workdir / 'checkpoints'
  left_over = _unfinished(folder)
  logged = last_step(workdir)
  process = start(workdir)
  begin = time.monotonic()
  try:
    while process.poll() is None:
      now = time.monotonic() - begin
      busy = _unfinished(folder) - left_over
      if now >= after and (busy or not writing):
        break
      time.sleep(0.001)
  finally:
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
  seconds = time.monotonic() - begin
  if process.returncode == 0:
    return None
  if process.returncode != -signal.SIGKILL:
    raise RuntimeError(f'exit status {process.returncode}: {output[-3000:]}')
  step = last_step(workdir)
  if _unfinished(folder) - left_over:
    during = 'writing a checkpoint'
  elif 'adapting to unseen users' in output:
    during = 'evaluating and reporting'
  elif step != logged:
    during = 'training'
  else:
    during = 'starting'
  return Kill(run, seconds, during, step)


def compare(workdir: Path, wanted: Path) -> list[str]:
  """Names of the files that differ from those of an undisturbed run.

  Of metrics.jsonl the speeds do not count, nor do timing.json and report.md,
  which tell the time.
  """
  names = [RESULTS_FILE, 'metrics.jsonl', 'analysis.npz']
  names += [str(p.relative_to(wanted)) for p in (wanted / 'model').iterdir()]
  return [name for name in names if _read(workdir, name) != _read(wanted, name)]


def _read(workdir: Path, name: str):
  path = workdir / name
  if name.endswith('.npz'):  # a zip file, which has dates
    with np.load(path) as file:
      return {key: (file[key].tobytes(), file[key].shape) for key in file}
  if not name.endswith('.jsonl'):
    return path.read_bytes()
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row in rows:
    del row['comparisons_per_second']
  return rows


def run_kills(
  folder: Path,
  number: int,
  seed: int,
  wanted: Path,
  whole: float,
  show=lambda line: None,
) -> list[Kill]:
  """Kills runs in a folder until there were `number` kills.

  Args:
    folder: of the runs.
    number: of kills.
    seed: of their moments.
    wanted: workdir of an undisturbed run.
    whole: its seconds.
    show: called with a line after each kill.

  Raises:
    InputError: if a run ends otherwise than the undisturbed one.
  """
  rng = np.random.default_rng(seed)
  kills: list[Kill] = []
  run = 0
  while len(kills) < number:
    workdir = folder / f'run{run}'
    here = 0
    while here < KILLS_A_RUN and len(kills) < number:
      writing = len(kills) % 3 == 2
      after = float(rng.uniform(0.3 * writing * whole, whole))
      begin = time.monotonic()
      done = kill(workdir, run, after, writing)
      if done is None:
        # It ended before: the undisturbed one was slower, and had compiled.
        whole = min(whole, time.monotonic() - begin)
        break
      kills.append(done)
      here += 1
      show(f'{len(kills)}: {done.seconds:.1f} s, {done.during}, {done.step}')
    finish(workdir)
    different = compare(workdir, wanted)
    if different:
      raise InputError(
        f'{workdir}: after {here} kills these differ from an undisturbed run: '
        + ', '.join(different)
      )
    run += 1
  return kills
