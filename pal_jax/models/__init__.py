"""Linen modules. `create(config)` makes one from its config."""

from pal_jax.errors import InputError
from pal_jax.ideal_points import PREFERENCES
from pal_jax.models.ideal_point_model import MEMBERSHIPS, IdealPointModel
from pal_jax.models.pal_a import POINTS, PalA
from pal_jax.models.pal_b import PalB
from pal_jax.models.projectors import (
  ACTIVATIONS,
  COMPUTE_DTYPES,
  num_hidden_layers,
)

MODELS = {'pal_a': PalA, 'pal_b': PalB}
_ONLY_PAL_A = ('point',)


def _check(field: str, value, known) -> None:
  if value not in known:
    raise InputError(
      f'config.model.{field}={value!r} is unknown: expected one of '
      f'{sorted(known)}'
    )


def check_config(config) -> None:
  """Refuses unknown variants, naming the field and the known values.

  Raises:
    InputError: as above, or for numbers out of range.
  """
  _check('name', config.name, MODELS)
  _check('point', config.point, POINTS)
  _check('preference', config.preference, PREFERENCES)
  _check('membership', config.membership, MEMBERSHIPS)
  _check('mixture_level', config.mixture_level, ('comparison', 'user'))
  _check('activation', config.activation, ACTIVATIONS)
  # Models that were saved before there was a choice lack the field.
  _check(
    'compute_dtype', config.get('compute_dtype', 'float32'), COMPUTE_DTYPES
  )
  num_hidden_layers(config.projector)
  for field in ('num_prototypes', 'width'):
    if config[field] < 1:
      raise InputError(
        f'config.model.{field}={config[field]} must be at least 1'
      )
  if not 0.0 <= config.dropout < 1.0:
    raise InputError(
      f'config.model.dropout={config.dropout} must lie in [0, 1)'
    )
  widths = tuple(config.matryoshka)
  if any(not 0 < p < config.width for p in widths):
    raise InputError(
      f'config.model.matryoshka={widths} must hold widths between 1 and '
      f'model.width - 1 = {config.width - 1}'
    )


def create(
  config, *, num_users: int, feature_width: int, axis_name: str | None = None
) -> IdealPointModel:
  """The model of `config.model`.

  Args:
    config: the `model` part of an experiment's config.
    num_users: rows of the user table, U.
    feature_width: D of the feature table.
    axis_name: the pmap axis, if the step is compiled by pmap.

  Raises:
    InputError: if a variant is unknown or there are fewer users than
      prototypes.
  """
  check_config(config)
  if config.num_prototypes > num_users:
    raise InputError(
      f'config.model.num_prototypes={config.num_prototypes} is larger than '
      f'the number of seen users, {num_users}: some prototypes could never be '
      'anybody; lower it or add users'
    )
  fields = config.to_dict()
  name = fields.pop('name')
  fields['matryoshka'] = tuple(fields['matryoshka'])
  if name == 'pal_a':
    fields['feature_width'] = feature_width
  else:
    for field in _ONLY_PAL_A:
      fields.pop(field)
  return MODELS[name](num_users=num_users, axis_name=axis_name, **fields)
