"""python -m pal_jax.audit --config=configs/persona.py."""

import sys

from absl import flags
from ml_collections import config_flags

from pal_jax import cli, data
from pal_jax.audit import audit, has_leak, render

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment whose data is audited.'
)


def main():
  config = _CONFIG.value
  dataset = data.create(config.data, join_prompt=config.model.name == 'pal_a')
  findings = audit(dataset)
  print(render(findings), end='')
  if has_leak(findings):
    sys.exit(3)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config'])
  cli.run(main)
