"""python -m pal_jax.convert --checkpoint=FILE --out=FOLDER."""

from absl import flags

from configs import base
from pal_jax import cli
from pal_jax.convert import Options, convert, match, read_state_dict
from pal_jax.saved_model import save_model

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A Lightning .ckpt, a state dict, or .safetensors.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder of the model; RewardModel.load')
_PREFERENCE = flags.DEFINE_string(
  'preference', '', "The reward; '' is distance for PAL-A, cosine for PAL-B."
)
_POINT = flags.DEFINE_string('point', 'f(Pw)', "PAL-A's ideal point.")
_ACTIVATION = flags.DEFINE_string('activation', 'gelu', 'gelu, relu, linear.')
_RESIDUAL = flags.DEFINE_bool('residual', False, 'Input added to the output.')


def main():
  matched = match(read_state_dict(_CHECKPOINT.value))
  print(matched.listing())
  options = Options(
    _PREFERENCE.value, _POINT.value, _ACTIVATION.value, _RESIDUAL.value
  )
  saved = convert(matched, base.get_config(), options)
  print(f'model: {save_model(saved, _OUT.value)}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['checkpoint', 'out'])
  cli.run(main)
