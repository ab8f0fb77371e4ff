"""user_solves: solves lower the objective, and training with them resumes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from pal_jax import (
  adaptation,
  parallel,
  stepping,
  sweep,
  train,
  user_solves,
)
from pal_jax.errors import InputError
from pal_jax.losses import logistic
from pal_jax.numerics import log_mean_weights

STRENGTH = 0.7


def make_config(**fields):
  config = tiny.get_config('simulation')
  config.train.user_solver = 'alternating'
  config.train.solve_every = 7
  config.train.num_steps = 30
  config.train.checkpoint_every = config.train.log_every = 10
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


FORMS = {
  'convex': {},
  'partition': {'model__membership': 'partition'},
  'mixture': {'model__membership': 'mixture_likelihood'},
  'pal_b': {'model__name': 'pal_b', 'model__projector': 'mlp0'},
}


def objective(experiment, variables, support, population):
  """sum_i f_i + lambda KL(w_i || population), by the model as it trains."""
  model = experiment.model
  placed = adaptation.place(model, variables, experiment.table)
  users = jnp.arange(model.num_users)
  log_w = model.apply(variables, users, method='user_log_weights')
  logit = adaptation.score(
    model, variables, placed, log_w, support, model.training_rule
  )
  loss = jnp.where(support.mask, logistic(logit, support.label), 0.0)
  kl = jnp.sum(jnp.exp(log_w) * (log_w - population), -1)
  return np.asarray(loss.sum(1) + STRENGTH * kl)


@pytest.mark.parametrize('form', FORMS)
def test_a_solve_raises_no_users_objective_and_nothing_nearby_is_lower(form):
  experiment = train.create_experiment(make_config(**FORMS[form]))
  state, _ = train.begin(experiment)
  variables = train.variables_of(state)
  # Far from the solution, at a temperature that is not 1.
  params = variables['params']
  params['user_logits'] = 3.0 * jax.random.normal(
    jax.random.key(1), params['user_logits'].shape
  )
  params['log_temperature'] = jnp.asarray(0.4)
  support = user_solves.group_training(experiment.dataset.train, 20)
  before = experiment.model.apply(
    variables, jnp.arange(20), method='user_log_weights'
  )
  population = log_mean_weights(before)
  found = user_solves.solve_users(
    experiment.model, variables, experiment.table, support, STRENGTH
  )

  def value(logits):
    at = {'params': params | {'user_logits': logits}}
    return objective(experiment, at, support, population)

  lowest = value(found)
  assert (lowest <= value(params['user_logits']) + 1e-5).all()
  assert lowest.sum() < 0.9 * value(params['user_logits']).sum()
  for nudge in (0.05, -0.05):
    assert (lowest <= value(found.at[:, 0].add(nudge)) + 1e-4).all()


def test_users_without_comparisons_get_the_population():
  experiment = train.create_experiment(make_config())
  variables = train.variables_of(train.begin(experiment)[0])
  support = user_solves.group_training(experiment.dataset.train, 20)
  support.mask[3] = False
  found = user_solves.solve_users(
    experiment.model, variables, experiment.table, support, 1.0
  )
  before = jax.nn.log_softmax(variables['params']['user_logits'])
  np.testing.assert_allclose(found[3], log_mean_weights(before), atol=1e-5)


class Killed(BaseException):
  """No Exception that anybody may handle."""


def run(experiment, workdir):
  state, _, _ = train.train(experiment, workdir, progress=False)
  return parallel.fetch(state)


@pytest.mark.parametrize('mode', parallel.MODES)
def test_a_resumed_run_with_solves_ends_as_an_uninterrupted_one(
  mode, tmp_path, monkeypatch
):
  experiment = train.create_experiment(
    make_config(parallel=mode, train__select='last')
  )
  solve, solved = stepping.Steps.solve, []

  def count(self, state):
    solved.append(int(state.step))
    return solve(self, state)

  def die(self, state):
    if int(state.step) == 21:
      raise Killed
    return solve(self, state)

  with monkeypatch.context() as patch:
    patch.setattr(stepping.Steps, 'solve', count)
    wanted = run(experiment, tmp_path / 'whole')
  assert solved == [7, 14, 21, 28, 30]
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(stepping.Steps, 'solve', die)
    run(experiment, tmp_path / 'cut')
  resumed = run(experiment, tmp_path / 'cut')
  jax.tree.map(np.testing.assert_array_equal, resumed, wanted)


BAD = [
  ({'train__user_solver': 'newton'}, "train.user_solver='newton' is unknown"),
  ({'train__solve_every': 0}, 'train.solve_every=0'),
  ({'train__solve_strength': 0.0}, 'train.solve_strength=0.0 positive'),
  ({'train__loss': 'hinge'}, "train.loss='hinge'"),
  ({'model__matryoshka': (2,)}, 'model.matryoshka'),
  (
    {'model__membership': 'partition', 'model__gumbel': True},
    'model.gumbel=True',
  ),
  ({'model__preference': 'cosine'}, "model.preference='cosine'"),
  (
    {
      'model__membership': 'mixture_likelihood',
      'model__mixture_level': 'user',
      'train__batching': 'users',
    },
    'has no weights of single users',
  ),
]


@pytest.mark.parametrize(('fields', 'words'), BAD, ids=str)
def test_what_cannot_be_solved_for_is_refused(fields, words):
  with pytest.raises(InputError, match=words):
    train.create_experiment(make_config(**fields))


def test_different_weights_within_a_user_are_refused():
  dataset = train.create_experiment(make_config()).dataset
  weight = np.where(dataset.train.user == 4, 2.0, 1.0).astype(np.float32)
  between = dataset.train.replace(weight=weight)
  user_solves.group_training(between, 20)
  weight[np.flatnonzero(dataset.train.user == 5)[0]] = 2.0
  with pytest.raises(InputError, match='user number 5 has comparisons of'):
    user_solves.group_training(dataset.train.replace(weight=weight), 20)


def test_a_sweep_refuses_solves():
  with pytest.raises(InputError, match='has no form in a sweep'):
    sweep.run_grid(make_config(), {'seed': [0]}, progress=False)
