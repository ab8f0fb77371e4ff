"""user_rows: a step on the rows of its batch's users, and nobody else's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pal_jax
from configs import tiny
from pal_jax import models, optimizer, parallel
from pal_jax import train as training
from pal_jax import train_step as steps
from pal_jax.errors import InputError
from pal_jax.structs import FeatureTable, make_comparisons
from pal_jax.user_rows import put_rows, take_rows

U, K, ITEMS, D = 7, 2, 12, 4
NOBODY = np.iinfo(np.int32).max


def make_config(**fields):
  config = tiny.get_config('simulation')
  config.update_from_flattened_dict(fields)
  return config


def batch_of(users, seed: int = 0):
  rng = np.random.default_rng(seed)
  users = np.asarray(users, np.int32)
  items = np.stack([rng.permutation(ITEMS)[:2] for _ in users])
  return make_comparisons(users, items, rng.integers(0, 2, users.size))


def begin(num_users: int, by_user_row: bool, **fields):
  """(compiled step, state, table), neither of which is placed."""
  config = make_config(**fields)
  items = np.random.default_rng(1).normal(size=(ITEMS, D))
  table = FeatureTable(items.astype(np.float32), np.zeros((1, D), np.float32))
  model = models.create(config.model, num_users=num_users, feature_width=D)
  state, tx = steps.create_state(
    model,
    lambda params: optimizer.create(config.optimizer, params, 40),
    jax.random.key(0),
    table,
  )
  objective = steps.create_objective(config.train, config.model)
  run = parallel.compile_step(
    steps.bind(model, tx, objective), 'jit', by_user_row=by_user_row
  )
  return run, state, table


def take_steps(batches, by_user_row: bool, **fields):
  """The state before and after some steps, on the host."""
  run, state, table = begin(U, by_user_row, **fields)
  first = parallel.fetch(state)
  state, table = parallel.place((state, table), 'jit')
  for batch in batches:
    state, metrics = run(state, batch, table, jax.random.key(2))
  return first, parallel.fetch(state), metrics


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_with_all_users_in_the_batch_it_is_the_dense_step(name):
  fields = {
    'optimizer.name': name,
    'optimizer.clip_norm': 0.05,
    'optimizer.groups.points.weight_decay': 0.1,
  }
  batches = [batch_of([*range(U), 3, 3], seed) for seed in range(4)]
  _, dense, metrics = take_steps(batches, False, **fields)
  first, sparse, others = take_steps(batches, True, **fields)
  for found, wanted in zip(
    jax.tree.leaves((sparse, others)),
    jax.tree.leaves((dense, metrics)),
    strict=True,
  ):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  moved = sparse.params['user_logits'] - first.params['user_logits']
  assert np.abs(moved).min(1).max() > 0


def test_who_is_not_in_the_batch_rests():
  """Also with momentum from a step before, which moves the dense table."""
  batches = [batch_of([0, 1, 2, 5]), batch_of([1, 1, 5, 5], 1)]
  _, once, _ = take_steps(batches[:1], True)
  _, twice, _ = take_steps(batches, True)
  _, dense, _ = take_steps(batches, False)
  for a, b in zip(
    jax.tree.leaves(tables_of(once)),
    jax.tree.leaves(tables_of(twice)),
    strict=True,
  ):
    rest = [0, 2, 3, 4, 6]
    np.testing.assert_array_equal(a[rest], b[rest])
    assert np.all(np.any(a[[1, 5]] != b[[1, 5]], axis=1))
  before = once.params['user_logits']
  assert np.any(before[0] != dense.params['user_logits'][0])


def tables_of(state):
  return [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if getattr(path[-1], 'key', None) == 'user_logits'
  ]


def test_the_table_has_two_moments_of_its_own_shape():
  first, _, _ = take_steps([batch_of([0])], True)
  assert [x.shape for x in tables_of(first)] == [(U, K)] * 3


def test_rows_past_the_table_are_read_as_zeros_and_never_written():
  tree = {'user_logits': jnp.arange(6.0).reshape(3, 2), 'scale': jnp.ones(2)}
  users = jnp.array([2, NOBODY], jnp.int32)
  rows = take_rows(tree, users)
  np.testing.assert_array_equal(rows['user_logits'], [[4, 5], [0, 0]])
  found = put_rows(tree, jax.tree.map(lambda x: x - 10, rows), users)
  np.testing.assert_array_equal(
    found['user_logits'], [[0, 1], [2, 3], [-6, -5]]
  )
  np.testing.assert_array_equal(found['scale'], [-9, -9])


def test_a_step_does_not_touch_the_whole_table():
  """In the compiled step it is given, and its rows are read and written."""
  users = 100_003
  operations = {}
  for by_user_row in (False, True):
    run, state, table = begin(users, by_user_row)
    batch = run.prepare(batch_of([5, 7, 7, 9]))
    lowered = run.step.lower(state, batch, table, jax.random.key(0))
    # As written, before XLA names and merges anything.
    operations[by_user_row] = set(
      re.findall(
        rf'stablehlo\.(\w+).*tensor<{users}x{K}xf32>\n', lowered.as_text()
      )
    )
    aliased = lowered.compile().as_text().splitlines()[0]
    assert 'input_output_alias' in aliased
  assert {'multiply', 'add'} <= operations[False]
  assert not operations[True] - {'scatter', 'gather', 'return'}, operations


def test_the_step_that_is_not_asked_to_is_the_dense_one():
  shared = parallel.compile_step(lambda *args: args, 'jit').prepare(
    batch_of([4, 2])
  )
  assert shared.users is None
  np.testing.assert_array_equal(shared.comparisons.user, [4, 2])


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (
      {'train.sparse_users': True, 'train.population_rate': 0.1},
      'population_rate=0.1',
    ),
    (
      {
        'train.sparse_users': True,
        'train.batching': 'users',
        'model.membership': 'mixture_likelihood',
        'model.mixture_level': 'user',
      },
      "mixture_level='user'",
    ),
    ({'train.shard_users': True}, 'train.sparse_users=False'),
    (
      {
        'train.shard_users': True,
        'train.sparse_users': True,
        'parallel': 'pmap',
      },
      "parallel='pmap'",
    ),
    (
      {
        'train.shard_users': True,
        'train.sparse_users': True,
        'train.user_solver': 'alternating',
      },
      "user_solver='alternating'",
    ),
  ],
)
def test_what_cannot_go_together_is_refused(fields, words):
  with pytest.raises(InputError, match=re.escape(words)):
    training.create_experiment(make_config(**fields))


@pytest.mark.parametrize('splits', [False, True])
def test_a_run_that_stopped_goes_on_to_the_same_end(tmp_path, splits):
  fields = {'train.sparse_users': True, 'train.shard_users': splits}
  results = {}
  for name, numbers in (('whole', [40]), ('stopped', [20, 40])):
    for number in numbers:
      config = make_config(**fields, **{'optimizer.schedule': 'constant'})
      with config.unlocked():
        config.train.num_steps = number
      state, _, _ = training.train(
        training.create_experiment(config), tmp_path / name, progress=False
      )
    results[name] = state
  assert results['whole'].params['user_logits'].shape[0] == 20
  for a, b in zip(
    jax.tree.leaves(results['whole'].params),
    jax.tree.leaves(results['stopped'].params),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_a_run_with_a_split_table_ends_in_a_report_and_a_model(tmp_path):
  config = make_config(
    **{'train.sparse_users': True, 'train.shard_users': True}
  )
  results = training.train_and_evaluate(
    config, tmp_path / 'run', progress=False, say=lambda line: None
  )
  assert results['seen']['accuracy'] > 0.6
  model = pal_jax.RewardModel.load(tmp_path / 'run')
  assert len(model.users) == 20
