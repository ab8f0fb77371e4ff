"""features.rows: what stays in files equals what is read into memory."""

import dataclasses
import json

import numpy as np
import pytest

from configs import base
from pal_jax import data
from pal_jax.errors import InputError
from pal_jax.features import feature_table
from pal_jax.features import table as table_module
from pal_jax.features.precomputed import Precomputed
from pal_jax.features.rows import FileRows, read_from

ITEMS = tuple(f'item {i}' for i in range(40))
PROMPTS = ('', 'why', 'item 3', 'how')


@pytest.fixture(scope='module')
def dataset():
  config = base.simulation_data()
  config.update({'num_seen_users': 4, 'num_unseen_users': 2})
  return dataclasses.replace(
    data.create(config),
    item_names=ITEMS,
    prompt_names=PROMPTS,
    item_features=None,
    prompt_features=None,
  )


def write(path, texts, dtype, seed=0):
  vectors = np.random.default_rng(seed).normal(size=(len(texts), 6))
  np.save(path, vectors.astype(dtype))
  path.with_suffix('.texts.json').write_text(json.dumps(texts))


class Letters:
  """Vectors of a text that a cache keeps."""

  name, version, width = 'letters', '1', 6

  def encode(self, texts):
    seeds = [sum(map(ord, text)) for text in texts]
    return np.stack([np.random.default_rng(s).normal(size=6) for s in seeds])


def file(folder, monkeypatch):
  texts = ['unused', *PROMPTS[:0:-1], *ITEMS[:3], *ITEMS[4:]]
  write(folder / 'vectors.npy', texts, np.float16)
  return folder / 'vectors.npy'


def folder_of_files(folder, monkeypatch):
  write(folder / 'a.npy', [*ITEMS[::2], 'why'], np.float32)
  write(folder / 'b.npy', [*ITEMS[::-1], 'how'], np.float16, seed=1)
  return folder


def cache(folder, monkeypatch):
  monkeypatch.setattr(table_module, 'create', lambda config: Letters())
  return ''


@pytest.mark.parametrize('place', [file, folder_of_files, cache])
@pytest.mark.parametrize('normalize', ['rms', 'none'])
def test_rows_in_files_are_those_in_memory(
  dataset, tmp_path, monkeypatch, place, normalize
):
  monkeypatch.setattr(table_module, '_CHUNK', 7)
  (tmp_path / 'vectors').mkdir()
  config = base.features()
  config.update({'encoder': 'precomputed', 'normalize': normalize})
  config.path = str(place(tmp_path / 'vectors', monkeypatch))
  config.cache_dir = str(tmp_path / 'cache')
  whole = feature_table(dataset, config)
  left = feature_table(dataset, config, lambda nbytes: True)
  rows = np.array([[3, 0, 3], [1, 2, 0]])
  for part in ('items', 'prompts'):
    expected, found = getattr(whole, part), getattr(left, part)
    assert isinstance(expected, np.ndarray) and isinstance(found, FileRows)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.nbytes == expected.nbytes
    for index in (rows, rows[1], 2, slice(None), slice(1, 3), rows[:0]):
      np.testing.assert_array_equal(found[index], expected[index])
    np.testing.assert_array_equal(np.asarray(found), expected)
  np.testing.assert_array_equal(left.prompts[[0]], np.zeros((1, 6)))


def test_only_what_is_asked_for_is_read(dataset, tmp_path, monkeypatch):
  monkeypatch.setattr(table_module, '_CHUNK', 7)
  config = base.features()
  config.encoder, config.path = 'precomputed', str(file(tmp_path, monkeypatch))
  asked = []
  read = Precomputed.read

  def gate(self, rows):
    asked.append(len(rows))
    return read(self, rows)

  monkeypatch.setattr(Precomputed, 'read', gate)
  table = feature_table(dataset, config, lambda nbytes: nbytes > 500)
  assert isinstance(table.items, FileRows) and not asked
  assert isinstance(table.prompts, np.ndarray)  # 96 bytes are not worth it
  table.items[np.array([[3, 1]])]
  assert asked == [2]


@pytest.mark.parametrize('row', [2, 33])
def test_files_are_checked_before_anything_is_trained(
  dataset, tmp_path, monkeypatch, row
):
  monkeypatch.setattr(table_module, '_CHUNK', 7)
  config = base.features()
  path = file(tmp_path, monkeypatch)
  config.encoder, config.path = 'precomputed', str(path)
  vectors = np.load(path)
  vectors[row, 2] = np.nan
  np.save(path, vectors)
  with pytest.raises(InputError, match=f'row {row} holds NaN'):
    feature_table(dataset, config, lambda nbytes: True)


def test_rows_of_several_places_keep_their_order():
  places = [np.arange(10.0)[:, None] + start for start in (0, 100)]
  read = read_from(
    [place.__getitem__ for place in places],
    np.array([1, 0, 1, 1]),
    np.array([4, 3, 2, 9]),
  )
  found = read(np.array([3, 1, 0, 3]))
  np.testing.assert_array_equal(found[:, 0], [109, 3, 104, 109])
