"""TL;DR: rows kept, workers' ranks, labels, splits; a run of the config."""

import collections

import numpy as np
import pytest

from configs import tldr, tldr_unseen
from pal_jax import data
from pal_jax.data.builders import prepare
from pal_jax.data.builders.tldr import TldrComparisons
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.data.tldr import length_labels, stratified
from pal_jax.errors import InputError
from pal_jax.train import train_and_evaluate
from tests.data.builders import files
from tests.slow import SLOW


def make_config(folder, which=tldr, **changes):
  config = which.get_config().unlock()
  config.data.path = str(folder / 'files')
  config.data.tfds_dir = str(folder / 'prepared')
  config.data.min_rows = 20
  config.data.min_query = 8
  config.data.max_support = 10
  config.evaluation.num_support = (0, 2, 10)
  config.data.update(changes)
  return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('tldr')
  (root / 'files').mkdir()
  rows = files.tldr_rows()
  files.write_json_lines(root / 'files' / 'batch3.json', rows[:200])
  files.write_json_lines(root / 'files' / 'batch4.json', rows[200:])
  return root


def prepared(folder, rows, suffix='json'):
  (folder / 'files').mkdir(exist_ok=True)
  path = folder / 'files' / f'batch3.{suffix}'
  write = files.write_json_lines if suffix == 'json' else files.write_parquet
  write(path, rows)
  return prepare.prepare(
    TldrComparisons, files=(path,), data_dir=folder / 'prepared'
  )


def test_rows_of_other_policies_and_null_rows_are_left_out(tmp_path):
  ppo = [
    {'text': 'x', 'policy': 'sup4_ppo_rm3'},
    {'text': 'y', 'policy': 'sup'},
  ]
  ref = [{'text': 'x', 'policy': 'ref'}, {'text': 'y', 'policy': 'sup4'}]
  nothing = [{'text': None, 'policy': 'sup'}, {'text': 'y', 'policy': 'sup4'}]
  article = {'id': '1', 'article': 'news', 'site': 'cnn'}  # as in the files
  null = {'id': '1', 'article': 'news', 'post': None}  # as on the hub
  rows = [
    files.tldr_row('a', 'one', 'two'),
    files.tldr_row('a', 'one', 'two', summaries=ppo),
    files.tldr_row('a', 'one', 'two', summaries=ref),
    files.tldr_row('a', 'one', 'two', summaries=nothing),
    files.tldr_row(None, 'one', 'two'),
    files.tldr_row('a', 'one', 'two', info=article),
    files.tldr_row('a', 'one', 'two', info=null),
    files.tldr_row('keys', 'three', 'four', split='valid1', choice=0),
    files.tldr_row('a.b', 'three', 'four', split='valid2'),
  ]
  builder = prepared(tmp_path, rows)
  train = list(prepare.read_split(builder, 'train'))
  assert [row['summary_0'] for row in train] == ['one']
  validation = list(prepare.read_split(builder, 'validation'))
  assert [row['worker'] for row in validation] == ['keys', 'a.b']
  assert [row['choice'] for row in validation] == [0, 1]
  assert '2 of other policies' in prepare.note(builder)
  assert '4 with a null post, text or worker' in prepare.note(builder)


def test_parquet_and_json_lines_are_the_same(tmp_path, folder):
  rows = files.tldr_rows()
  (tmp_path / 'one').mkdir()
  (tmp_path / 'two').mkdir()
  one = prepared(tmp_path / 'one', rows)
  two = prepared(tmp_path / 'two', rows, 'parquet')
  for split in ('train', 'validation'):
    assert list(prepare.read_split(one, split)) == list(
      prepare.read_split(two, split)
    )


def test_changed_files_are_prepared_again(tmp_path):
  rows = files.tldr_rows()
  first = prepared(tmp_path, rows)
  again = prepared(tmp_path, rows)
  other = prepared(tmp_path, rows[:-100])
  assert first.data_dir == again.data_dir != other.data_dir


def test_ten_workers_are_seen_and_three_of_them_want_it_short(folder):
  dataset = data.create(make_config(folder).data)
  # The more training rows, the lower the rank; 'w.10' and 'w.11' have fewest.
  assert sorted(dataset.user_ids) == sorted(f'w.{i}' for i in range(10))
  wants_short = {
    user
    for user, group in zip(dataset.user_ids, dataset.truth.group, strict=False)
    if group
  }
  assert wants_short == {'w.3', 'w.4', 'w.5'}
  assert set(dataset.unseen_user_ids) == {f'w.{i}' for i in range(10, 15)}
  rows = files.tldr_rows()
  count = collections.Counter(
    row['split'] == 'train' for row in rows if row['worker'] in wants_short
  )
  user = np.array([dataset.user_ids.index(u) for u in wants_short])
  of_them = np.isin(dataset.train.user, user).sum()
  of_them += np.isin(dataset.validation.user, user).sum()
  assert of_them == count[True]
  assert dataset.seen[UNSEEN_ITEMS].mask[user].sum() == count[False]


def test_labels_are_the_length_for_each_worker(folder):
  dataset = data.create(make_config(folder).data)
  lengths = np.array([len(text) for text in dataset.item_names])
  train = dataset.train
  left, right = lengths[train.items].T
  short = dataset.truth.group[train.user] == 1
  assert (train.label[left == right] == 0.5).all()
  assert (left == right).any()
  decided = left != right
  longer = (left > right).astype(float)
  expected = np.where(short, 1 - longer, longer)
  np.testing.assert_array_equal(train.label[decided], expected[decided])


def test_human_labels_are_the_choice(folder):
  config = make_config(folder, labels='human').data
  dataset = data.create(config)
  assert dataset.truth.group is None
  # Every row of the fixture chooses the second.
  assert (dataset.train.label == 0).all()


def test_named_workers_replace_the_ranks(folder):
  config = make_config(folder, short_workers=('w.0', 'w.13')).data
  dataset = data.create(config)
  everybody = (*dataset.user_ids, *dataset.unseen_user_ids)
  chosen = {u for u, g in zip(everybody, dataset.truth.group, strict=True) if g}
  assert chosen == {'w.0', 'w.13'}
  with pytest.raises(InputError, match="'w.99', who has no row"):
    data.create(make_config(folder, short_workers=('w.99',)).data)


def test_the_paper_split_sizes_come_out():
  counts = (5245, 2920, 2437, 2366, 2200, 2126, 1824, 1606, 1366, 1209)
  user = np.repeat(np.arange(10), counts)
  held = stratified(np.random.default_rng(0), user, 0.1)
  assert (held.sum(), (~held).sum()) == (2330, 20969)
  share = np.bincount(user[held]) - 0.1 * np.array(counts)
  assert (np.abs(share) < 1).all()


def test_length_labels_oppose_each_other_and_tie():
  lengths = np.array([[3, 5], [5, 3], [4, 4]])
  long = length_labels(lengths, np.zeros(3, bool))
  np.testing.assert_array_equal(long, [0, 1, 0.5])
  np.testing.assert_array_equal(
    length_labels(lengths, np.ones(3, bool)), 1 - long
  )


def test_the_paper_template_joins_post_and_summary(folder):
  config = make_config(folder, template='paper').data
  joined = data.create(config)
  apart = data.create(config, join_prompt=False)
  assert joined.item_names[0].startswith('Human: ')
  assert ' Assistant: ' in joined.item_names[0]
  assert joined.item_names[0].endswith('<|endoftext|>')
  assert joined.item_names[0] == apart.prompt_names[0] + apart.item_names[0]


def test_support_and_queries_are_apart_and_sized(folder):
  dataset = data.create(make_config(folder).data)
  support, queries = dataset.support, dataset.unseen[UNSEEN_ITEMS]
  assert (support.mask.sum(-1) == 10).all()
  assert (queries.mask.sum(-1) >= 8).all()
  for known, asked in zip(support, queries, strict=True):
    items = known.items[known.mask], asked.items[asked.mask]
    assert not np.isin(*items).any()


@pytest.mark.parametrize('which', [pytest.param(tldr, marks=SLOW), tldr_unseen])
def test_a_full_run(folder, which, tmp_path):
  config = make_config(folder, which)
  names = data.create(config.data).item_names
  lengths = np.array([len(name) for name in names], np.float32)
  noise = np.random.default_rng(0).normal(size=(len(names), 7))
  x = np.concatenate([lengths[:, None] / 20, 0.1 * noise], -1)
  names, rows = np.unique(np.array(names), return_index=True)
  path = tmp_path / 'summaries.npz'
  np.savez(path, texts=names, features=x[rows].astype(np.float32))
  config.features.encoder = 'precomputed'
  config.features.path = str(path)
  config.features.normalize = 'none'
  config.model.projector = 'mlp0'
  config.model.width = 4
  config.train.num_steps = 100
  config.train.batch_size = 64
  results = train_and_evaluate(
    config.lock(), tmp_path / 'run', progress=False, say=lambda _: None
  )
  # A scorer of length alone cannot please those who want it short.
  test = data.create(config.data).seen[UNSEEN_ITEMS]
  short = np.isin(np.arange(10), np.flatnonzero(results_groups(config)))
  decided = test.mask & (test.label != 0.5)
  share = decided[~short].sum() / decided.sum()
  length = results['controls']['length_seen']['accuracy']
  assert length == pytest.approx(max(share, 1 - share), abs=1e-6)
  assert results['seen']['accuracy'] > length + 0.1
  report = (tmp_path / 'run' / 'report.md').read_text()
  assert 'length only, seen users' in report
  assert 'length only, unseen users' in report


def results_groups(config):
  return data.create(config.data).truth.group[:10]


def test_what_is_missing_is_named(tmp_path):
  config = make_config(tmp_path)
  with pytest.raises(InputError, match='fetch the comparisons of openai'):
    data.create(config.data)
  config.data.path = ''
  with pytest.raises(InputError, match='data.path is empty'):
    data.create(config.data)
  (tmp_path / 'files').mkdir()
  with pytest.raises(InputError, match='has no file that ends in'):
    TldrComparisons.find_files(tmp_path / 'files')


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"a": 1', 'batch3.json, line 2: malformed JSON'),
    ('{"split": "test"}', "line 2: the field 'split' is 'test'"),
    ('[1, 2]', "line 2: the field 'split' is None"),
    ('{"split": "train"}', 'line 2: expected info.post, two summaries'),
  ],
)
def test_damaged_lines_are_named_and_leave_nothing(tmp_path, line, message):
  (tmp_path / 'files').mkdir()
  path = tmp_path / 'files' / 'batch3.json'
  files.write_json_lines(path, [files.tldr_row('a', 'one', 'two')])
  path.write_text(path.read_text() + line + '\n')
  with pytest.raises(InputError, match=message):
    data.create(make_config(tmp_path).data)
  assert not list((tmp_path / 'prepared').rglob('dataset_info.json'))


def test_a_choice_out_of_range_is_refused(tmp_path):
  row = files.tldr_row('a', 'one', 'two', choice=3)
  with pytest.raises(InputError, match="'choice' is 3, expected 0 or 1"):
    prepared(tmp_path, [row])
