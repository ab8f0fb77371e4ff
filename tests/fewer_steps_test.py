"""configs/fewer_steps: what it changes, and nothing else."""

import pytest

from configs import fewer_steps, persona, simulation
from pal_jax import experiment

BEFORE = {
  'persona': persona.get_config,
  'partition': simulation.get_config,
  'mixture': lambda: simulation.get_config('mixture'),
}
CHANGED = {
  'train.start',
  'train.num_steps',
  'train.log_every',
  'train.checkpoint_every',
  'optimizer.warmup_steps',
  'optimizer.groups.projectors.learning_rate',
  'optimizer.groups.temperatures.learning_rate',
}


def flatten(config, prefix=''):
  out = {}
  for name, value in config.items():
    path = f'{prefix}{name}'
    inner = hasattr(value, 'items')
    out |= flatten(value, f'{path}.') if inner else {path: value}
  return out


@pytest.mark.parametrize('which', BEFORE)
def test_it_changes_the_start_the_length_and_two_rates(which):
  config = fewer_steps.get_config(which)
  before, after = flatten(BEFORE[which]()), flatten(config)
  assert before.keys() == after.keys()
  assert {name for name in after if after[name] != before[name]} == CHANGED
  assert config.is_locked
  assert config.train.num_steps >= 10 * config.train.checkpoint_every
  experiment.check_config(config)


def test_solves_may_be_the_only_thing_that_moves_users():
  config = fewer_steps.solve(persona.get_config(), freeze=True)
  assert config.train.user_solver == 'alternating'
  assert config.optimizer.groups.users.learning_rate == 0.0
  experiment.check_config(config)


def test_an_unknown_experiment_is_refused():
  with pytest.raises(ValueError, match='convarg: expected one of'):
    fewer_steps.get_config('convarg')
