"""checkpoint: what is kept, and that damage is noticed, said and survived."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pal_jax.checkpoint import Checkpointer
from pal_jax.errors import InputError
from pal_jax.train_step import TrainState

# Orbax leaves a callback to an event loop of its own that a failed restore
# has closed.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def make_state(step: int) -> TrainState:
  """A state all of whose arrays tell the step."""
  rng = np.random.default_rng(step)
  params = {
    'prototypes': jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
    'projector': {
      'kernel': jnp.asarray(rng.normal(size=(40, 30)), jnp.float32)
    },
    'log_scale': jnp.float32(step),
  }
  optimizer = optax.adam(1e-3)
  moments = jax.tree.map(lambda x: x + step, optimizer.init(params))
  return TrainState(
    step=jnp.int32(step),
    params=params,
    model_state={'batch_stats': {'mean': jnp.full((5,), step, jnp.float32)}},
    opt_state=moments,
  )


def save_all(folder, scores: dict[int, float]) -> None:
  checkpointer = Checkpointer(folder)
  for step, score in scores.items():
    checkpointer.save(make_state(step), score)
  checkpointer.close()


def assert_is_step(state, step: int) -> None:
  """Bit for bit the state that was saved, types included."""
  wanted = make_state(step)
  assert jax.tree.structure(state) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def latest(folder):
  """(state, what was said, steps that are left) of a new process's view."""
  said = []
  checkpointer = Checkpointer(folder, said.append)
  state = checkpointer.restore_latest(make_state(0))
  left = checkpointer.steps()
  checkpointer.close()
  return state, said, left


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with intact checkpoints of steps 1 and 2; never changed."""
  workdir = tmp_path_factory.mktemp('saved')
  save_all(workdir / 'checkpoints', {1: 0.6, 2: 0.5})
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of it to damage."""
  shutil.copytree(saved, tmp_path / 'run')
  return tmp_path / 'run'


# What is kept.


def test_an_empty_folder_has_nothing_to_resume(tmp_path):
  state, said, left = latest(tmp_path / 'checkpoints')
  assert state is None and said == [] and left == []


def test_restoring_gives_back_every_bit(saved):
  checkpointer = Checkpointer(saved / 'checkpoints')
  assert_is_step(checkpointer.restore_latest(make_state(0)), 2)
  assert_is_step(checkpointer.restore_best(make_state(0)), 2)
  checkpointer.close()


def make_prior(step: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(step)
  return {
    'log_atoms': np.float32(rng.normal(size=(6, 3))),
    'strength': np.float32(step),
  }


def test_the_prior_of_each_step_is_kept_with_its_summary(tmp_path):
  checkpointer = Checkpointer(tmp_path / 'checkpoints')
  for step in (1, 2):
    checkpointer.save(make_state(step), 1.0, make_prior(step), {'atoms': step})
  checkpointer.wait()
  for step in (1, 2):
    prior, summary = checkpointer.read_prior(step)
    assert summary == {'atoms': step}
    assert prior.keys() == make_prior(step).keys()
    for name, value in make_prior(step).items():
      np.testing.assert_array_equal(prior[name], value)
      assert prior[name].dtype == value.dtype
  checkpointer.close()


def test_a_damaged_prior_damages_its_checkpoint(tmp_path):
  """A state without the population that goes with it is not used."""
  folder = tmp_path / 'checkpoints'
  checkpointer = Checkpointer(folder)
  for step in (1, 2):
    checkpointer.save(make_state(step), 1.0, make_prior(step))
  checkpointer.close()
  shutil.rmtree(folder / '2' / 'prior')
  shutil.copytree(folder / '1' / 'prior', folder / '2' / 'prior')
  state, said, left = latest(folder)
  assert_is_step(state, 1)
  assert left == [1] and len(said) == 1 and 'step 2' in said[0]


def test_the_latest_two_and_the_best_are_kept(tmp_path):
  folder = tmp_path / 'checkpoints'
  save_all(folder, {1: 0.9, 2: 0.3, 3: 0.8, 4: 0.7, 5: 0.6})
  checkpointer = Checkpointer(folder)
  assert checkpointer.steps() == [2, 4, 5]
  assert_is_step(checkpointer.restore_best(make_state(0)), 2)
  assert_is_step(checkpointer.restore_latest(make_state(0)), 5)
  checkpointer.close()


def test_the_best_survives_resuming(tmp_path):
  """Its score must be on disk: a new process knows no other."""
  folder = tmp_path / 'checkpoints'
  save_all(folder, {1: 0.9, 2: 0.3})
  save_all(folder, {3: 0.8})
  save_all(folder, {4: 0.7, 5: 0.6})
  checkpointer = Checkpointer(folder)
  assert checkpointer.steps() == [2, 4, 5]
  assert_is_step(checkpointer.restore_best(make_state(0)), 2)
  checkpointer.close()


def test_a_better_one_takes_the_place_of_the_best(tmp_path):
  folder = tmp_path / 'checkpoints'
  save_all(folder, {1: 0.5, 2: 0.9})
  save_all(folder, {3: 0.4, 4: 0.9, 5: 0.9})
  checkpointer = Checkpointer(folder)
  assert checkpointer.steps() == [3, 4, 5]
  checkpointer.close()


def test_of_equal_scores_the_earlier_is_the_best(tmp_path):
  folder = tmp_path / 'checkpoints'
  save_all(folder, {1: 0.5, 2: 0.5})
  checkpointer = Checkpointer(folder)
  assert_is_step(checkpointer.restore_best(make_state(0)), 1)
  checkpointer.close()


def test_a_relative_folder_works(tmp_path, monkeypatch):
  """Orbax refuses one only when it saves."""
  monkeypatch.chdir(tmp_path)
  save_all('checkpoints', {1: 0.5})
  assert_is_step(latest('checkpoints')[0], 1)


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
  """Saving is asynchronous: arrays changed afterwards must not leak in."""
  state = jax.tree.map(np.array, make_state(1))
  checkpointer = Checkpointer(tmp_path / 'checkpoints')
  checkpointer.save(state, 0.5)
  for leaf in jax.tree.leaves(state):
    leaf[...] = 0
  checkpointer.close()
  assert_is_step(latest(tmp_path / 'checkpoints')[0], 1)


def test_a_save_cut_off_by_a_kill_is_passed_over(workdir):
  folder = workdir / 'checkpoints'
  half = folder / '3.orbax-checkpoint-tmp'
  shutil.copytree(folder / '2', half)
  next(p for p in half.rglob('*') if p.is_file()).unlink()
  state, _, left = latest(folder)
  assert left == [1, 2]
  assert_is_step(state, 2)


# Damage.


def array_files(checkpoint, item='params'):
  """Files that hold the numbers of an item."""
  found = [
    p
    for p in sorted((checkpoint / item).rglob('*'))
    if 'd' in p.parts and p.is_file() and p.stat().st_size > 0
  ]
  assert found
  return found


def assert_falls_back(workdir, step=1, damaged=2):
  state, said, left = latest(workdir / 'checkpoints')
  assert_is_step(state, step)
  aside = workdir / 'damaged_checkpoints' / str(damaged)
  assert len(said) == 1
  for words in (f'step {damaged}', 'damaged', str(aside), 'before it'):
    assert words in said[0]
  assert left == [step]
  assert aside.is_dir() and any(p.is_file() for p in aside.rglob('*'))
  return aside


def truncate_arrays(checkpoint):
  for path in array_files(checkpoint):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_arrays(checkpoint):
  for path in array_files(checkpoint):
    path.write_bytes(b'')


def delete_arrays(checkpoint):
  for path in array_files(checkpoint):
    path.unlink()


def delete_item(checkpoint):
  shutil.rmtree(checkpoint / 'opt_state')


def delete_checksum(checkpoint):
  shutil.rmtree(checkpoint / 'check')


def delete_everything_inside(checkpoint):
  for path in checkpoint.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  (checkpoint / 'left').write_text('over')


def garble_tree(checkpoint):
  for path in (checkpoint / 'params').glob('_*'):
    path.write_text('{')


def overwrite_with_noise(checkpoint):
  rng = np.random.default_rng(0)
  for path in array_files(checkpoint):
    path.write_bytes(rng.bytes(path.stat().st_size))


@pytest.mark.parametrize(
  'damage',
  [
    truncate_arrays,
    empty_arrays,
    delete_arrays,
    delete_item,
    delete_checksum,
    delete_everything_inside,
    garble_tree,
    overwrite_with_noise,
  ],
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(workdir, damage):
  damage(workdir / 'checkpoints' / '2')
  assert_falls_back(workdir)


@pytest.mark.parametrize(
  'harm',
  [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(path.read_bytes()[:9]),
    lambda path: path.write_bytes(b'\xff' * path.stat().st_size),
  ],
  ids=['deleted', 'emptied', 'truncated', 'overwritten'],
)
def test_no_single_damaged_file_stops_anybody(workdir, harm):
  """Each file in turn: the state is that of step 2, or said to be of 1."""
  folder = workdir / 'checkpoints'
  files = sorted(p for p in (folder / '2').rglob('*') if p.is_file())
  needed = 0
  for path in files:
    intact = path.read_bytes()
    harm(path)
    state, said, _ = latest(folder)
    aside = workdir / 'damaged_checkpoints' / '2'
    if aside.exists():
      assert_is_step(state, 1)
      assert 'step 2 is damaged' in said[0]
      aside.rename(folder / '2')
      needed += 1
    else:
      assert_is_step(state, 2)
      assert said == []
    path.write_bytes(intact)
  assert needed >= 8


def test_a_best_whose_score_is_damaged_does_not_stop_the_others(tmp_path):
  """Orbax reads all scores when it opens the folder."""
  folder = tmp_path / 'checkpoints'
  save_all(folder, {1: 0.3, 2: 0.6, 3: 0.5})
  (folder / '1' / 'metrics' / 'metrics').write_text('{"validation_nll": ')
  state, said, left = latest(folder)
  assert_is_step(state, 3)
  assert left == [2, 3] and 'step 1 is damaged' in said[0]


def test_arrays_of_another_checkpoint_are_noticed_by_the_checksum(workdir):
  """Orbax restores them without a word; only the checksum can tell."""
  folder = workdir / 'checkpoints'
  shutil.rmtree(folder / '2' / 'params')
  shutil.copytree(folder / '1' / 'params', folder / '2' / 'params')
  state, said, _ = latest(folder)
  assert_is_step(state, 1)
  assert 'its arrays differ from those that were saved' in said[0]


def test_a_wrong_checksum_is_noticed(workdir):
  path = workdir / 'checkpoints' / '2' / 'check' / 'metadata'
  check = json.loads(path.read_text(encoding='utf-8'))
  check['crc32'] ^= 1
  path.write_text(json.dumps(check), encoding='utf-8')
  assert_falls_back(workdir)


@pytest.mark.parametrize('item', ['params', 'opt_state', 'extra'])
def test_a_flipped_bit_never_gives_other_numbers(workdir, item):
  """Wherever it is: either it changes nothing, or the one before is used."""
  folder = workdir / 'checkpoints'
  noticed = 0
  for path in array_files(folder / '2', item):
    intact = path.read_bytes()
    for position in np.linspace(0, len(intact) - 1, 6).astype(int):
      flipped = bytearray(intact)
      flipped[position] ^= 0x10
      path.write_bytes(flipped)
      state, said, _ = latest(folder)
      assert_is_step(state, 1 if said else 2)
      if said:
        noticed += 1
        (workdir / 'damaged_checkpoints' / '2').rename(folder / '2')
    path.write_bytes(intact)
  assert noticed


def test_damage_on_damage_overwrites_nothing(workdir):
  """The second damaged checkpoint of a step has a place of its own."""
  folder = workdir / 'checkpoints'
  truncate_arrays(folder / '2')
  assert_falls_back(workdir)
  save_all(folder, {2: 0.5})
  empty_arrays(folder / '2')
  state, _, _ = latest(folder)
  assert_is_step(state, 1)
  names = {p.name for p in (workdir / 'damaged_checkpoints').iterdir()}
  assert names == {'2', '2-1'}


def test_saving_goes_on_after_damage(workdir):
  folder = workdir / 'checkpoints'
  truncate_arrays(folder / '2')
  checkpointer = Checkpointer(folder, lambda line: None)
  assert_is_step(checkpointer.restore_latest(make_state(0)), 1)
  checkpointer.save(make_state(2), 0.5)
  checkpointer.save(make_state(3), 0.7)
  checkpointer.close()
  checkpointer = Checkpointer(folder)
  assert checkpointer.steps() == [2, 3]
  assert_is_step(checkpointer.restore_best(make_state(0)), 2)
  checkpointer.close()


def test_if_all_are_damaged_training_starts_again(workdir):
  for step in ('1', '2'):
    truncate_arrays(workdir / 'checkpoints' / step)
  state, said, left = latest(workdir / 'checkpoints')
  assert state is None and len(said) == 2 and left == []


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path):
  folder = tmp_path / 'checkpoints'
  save_all(folder, {1: 0.3, 2: 0.6, 3: 0.5})
  truncate_arrays(folder / '1')
  said = []
  checkpointer = Checkpointer(folder, said.append)
  assert_is_step(checkpointer.restore_best(make_state(0)), 3)
  assert len(said) == 1 and 'step 1' in said[0]
  checkpointer.close()


def test_without_an_intact_checkpoint_there_is_no_best(workdir):
  for step in ('1', '2'):
    delete_item(workdir / 'checkpoints' / step)
  checkpointer = Checkpointer(workdir / 'checkpoints', lambda line: None)
  with pytest.raises(InputError, match='holds no intact checkpoint'):
    checkpointer.restore_best(make_state(0))
  checkpointer.close()
