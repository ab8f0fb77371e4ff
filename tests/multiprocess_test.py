"""Several processes on loopback: one computation, stopped and resumed as one.

Run as a script, with its place and a path, this file is one of several
processes that train by `parallel`, and writes what came out.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tiny_runs
from pal_jax import distributed
from pal_jax.distributed import Place, find_place
from pal_jax.errors import InputError
from pal_jax.preemption import EXIT_CODE
from tests import parallel_test
from tests.slow import SLOW

ROOT = Path(__file__).resolve().parents[1]
FEWER = 'fewer comparisons than devices'
HEARTBEAT = 10  # seconds
DEAD = 'process {} of {} stopped: another process died'


def free_address() -> str:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{found.getsockname()[1]}'


def environment(devices: int) -> dict[str, str]:
  env = tiny_runs.environment()
  env['XLA_FLAGS'] += f' --xla_force_host_platform_device_count={devices}'
  return env


def start(command: list[str], index: int, log: Path, devices: int = 1):
  """One process, which prints into a file: pipes may fill up unread."""
  with log.open('w') as file:
    return subprocess.Popen(
      [*command, f'--process_id={index}'],
      cwd=ROOT,
      env=environment(devices),
      stdout=file,
      stderr=subprocess.STDOUT,
    )


class Processes:
  """Several that run one command, and what they printed."""

  def __init__(self, command, number: int, folder: Path, devices: int = 1):
    folder.mkdir()
    shared = [
      *command,
      f'--coordinator_address={free_address()}',
      f'--num_processes={number}',
    ]
    self._logs = [folder / f'{i}.txt' for i in range(number)]
    self.processes = [
      start(shared, i, log, devices) for i, log in enumerate(self._logs)
    ]

  def wait(self, timeout: float = 300) -> list[int]:
    """Exit statuses; nobody is left behind, whatever happens."""
    deadline = time.monotonic() + timeout
    try:
      return [
        p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes
      ]
    finally:
      for process in self.processes:
        process.kill()

  def printed(self) -> list[str]:
    return [log.read_text() for log in self._logs]

  def wait_for(self, words: list[str], timeout: float = 60) -> list[str]:
    """What was printed, once each log has its words or time is up.

    Of a process that JAX aborted, a shell that outlives it prints them.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
      printed = self.printed()
      if all(w in text for w, text in zip(words, printed, strict=True)):
        break
      time.sleep(0.05)
    return self.printed()


# One computation.


def train_both(path: str, case: str, *flags: str) -> None:
  """The script: a case in both modes on the devices of all processes."""
  import jax

  given = dict(flag[2:].split('=') for flag in flags)
  place = find_place(
    given['coordinator_address'],
    int(given['num_processes']),
    int(given['process_id']),
    {},
  )
  with distributed.joined(place, False, HEARTBEAT):
    results = {
      mode: parallel_test.train(case, mode, jax.device_count())
      for mode in ('jit', 'pmap')
    }
    # Each process has the features of its own devices' rows.
    results['jit, host'] = parallel_test.train(
      case, 'jit', jax.device_count(), on_host=True
    )
  Path(f'{path}.{place.index}').write_text(json.dumps(results))


@pytest.mark.parametrize(
  ('number', 'devices', 'case'),
  [
    (4, 2, 'PAL-A convex'),
    pytest.param(2, 4, 'PAL-A convex', marks=SLOW),
    pytest.param(2, 1, 'PAL-B', marks=SLOW),
    pytest.param(2, 4, 'batch norm', marks=SLOW),
    pytest.param(4, 1, 'user-level mixture', marks=SLOW),
    pytest.param(4, 2, FEWER, marks=SLOW),
  ],
)
def test_many_processes_equal_one_device(tmp_path, number, devices, case):
  path = tmp_path / 'results'
  command = [sys.executable, __file__, str(path), case]
  run = Processes(command, number, tmp_path / 'logs', devices)
  one = parallel_test.train(case, 'jit', 1)
  assert run.wait() == [0] * number, run.printed()
  for i in range(number):
    found = json.loads(Path(f'{path}.{i}').read_text())
    # What pmap returns, each process has for itself.
    assert found['jit']['devices'] == [number * devices]
    assert found['pmap']['devices'] == [devices]
    assert len(found) == 3
    for many in found.values():
      assert many['traces'] == 1
      for key in ('metrics', 'state'):
        np.testing.assert_allclose(many[key], one[key], rtol=1e-5, atol=1e-5)


# Whole runs.

FIELDS = {
  'train.num_steps': 400,
  'train.log_every': 10,
  'train.checkpoint_every': 50,
  'model.projector': 'mlp1',
  # Noise would depend on the number of devices under pmap.
  'model.dropout': 0.0,
}


def command(workdir: Path) -> list[str]:
  return [
    *(x for x in tiny_runs.command(workdir) if '--config.' not in x),
    *(f'--config.{name}={value}' for name, value in FIELDS.items()),
    f'--heartbeat_timeout={HEARTBEAT}',
  ]


def reach(run: Processes, workdir: Path, step: int) -> None:
  """Waits until metrics tell of a step."""
  deadline = time.monotonic() + 300
  while tiny_runs.last_step(workdir) < step:
    assert time.monotonic() < deadline and all(
      p.poll() is None for p in run.processes
    ), run.printed()
    time.sleep(0.01)


def rows(workdir: Path) -> list[dict]:
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def story(tmp_path_factory):
  """One workdir: two processes, of which one gets SIGTERM; two, of which one
  is killed; one on two devices, to the end."""
  folder = tmp_path_factory.mktemp('story')
  workdir = folder / 'run'
  chapters = {}

  def tell(name, number, act, step=0, devices=1):
    run = Processes(command(workdir), number, folder / name, devices)
    if step:
      reach(run, workdir, step)
    act(run)
    begin = time.monotonic()
    statuses = run.wait()
    seconds = time.monotonic() - begin
    if name == 'kill':
      run.wait_for([DEAD.format(0, 2), ''])
    chapters[name] = statuses, run.printed(), seconds

  tell('term', 2, lambda run: run.processes[1].terminate(), 60)
  tell('kill', 2, lambda run: run.processes[1].kill(), 160)
  tell('end', 1, lambda run: None, devices=2)
  return workdir, chapters


def test_sigterm_to_one_stops_all_at_the_same_step(story):
  statuses, printed, _ = story[1]['term']
  assert statuses == [EXIT_CODE] * 2, printed
  steps = [re.search(r'saved after step (\d+);', text) for text in printed]
  assert all(steps), printed
  assert steps[0][1] == steps[1][1]
  assert f'resuming from step {steps[0][1]} of 400' in story[1]['kill'][1][0]


def check_death(statuses, printed, seconds, killed: int) -> None:
  for i, (status, text) in enumerate(zip(statuses, printed, strict=True)):
    if i == killed:
      assert status == -signal.SIGKILL
      continue
    assert status in (EXIT_CODE, -signal.SIGABRT), text
    assert DEAD.format(i, len(statuses)) in text
  assert seconds < HEARTBEAT + 20


def test_a_process_that_dies_stops_the_others_with_a_message(story):
  check_death(*story[1]['kill'], killed=1)


@SLOW
@pytest.mark.parametrize('killed', [0, 3])
def test_any_of_four_stops_the_others(tmp_path, killed):
  """The first is also where the others meet."""
  workdir = tmp_path / 'run'
  run = Processes(command(workdir), 4, tmp_path / 'logs')
  reach(run, workdir, 60)
  run.processes[killed].kill()
  begin = time.monotonic()
  statuses = run.wait()
  seconds = time.monotonic() - begin
  words = ['' if i == killed else DEAD.format(i, 4) for i in range(4)]
  check_death(statuses, run.wait_for(words), seconds, killed)


def test_another_number_of_processes_goes_on_to_the_same_end(
  story, tmp_path_factory
):
  workdir, chapters = story
  statuses, printed, _ = chapters['end']
  assert statuses == [0], printed
  step = int(re.search(r'resuming from step (\d+) of 400', printed[0])[1])
  assert 100 <= step < 400 and step % 50 == 0
  alone = tmp_path_factory.mktemp('alone') / 'run'
  done = subprocess.run(
    command(alone), cwd=ROOT, env=environment(1), capture_output=True
  )
  assert done.returncode == 0, done.stderr
  found, wanted = rows(workdir), rows(alone)
  assert [r['step'] for r in found] == list(range(10, 401, 10))
  for row, other in zip(found, wanted, strict=True):
    assert row.keys() == other.keys()
    for name in row.keys() - {'comparisons_per_second'}:
      assert row[name] == pytest.approx(other[name], abs=1e-5), (row, name)


def test_only_the_first_process_prints(story):
  first, second = story[1]['term'][1]
  assert 'train:' in first and 'train:' not in second
  first, second = story[1]['kill'][1]
  assert 'resuming' in first and 'resuming' not in second


@SLOW
def test_two_processes_run_to_the_results(tmp_path):
  workdir = tmp_path / 'run'
  run = Processes(command(workdir), 2, tmp_path / 'logs')
  assert run.wait() == [0, 0], run.printed()
  first, second = run.printed()
  assert '"unseen"' in first and 'report: ' in first
  assert 'unseen' not in second
  assert (workdir / 'results.json').exists()


# What cannot work is said at once.


def test_a_mistake_is_told_by_all(tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'something').write_text('')
  run = Processes(command(workdir), 2, tmp_path / 'logs')
  assert run.wait() == [2, 2]
  for text in run.printed():
    assert text.count('error: ') == 1 and 'is not empty' in text
    assert 'Traceback' not in text


def test_a_port_that_is_taken_is_refused(tmp_path):
  with socket.socket() as taken:
    taken.bind(('', 0))
    taken.listen()
    address = f'127.0.0.1:{taken.getsockname()[1]}'
    done = subprocess.run(
      [
        *command(tmp_path / 'run'),
        f'--coordinator_address={address}',
        '--num_processes=2',
        '--process_id=0',
      ],
      cwd=ROOT,
      env=environment(1),
      capture_output=True,
      text=True,
    )
  assert done.returncode == 2
  assert f'process 0 of 2 cannot join the others at {address}' in done.stderr
  assert 'Traceback' not in done.stderr


ENVIRONMENT = {
  'JAX_COORDINATOR_ADDRESS': 'host:1234',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '0',
}


def test_flags_come_before_the_environment():
  assert find_place(None, None, None, {}) is None
  assert find_place(None, None, None, ENVIRONMENT) == Place('host:1234', 4, 0)
  assert find_place('a:1', 2, 1, ENVIRONMENT) == Place('a:1', 2, 1)
  # 0 is a number like any other, not one that is missing.
  assert find_place(None, None, 0, ENVIRONMENT | {'JAX_PROCESS_ID': '3'}) == (
    Place('host:1234', 4, 0)
  )


@pytest.mark.parametrize(
  ('flags', 'variables', 'words'),
  [
    (('a:1', 2, None), {}, 'Missing: --process_id or $JAX_PROCESS_ID. '),
    ((None, None, 1), {}, 'Missing: --coordinator_address'),
    (('a:1', 2, 2), {}, '--process_id=2 with --num_processes=2'),
    (('a:1', 2, -1), {}, 'numbered from 0'),
    (('a:1', 0, 0), {}, '--num_processes=0'),
    (('a', 2, 0), {}, "--coordinator_address='a': expected HOST:PORT"),
    (('a:x', 2, 0), {}, 'expected HOST:PORT'),
    (('a:70000', 2, 0), {}, 'expected HOST:PORT'),
    ((None, None, None), {'JAX_PROCESS_ID': 'x'}, "$JAX_PROCESS_ID='x'"),
  ],
)
def test_places_that_cannot_be_are_refused(flags, variables, words):
  with pytest.raises(InputError, match=re.escape(words)):
    find_place(*flags, variables)


def test_a_heartbeat_must_be_possible():
  with (
    pytest.raises(InputError, match='--heartbeat_timeout=0'),
    distributed.joined(None, False, 0),
  ):
    pass


def test_alone_there_is_nobody_to_ask():
  with distributed.joined(None, False, 100):
    assert distributed.is_first()
    assert distributed.from_first(lambda: [1]) == [1]


if __name__ == '__main__':
  train_both(*sys.argv[1:])
