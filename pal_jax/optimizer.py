"""Optimisers with groups of parameters by name, schedules and clipping."""

import re

import jax
import optax

from pal_jax.errors import InputError
from pal_jax.numerics import is_known

SCHEDULES = ('constant', 'linear', 'cosine')
OPTIMIZERS = ('adamw', 'adam')
UNGROUPED = '(no group)'


def path_name(path) -> str:
  """'projector/Dense_0/kernel' of a key path of the parameters."""
  return '/'.join(str(getattr(key, 'key', key)) for key in path)


def label_parameters(params, groups) -> dict:
  """The group of every parameter, a tree of names.

  Args:
    params: a tree of parameters.
    groups: mapping of group name to a config with `pattern` (a regular
      expression searched in the parameter's path) and `optional`.

  Returns:
    A tree like `params` of group names.

  Raises:
    InputError: if a group that is not optional matches nothing, a parameter
      is in no group, or in two.
  """
  used = set()

  def label(path, _):
    name = path_name(path)
    found = [
      group
      for group, spec in groups.items()
      if spec.pattern and re.search(spec.pattern, name)
    ]
    if len(found) > 1:
      raise InputError(
        f'the parameter {name!r} matches the optimizer groups {found}: a '
        'parameter in two groups would take two steps; make their patterns '
        'exclusive'
      )
    used.update(found)
    return found[0] if found else UNGROUPED

  labels = jax.tree_util.tree_map_with_path(label, params)
  names = [
    path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  for group, spec in groups.items():
    if group not in used and spec.pattern and not spec.optional:
      raise InputError(
        f'optimizer.groups.{group}: the pattern {spec.pattern!r} matches no '
        f'parameter, so the group would never train; there are {names}; mend '
        'the pattern, or set optional to True'
      )
  lost = [
    name
    for name, group in zip(names, jax.tree.leaves(labels), strict=True)
    if group == UNGROUPED
  ]
  if lost:
    raise InputError(
      f'no optimizer group matches the parameters {lost}: they would never '
      'train; extend a pattern (a group with learning_rate 0.0 freezes)'
    )
  return labels


def make_schedule(config, num_steps: int, peak: float) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then the named decay to 0 at the end.

  Args:
    config: the `optimizer` part of a config.
    num_steps: length of training, warm-up included.
    peak: learning rate at the end of the warm-up.

  Raises:
    InputError: if the schedule is unknown or the warm-up too long.
  """
  warmup = config.warmup_steps
  if not 0 <= warmup < max(num_steps, 1):
    raise InputError(
      f'optimizer.warmup_steps={warmup} must lie between 0 and '
      f'train.num_steps - 1 = {num_steps - 1}'
    )
  rest = num_steps - warmup
  makers = {
    'constant': lambda: optax.constant_schedule(peak),
    'linear': lambda: optax.linear_schedule(peak, 0.0, rest),
    'cosine': lambda: optax.cosine_decay_schedule(peak, rest),
  }
  if config.schedule not in makers:
    raise InputError(
      f'optimizer.schedule={config.schedule!r} is unknown: expected one of '
      f'{SCHEDULES}'
    )
  decay = makers[config.schedule]()
  if not warmup:
    return decay
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup), decay], [warmup]
  )


def _group_optimizer(config, spec, num_steps):
  if is_known(spec.learning_rate) and spec.learning_rate == 0.0:
    return optax.set_to_zero()
  schedule = make_schedule(config, num_steps, spec.learning_rate)
  moments = {'b1': config.b1, 'b2': config.b2, 'eps': config.eps}
  if config.name == 'adamw':
    return optax.adamw(schedule, weight_decay=spec.weight_decay, **moments)
  # torch's Adam adds the decay to the gradient, before the moments.
  return optax.chain(
    optax.add_decayed_weights(spec.weight_decay),
    optax.adam(schedule, **moments),
  )


def create(config, params, num_steps: int) -> optax.GradientTransformation:
  """The optimiser of `config.optimizer` for these parameters.

  Args:
    config: the `optimizer` part of an experiment's config. Of what a sweep
      varies (`grid.FIELDS`) the numbers may be traced; then rates and the
      clip norm are taken to be positive.
    params: a tree of parameters (shapes suffice).
    num_steps: length of training in steps.

  Raises:
    InputError: see `label_parameters` and `make_schedule`, or if the name is
      unknown.
  """
  if config.name not in OPTIMIZERS:
    raise InputError(
      f'optimizer.name={config.name!r} is unknown: expected one of {OPTIMIZERS}'
    )
  labels = label_parameters(params, config.groups)
  groups = optax.partition(
    {
      name: _group_optimizer(config, spec, num_steps)
      for name, spec in config.groups.items()
    },
    labels,
  )
  if is_known(config.clip_norm):
    if config.clip_norm < 0:
      raise InputError(
        f'optimizer.clip_norm={config.clip_norm} must be 0 (off) or positive'
      )
    if not config.clip_norm:
      return groups
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), groups)
