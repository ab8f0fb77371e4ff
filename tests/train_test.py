"""train: the loop's cadence, resuming, reproducing, and refusing."""

import dataclasses
import json
import shutil
import threading

import jax
import numpy as np
import pytest

from configs import tiny
from pal_jax import parallel, stepping
from pal_jax import train as training
from pal_jax.errors import InputError
from pal_jax.preemption import Preempted, Preemption


def make_config(which='simulation', **fields):
  """A tiny config; fields are written data__seed=1 for data.seed=1."""
  config = tiny.get_config(which)
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


def run(config, workdir, say=None):
  return training.train_and_evaluate(
    config, workdir, progress=False, say=say or (lambda line: None)
  )


def metrics_of(workdir):
  """Lines of metrics.jsonl without what a clock says."""
  lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
  rows = [json.loads(line) for line in lines]
  for row in rows:
    assert row.pop('comparisons_per_second') > 0
  return rows


# When things are due.


def test_due_counts_from_1_and_the_last_step_is_always_due():
  steps = range(8)
  assert [s for s in steps if training.due(s, 3, 7)] == [3, 6, 7]
  assert [s for s in steps if training.due(s, 7, 7)] == [7]
  assert [s for s in steps if training.due(s, 100, 7)] == [7]
  assert [s for s in steps if training.due(s, 1, 7)] == [1, 2, 3, 4, 5, 6, 7]


# Training in this process.


@pytest.fixture(scope='module')
def experiment():
  return training.create_experiment(
    make_config(train__log_every=5, train__checkpoint_every=10)
  )


def train(experiment, workdir, say=lambda line: None, **kwargs):
  state, _, speed = training.train(
    experiment, workdir, progress=False, say=say, **kwargs
  )
  return parallel.fetch(state), speed


@pytest.fixture(scope='module')
def uninterrupted(experiment, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  state, speed = train(experiment, workdir)
  return workdir, state, speed


def assert_same_state(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


class Killed(BaseException):
  """Like a kill, it is no Exception that anybody may handle."""


def interrupt_at_step(monkeypatch, number):
  """The step after `number` of them does not happen."""
  compile_step = parallel.compile_step

  def compile_and_count(step, mode, **kwargs):
    compiled, done = compile_step(step, mode, **kwargs), []

    def run(state, *args):
      if int(state.step) == number:
        raise Killed
      done.append(1)
      return compiled.step(state, *args)

    return dataclasses.replace(compiled, step=run)

  monkeypatch.setattr(training.parallel, 'compile_step', compile_and_count)


def interrupt_after_saving(monkeypatch, step):
  """The checkpoint of `step` is on disk, and nothing after it happens."""
  save = training.Checkpointer.save

  def save_and_die(self, state, nll, *learned):
    save(self, state, nll, *learned)
    if int(state.step) == step:
      self.wait()
      raise Killed

  monkeypatch.setattr(training.Checkpointer, 'save', save_and_die)


def test_metrics_stand_at_every_due_step(uninterrupted):
  workdir, state, speed = uninterrupted
  rows = metrics_of(workdir)
  assert [row['step'] for row in rows] == list(range(5, 41, 5))
  validated = [row['step'] for row in rows if 'validation_nll' in row]
  assert validated == [10, 20, 30, 40]
  assert speed['seconds'] > 0 and speed['comparisons_per_second'] > 0
  for row in rows:
    assert np.isfinite(list(row.values())).all()


def test_training_learns(uninterrupted):
  rows = metrics_of(uninterrupted[0])
  assert rows[-1]['loss'] < 0.5 * rows[0]['loss']
  assert rows[-1]['accuracy'] > 0.85


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
  experiment, uninterrupted, tmp_path, monkeypatch
):
  """Killed within a window, then right after a save, then at the end."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  wanted_dir, wanted, _ = uninterrupted
  said = []
  with monkeypatch.context() as patch, pytest.raises(Killed):
    interrupt_at_step(patch, 17)
    train(experiment, workdir, said.append)
  assert [row['step'] for row in metrics_of(workdir)] == [5, 10, 15]
  with monkeypatch.context() as patch, pytest.raises(Killed):
    interrupt_after_saving(patch, 30)
    train(experiment, workdir, said.append)
  with monkeypatch.context() as patch, pytest.raises(Killed):
    interrupt_after_saving(patch, 40)
    train(experiment, workdir, said.append)
  # Killed in the evaluation, say: nothing is left to train.
  with monkeypatch.context() as patch:
    interrupt_at_step(patch, 40)
    state, _ = train(experiment, workdir, said.append)
  assert said == [f'resuming from step {s} of 40' for s in (10, 30, 40)]
  assert_same_state(state, wanted)
  assert metrics_of(workdir) == metrics_of(wanted_dir)


def count_traces(monkeypatch):
  """Of the step, and the tables that it was called with."""
  bind, traces = training.steps.bind, []

  def bind_and_count(*args):
    step = bind(*args)

    def counted(state, batch, table, key):
      traces.append(table)
      return step(state, batch, table, key)

    return counted

  monkeypatch.setattr(training.steps, 'bind', bind_and_count)
  return traces


def test_features_on_the_host_make_the_same_run_interrupted_or_not(
  experiment, uninterrupted, tmp_path, monkeypatch
):
  on_host = dataclasses.replace(experiment, on_host=True)
  wanted_dir, wanted, _ = uninterrupted
  with monkeypatch.context() as patch, pytest.raises(Killed):
    interrupt_at_step(patch, 17)
    train(on_host, tmp_path)
  assert not [t for t in threading.enumerate() if 'prefetch' in t.name]
  traces = count_traces(monkeypatch)
  state, _ = train(on_host, tmp_path)
  assert traces == [None]
  assert_same_state(state, wanted)
  assert metrics_of(tmp_path) == metrics_of(wanted_dir)
  assert not [t for t in threading.enumerate() if 'prefetch' in t.name]


def test_an_error_of_the_thread_stops_the_run_at_its_step(experiment, tmp_path):
  class Disk:
    """Its file is cut off while the run is under way."""

    def __init__(self, rows):
      self.rows, self.shape, self.number = rows, rows.shape, 0

    def __getitem__(self, index):
      self.number += np.ndim(index) > 0
      if self.number == 14:
        raise OSError('cut off')
      return self.rows[index]

  table = experiment.table.replace(items=Disk(experiment.table.items))
  broken = dataclasses.replace(experiment, table=table, on_host=True)
  with pytest.raises(OSError, match='cut off'):
    train(broken, tmp_path)
  assert (tmp_path / 'checkpoints' / '10').is_dir()
  assert [row['step'] for row in metrics_of(tmp_path)] == [5, 10]
  assert not [t for t in threading.enumerate() if 'prefetch' in t.name]


def ask_to_stop_after_step(monkeypatch, number):
  """SIGTERM comes while step `number` is taken."""
  preemption = Preemption()
  compile_step = parallel.compile_step

  def compile_and_ask(step, mode, **kwargs):
    compiled = compile_step(step, mode, **kwargs)

    def run(state, *args):
      preemption.requested |= int(state.step) + 1 == number
      return compiled.step(state, *args)

    return dataclasses.replace(compiled, step=run)

  monkeypatch.setattr(training.parallel, 'compile_step', compile_and_ask)
  return preemption


def test_a_run_that_was_asked_to_stop_loses_no_step(
  experiment, uninterrupted, tmp_path, monkeypatch
):
  """Within a window twice, at its end, where it saves anyway, at the end."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  wanted_dir, wanted, _ = uninterrupted
  said, stops = [], (12, 14, 15, 20, 33, 40)
  for step in stops:
    with monkeypatch.context() as patch:
      preemption = ask_to_stop_after_step(patch, step)
      with pytest.raises(Preempted, match=f'saved after step {step};'):
        train(experiment, workdir, said.append, preemption=preemption)
  state, _ = train(experiment, workdir, said.append)
  assert said == [f'resuming from step {s} of 40' for s in stops]
  assert_same_state(state, wanted)
  assert metrics_of(workdir) == metrics_of(wanted_dir)


def test_where_a_run_was_asked_to_stop_is_never_the_best(
  experiment, tmp_path, monkeypatch
):
  """It was not validated there; and the first step would be the best here."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  with monkeypatch.context() as patch:
    preemption = ask_to_stop_after_step(patch, 3)
    with pytest.raises(Preempted):
      train(experiment, workdir, preemption=preemption)
  checkpointer = training.Checkpointer(workdir / 'checkpoints')
  like, _ = stepping._initial_state(experiment, jax.random.key(0))
  assert int(checkpointer.restore_latest(like).step) == 3
  with pytest.raises(InputError, match='no intact checkpoint'):
    checkpointer.restore_best(like)
  checkpointer.close()


def test_training_falls_back_over_a_damaged_checkpoint(
  experiment, uninterrupted, tmp_path
):
  wanted_dir, wanted, _ = uninterrupted
  workdir = tmp_path / 'run'
  shutil.copytree(wanted_dir, workdir)
  for path in (workdir / 'checkpoints' / '40').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:20])
  said = []
  state, _ = train(experiment, workdir, said.append)
  assert 'step 40 is damaged' in said[0]
  assert said[1] == 'resuming from step 30 of 40'
  assert_same_state(state, wanted)
  assert metrics_of(workdir) == metrics_of(wanted_dir)
  assert (workdir / 'damaged_checkpoints' / '40').is_dir()


@pytest.mark.parametrize('select', ['best', 'last'])
def test_the_selected_parameters_are_those_of_the_config(tmp_path, select):
  """A rate that grows spoils the end: the best is not the last."""
  experiment = training.create_experiment(
    make_config(
      train__select=select,
      train__num_steps=10,
      train__log_every=5,
      train__checkpoint_every=5,
      optimizer__schedule='constant',
      optimizer__warmup_steps=9,
      optimizer__clip_norm=0.0,
      optimizer__groups__points__learning_rate=100.0,
    )
  )
  state, _ = train(experiment, tmp_path)
  first, last = metrics_of(tmp_path)
  assert first['validation_nll'] < last['validation_nll']
  assert int(state.step) == {'best': 5, 'last': 10}[select]


@pytest.mark.parametrize('mode', parallel.MODES)
def test_the_loop_traces_the_step_once(tmp_path, monkeypatch, mode):
  train_step, traces = training.steps.train_step, []

  def counted(*args, **kwargs):
    traces.append(1)
    return train_step(*args, **kwargs)

  monkeypatch.setattr(training.steps, 'train_step', counted)
  config = make_config(parallel=mode, train__num_steps=12)
  train(training.create_experiment(config), tmp_path)
  assert len(traces) == 1


@pytest.mark.filterwarnings('ignore:invalid value:RuntimeWarning')
@pytest.mark.parametrize(
  ('num_steps', 'step', 'what'),
  [(20, 2, 'the loss is'), (1, 1, 'the validation loss is')],
)
def test_a_loss_that_is_not_finite_stops_and_names_the_step(
  tmp_path, num_steps, step, what
):
  """Also if it is the last update that broke the parameters."""
  config = make_config(
    optimizer__schedule='constant',
    optimizer__warmup_steps=0,
    optimizer__clip_norm=0.0,
    optimizer__groups__points__learning_rate=1e30,
    train__num_steps=num_steps,
  )
  with pytest.raises(InputError, match=f'{what} .* at step {step}:') as error:
    run(config, tmp_path / 'run')
  assert 'learning_rate' in str(error.value)
  assert not (tmp_path / 'run' / 'results.json').exists()
  kept = [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert not [name for name in kept if name.isdigit()]


def test_poisoned_parameters_stop_at_the_step_they_act(
  experiment, tmp_path, monkeypatch
):
  """And the checkpoint from before is there to resume from."""
  compile_step = parallel.compile_step

  def poisoned(step, mode, **kwargs):
    compiled = compile_step(step, mode, **kwargs)

    def run(state, *args):
      if int(state.step) == 13:
        bad = state.params['prototypes'] * np.nan
        state = state.replace(params={**state.params, 'prototypes': bad})
      return compiled.step(state, *args)

    return dataclasses.replace(compiled, step=run)

  with monkeypatch.context() as patch:
    patch.setattr(training.parallel, 'compile_step', poisoned)
    with pytest.raises(InputError, match='the loss is nan at step 14:'):
      train(experiment, tmp_path)
  assert (tmp_path / 'checkpoints' / '10').is_dir()


# Refusing.


def with_nan_features(dataset):
  features = dataset.item_features.copy()
  features[7, 1] = np.nan
  return dataclasses.replace(dataset, item_features=features)


BAD_INPUT = [
  ('simulation', {'model__name': 'pal_c'}, "model.name='pal_c'"),
  ('simulation', {'model__point': 'wP'}, "model.point='wP'"),
  ('simulation', {'features__placement': 'disk'}, "features.placement='disk'"),
  ('simulation', {'model__preference': 'l1'}, "model.preference='l1'"),
  ('simulation', {'model__membership': 'soft'}, "model.membership='soft'"),
  ('simulation', {'model__mixture_level': 'all'}, "model.mixture_level='all'"),
  ('simulation', {'model__activation': 'tanh'}, "model.activation='tanh'"),
  ('simulation', {'model__projector': 'mlp'}, "model.projector='mlp'"),
  ('simulation', {'model__num_prototypes': 21}, 'model.num_prototypes=21'),
  ('simulation', {'model__num_prototypes': 0}, 'model.num_prototypes=0'),
  ('simulation', {'model__width': 8}, '--config.model.width=4'),
  ('simulation', {'model__matryoshka': (4,)}, 'model.matryoshka=(4,)'),
  ('simulation', {'model__dropout': 1.0}, 'model.dropout=1.0'),
  ('simulation', {'data__name': 'none'}, "data.name='none'"),
  ('simulation', {'data__num_items': 4}, 'data.num_items=4'),
  ('simulation', {'data__label_noise': 0.5}, 'data.label_noise=0.5'),
  ('persona', {'data__path': '/nowhere'}, '/nowhere/persona/'),
  ('persona', {'features__encoder': 'elmo'}, "'elmo'"),
  ('simulation', {'train__loss': 'l2'}, "train.loss='l2'"),
  ('simulation', {'train__batching': 'all'}, "train.batching='all'"),
  ('simulation', {'train__select': 'first'}, "train.select='first'"),
  ('simulation', {'train__num_steps': 0}, 'train.num_steps=0'),
  ('simulation', {'train__batch_size': 0}, 'train.batch_size=0'),
  ('simulation', {'train__log_every': 0}, 'train.log_every=0'),
  (
    'simulation',
    {'train__checkpoint_every': 15},
    'train.checkpoint_every=15 must be a multiple of train.log_every=10',
  ),
  ('simulation', {'train__user_weighting': 'n'}, "train.user_weighting='n'"),
  (
    'simulation',
    {'train__batching': 'users', 'train__batch_size': 9},
    'train.batch_size=9',
  ),
  ('simulation', {'optimizer__name': 'lion'}, "optimizer.name='lion'"),
  ('simulation', {'optimizer__schedule': 'step'}, "optimizer.schedule='step'"),
  ('simulation', {'optimizer__warmup_steps': 40}, 'optimizer.warmup_steps=40'),
  ('simulation', {'optimizer__clip_norm': -1.0}, 'optimizer.clip_norm=-1.0'),
  (
    'simulation',
    {'optimizer__groups__points__pattern': '^prototype$'},
    'optimizer.groups.points',
  ),
  ('simulation', {'parallel': 'xmap'}, "parallel='xmap'"),
  ('simulation', {'adaptation__strength': -1.0}, 'adaptation.strength=-1.0'),
  ('simulation', {'evaluation__resamples': 0}, 'evaluation.resamples=0'),
]


@pytest.mark.parametrize(('which', 'fields', 'words'), BAD_INPUT, ids=str)
def test_bad_input_is_refused_and_leaves_no_workdir(
  tmp_path, which, fields, words
):
  workdir = tmp_path / 'deep' / 'run'
  with pytest.raises(InputError) as error:
    run(make_config(which, **fields), workdir)
  assert words in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_refused(tmp_path, monkeypatch):
  create = training.data.create
  monkeypatch.setattr(
    training.data,
    'create',
    lambda *args, **kwargs: with_nan_features(create(*args, **kwargs)),
  )
  with pytest.raises(InputError, match="row 7 .'item 7'. holds NaN"):
    run(make_config(), tmp_path / 'run')
  assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(InputError, match='is not empty .* name a new folder'):
    run(make_config(), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_a_file_is_no_workdir(tmp_path):
  path = tmp_path / 'run'
  path.write_text('')
  with pytest.raises(InputError, match='--workdir must name a folder'):
    run(make_config(), path)


def test_an_empty_folder_and_left_over_hidden_files_will_do(tmp_path):
  (tmp_path / '.config.json.123.tmp').write_text('{')
  assert training.prepare_workdir(make_config(), tmp_path) is False
  assert (tmp_path / 'config.json').exists()


def test_another_config_is_refused_naming_the_fields(tmp_path):
  training.prepare_workdir(make_config(), tmp_path)
  assert training.prepare_workdir(make_config(), tmp_path) is False
  other = make_config(
    seed=3, model__preference='cosine', evaluation__num_support=(0, 1)
  )
  with pytest.raises(InputError) as error:
    run(other, tmp_path)
  for words in (
    'seed was 0, now 3',
    "model.preference was 'squared_distance', now 'cosine'",
    'evaluation.num_support was [0, 2, 5, 10], now [0, 1]',
  ):
    assert words in str(error.value)
  assert 'train' not in str(error.value)


def test_fields_of_only_one_of_two_configs_are_named(tmp_path):
  training.prepare_workdir(make_config(), tmp_path)
  with pytest.raises(InputError) as error:
    training.prepare_workdir(make_config('persona'), tmp_path)
  for words in (
    "data.name was 'simulation', now 'persona'",
    'data.dimension stands in one of the two only',
    'data.behaviors stands in one of the two only',
  ):
    assert words in str(error.value)


def test_a_damaged_config_file_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{"seed": ')
  with pytest.raises(InputError, match='config.json: malformed JSON'):
    run(make_config(), tmp_path)
