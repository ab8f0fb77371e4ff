"""data.convarg: what is read and refused, and how judgments are split."""

import builtins
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from configs import base
from configs.convarg import get_config
from pal_jax import data
from pal_jax.data.convarg import create_convarg, read_judgments
from pal_jax.data.dataset import (
  SEEN_ITEMS,
  UNSEEN_ITEMS,
  check_dataset,
  fingerprint,
)
from pal_jax.errors import InputError

FILE = 'comparisons.parquet'
NUM_TOPICS = 3
NUM_ARGUMENTS = 20  # of a topic
# Arguments 18 and 19 of each topic are copies, and 17 stands in all topics.
TEXTS = [f'Because "{i}",\nthat is why.' for i in range(NUM_ARGUMENTS - 1)]
TEXTS += [f' {TEXTS[-1]} ']


def argument(topic, i):
  return TEXTS[i] if i >= 17 else f'{TEXTS[i]} {topic}'


def judgment(user='u', topic='t', a=0, b=1, label=1.0, **changes):
  row = {
    'user_id': user,
    'prompt': topic,
    'response_a': argument(topic, a),
    'response_b': argument(topic, b),
    'response_a_id': f'{topic}/{a}',
    'response_b_id': f'{topic}/{b}',
    'label': label,
  }
  return row | changes


def write(folder, rows):
  path = folder / FILE
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return path


def all_judgments():
  """40 workers who judge 60 pairs each, and ten who judge three."""
  rng = np.random.default_rng(0)
  rows = []
  for user in range(50):
    seen = set()
    while len(seen) < (60 if user < 40 else 3):
      topic, a, b = rng.integers(0, [NUM_TOPICS, NUM_ARGUMENTS, NUM_ARGUMENTS])
      if a != b and (topic, a, b) not in seen and (topic, b, a) not in seen:
        seen.add((topic, a, b))
        label = rng.choice([0.0, 1.0, 0.5], p=[0.4, 0.4, 0.2])
        rows.append(
          judgment(f'worker {user}', f'topic-{topic}', int(a), int(b), label)
        )
  return rows


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('convarg')
  write(path, all_judgments())
  return path


def small(folder, **changes):
  config = base.convarg_data()
  config.update({'path': str(folder), **changes})
  return config


@pytest.fixture(scope='module')
def dataset(folder):
  return create_convarg(small(folder))


def sets_of(dataset):
  """{name: (comparisons [N] without padding, ids of their users)}."""

  def live(c):
    flat = c.flatten()
    return flat[flat.mask]

  return {
    'train': (dataset.train, dataset.user_ids),
    'validation': (dataset.validation, dataset.user_ids),
    'support': (live(dataset.support), dataset.unseen_user_ids),
    **{
      f'seen {k}': (live(c), dataset.user_ids) for k, c in dataset.seen.items()
    },
    **{
      f'unseen {k}': (live(c), dataset.unseen_user_ids)
      for k, c in dataset.unseen.items()
    },
  }


# Reading.


def test_judgments_are_read_as_they_are(tmp_path):
  rows = [
    judgment('x', 't', 0, 1, 1.0),
    judgment('y', 's', 2, 0, 0.5),
    judgment('x', 't', 2, 1, 0.0),
  ]
  found = read_judgments(write(tmp_path, rows))
  assert found.workers == ('x', 'y') and found.topics == ('t', 's')
  assert found.worker.tolist() == [0, 1, 0]
  assert found.label.tolist() == [1.0, 0.5, 0.0]
  for pair, row in zip(found.items, rows, strict=True):
    for item, side in zip(pair, ('a', 'b'), strict=True):
      assert found.arguments[item] == row[f'response_{side}']
      assert found.topics[found.topic[item]] == row['prompt']


def test_whole_numbers_are_ids_too(tmp_path):
  rows = [
    judgment(user=7, response_a_id=1, response_b_id=2),
    judgment(user=8, response_a_id=1, response_b_id=2),
  ]
  assert read_judgments(write(tmp_path, rows)).workers == ('7', '8')


def test_copies_are_one_argument(tmp_path):
  rows = [
    judgment('x', 't', 0, 18),
    judgment('x', 't', 19, 0, 1.0),  # the same pair again
    judgment('x', 't', 18, 19),  # of an argument and its copy
    judgment('y', 't', 19, 0),
    judgment('y', 's', 18, 0),  # another topic: another item
  ]
  found = read_judgments(write(tmp_path, rows))
  assert len(found.arguments) == 4
  assert found.worker.tolist() == [0, 1, 1]
  assert found.items[0].tolist() == found.items[1][::-1].tolist()
  (note,) = found.notes
  assert '1 arguments are copies' in note
  assert '1 judgments of an argument against its copy and 1 repeated' in note


# What is refused.


def refused(path, *parts):
  with pytest.raises(InputError) as caught:
    read_judgments(path)
  for part in (str(path), *parts):
    assert part in str(caught.value)


def test_no_path_says_what_to_download_and_how_to_set_it():
  with pytest.raises(InputError) as caught:
    data.create(get_config().data)
  for part in (
    'data.path is empty',
    'github.com/UKPLab/acl2016-convincing-arguments',
    'CC BY 4.0',
    '--config.data.path=',
    FILE,
  ):
    assert part in str(caught.value)


def test_a_missing_file_says_what_to_download(tmp_path):
  with pytest.raises(InputError, match='no such file; download'):
    create_convarg(small(tmp_path))


def test_without_pyarrow_it_says_how_to_install_it(folder, monkeypatch):
  real = builtins.__import__

  def refuse(name, *args, **kwargs):
    if name.startswith('pyarrow'):
      raise ImportError('no pyarrow here')
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', refuse)
  with pytest.raises(InputError, match='pip install pyarrow'):
    create_convarg(small(folder))


def test_another_format_is_refused(tmp_path):
  path = tmp_path / FILE
  path.write_text('user_id,prompt\n')
  refused(path, 'not a Parquet file')


def test_a_table_without_rows_is_refused(tmp_path):
  path = write(tmp_path, [judgment()])
  parquet.write_table(parquet.read_table(path)[:0], path)
  refused(path, 'no rows')


@pytest.mark.parametrize('column', sorted(judgment()))
def test_a_missing_column_is_named(tmp_path, column):
  row = judgment()
  del row[column]
  refused(write(tmp_path, [row]), f"the column '{column}' is missing")


@pytest.mark.parametrize('column', sorted(judgment()))
def test_a_null_is_refused_with_row_and_column(tmp_path, column):
  rows = [judgment(), judgment(**{column: None})]
  refused(write(tmp_path, rows), 'row 1', f"'{column}' is None", 'expected')


@pytest.mark.parametrize(
  'changes, parts',
  [
    ({'label': 0.7}, ("'label' is 0.7", '(0.0, 0.5, 1.0)')),
    ({'label': float('nan')}, ("'label' is nan",)),
    ({'prompt': ' '}, ("'prompt' is ' '", 'text')),
    ({'response_b': ''}, ("'response_b' is ''", 'text')),
    ({'user_id': ''}, ("'user_id' is ''", 'an id')),
    ({'response_a': 'another'}, ("'t/0' has another text than in row 0",)),
    (
      {'prompt': 's', 'response_b_id': 'new'},
      ("'t/0' has another topic than in row 0",),
    ),
  ],
)
def test_a_bad_value_is_refused_with_row_and_column(tmp_path, changes, parts):
  rows = [judgment(), judgment(user='v', **changes)]
  refused(write(tmp_path, rows), 'row 1', *parts)


@pytest.mark.parametrize(
  'changes, part',
  [
    ({'ties': 'some'}, "data.ties='some' is unknown"),
    ({'min_support': 0}, 'data.min_support=0 must be at least 1'),
    ({'max_pairs_per_user': 0}, 'data.max_pairs_per_user=0 must be at least 1'),
    ({'min_support': 6}, 'data.min_support=6 must be at most'),
    ({'unseen_fraction': 1.5}, 'data.unseen_fraction=1.5'),
    ({'min_query': 40}, 'of 15 as unseen ones'),
    ({'test_fraction': 0.0}, 'data.test_fraction=0.0'),
  ],
)
def test_fields_out_of_range_are_refused(folder, changes, part):
  with pytest.raises(InputError) as caught:
    create_convarg(small(folder, **changes))
  assert part in str(caught.value)


# The protocol.


@pytest.mark.parametrize('join_prompt', [True, False])
@pytest.mark.parametrize('ties', ['keep', 'drop'])
def test_every_comparison_is_a_judgment(folder, join_prompt, ties):
  found = create_convarg(small(folder, ties=ties), join_prompt=join_prompt)
  judged = {}
  for row in all_judgments():
    texts = row['response_a'].strip(), row['response_b'].strip()
    judged.setdefault((row['user_id'], row['prompt'], *texts), row['label'])
  labels = set()
  for name, (c, users) in sets_of(found).items():
    assert c.label.size, name
    for user, prompt, pair, label in zip(
      c.user, c.prompt, c.items, c.label, strict=True
    ):
      topic = found.prompt_names[prompt]
      texts = [found.item_names[i] for i in pair]
      if join_prompt:
        assert all(t.startswith(f'{topic}\n') for t in texts)
        texts = [t.removeprefix(f'{topic}\n') for t in texts]
      assert judged[users[user], topic, *texts] == label
    labels |= set(c.label.tolist())
  assert labels == ({0.0, 0.5, 1.0} if ties == 'keep' else {0.0, 1.0})
  assert ('kept' if ties == 'keep' else 'left out') in found.notes[1]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'ties': 'keep'},
    {'min_support': 3, 'max_support': 8},
    {'heldout_fraction': 0.5, 'max_query': 3},
    {'max_pairs_per_user': 4},
  ],
)
def test_every_rule_of_the_protocol(folder, seed, changes):
  config = small(folder, seed=seed, **changes)
  found = create_convarg(config)
  assert check_dataset(found) is found
  assert not set(found.user_ids) & set(found.unseen_user_ids)
  splits = {
    'train': 0,
    'validation': 1,
    'support': 0,
    f'seen {SEEN_ITEMS}': 0,
    f'seen {UNSEEN_ITEMS}': 2,
    f'unseen {SEEN_ITEMS}': 0,
    f'unseen {UNSEEN_ITEMS}': 2,
  }
  keys = set()
  for name, (c, users) in sets_of(found).items():
    assert set(found.item_split[c.items].ravel()) <= {splits[name]}, name
    for user, pair in zip(c.user, np.sort(c.items), strict=True):
      key = users[user], *pair.tolist()
      assert key not in keys  # each judgment is used once
      keys.add(key)
  counts = Counter(found.train.user.tolist())
  assert set(counts) == set(range(found.num_users))
  assert min(counts.values()) >= config.min_comparisons
  assert max(counts.values()) <= config.max_pairs_per_user
  support, asked = found.support, found.unseen[SEEN_ITEMS]
  for user in range(len(found.unseen_user_ids)):
    known = support.items[user][support.mask[user]]
    assert not np.isin(asked.items[user][asked.mask[user]], known).any()
  assert config.min_support <= support.mask.sum(-1).min()
  assert support.mask.sum(-1).max() <= config.max_support
  assert found.unseen[UNSEEN_ITEMS].mask.sum(-1).min() >= config.min_query
  for c in (*found.seen.values(), *found.unseen.values()):
    assert c.shape[1] <= config.max_query


def test_arguments_are_split_within_topics_and_copies_together(dataset):
  texts = [n.split('\n', 1)[1] for n in dataset.item_names]
  split_of = {}
  for text, split in zip(texts, dataset.item_split, strict=True):
    assert split_of.setdefault(text, split) == split
  groups = np.array(dataset.item_groups)
  for topic in dataset.prompt_names:
    counts = np.bincount(dataset.item_split[groups == topic], minlength=3)
    assert counts.sum() == NUM_ARGUMENTS - 1
    # Two of the 19 texts stand in every topic and follow the first of them.
    np.testing.assert_allclose(counts, [9, 3, 7], atol=2)


def test_both_forms_have_the_same_comparisons(folder, dataset):
  apart = create_convarg(small(folder), join_prompt=False)
  one, two = fingerprint(apart), fingerprint(dataset)
  assert one['users'] == two['users']
  assert one['comparisons'] == two['comparisons']
  assert one['items'] != two['items']
  assert apart.prompt_names == dataset.prompt_names
  for joined, alone, topic in zip(
    dataset.item_names, apart.item_names, dataset.item_groups, strict=True
  ):
    assert joined == f'{topic}\n{alone}'


def test_the_notes_count_what_is_left_out(dataset, folder):
  judged = read_judgments(folder / FILE)
  decided = judged.label != 0.5
  split = dataset.item_split[judged.items]
  across = int((decided & (split[:, 0] != split[:, 1])).sum())
  assert f'{int((~decided).sum())} judgments are ties' in dataset.notes[1]
  assert f'{across} judgments of arguments of two' in dataset.notes[1]
  assert 'Of 50 people' in dataset.notes[2]


def test_there_is_no_truth(dataset):
  assert all(value is None for value in vars(dataset.truth).values())


def test_a_seed_decides_everything(folder, dataset):
  assert fingerprint(data.create(small(folder))) == fingerprint(dataset)
  other = fingerprint(create_convarg(small(folder, seed=1)))
  assert all(other[k] != v for k, v in fingerprint(dataset).items())


def test_the_config_keeps_one_cohort():
  config = get_config()
  assert config.is_locked
  assert max(config.evaluation.num_support) <= config.data.min_support


@pytest.mark.skipif(
  'PAL_JAX_DATA' not in os.environ,
  reason='PAL_JAX_DATA names no folder with ukpconvarg1/',
)
def test_the_real_file():
  found = create_convarg(
    small(Path(os.environ['PAL_JAX_DATA']) / 'ukpconvarg1')
  )
  assert '3815 workers' in found.notes[0]
  assert len(found.item_names) == 1038 and len(found.prompt_names) == 32
  assert found.num_users > 900 and len(found.unseen_user_ids) > 80
