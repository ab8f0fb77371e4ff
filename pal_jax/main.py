"""python -m pal_jax.main --config=configs/persona.py --workdir=FOLDER."""

import json
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pal_jax.errors import InputError
from pal_jax.train import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment, for example configs/persona.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of this run: checkpoints, results, report.'
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # orbax announces every file; the progress bar is enough.
  logging.set_verbosity(logging.WARNING)
  try:
    results = train_and_evaluate(_CONFIG.value, _WORKDIR.value)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  shown = ('seen', 'unseen', 'ari', 'ari_dominant', 'num_prototypes', 'train')
  print(json.dumps({key: results[key] for key in shown}, indent=2))
  print(f'report: {_WORKDIR.value}/report.md')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
