"""Several processes that train one model: how they meet, agree and stop.

`joined` makes them one program, whose devices `parallel` then sees. All run the
same loop on the same numbers; the first one alone touches the workdir's files
outside of checkpoints, and `from_first` tells the others what came of it.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jax._src.distributed import global_state

from pal_jax.errors import InputError
from pal_jax.preemption import EXIT_CODE, Preempted

ADDRESS_VARIABLE = 'JAX_COORDINATOR_ADDRESS'
COUNT_VARIABLE = 'JAX_NUM_PROCESSES'
INDEX_VARIABLE = 'JAX_PROCESS_ID'
_START = 300  # seconds that processes wait for each other at the start
_RAISED = {error.__name__: error for error in (InputError, Preempted)}
_told = 0


@dataclass(frozen=True)
class Place:
  """Which of how many processes this is, and where they meet."""

  address: str  # HOST:PORT of the process 0
  count: int
  index: int

  def __str__(self):
    return f'process {self.index} of {self.count}'


def find_place(
  address: str | None,
  count: int | None,
  index: int | None,
  environment: Mapping[str, str],
) -> Place | None:
  """From flags, and for those that are None from the environment.

  Returns:
    None if nothing tells of several processes.

  Raises:
    InputError: if only some are given, or they contradict each other.
  """
  address = address or environment.get(ADDRESS_VARIABLE) or None
  count = _number(count, COUNT_VARIABLE, environment)
  index = _number(index, INDEX_VARIABLE, environment)
  given = {
    f'--coordinator_address or ${ADDRESS_VARIABLE}': address,
    f'--num_processes or ${COUNT_VARIABLE}': count,
    f'--process_id or ${INDEX_VARIABLE}': index,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if missing:
    raise InputError(
      f'several processes need all of {"; ".join(given)}. Missing: '
      f'{"; ".join(missing)}. On a TPU VM, under Slurm or Open MPI --multihost '
      'finds them'
    )
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise InputError(
      f'--coordinator_address={address!r}: expected HOST:PORT of the machine '
      'of process 0, with a free port, for example 10.0.0.1:8476'
    )
  if count < 1 or not 0 <= index < count:
    raise InputError(
      f'--process_id={index} with --num_processes={count}: processes are '
      'numbered from 0 to --num_processes - 1, each number once'
    )
  return Place(address, count, index)


def _number(value, variable, environment) -> int | None:
  if value is not None or not environment.get(variable):
    return value
  try:
    return int(environment[variable])
  except ValueError:
    raise InputError(
      f'${variable}={environment[variable]!r}: expected a whole number'
    ) from None


def is_first() -> bool:
  """Whether this process writes, prints and evaluates; one alone does."""
  return jax.process_index() == 0


class _Obituary:
  """Says why a process ended that could no longer say it itself.

  JAX aborts a process from a thread of its own when another one is gone. A
  shell that outlives it then prints the last line that it was given.
  """

  def __init__(self):
    self._shell = subprocess.Popen(
      [
        'sh',
        '-c',
        'while IFS= read -r line; do last=$line; done; '
        '[ -z "$last" ] || printf "%s\\n" "$last" >&2',
      ],
      stdin=subprocess.PIPE,
      text=True,
      # What is sent to the terminal's whole group is not for it.
      start_new_session=True,
    )

  def prepare(self, line: str) -> None:
    self._shell.stdin.write(f'{line}\n')
    self._shell.stdin.flush()

  def cancel(self) -> None:
    self.prepare('')
    self._shell.stdin.close()
    self._shell.wait()


@contextlib.contextmanager
def joined(place: Place | None, multihost: bool, heartbeat_timeout: int):
  """Within it this process is one of several, if it is.

  If another one dies, this process ends with a message: after the timeout at
  the latest, aborted by JAX (status 134), or with status 75 where a sum over
  devices fails before.

  Args:
    place: of this process; None for one that is alone, or to let JAX find it.
    multihost: whether JAX finds it, as on TPU VMs, under Slurm and Open MPI.
    heartbeat_timeout: seconds without a sign of life after which a process
      counts as dead.

  Raises:
    InputError: if they cannot meet.
  """
  if heartbeat_timeout < 1:
    raise InputError(
      f'--heartbeat_timeout={heartbeat_timeout}: expected seconds, at least 1'
    )
  if place is None and not multihost:
    yield
    return
  obituary = _Obituary()
  name = place or 'this process'
  obituary.prepare(
    f'error: {name} did not meet the others'
    + (f' at {place.address}' if place else '')
    + f' within {_START} seconds: are all of them started, with the same '
    'address and number of processes, and can they reach it?'
  )
  try:
    _initialize(place, heartbeat_timeout)
  except (ValueError, RuntimeError, OSError) as error:
    obituary.cancel()
    at = f' at {place.address}' if place else ''
    raise InputError(f'{name} cannot join the others{at}: {error}') from error
  lost = (
    f'process {jax.process_index()} of {jax.process_count()} stopped: another '
    'process died or can no longer be reached, unless this one was killed '
    'itself; see what the others printed. Start all of them again, with the '
    'same command: they go on from the last checkpoint'
  )
  obituary.prepare(lost)
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):  # its own trouble
      obituary.cancel()
      raise
    reason = ' '.join(str(error).split())[:300]
    print(f'{lost} ({reason})', file=sys.stderr, flush=True)
    obituary.cancel()
    sys.stdout.flush()
    # Not sys.exit: at the exit JAX would wait for those who are gone.
    os._exit(EXIT_CODE)
  except BaseException:
    obituary.cancel()
    raise
  obituary.cancel()


def _initialize(place: Place | None, heartbeat_timeout: int) -> None:
  where = {}
  if place is not None:
    where = {
      'coordinator_address': place.address,
      'num_processes': place.count,
      'process_id': place.index,
      'cluster_detection_method': 'deactivate',
    }
    if place.index == 0:
      # JAX may crash where the port is taken.
      socket.create_server(('', int(place.address.rpartition(':')[2]))).close()
  jax.distributed.initialize(
    **where,
    initialization_timeout=_START,
    heartbeat_timeout_seconds=heartbeat_timeout,
    # A process that ends with an error waits for the others so long.
    shutdown_timeout_seconds=heartbeat_timeout,
  )


def from_first(function: Callable[[], object]):
  """What function(), called by the first process alone, returns; in all.

  The others wait, however long it takes. All must call it in the same order.

  Args:
    function: returns plain JSON values.

  Raises:
    InputError, Preempted: in all processes, if it does in the first.
  """
  if jax.process_count() == 1:
    return function()
  global _told
  key = f'pal_jax/from_first/{_told}'
  _told += 1
  if not is_first():
    raised, value = json.loads(_wait_for(key))
    if raised:
      raise _RAISED[raised](value)
    return value
  try:
    value = function()
  except (InputError, Preempted) as error:
    _tell(key, [type(error).__name__, str(error)])
    raise
  _tell(key, [None, value])
  return value


def _tell(key: str, value) -> None:
  global_state.client.key_value_set(key, json.dumps(value))


def _wait_for(key: str) -> str:
  while True:
    try:
      # A second at a time, so that signals are heard in between.
      return global_state.client.blocking_key_value_get(key, 1000)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
