"""Trains, adapts to unseen users, evaluates, and writes a report.

  python -m pal_jax.main --config=configs/persona.py --workdir=FOLDER

Run it again to go on where it was stopped. Exit status: 0 finished; 2 for a
mistake in the input, or a disk that cannot be written; 75 stopped by SIGTERM,
after saving.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from pal_jax import cli
from pal_jax.train import TIMING_FILE, train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment, for example configs/persona.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of this run: checkpoints, results, report.'
)
_SHOWN = ('seen', 'unseen', 'ari', 'ari_dominant', 'num_prototypes', 'train')


def main():
  results = train_and_evaluate(_CONFIG.value, _WORKDIR.value)
  shown = {key: results[key] for key in _SHOWN}
  timing = Path(_WORKDIR.value).expanduser() / TIMING_FILE
  if timing.exists():  # not of a run finished by an older version
    shown['train'] |= json.loads(timing.read_text(encoding='utf-8'))
  print(json.dumps(shown, indent=2))
  print(f'report: {_WORKDIR.value}/report.md')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
