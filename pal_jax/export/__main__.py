"""python -m pal_jax.export --model=WORKDIR --user=ID --out=FOLDER."""

import os
import shutil
from pathlib import Path

from absl import flags

from pal_jax import cli
from pal_jax.errors import InputError
from pal_jax.export import fold, write_folded, write_program
from pal_jax.export.fold import FORMAT
from pal_jax.reward_model import RewardModel
from pal_jax.writer import write_json

_MODEL = flags.DEFINE_string('model', None, 'A finished workdir, or a model.')
_USER = flags.DEFINE_string('user', '', "An id; '' is the population.")
# Of the model's card: nothing of its other users.
_KEPT = ('equation', 'input', 'feature_width', 'features', 'encoder', 'data')
_OUT = flags.DEFINE_string('out', None, 'A new folder.')


def main():
  out = Path(_OUT.value).expanduser()
  if out.exists():
    raise InputError(f'{out} exists: --out must name a new folder')
  found = RewardModel.load(_MODEL.value)
  person = found.user(_USER.value or None)
  card = found.card
  normalize = 'none' if not card['encoder'] else card['features']['normalize']
  user = found.model, found.variables, person.log_atoms, person.log_belief
  folded = fold(*user, normalize)
  temporary = out.with_name(f'.{out.name}.{os.getpid()}.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    write_folded(folded, temporary / 'reward.safetensors')
    write_program(
      *user, normalize, card['feature_width'], temporary / 'reward.stablehlo'
    )
    shutil.copy(Path(__file__).with_name('torch_reward.py'), temporary)
    write_json(
      temporary / 'card.json',
      {name: card[name] for name in _KEPT}
      | {
        'format': FORMAT,
        'user': _USER.value or None,
        'reward': folded.form,
        'tensors': {n: list(x.shape) for n, x in folded.tensors.items()},
      },
    )
    temporary.rename(out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  print(f'reward of {_USER.value or "the population"}: {out}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['model', 'out'])
  cli.run(main)
