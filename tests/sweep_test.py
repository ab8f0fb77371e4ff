"""sweep, grid: a run of a sweep is the run that it would be alone."""

import jax
import numpy as np
import pytest

from configs import tiny
from pal_jax import grid, sweep, train
from pal_jax.errors import InputError

RATE = 'optimizer.groups.points.learning_rate'
DECAY = 'optimizer.groups.points.weight_decay'
# Every one moves the parameters by far more than the tolerance.
AXES = {
  RATE: [0.03, 0.3],
  DECAY: [0.0, 0.3],
  'train.bound_weight': [0.0, 3.0],
  ('seed', 'data.seed'): [0, 1],
}


SHORT = {
  'train.num_steps': 5,
  'train.log_every': 5,
  'train.checkpoint_every': 5,
}


def make_config(**fields):
  config = tiny.get_config('simulation').copy_and_resolve_references()
  with config.unlocked():
    config.train.bound_radius = 0.1  # within reach of so few steps
    config.train.num_steps = 24
    config.train.checkpoint_every = 10  # the last chunk is a shorter one
    config.update_from_flattened_dict(fields)
  return config.lock()


def assert_close(selected, other):
  """Rates of 0.3 are many times what rounding moves a parameter by."""
  assert int(selected.step) == int(other.step)
  np.testing.assert_allclose(selected.nll, other.nll, rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    selected.variables['params'],
    other.variables['params'],
  )


@pytest.fixture(scope='module')
def experiments():
  return sweep.create_experiments(grid.make_configs(make_config(), AXES))


@pytest.fixture(scope='module')
def selected(experiments):
  return sweep.train_runs(experiments)


def test_a_run_of_a_grid_is_the_run_of_train(experiments, selected, tmp_path):
  state, _, _ = train.train(experiments[-1], tmp_path / 'run', progress=False)
  variables = train.variables_of(state)
  found = train.validate(experiments[-1], variables)
  alone = sweep.Selected(state.step, variables, found['nll'], found['accuracy'])
  assert_close(selected[-1], alone)
  np.testing.assert_allclose(selected[-1].accuracy, alone.accuracy, rtol=1e-6)


def test_calls_of_one_run_give_the_same(experiments, selected):
  """Of fewer runs, tables and streams of batches too."""
  some = [5, 8, 10]
  again = sweep.train_runs([experiments[i] for i in some], at_once=1)
  for i, one in zip(some, again, strict=True):
    assert_close(one, selected[i])


def test_every_number_and_seed_matters(selected):
  points = np.stack([s.variables['params']['prototypes'] for s in selected])
  each = points.reshape(-1, points[0].size)
  apart = np.abs(each[:, None] - each[None]).max(-1)
  assert (apart + np.eye(len(each)) > 1e-3).all()


def test_numbers_of_noise_are_swept_too():
  """0 leaves dropout and the population out of the program of one run."""
  fields = (
    'model.dropout',
    'train.population_rate',
    'model.init_user_scale',
  )
  configs = [
    make_config(
      **SHORT,
      **dict(zip(fields, values, strict=True)),
      **{
        'model.projector': 'mlp1',
        'optimizer.groups.projectors.learning_rate': 0.03,
      },
    )
    for values in ((0.0, 0.0, 0.1), (0.4, 0.3, 0.9))
  ]
  runs = sweep.create_experiments(configs)
  assert runs[0].dataset is runs[1].dataset
  together = sweep.train_runs(runs)
  for i, experiment in enumerate(runs):
    assert_close(together[i], sweep.train_runs([experiment])[0])


def test_runs_that_begin_in_clusters_are_those_of_train(tmp_path):
  config = make_config(**SHORT, **{'train.start': 'spectral'})
  (experiment,) = sweep.create_experiments([config])
  (selected,) = sweep.train_runs([experiment])
  state, _, _ = train.train(experiment, tmp_path / 'run', progress=False)
  variables = train.variables_of(state)
  found = train.validate(experiment, variables)
  assert_close(
    selected,
    sweep.Selected(state.step, variables, found['nll'], found['accuracy']),
  )


def test_rows_of_a_grid_name_their_values():
  rows = sweep.run_grid(
    make_config(**SHORT), {RATE: [0.03, 0.3], 'seed': [4]}, progress=False
  )
  assert [row[RATE] for row in rows] == [0.03, 0.3]
  assert [row['seed'] for row in rows] == [4, 4]
  assert rows[0]['nll'] != rows[1]['nll']


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ({'optimizer.groups.point.learning_rate': [0.1]}, 'did you mean.*points'),
    ({'model.num_prototypes': [2, 3]}, 'num_prototypes changes the program'),
    ({'optimizer.schedule': ['linear']}, 'may differ in seed, data'),
    ({RATE: []}, 'has no values'),
    ({RATE: [float('nan')]}, 'not a finite number'),
    ({RATE: ['fast']}, "cannot be 'fast'"),
    ({RATE: [0.1], (RATE, 'seed'): [1]}, 'in two axes'),
  ],
)
def test_what_is_not_in_a_grid_is_refused(axes, message):
  with pytest.raises(InputError, match=message):
    grid.make_configs(make_config(), axes)


@pytest.mark.parametrize('name', [RATE, 'optimizer.clip_norm'])
def test_a_zero_that_changes_the_program_is_refused(name):
  configs = grid.make_configs(make_config(), {name: [0.0, 0.1]})
  with pytest.raises(InputError, match=f'{name}=0.0 stands beside 0.1'):
    grid.find_numbers(configs)


def test_runs_of_two_structures_are_refused():
  configs = make_config(), make_config(**{'model.num_prototypes': 3})
  with pytest.raises(InputError, match='2 in one run, 3 in another'):
    grid.find_numbers(configs)


def test_runs_of_two_sizes_of_data_are_refused():
  configs = grid.make_configs(make_config(), {'data.num_items': [200, 220]})
  with pytest.raises(InputError, match='same numbers of users, items'):
    sweep.train_runs(sweep.create_experiments(configs))


def test_features_that_stay_on_the_host_are_refused():
  configs = [make_config(**{'features.placement': 'host'})]
  with pytest.raises(InputError, match='features.placement=device'):
    sweep.train_runs(sweep.create_experiments(configs))


def test_a_loss_that_is_not_finite_names_the_run():
  with pytest.raises(InputError, match=f'seed=3, {RATE}=1e\\+30'):
    sweep.run_grid(
      make_config(**SHORT), {RATE: [0.1, 1e30], 'seed': [3]}, progress=False
    )
