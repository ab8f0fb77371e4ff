"""data.table: the splits of a run, saved, give the same run again."""

import csv
import json
from collections import Counter

import numpy as np
import pytest

from configs import table as table_config
from pal_jax import data
from pal_jax import train as training
from pal_jax.data.dataset import SEEN_ITEMS
from pal_jax.errors import InputError
from tests.data.table.create_test import (
  apart,
  comparisons,
  list_of_items,
  sets_of,
  split_rows,
)
from tests.data.table.table_test import SUFFIXES, config, row, write


def with_problems(rows):
  """In any order, and with rows that data.on_problem=drop leaves out."""
  rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
  first, second, third = rows[0], rows[50], rows[99]
  turned = {
    'response_a': second['response_b'],
    'response_b': second['response_a'],
    'label': 1 - second['label'],
  }
  return [
    rows[0] | {'label': 7},
    rows[1] | {'user_id': ''},
    *rows,
    first | {'label': 1 - first['label']},  # contradicts
    second | turned,  # repeats
    third | {'response_b': third['response_a']},
  ]


def created(path, join_prompt=True, **changes):
  return data.create(config(path, **changes), join_prompt=join_prompt)


def with_column(rows, dataset):
  assert len(dataset.row_split) == len(rows)
  return [
    r | {'split': str(name)}
    for r, name in zip(rows, dataset.row_split, strict=True)
  ]


def assert_same(one, other):
  assert one.user_ids == other.user_ids
  assert one.unseen_user_ids == other.unseen_user_ids
  found = sets_of(other)
  for name, (a, _) in sets_of(one).items():
    b = found[name][0]
    np.testing.assert_array_equal(a.mask, b.mask, name)
    a, b = (c.flatten()[np.flatnonzero(c.mask)] for c in (a, b))
    for field in ('user', 'label', 'weight'):
      np.testing.assert_array_equal(getattr(a, field), getattr(b, field), name)
    for names, rows in (('item_names', 'items'), ('prompt_names', 'prompt')):
      texts = [
        [getattr(d, names)[i] for i in getattr(c, rows).ravel()]
        for d, c in ((one, a), (other, b))
      ]
      assert texts[0] == texts[1], name


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('join_prompt', [True, False])
@pytest.mark.parametrize('rows', [apart(), list_of_items()], ids=['a', 'l'])
def test_the_column_gives_what_was_drawn(tmp_path, suffix, join_prompt, rows):
  rows = with_problems(rows)
  path = write(tmp_path / f'mine{suffix}', rows)
  drawn = created(path, join_prompt, on_problem='drop')
  marked = write(tmp_path / f'again{suffix}', with_column(rows, drawn))
  # Rows that are not used are not looked at: nothing to drop.
  given = created(marked, join_prompt)
  assert_same(drawn, given)
  assert drawn.row_split.tolist() == given.row_split.tolist()
  counts = Counter(drawn.row_split.tolist())
  assert len(counts) == 8  # every name is there
  again = ' '.join(given.notes)
  assert f"{counts['unused']:,} more rows are marked 'unused'." in again


def test_each_row_has_the_split_of_its_comparison(tmp_path):
  rows = with_problems(apart())
  dataset = created(write(tmp_path / 'mine.csv', rows), on_problem='drop')
  named = {
    'train': 'train',
    'validation': 'validation',
    'test': 'seen unseen_items',
    'test_seen_items': f'seen {SEEN_ITEMS}',
    'support': 'support',
    'query': 'unseen unseen_items',
    'query_seen_items': f'unseen {SEEN_ITEMS}',
  }
  found = {}
  for r, split in zip(rows, dataset.row_split, strict=True):
    if split != 'unused':
      a, b = (f'{r["prompt"]}\n{r[f"response_{x}"]}' for x in 'ab')
      found[r['user_id'], a, b] = named[split], r['label'], r['weight']
  assert found == comparisons(dataset)


def test_groups_and_given_splits_survive(tmp_path):
  rows = [
    r | {'group': f'g{int(r["user_id"][5:]) % 3}'} for r in split_rows()[::-1]
  ]
  rows[7]['split'] = 'unused'
  # Of somebody who is not used the group need not be known.
  rows.insert(0, rows[0] | {'user_id': 'x', 'group': None, 'split': 'unused'})
  first = created(write(tmp_path / 'mine.csv', rows))
  assert first.row_split.tolist() == [r['split'] for r in rows]
  second = created(write(tmp_path / 'again.csv', with_column(rows, first)))
  assert_same(first, second)
  assert first.truth.group is not None
  np.testing.assert_array_equal(first.truth.group, second.truth.group)


def test_rows_are_counted_as_messages_count_them(tmp_path):
  path = write(tmp_path / 'mine.jsonl', split_rows())
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([lines[0], '', '{"broken', *lines[1:]]) + '\n')
  with pytest.raises(InputError, match='row 3: '):
    created(path)
  found = created(path, on_problem='drop').row_split.tolist()
  expected = [json.loads(line)['split'] for line in lines]
  assert found == [expected[0], 'unused', 'unused', *expected[1:]]


def test_nothing_but_unused_rows_is_an_error(tmp_path):
  path = write(tmp_path / 'mine.csv', [row(label=9, split='unused')] * 3)
  with pytest.raises(InputError, match="left of 3 .3 are marked 'unused'"):
    created(path)


@pytest.mark.parametrize(
  ('split', 'known'),
  [('test_seen_items', 'train'), ('query_seen_items', 'support')],
)
def test_users_of_whom_nothing_is_known_are_refused(tmp_path, split, known):
  rows = [
    *split_rows(),
    row('stranger', split=split, prompt='', weight=1, time=0),
  ]
  message = f'1 users have {split} rows but none of {known}'
  with pytest.raises(InputError, match=message):
    created(write(tmp_path / 'mine.csv', rows))


# Whole runs, on ids that are rows of an array.


def whole_config(path, features):
  found = table_config.get_config().copy_and_resolve_references()
  with found.unlocked():
    found.update_from_flattened_dict(
      {
        'data.path': str(path),
        'features.encoder': 'precomputed',
        'features.path': str(features),
        'model.num_prototypes': 2,
        'model.projector': 'mlp1',
        'model.width': 8,
        # Its draws go by the numbers of the texts, which are the file's order.
        'model.dropout': 0.0,
        'train.num_steps': 20,
        'train.batch_size': 32,
        'train.log_every': 10,
        'train.checkpoint_every': 10,
        'optimizer.warmup_steps': 2,
        'evaluation.num_support': (0, 5),
        'evaluation.resamples': 2,
      }
    )
  return found


@pytest.fixture
def whole(tmp_path):
  """(rows, path of the table, path of the array): whole numbers as ids."""
  rng = np.random.default_rng(0)
  np.save(tmp_path / 'v.npy', rng.normal(size=(40, 6)).astype(np.float32))
  rows = list_of_items()
  for r in rows:
    for side in ('response_a', 'response_b'):
      r[side] = int(r[side].split()[1])
  rng.shuffle(rows)
  return rows, write(tmp_path / 'mine.parquet', rows), tmp_path / 'v.npy'


def run(config, workdir):
  return training.train_and_evaluate(config, workdir, progress=False, say=str)


def test_a_run_saves_its_splits_and_they_give_it_again(
  tmp_path, whole, monkeypatch
):
  rows, path, features = whole
  first, second = tmp_path / 'first', tmp_path / 'second'

  def killed(*args, **kwargs):
    raise KeyboardInterrupt

  # Before training; and resuming does not mind them.
  with monkeypatch.context() as patch:
    patch.setattr(training, 'train', killed)
    with pytest.raises(KeyboardInterrupt):
      run(whole_config(path, features), first)
  assert sorted(p.name for p in first.iterdir()) == [
    'config.json',
    'splits.csv',
  ]
  with (first / 'splits.csv').open(newline='') as file:
    saved = list(csv.DictReader(file))
  assert [int(r['row']) for r in saved] == list(range(1, len(rows) + 1))
  # Not other data under the same name.
  write(path, rows[1:])
  with pytest.raises(InputError, match='splits.csv has other splits'):
    run(whole_config(path, features), first)
  write(path, rows)
  before = (first / 'splits.csv').read_bytes()
  results = run(whole_config(path, features), first)
  assert (first / 'splits.csv').read_bytes() == before

  marked = [r | {'split': s['split']} for r, s in zip(rows, saved, strict=True)]
  again = run(
    whole_config(write(tmp_path / 'again.parquet', marked), features), second
  )
  assert (second / 'splits.csv').read_bytes() == before
  for part in ('grid', 'controls'):
    numbers = [_numbers(found[part]) for found in (results, again)]
    assert len(numbers[0]) > 20
    np.testing.assert_allclose(*numbers, atol=1e-5)


def _numbers(value):
  """All numbers in JSON, by name; null is NaN."""
  if isinstance(value, dict):
    return [x for key in sorted(value) for x in _numbers(value[key])]
  return [np.nan if value is None else value]


@pytest.mark.parametrize('wrong', [40, -1, 'tea'])
def test_ids_that_are_no_rows_are_told(tmp_path, whole, wrong):
  rows, _, features = whole
  rows = [r | {'response_a': str(r['response_a'])} for r in rows]
  rows[3]['response_a'] = str(wrong)
  path = write(tmp_path / 'wrong.csv', rows)
  with pytest.raises(InputError) as caught:
    run(whole_config(path, features), tmp_path / 'work')
  for part in (f"no vector for '{wrong}'", 'numbers of its rows, 0 to 39'):
    assert part in str(caught.value)
  assert not (tmp_path / 'work').exists()
