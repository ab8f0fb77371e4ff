"""features.store and features.lookup: what is kept, found, and refused."""

import json
import os
import pathlib
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from pal_jax import features
from pal_jax.errors import InputError
from pal_jax.features import lookup
from pal_jax.features.store import FeatureStore, Spec, text_keys

WIDTH = 5


class CountingEncoder:
  """Vectors that depend on the text alone; remembers what it was asked."""

  def __init__(self, name='fake', version='1', fail_on=None):
    self.name = name
    self.version = version
    self.width = WIDTH
    self.asked = []
    self._fail_on = fail_on

  def encode(self, texts):
    self.asked.append(list(texts))
    vectors = np.stack([vector(text) for text in texts])
    if self._fail_on in texts:
      vectors[texts.index(self._fail_on), 2] = np.nan
    return vectors


def vector(text):
  seed = int.from_bytes(text_keys([text])[0, :4].tobytes(), 'little')
  return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)


def look_up(texts, encoder, tmp_path, stores=(), dtype='float32', **options):
  return features.lookup_or_encode(
    texts, encoder, stores, tmp_path / 'cache', dtype, **options
  )


def make_store(folder, texts, spec=None, vectors=None):
  spec = spec or Spec('fake', '1', WIDTH, 'float32')
  store = FeatureStore.open_or_create(folder, spec)
  if vectors is None:
    vectors = np.stack([vector(text) for text in texts])
  store.append(texts, vectors)
  return store


def shard_file(folder, kind):
  (path,) = folder.glob(f'*.{kind}.npy')
  return path


def snapshot(folder):
  return {
    path.name: (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.iterdir()
  }


def test_order_and_duplicates(tmp_path):
  encoder = CountingEncoder()
  texts = ['b', 'a', '', 'b', 'ü\n', 'a']
  result = look_up(texts, encoder, tmp_path)
  np.testing.assert_array_equal(result, np.stack([vector(t) for t in texts]))
  assert encoder.asked == [['b', 'a', '', 'ü\n']]


def test_the_second_run_encodes_nothing_and_sees_the_same_numbers(tmp_path):
  texts = [f'text {i}' for i in range(50)]
  first = look_up(texts, CountingEncoder(), tmp_path, dtype='float16')
  encoder = CountingEncoder()
  second = look_up(texts[::-1], encoder, tmp_path, dtype='float16')
  assert encoder.asked == []
  assert first.dtype == second.dtype == np.float16
  np.testing.assert_array_equal(first, second[::-1])


def test_only_what_is_missing_is_encoded(tmp_path):
  encoder = CountingEncoder()
  look_up(['a', 'b'], encoder, tmp_path)
  result = look_up(['c', 'b', 'd', 'a'], encoder, tmp_path)
  assert encoder.asked == [['a', 'b'], ['c', 'd']]
  np.testing.assert_array_equal(result, np.stack([vector(t) for t in 'cbda']))


def test_no_texts(tmp_path):
  encoder = CountingEncoder()
  assert look_up([], encoder, tmp_path).shape == (0, WIDTH)
  assert encoder.asked == [] and not (tmp_path / 'cache').exists()


def test_read_only_stores_come_first_and_are_never_written(tmp_path):
  folder = tmp_path / 'shipped'
  make_store(folder, ['a', 'b'], vectors=np.full((2, WIDTH), 7.0))
  before = snapshot(folder)
  encoder = CountingEncoder()
  result = look_up(['b', 'x', 'a'], encoder, tmp_path, stores=[folder])
  assert encoder.asked == [['x']]
  np.testing.assert_array_equal(result[[0, 2]], np.full((2, WIDTH), 7.0))
  assert snapshot(folder) == before
  # Nothing of theirs was copied to the cache.
  assert (
    len(
      FeatureStore(lookup.cache_folder(encoder, tmp_path / 'cache', 'float32'))
    )
    == 1
  )


def test_all_found_needs_no_encoder_and_writes_nothing(tmp_path):
  class NotInstalled:
    name, version = 'fake', '1'

    @property
    def width(self):
      raise AssertionError('asked for the width')

    def encode(self, texts):
      raise AssertionError('asked to encode')

  make_store(tmp_path / 'shipped', ['a', 'b'])
  result = look_up(['b'], NotInstalled(), tmp_path, [tmp_path / 'shipped'])
  np.testing.assert_array_equal(result[0], vector('b'))
  assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize(
  'spec',
  [Spec('fake', '2', WIDTH, 'float32'), Spec('other', '1', WIDTH, 'float32')],
)
def test_a_store_of_another_version_or_encoder_is_passed_over(tmp_path, spec):
  make_store(tmp_path / 's', ['a'], spec, vectors=np.full((1, WIDTH), 7.0))
  encoder = CountingEncoder()
  result = look_up(['a'], encoder, tmp_path, [tmp_path / 's'])
  np.testing.assert_array_equal(result[0], vector('a'))


def test_versions_never_share_a_cache(tmp_path):
  look_up(['a'], CountingEncoder(version='1'), tmp_path)
  encoder = CountingEncoder(version='2')
  look_up(['a'], encoder, tmp_path)
  assert encoder.asked == [['a']]


def test_leftovers_of_a_killed_process_are_ignored(tmp_path):
  folder = tmp_path / 's'
  make_store(folder, ['a'])
  # Killed between the two files, in either order, and within one.
  np.save(folder / 'x.keys.npy', text_keys(['b']))
  np.save(folder / 'y.vectors.npy', np.zeros((1, WIDTH), np.float32))
  (folder / '.z.keys.npy.1.tmp').write_bytes(b'\x93NUMPY')
  with warnings.catch_warnings(action='error'):
    store = FeatureStore(folder)
  assert len(store) == 1
  assert (store.find(text_keys(['b', 'a'])) >= 0).tolist() == [False, True]


@pytest.mark.parametrize('stop', ['write_array', 'replace'])
def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch, stop):
  """Stopped while writing, and between writing and renaming."""
  store = make_store(tmp_path / 's', ['a'])
  before = snapshot(tmp_path / 's')

  def write_half(file, array, allow_pickle):
    file.write(array.tobytes()[:3])
    raise OSError('disk full')

  def fail(*args):
    raise OSError('disk full')

  if stop == 'write_array':
    monkeypatch.setattr(np.lib.format, 'write_array', write_half)
  else:
    monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(InputError, match='disk full.*features.cache_dir'):
    store.append(['b'], np.ones((1, WIDTH)))
  assert snapshot(tmp_path / 's') == before


def test_a_process_killed_at_any_moment_leaves_a_store_that_works(tmp_path):
  """SIGKILL during appends: what is there is right, and appends go on."""
  code = f"""
import itertools, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parents[2])!r})
import numpy as np
from pal_jax.features.store import FeatureStore, Spec
store = FeatureStore.open_or_create({str(tmp_path / 's')!r},
                                    Spec('fake', '1', {WIDTH}, 'float32'))
for i in itertools.count():
  texts = [f'{{i}} {{j}}' for j in range(500)]
  store.append(texts, np.full((500, {WIDTH}), i))
  print(i, flush=True)
"""
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, text=True
  )
  for _ in range(5):
    assert process.stdout.readline()
  time.sleep(0.003)
  process.kill()
  process.communicate()
  store = FeatureStore(tmp_path / 's')
  assert len(store) >= 2500
  positions = store.find(text_keys([f'{i} 7' for i in range(5)]))
  np.testing.assert_array_equal(store.read(positions)[:, 0], np.arange(5))
  store.append(['new'], np.ones((1, WIDTH)))
  assert FeatureStore(tmp_path / 's').find(text_keys(['new']))[0] >= 0


def truncate(folder, kind):
  path = shard_file(folder, kind)
  os.truncate(path, path.stat().st_size - 3)


def empty(folder, kind):
  os.truncate(shard_file(folder, kind), 0)


def overwrite(array):
  return lambda folder, kind: np.save(shard_file(folder, kind), array)


@pytest.mark.parametrize(
  'kind, damage',
  [
    ('vectors', truncate),
    ('keys', truncate),
    ('vectors', empty),
    ('keys', empty),
    ('vectors', overwrite(np.zeros((2, WIDTH), np.float32))),
    ('vectors', overwrite(np.zeros((3, WIDTH + 1), np.float32))),
    ('vectors', overwrite(np.zeros((3, WIDTH), np.float64))),
    ('keys', overwrite(np.zeros((3, 16), np.uint8))),
    ('vectors', overwrite(np.array([{}, {}, {}]))),
  ],
)
def test_a_corrupt_shard_is_skipped_and_encoded_again(tmp_path, kind, damage):
  encoder = CountingEncoder()
  look_up(['a', 'b', 'c'], encoder, tmp_path)
  damage(lookup.cache_folder(encoder, tmp_path / 'cache', 'float32'), kind)
  with pytest.warns(UserWarning, match='is skipped') as caught:
    result = look_up(['c', 'a'], encoder, tmp_path)
  assert len(caught) == 1
  assert encoder.asked[1:] == [['c', 'a']]
  np.testing.assert_array_equal(result, np.stack([vector('c'), vector('a')]))


def test_a_text_added_by_two_processes(tmp_path):
  one = make_store(tmp_path / 's', ['a', 'b'])
  other = FeatureStore(tmp_path / 's')
  one.append(['c', 'd'], np.full((2, WIDTH), 1.0))
  other.append(['d', 'e'], np.full((2, WIDTH), 1.0))
  store = FeatureStore(tmp_path / 's')
  positions = store.find(text_keys(list('edcba')))
  assert (positions >= 0).all()
  np.testing.assert_array_equal(store.read(positions)[3], vector('b'))


def test_equal_prefixes_do_not_mix_texts_up(tmp_path):
  """Keys that agree in the 8 bytes of the index, and differ after them."""
  store = make_store(tmp_path / 's', ['a'])
  other = text_keys(['a']).copy()
  other[0, 31] ^= 1
  assert store.find(other).tolist() == [-1]


def test_nan_from_the_encoder_names_the_row_and_is_not_stored(tmp_path):
  encoder = CountingEncoder(fail_on='bad one')
  with pytest.raises(InputError, match="row 3, 'bad one'.*NaN"):
    look_up(['a', 'a', 'b', 'bad one'], encoder, tmp_path)
  folder = lookup.cache_folder(encoder, tmp_path / 'cache', 'float32')
  assert len(FeatureStore(folder)) == 0


def test_nan_in_a_store_names_the_row_and_the_file(tmp_path):
  make_store(tmp_path / 's', ['a', 'b', 'c'])
  path = shard_file(tmp_path / 's', 'vectors')
  vectors = np.load(path)
  vectors[1, 0] = np.inf
  np.save(path, vectors)
  with pytest.raises(InputError, match="npy, row 1: .* row 2, 'b'"):
    look_up(['c', 'c', 'b'], CountingEncoder(), tmp_path, [tmp_path / 's'])
  look_up(['a', 'c'], CountingEncoder(), tmp_path, [tmp_path / 's'])


def test_a_value_beyond_float16_says_so(tmp_path):
  class Large(CountingEncoder):
    def encode(self, texts):
      return np.full((len(texts), WIDTH), 1e5, np.float32)

  with pytest.raises(InputError, match='row 0.*1e.05.*float32'):
    look_up(['a'], Large(), tmp_path, dtype='float16')
  assert look_up(['a'], Large(), tmp_path, dtype='float32')[0, 0] == 1e5


@pytest.mark.parametrize(
  'texts, message',
  [
    ('one string', 'one string'),
    (['a', None], 'row 1: expected a string, got NoneType'),
    (['a', 'b', 3], 'row 2: expected a string, got int'),
    (['a', '\ud800'], 'row 1.*not valid Unicode'),
  ],
)
def test_what_is_no_text_is_refused(tmp_path, texts, message):
  with pytest.raises(InputError, match=message):
    look_up(texts, CountingEncoder(), tmp_path)


def test_a_wrong_shape_from_the_encoder(tmp_path):
  class Wrong(CountingEncoder):
    def encode(self, texts):
      return np.zeros((len(texts), WIDTH + 1))

  with pytest.raises(InputError, match=r'\(2, 6\); expected \(2, 5\)'):
    look_up(['a', 'b'], Wrong(), tmp_path)


def test_a_folder_that_is_no_store_is_refused(tmp_path):
  with pytest.raises(InputError, match='no store.json'):
    look_up(['a'], CountingEncoder(), tmp_path, [tmp_path / 'typo'])


@pytest.mark.parametrize(
  'change, message',
  [
    ({'format': 2}, 'format is 2'),
    ({'dtype': 'float64'}, 'float64'),
    ({'width': None, 'colour': 1}, 'colour'),
  ],
)
def test_a_changed_description_is_refused(tmp_path, change, message):
  make_store(tmp_path / 's', ['a'])
  path = tmp_path / 's' / 'store.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(InputError, match=message):
    FeatureStore(tmp_path / 's')


def test_another_spec_in_the_cache_is_refused(tmp_path):
  make_store(tmp_path / 's', ['a'])
  with pytest.raises(InputError, match="version='2'"):
    FeatureStore.open_or_create(
      tmp_path / 's', Spec('fake', '2', WIDTH, 'float32')
    )


def test_an_encoder_that_cannot_run_says_what_was_missing(tmp_path):
  class NotInstalled(CountingEncoder):
    def encode(self, texts):
      raise InputError('pip install something')

  make_store(tmp_path / 's', ['a'])
  message = '1 of 2 texts.*encoder fake, version 1.*pip install something'
  with pytest.raises(InputError, match=message):
    look_up(['a', 'b'], NotInstalled(), tmp_path, [tmp_path / 's'])


def test_an_encoder_with_vectors_of_its_own_is_not_cached(tmp_path):
  encoder = CountingEncoder()
  encoder.cacheable = False
  result = look_up(['b', 'a', 'b'], encoder, tmp_path)
  np.testing.assert_array_equal(result, np.stack([vector(t) for t in 'bab']))
  assert not (tmp_path / 'cache').exists()


def test_the_result_is_read_only(tmp_path):
  result = look_up(['a'], CountingEncoder(), tmp_path)
  with pytest.raises(ValueError, match='read-only'):
    result[0, 0] = 1.0


def test_progress_and_the_shards_of_a_long_run(tmp_path, monkeypatch):
  monkeypatch.setattr(lookup, '_CHUNK', 4)
  encoder = CountingEncoder()
  calls = []
  texts = [str(i) for i in range(10)]
  result = look_up(
    texts, encoder, tmp_path, progress=lambda *args: calls.append(args)
  )
  assert calls == [(4, 10), (8, 10), (10, 10)]
  np.testing.assert_array_equal(result, np.stack([vector(t) for t in texts]))
  again = look_up(texts[::-1], encoder, tmp_path)
  np.testing.assert_array_equal(again[::-1], result)
  assert len(encoder.asked) == 3


def test_an_interrupted_run_keeps_what_it_had_encoded(tmp_path, monkeypatch):
  monkeypatch.setattr(lookup, '_CHUNK', 4)
  encoder = CountingEncoder(fail_on='9')
  texts = [str(i) for i in range(10)]
  with pytest.raises(InputError):
    look_up(texts, encoder, tmp_path)
  encoder = CountingEncoder()
  look_up(texts, encoder, tmp_path)
  assert encoder.asked == [['8', '9']]


def test_default_cache_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  expected = tmp_path / 'pal_jax' / 'features'
  encoder = CountingEncoder()
  features.lookup_or_encode(['a'], encoder)
  assert lookup.cache_folder(encoder, '', 'float16').is_relative_to(expected)
  assert lookup.cache_folder(encoder, '', 'float16').exists()


def test_many_texts_are_found_without_a_search_for_each(tmp_path):
  """1e5 texts take well under a second; a linear search would take hours."""
  texts = [f'text {i}' for i in range(100_000)]
  vectors = np.arange(200_000, dtype=np.float32).reshape(-1, 2)
  spec = Spec('fake', '1', 2, 'float32')
  store = FeatureStore.open_or_create(tmp_path / 's', spec)
  store.append(texts[:60_000], vectors[:60_000])
  store.append(texts[60_000:], vectors[60_000:])
  order = np.random.default_rng(0).permutation(len(texts))
  start = time.perf_counter()
  result = look_up(
    [texts[i] for i in order], CountingEncoder(), tmp_path, [tmp_path / 's']
  )
  seconds = time.perf_counter() - start
  np.testing.assert_array_equal(result, vectors[order])
  assert seconds < 10, seconds


def test_encoding_again_replaces_a_corrupt_pair(tmp_path):
  encoder = CountingEncoder()
  look_up(['a', 'b'], encoder, tmp_path)
  folder = lookup.cache_folder(encoder, tmp_path / 'cache', 'float32')
  truncate(folder, 'vectors')
  with pytest.warns(UserWarning, match='is skipped'):
    look_up(['a', 'b'], encoder, tmp_path)
  look_up(['b', 'a'], encoder, tmp_path)
  assert len(encoder.asked) == 2
