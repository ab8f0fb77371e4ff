"""python -m pal_jax.main --config=configs/persona.py --workdir=FOLDER."""

import json

from absl import flags
from ml_collections import config_flags

from pal_jax import cli
from pal_jax.train import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment, for example configs/persona.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of this run: checkpoints, results, report.'
)
_SHOWN = ('seen', 'unseen', 'ari', 'ari_dominant', 'num_prototypes', 'train')


def main():
  results = train_and_evaluate(_CONFIG.value, _WORKDIR.value)
  print(json.dumps({key: results[key] for key in _SHOWN}, indent=2))
  print(f'report: {_WORKDIR.value}/report.md')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
