"""Trains, adapts to unseen users, evaluates, and writes a report.

  python -m pal_jax.main --config=configs/persona.py --workdir=FOLDER

Run it again to go on where it was stopped. Exit status: 0 finished; 2 for a
mistake in the input, or a disk that cannot be written; 75 stopped by SIGTERM,
after saving, or because another process died.

Several processes, on one machine or many, each with its number:

  python -m pal_jax.main --config=... --workdir=SHARED_FOLDER \\
    --coordinator_address=HOST:PORT --num_processes=2 --process_id=0
"""

import json
import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from pal_jax import cli, distributed
from pal_jax.train import TIMING_FILE, train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment, for example configs/persona.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of this run: checkpoints, results, report.'
)
_ADDRESS = flags.DEFINE_string(
  'coordinator_address',
  None,
  'Of several processes: HOST:PORT of process 0, the same in all of them. '
  'Otherwise $JAX_COORDINATOR_ADDRESS.',
)
_COUNT = flags.DEFINE_integer(
  'num_processes', None, 'How many they are. Otherwise $JAX_NUM_PROCESSES.'
)
_INDEX = flags.DEFINE_integer(
  'process_id', None, 'Which one this is, from 0. Otherwise $JAX_PROCESS_ID.'
)
_MULTIHOST = flags.DEFINE_bool(
  'multihost',
  False,
  'Lets JAX find address, number and index: TPU VMs, Slurm, Open MPI.',
)
_HEARTBEAT = flags.DEFINE_integer(
  'heartbeat_timeout',
  100,
  'Seconds without a sign of life after which a process counts as dead, and '
  'the others stop.',
)
_SHOWN = ('seen', 'unseen', 'ari', 'ari_dominant', 'num_prototypes', 'train')


def main():
  place = distributed.find_place(
    _ADDRESS.value, _COUNT.value, _INDEX.value, os.environ
  )
  with distributed.joined(place, _MULTIHOST.value, _HEARTBEAT.value):
    results = train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    if distributed.is_first():
      _show(results)


def _show(results: dict) -> None:
  shown = {key: results[key] for key in _SHOWN}
  timing = Path(_WORKDIR.value).expanduser() / TIMING_FILE
  if timing.exists():  # not of a run finished by an older version
    shown['train'] |= json.loads(timing.read_text(encoding='utf-8'))
  print(json.dumps(shown, indent=2))
  print(f'report: {_WORKDIR.value}/report.md')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
