"""SIGTERM, SIGKILL and disks that refuse: whole runs in processes of their own.

Five random kills here, fifty where slow tests run; `benchmarks.kills` keeps a
log of them.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from benchmarks import tiny_runs
from configs import tiny
from pal_jax import train as training
from pal_jax.errors import InputError
from pal_jax.preemption import EXIT_CODE, Preempted, Preemption

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def timed(tmp_path_factory):
  """A run that nobody disturbed, and its seconds."""
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  return workdir, tiny_runs.run_undisturbed(workdir)


@pytest.fixture(scope='module')
def undisturbed(timed):
  return timed[0]


def tiny_config():
  config = tiny.get_config('simulation')
  config.update_from_flattened_dict(tiny_runs.FIELDS)
  return config


def terminate(process: subprocess.Popen, workdir: Path, step: int) -> str:
  """Sends SIGTERM when metrics tell of a step; what was printed."""
  deadline = time.monotonic() + 300
  while process.poll() is None and tiny_runs.last_step(workdir) < step:
    assert time.monotonic() < deadline
    time.sleep(0.005)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=120)
  return output


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """A run that got SIGTERM and went on: its workdir and the two outputs."""
  workdir = tmp_path_factory.mktemp('stopped') / 'run'
  process = tiny_runs.start(workdir)
  first = terminate(process, workdir, 140)
  assert process.returncode == EXIT_CODE == 75, first[-3000:]
  assert not (workdir / 'results.json').exists()
  return workdir, first, tiny_runs.finish(workdir)


def test_sigterm_saves_and_the_same_command_goes_on(stopped, undisturbed):
  workdir, first, second = stopped
  (line,) = (x for x in first.splitlines() if x.startswith('stopped by'))
  step = int(line.split('after step ')[1].split(';')[0])
  assert step >= 140
  assert 'Traceback' not in first
  assert f'resuming from step {step} of 600' in second
  assert tiny_runs.compare(workdir, undisturbed) == []


def test_nothing_is_left_behind(stopped, undisturbed):
  """No temporary file, no unfinished checkpoint, nothing set aside."""
  expected = {
    'analysis.npz',
    'checkpoints',
    'config.json',
    'few_shot.png',
    'metrics.jsonl',
    'model',
    'report.md',
    'results.json',
    'space.png',
    'timing.json',
    'weights.png',
  }
  for workdir in (stopped[0], undisturbed):
    assert {p.name for p in workdir.iterdir()} == expected
    for path in (workdir / 'checkpoints').iterdir():
      assert path.name.isdigit()


def test_a_finished_workdir_gives_its_results_again(undisturbed, monkeypatch):
  """Without data, features or training."""
  before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob('*')}

  def never(*args, **kwargs):
    raise AssertionError('it is finished')

  for name in ('create_experiment', 'train', 'evaluate'):
    monkeypatch.setattr(training, name, never)
  said = []
  results = training.train_and_evaluate(
    tiny_config(), undisturbed, progress=False, say=said.append
  )
  assert results == json.loads((undisturbed / 'results.json').read_text())
  assert said == [f'{undisturbed} is finished; these are its results']
  assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob('*')} == before


def test_a_finished_workdir_refuses_another_config(undisturbed):
  config = tiny_config()
  config.data.seed = 5
  with pytest.raises(InputError, match='data.seed was 0, now 5'):
    training.train_and_evaluate(config, undisturbed, progress=False)


def raise_sigterm(*args, **kwargs):
  signal.raise_signal(signal.SIGTERM)
  raise AssertionError('nobody listened')


def test_sigterm_before_training_leaves_no_workdir(tmp_path, monkeypatch):
  monkeypatch.setattr(training, 'create_experiment', raise_sigterm)
  workdir = tmp_path / 'run'
  with pytest.raises(Preempted, match='stopped by SIGTERM'):
    training.train_and_evaluate(tiny_config(), workdir, progress=False)
  assert not workdir.exists()


def test_sigterm_while_evaluating_costs_the_evaluation(
  undisturbed, tmp_path, monkeypatch
):
  """Its checkpoints are there; the run ends as it would have."""
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed, workdir)
  (workdir / 'results.json').unlink()
  with monkeypatch.context() as patch:
    patch.setattr(training, 'evaluate', raise_sigterm)
    with pytest.raises(Preempted, match='goes on from the last checkpoint'):
      training.train_and_evaluate(tiny_config(), workdir, progress=False)
  assert not (workdir / 'results.json').exists()
  output = tiny_runs.finish(workdir)
  assert 'resuming from step 600 of 600' in output
  assert tiny_runs.compare(workdir, undisturbed) == []


def test_kills_at_any_moment_change_nothing(timed, tmp_path):
  number = 50 if os.environ.get('PAL_JAX_SLOW_TESTS') else 5
  found = tiny_runs.run_kills(tmp_path, number, 0, *timed)
  assert len(found) == number
  assert any(k.step > 0 for k in found)  # not all of them at the start


def test_a_second_sigterm_kills():
  preemption = Preemption()
  with preemption.listening(), pytest.raises(Preempted), preemption.held():
    signal.raise_signal(signal.SIGTERM)
    assert preemption.requested
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  with preemption.listening(), pytest.raises(Preempted):
    signal.raise_signal(signal.SIGTERM)


def test_the_handler_from_before_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with Preemption().listening():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


def test_threads_may_train_without_listening():
  done = []

  def work():
    with Preemption().listening() as preemption:
      done.append(preemption.requested)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert done == [False]


# Disks. In a namespace of its own a process may mount what it likes.

UNSHARE = ['unshare', '--user', '--map-root-user', '--mount']


def may_mount(folder: Path) -> bool:
  if not shutil.which('unshare'):
    return False
  mount = f'mount -t tmpfs -o size=64k tmpfs {folder}'
  return not subprocess.run(
    [*UNSHARE, 'sh', '-c', mount], capture_output=True
  ).returncode


def run_mounted(workdir: Path, script: str) -> subprocess.CompletedProcess:
  """`script` with $RUN, the command of a tiny run in `workdir`."""
  if not may_mount(workdir):
    pytest.skip('mounting in a user namespace is not permitted here')
  return subprocess.run(
    [*UNSHARE, 'sh', '-c', script],
    cwd=ROOT,
    env={
      **tiny_runs.environment(),
      'RUN': ' '.join(tiny_runs.command(workdir / 'run')),
      'AT': str(workdir),
      'SAVED': f'{workdir}.saved',  # outside of what is mounted
    },
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(
  undisturbed, tmp_path
):
  """It fills up in training; with room again the run ends as it would have."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  done = run_mounted(
    folder,
    """
    mount -t tmpfs -o size=3m tmpfs $AT || exit 99
    (while ! ls $AT/run/checkpoints/60 >/dev/null 2>&1; do sleep 0.01; done
     dd if=/dev/zero of=$AT/fill bs=4k 2>/dev/null) &
    $RUN; echo status $?
    ls $AT/run/checkpoints
    rm $AT/fill
    mount -o remount,size=64m $AT
    $RUN; echo status $?
    cp -r $AT/run $SAVED
    """,
  )
  output = done.stdout + done.stderr
  assert done.stdout.count('status 2') == 1, output[-4000:]
  assert 'status 0' in done.stdout, output[-4000:]
  (line,) = (x for x in done.stderr.splitlines() if x.startswith('error: '))
  # Threads of orbax may have printed what they ran into, too.
  assert 'No space left' in line and 'goes on from the last checkpoint' in line
  assert 'resuming from step' in done.stdout
  assert tiny_runs.compare(Path(f'{folder}.saved'), undisturbed) == []


def test_a_read_only_workdir_is_refused(tmp_path):
  folder = tmp_path / 'disk'
  folder.mkdir()
  done = run_mounted(
    folder,
    """
    mount -t tmpfs -o size=64m tmpfs $AT || exit 99
    mkdir $AT/run
    mount -o remount,ro $AT
    $RUN; echo status $?
    """,
  )
  assert 'status 2' in done.stdout, (done.stdout + done.stderr)[-4000:]
  assert 'Read-only file system' in done.stderr
  assert 'Traceback' not in done.stderr
