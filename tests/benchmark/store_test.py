"""benchmark.store: cells are found by what they were made from."""

import dataclasses

import ml_collections
import numpy as np
import pytest

from configs import benchmark
from pal_jax import methods
from pal_jax.benchmark.store import (
  cell_path,
  describe,
  digest,
  load_cell,
  save_cell,
)
from pal_jax.methods import catalogue

PAL = benchmark.get_config().pal
CATALOGUE = catalogue.catalogue(PAL)
ARRAYS = {
  'num_support': np.array([0, 3]),
  'unseen/unseen_items/logit': np.random.default_rng(0)
  .normal(size=(2, 1, 40, 50))
  .astype(np.float32),
  'unseen/unseen_items/label': np.array([[1.0, np.nan]], np.float32),
  'temperature': np.float64(1.25),
}
META = {
  'unseen_users': ('ünseen', 'b'),
  'group': np.array([1, 0]),
  'bayes_accuracy': None,
  'notes': ('a "note"',),
}


def save(tmp_path):
  path = cell_path(tmp_path, 'toy', 'em', 3, 'abc')
  save_cell(path, ARRAYS, META)
  return path


# Digests.


def test_a_digest_is_short_and_of_values():
  found = digest({'a': 1, 'b': (1.5, None)}, [True, 'x'])
  assert len(found) == 12 and int(found, 16) >= 0
  # The order of keys, and lists or tuples, do not count.
  assert digest({'b': [1.5, None], 'a': 1}, (True, 'x')) == found
  assert digest({'a': np.int64(1), 'b': np.array([1.5])}) != found


@pytest.mark.parametrize(
  'parts',
  [
    ({'a': 2}, 'x'),
    ({'a': 1.5}, 'x'),
    ({'b': 1}, 'x'),
    ({'a': 1}, 'y'),
    ('x', {'a': 1}),
    ({'a': 1},),
    ({'a': 1}, 'x', None),
    ({'a': '1'}, 'x'),
    ({'a': [1]}, 'x'),
    ({'a': 1, 'b': None}, 'x'),
  ],
)
def test_a_digest_changes_with_any_part(parts):
  assert digest(*parts) != digest({'a': 1}, 'x')


def every_change(method):
  """The method with each of its fields changed, by the field."""
  for field in dataclasses.fields(method):
    value = getattr(method, field.name)
    if isinstance(value, bool):
      new = not value
    elif isinstance(value, int | float):
      new = value + 1
    elif isinstance(value, str):
      new = value + 'x'
    else:
      continue
    yield field.name, dataclasses.replace(method, **{field.name: new})


@pytest.mark.parametrize('name', sorted(CATALOGUE))
def test_a_digest_changes_with_every_hyper_parameter(name):
  for method in CATALOGUE[name]:
    before = digest(describe(method))
    for field, changed in every_change(method):
      assert digest(describe(changed)) != before, field


def leaves(config, path=()):
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from leaves(value, (*path, name))
    else:
      yield (*path, name)


def test_a_digest_changes_with_every_field_of_pal():
  method = catalogue.pal(PAL)
  config = ml_collections.ConfigDict(method.config.to_dict())
  before = digest(describe(method))
  paths = list(leaves(config))
  assert len(paths) > 50 and ('model', 'num_prototypes') in paths
  for path in paths:
    changed = ml_collections.ConfigDict(config.to_dict(), type_safe=False)
    part = changed
    for name in path[:-1]:
      part = part[name]
    part[path[-1]] = 'something else'
    frozen = ml_collections.FrozenConfigDict(changed)
    assert digest(describe(methods.Pal(frozen))) != before, path
  assert digest(describe(dataclasses.replace(method, start='em'))) != before


def test_a_digest_changes_with_what_a_method_stands_on():
  near = methods.Neighbours(methods.RewardFeatures())
  other = methods.Neighbours(methods.RewardFeatures(num_features=9))
  assert digest(describe(near)) != digest(describe(other))
  assert describe(near)['base']['class'] == 'RewardFeatures'


def test_all_settings_of_the_catalogue_differ():
  every = [
    digest(describe(method)) for found in CATALOGUE.values() for method in found
  ]
  assert len(set(every)) == len(every)


def test_classes_with_equal_fields_differ():
  assert describe(methods.Random()) == {'class': 'Random'}
  first, other = methods.Random(), methods.BradleyTerry()
  assert digest(describe(first)) != digest(describe(other))


# Cells.


def test_paths_tell_the_cells_apart(tmp_path):
  every = {
    cell_path(tmp_path, dataset, method, seed, key)
    for dataset in ('a', 'b')
    for method in ('m', 'n')
    for seed in (0, 1)
    for key in ('1', '2')
  }
  assert len(every) == 16
  assert all(path.is_relative_to(tmp_path) for path in every)


def test_a_cell_comes_back_as_it_was(tmp_path):
  path = save(tmp_path)
  found = load_cell(path, 'toy', 'em', 3)
  assert (found.dataset, found.method, found.seed) == ('toy', 'em', 3)
  assert set(found.arrays) == set(ARRAYS)
  for name, x in ARRAYS.items():
    np.testing.assert_array_equal(found.arrays[name], x)
    assert found.arrays[name].dtype == np.asarray(x).dtype
  assert found.meta == {
    'unseen_users': ['ünseen', 'b'],
    'group': [1, 0],
    'bayes_accuracy': None,
    'notes': ['a "note"'],
  }


def test_a_later_cell_replaces_the_first_and_nothing_else_is_left(tmp_path):
  path = save(tmp_path)
  save_cell(path, {'x': np.arange(3)}, {'unseen_users': []})
  found = load_cell(path, 'toy', 'em', 3)
  assert set(found.arrays) == {'x'} and found.meta == {'unseen_users': []}
  assert list(path.parent.iterdir()) == [path]


def test_a_cell_that_cannot_be_written_leaves_the_old_one(tmp_path):
  path = save(tmp_path)
  before = path.read_bytes()

  class Broken:
    def __array__(self, dtype=None, copy=None):
      raise OSError('no space left')

  with pytest.raises(OSError, match='no space'):
    save_cell(path, {'x': Broken()}, META)
  assert path.read_bytes() == before


def test_where_nothing_is_there_is_no_cell(tmp_path):
  assert load_cell(tmp_path / 'none.npz', 'toy', 'em', 3) is None
  assert load_cell(tmp_path, 'toy', 'em', 3) is None


@pytest.mark.parametrize('share', [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_cell_is_none(tmp_path, share):
  path = save(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole))])
  assert load_cell(path, 'toy', 'em', 3) is None


@pytest.mark.parametrize(
  'content',
  [
    b'garbage',
    b'PK\x03\x04 garbage',
    b'\x93NUMPY garbage',
    b'\x80\x04.',
    b'{}',
  ],
)
def test_garbage_is_no_cell(tmp_path, content):
  path = tmp_path / 'cell.npz'
  path.write_bytes(content * 50)
  assert load_cell(path, 'toy', 'em', 3) is None


def test_a_damaged_cell_is_none_or_raises_nothing(tmp_path):
  path = save(tmp_path)
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(100):
    start, size = rng.integers(0, len(whole) - 200), rng.integers(1, 200)
    path.write_bytes(whole[:start] + rng.bytes(size) + whole[start + size :])
    load_cell(path, 'toy', 'em', 3)


def test_arrays_without_what_they_are_of_are_no_cell(tmp_path):
  path = tmp_path / 'cell.npz'
  np.savez(path, **{'num_support': np.arange(2)})
  assert load_cell(path, 'toy', 'em', 3) is None
