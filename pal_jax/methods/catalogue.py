"""The methods of the benchmark by name, each with the settings it may try.

Settings stand in order of preference, the published or the simplest first; no
method has more than BUDGET.
"""

import dataclasses
import functools

import ml_collections

from pal_jax.errors import InputError
from pal_jax.methods.base import Method
from pal_jax.methods.distributional import Distributional
from pal_jax.methods.em import Em
from pal_jax.methods.homogeneous import BradleyTerry, BradleyTerryMlp, Random
from pal_jax.methods.neighbours import Neighbours
from pal_jax.methods.neural_process import NeuralProcess
from pal_jax.methods.pal import Pal
from pal_jax.methods.per_user import PerUser
from pal_jax.methods.reward_features import RewardFeatures
from pal_jax.methods.router import ContextRouter
from pal_jax.methods.surface import Surface
from pal_jax.methods.training import Trained
from pal_jax.methods.variational import Variational

BUDGET = 6


def pal(
  base: ml_collections.ConfigDict, start: str = 'random', **changes
) -> Pal:
  """PAL by a config with fields changed.

  Args:
    base: `config.pal` of `configs/benchmark.py`.
    start: as `Pal.start`.
    **changes: of fields, `model__num_prototypes=2`.
  """
  config = ml_collections.ConfigDict(base.to_dict())
  for name, value in changes.items():
    *path, last = name.split('__')
    part = config
    for each in path:
      part = part[each]
    part[last] = value
  if config.model.projector == 'identity':
    config.model.width = 0  # D, whatever it is
    config.optimizer.groups.projectors.optional = True
  if start != 'random':
    # From a solution, not from noise: small steps for the points.
    groups = config.optimizer.groups
    groups.points.pattern = '^prototypes$'
    groups.points.learning_rate = 1e-4
    groups.users = ml_collections.ConfigDict(
      {
        'pattern': '^(user_logits|class_logits)$',
        'learning_rate': 0.03,
        'weight_decay': 0.0,
        'optional': False,
      }
    )
  return Pal(ml_collections.FrozenConfigDict(config), start)


_LORE = {'model__preference': 'inner_product', 'model__projector': 'identity'}


def _grid(make, **options) -> tuple[Method, ...]:
  """One setting for each place in the options."""
  (length,) = {len(values) for values in options.values()}
  return tuple(
    make(**{name: values[i] for name, values in options.items()})
    for i in range(length)
  )


def catalogue(base: ml_collections.ConfigDict) -> dict[str, tuple[Method, ...]]:
  """All methods; `base` is what PAL's settings start from."""
  make_pal = functools.partial(pal, base)
  return {
    'random': (Random(),),
    'length': (Surface(),),
    'formatting': (Surface(kind='formatting'),),
    'btl': (BradleyTerry(),),
    'btl_mlp': _grid(
      BradleyTerryMlp,
      weight_decay=(1e-2, 1.0, 1.0),
      learning_rate=(1e-3, 1e-3, 1e-4),
    ),
    'dpl': (
      Distributional(),
      Distributional(learning_rate=3e-4, weight_decay=1.0),
      Distributional(kind='categorical'),
      Distributional(kind='categorical', learning_rate=3e-4, weight_decay=1.0),
    ),
    'per_user': (PerUser(),),
    'em': _grid(Em, num_classes=(2, 3, 4, 6, 8)),
    'em_hard': _grid(Em, num_classes=(2, 4, 8), hard=(True, True, True)),
    'rfm': _grid(
      RewardFeatures,
      num_features=(8, 8, 32, 8, 32),
      hidden=(0, 0, 0, 64, 64),
      weight_decay=(1e-2, 10.0, 10.0, 1.0, 1.0),
    ),
    'pref': _grid(
      RewardFeatures,
      svd=(True,) * 5,
      num_features=(2, 4, 8, 8, 32),
      learning_rate=(1e-4, 1e-4, 1e-4, 1e-3, 1e-4),
      weight_decay=(1.0, 1.0, 1.0, 1e-2, 1.0),
    ),
    'lore': tuple(
      make_pal(
        **_LORE,
        model__num_prototypes=k,
        optimizer__groups__points__learning_rate=rate,
      )
      for k, rate in ((5, 1e-2), (10, 1e-2), (2, 1e-3), (5, 1e-3), (10, 1e-3))
    ),
    'neighbours': tuple(
      Neighbours(features, temperature)
      for features in (
        RewardFeatures(),
        RewardFeatures(svd=True, learning_rate=1e-4, weight_decay=1.0),
      )
      for temperature in (0.07, 0.02)
    ),
    'micro': _grid(
      ContextRouter,
      num_rewards=(10, 10, 4),
      entropy=(0.5, 0.1, 0.5),
    ),
    'vpl': _grid(Variational, beta=(3e-6, 1e-4, 0.0)),
    'np_btl': _grid(
      NeuralProcess,
      learning_rate=(3e-4, 1e-4, 1e-3),
      weight_decay=(1e-3, 1.0, 1e-3),
      # Where context helps late in training, noisy batches never get there.
      users=(16, 16, 64),
      num_steps=(1500, 1500, 3000),
    ),
    # When to use which: see the README.
    'pal_a': (
      *(
        make_pal(
          'em',
          model__projector='identity',
          model__preference='inner_product',
          model__num_prototypes=k,
        )
        for k in (1, 4)
      ),
      # Features that are the preference space already.
      make_pal(model__projector='identity', model__num_prototypes=4),
      # One or a few features without noise.
      make_pal(
        model__num_prototypes=2,
        model__membership='partition',
        model__dropout=0.0,
        optimizer__groups__projectors__learning_rate=3e-3,
      ),
      make_pal(model__num_prototypes=8, model__preference='inner_product'),
      make_pal(
        model__num_prototypes=16,
        model__width=128,
        model__preference='inner_product',
      ),
    ),
    'pal_b': tuple(
      make_pal(
        model__name='pal_b', model__num_prototypes=k, model__preference=form
      )
      for k, form in (
        (1, 'cosine'),
        (4, 'cosine'),
        (4, 'squared_distance'),
        (8, 'inner_product'),
      )
    ),
  }


def candidates(
  base: ml_collections.ConfigDict,
  name: str,
  max_candidates: int = 0,
  max_steps: int = 0,
) -> tuple[Method, ...]:
  """The settings of a method.

  Args:
    base: what PAL's settings start from.
    name: of the catalogue.
    max_candidates: at most so many, the first; 0: all.
    max_steps: at most so many steps of gradient descent; 0: as they are.

  Raises:
    InputError: if the name is unknown.
  """
  known = catalogue(base)
  if name not in known:
    raise InputError(
      f'methods: {name!r} is unknown: expected all, or of {", ".join(known)}'
    )
  found = known[name]
  found = found[:max_candidates] if max_candidates else found
  return tuple(_shorter(m, max_steps) for m in found) if max_steps else found


def _shorter(method: Method, steps: int) -> Method:
  if isinstance(method, Pal):
    config = ml_collections.ConfigDict(method.config.to_dict())
    config.train.num_steps = min(steps, config.train.num_steps)
    config.train.checkpoint_every = min(steps, config.train.checkpoint_every)
    config.train.log_every = config.train.checkpoint_every
    config.optimizer.warmup_steps = min(
      steps // 4, config.optimizer.warmup_steps
    )
    return dataclasses.replace(
      method, config=ml_collections.FrozenConfigDict(config)
    )
  if isinstance(method, Neighbours):
    return dataclasses.replace(method, base=_shorter(method.base, steps))
  if isinstance(method, Trained):
    return dataclasses.replace(method, num_steps=min(steps, method.num_steps))
  return method
