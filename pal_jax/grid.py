"""Which fields of a config a sweep may vary, and the configs of a grid.

Runs of one compiled program have the same arrays and the same operations, so
they may differ in numbers alone.
"""

import difflib
import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from pal_jax.errors import InputError

# Numbers that become arrays with an axis of runs.
FIELDS = (
  'optimizer.groups.*.learning_rate',
  'optimizer.groups.*.weight_decay',
  'optimizer.clip_norm',
  'optimizer.b1',
  'optimizer.b2',
  'optimizer.eps',
  'train.bound_weight',
  'train.bound_radius',
  'train.population_rate',
  'model.dropout',
  'model.init_user_scale',
  'model.gumbel_temperature',
)
# What 0 takes out of the program: a group that is frozen, no clipping.
_POSITIVE = ('optimizer.groups.*.learning_rate', 'optimizer.clip_norm')
# Of arrays, not of the program.
_DATA = ('seed', 'data.*')
_PARTS = ('model', 'train', 'optimizer')  # whose other fields are the program

Name = str | tuple[str, ...]
Numbers = dict[str, np.ndarray]


def _matches(name: str, patterns: Iterable[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _flatten(config: dict, prefix: str = '') -> dict:
  """{'groups.points.learning_rate': 0.1, ...}"""
  out = {}
  for key, value in config.items():
    name = f'{prefix}.{key}' if prefix else key
    out |= _flatten(value, name) if isinstance(value, dict) else {name: value}
  return out


def _check_name(config, known: dict, name: str) -> None:
  if name not in known:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise InputError(
      f'the config has no field {name!r} to sweep: '
      + (f'did you mean one of {near}?' if near else 'see configs/base.py')
    )
  if not _matches(name, FIELDS + _DATA):
    raise _not_a_number(name, f'it is {known[name]!r} in the config')


def _not_a_number(name: str, found: str) -> InputError:
  return InputError(
    f'{name} changes the program, not a number in it ({found}): the runs of '
    f'one sweep may differ in seed, data.* and {", ".join(FIELDS)}; make one '
    f'sweep for each value of {name}'
  )


def make_configs(
  config: ConfigDict, axes: Mapping[Name, Sequence]
) -> list[ConfigDict]:
  """The configs of a grid: every combination, the last axis fastest.

  Args:
    config: the base of all.
    axes: values of each field, for example {'train.bound_weight': [0.0, 1.0],
      ('seed', 'data.seed'): range(5)}. The fields of a tuple move together.

  Raises:
    InputError: if a field is not there, may not differ within a sweep, or
      cannot take a value.
  """
  known = _flatten(config.to_dict())
  names = [(name,) if isinstance(name, str) else tuple(name) for name in axes]
  for name in itertools.chain(*names):
    _check_name(config, known, name)
  if len(set(itertools.chain(*names))) < sum(map(len, names)):
    raise InputError(f'a field stands in two axes of the grid: {names}')
  for name, values in zip(names, axes.values(), strict=True):
    if not len(values):
      raise InputError(f'the axis {", ".join(name)} of the grid has no values')
  return [
    _with_values(config, dict(zip(names, values, strict=True)))
    for values in itertools.product(*axes.values())
  ]


def _with_values(config, values: dict) -> ConfigDict:
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for names, value in values.items():
      for name in names:
        *parents, field = name.split('.')
        part = config
        for parent in parents:
          part = part[parent]
        number = isinstance(value, int | float | np.number)
        if number and not math.isfinite(value):
          raise InputError(f'{name}={value} is not a finite number')
        try:
          part[field] = value.item() if isinstance(value, np.number) else value
        except TypeError as error:
          raise InputError(
            f'{name} cannot be {value!r}: it is {part[field]!r} in the config'
          ) from error
  return config.lock()


def find_numbers(configs: Sequence) -> Numbers:
  """What differs between runs, an array [R] for each field.

  Raises:
    InputError: if they differ in what a sweep may not vary.
  """
  flat = [
    _flatten({part: config[part].to_dict() for part in _PARTS})
    for config in configs
  ]
  names = dict.fromkeys(itertools.chain(*flat))
  numbers = {}
  for name in names:
    values = [each.get(name) for each in flat]
    if all(value == values[0] for value in values):
      continue
    if not _matches(name, FIELDS):
      other = next(value for value in values if value != values[0])
      raise _not_a_number(
        name, f'{values[0]!r} in one run, {other!r} in another'
      )
    if _matches(name, _POSITIVE) and min(values) <= 0.0:
      raise InputError(
        f'{name}={min(values)} stands beside {max(values)}: in a sweep it must '
        'be above 0, because 0 leaves a part out of the program; make a sweep '
        'of its own for 0'
      )
    numbers[name] = np.array(values, np.float32)
  return numbers


def part(numbers: dict, name: str) -> dict:
  """The numbers of one part of a config, by their names in it."""
  return {
    key.removeprefix(f'{name}.'): value
    for key, value in numbers.items()
    if key.startswith(f'{name}.')
  }


def fill(config, numbers: dict) -> ConfigDict:
  """A copy of a (part of a) config with numbers that may be traced."""
  config = ConfigDict(config.to_dict(), type_safe=False)
  for name, value in numbers.items():
    *parents, field = name.split('.')
    here = config
    for parent in parents:
      here = here[parent]
    here[field] = value
  return config


def values_of(config, axes: Mapping[Name, Sequence]) -> dict:
  """What a config of a grid has of each field of its axes."""
  flat = _flatten(config.to_dict())
  names = itertools.chain(*((n,) if isinstance(n, str) else n for n in axes))
  return {name: flat[name] for name in names}


def describe(config, numbers: Numbers) -> str:
  """'seed=3, train.bound_weight=0.1': what tells a run from the others."""
  flat = _flatten(config.to_dict())
  return ', '.join(f'{name}={flat[name]}' for name in ('seed', *numbers))
