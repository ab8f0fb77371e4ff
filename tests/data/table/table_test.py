"""data.table: what is read, what is refused, what is left out and counted."""

import csv
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from configs import table as table_config
from pal_jax.data.table import read_table
from pal_jax.data.table.spool import SpooledTexts
from pal_jax.errors import InputError

SUFFIXES = ('.parquet', '.csv', '.jsonl')


def row(user='ann', a='tea', b='coffee', label=1.0, **more):
  return {'user_id': user, 'response_a': a, 'response_b': b, 'label': label} | (
    more
  )


def write(path, rows):
  if path.suffix == '.parquet':
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  elif path.suffix == '.csv':
    with path.open('w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  else:
    lines = [json.dumps(r) + '\n' for r in rows]
    path.write_text(''.join(lines), encoding='utf-8')
  return path


def config(path, **changes):
  found = table_config.get_config().copy_and_resolve_references()
  with found.unlocked():
    found.data.path = str(path)
    found.data.update_from_flattened_dict(changes)
  return found.data


def refused(path, **changes):
  with pytest.raises(InputError) as caught:
    read_table(config(path, **changes))
  return str(caught.value)


# What is read.


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_the_three_formats_are_one_table(tmp_path, suffix):
  rows = [
    row(prompt='drink?', weight=2.0, time=3, group='x'),
    row('bob', 'water,\n"still"', 'tea', 0.25, prompt='', weight=1.0, time=1),
    row('ann', 'tea', 'water,\n"still"', 0, prompt='eat?', weight=0, time=2),
  ]
  rows[1]['group'], rows[2]['group'] = 'y', 'x'
  found = read_table(config(write(tmp_path / f'mine{suffix}', rows)))
  assert found.users == ('ann', 'bob')
  assert found.user.tolist() == [0, 1, 0]
  assert list(found.prompts) == ['', 'drink?', 'eat?']
  texts = [[found.texts[i] for i in pair] for pair in found.items.tolist()]
  assert texts == [[r['response_a'], r['response_b']] for r in rows]
  asked = [found.prompts[found.prompt_of[p[0]]] for p in found.items]
  assert asked == ['drink?', '', 'eat?']
  np.testing.assert_allclose(found.label, [1, 0.25, 0])
  np.testing.assert_allclose(found.weight, [2, 1, 0])
  np.testing.assert_allclose(found.time, [3, 1, 2])
  assert found.group.tolist() == [0, 1]
  assert found.split is None
  # One text under two prompts is two items: together they read differently.
  assert len(found.texts) == 6


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_whole_numbers_are_users_and_responses(tmp_path, suffix):
  rows = [row(7, 1, 2), row(8, 2, 3, 0)]
  found = read_table(config(write(tmp_path / f'mine{suffix}', rows)))
  assert found.users == ('7', '8')
  assert list(found.texts) == ['1', '2', '3']


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_chosen_and_rejected_instead_of_a_label(tmp_path, suffix):
  rows = [
    {'user_id': 'ann', 'prompt': 'p', 'chosen': 'tea', 'rejected': 'coffee'}
  ]
  found = read_table(config(write(tmp_path / f'mine{suffix}', rows)))
  assert found.label.tolist() == [1.0]
  assert list(found.texts) == ['tea', 'coffee']


@pytest.mark.parametrize('suffix', ['.parquet', '.jsonl'])
def test_conversations_are_prompt_and_answer(tmp_path, suffix):
  def talk(*texts):
    return [{'role': 'any', 'content': t} for t in texts]

  rows = [
    {
      'user_id': 'ann',
      'chosen': talk('hello', 'drink?', 'tea'),
      'rejected': talk('hello', 'drink?', 'coffee'),
    }
  ]
  found = read_table(config(write(tmp_path / f'a{suffix}', rows)))
  assert list(found.prompts) == ['', 'hello\ndrink?']
  assert list(found.texts) == ['tea', 'coffee']
  rows = [
    {
      'user_id': 'ann',
      'prompt': talk('hello', 'drink?'),
      'chosen': talk('tea'),
      'rejected': talk('coffee'),
    }
  ]
  found = read_table(config(write(tmp_path / f'b{suffix}', rows)))
  assert list(found.prompts) == ['', 'hello\ndrink?']
  rows[0]['rejected'] = talk('other', 'coffee')
  del rows[0]['prompt']
  rows[0]['chosen'] = talk('hello', 'tea')
  message = refused(write(tmp_path / f'c{suffix}', rows))
  assert 'answer different conversations: 1' in message


def test_columns_may_have_other_names(tmp_path):
  rows = [{'who': 'ann', 'left': 'a', 'right': 'b', 'y': 1, 'q': 'why?'}]
  found = read_table(
    config(
      write(tmp_path / 'mine.csv', rows),
      **{
        'columns.user': 'who',
        'columns.response_a': 'left',
        'columns.response_b': 'right',
        'columns.label': 'y',
        'columns.prompt': 'q',
      },
    )
  )
  assert found.users == ('ann',) and list(found.prompts) == ['', 'why?']


@pytest.mark.parametrize(
  ('label', 'expected'),
  [(True, 1.0), (False, 0.0), (1, 1.0), (0.5, 0.5), ('0.75', 0.75), ('1', 1.0)],
)
def test_labels_are_probabilities(tmp_path, label, expected):
  path = write(tmp_path / 'mine.jsonl', [row(label=label)])
  assert read_table(config(path)).label.tolist() == [expected]


# Problems.


def test_all_problems_are_told_at_once(tmp_path):
  rows = [row(f'u{i}', label=2 + i) for i in range(14)]
  rows += [
    row(''),
    row('ann', ''),
    row('ann', '  ', 'x'),
    row('ann', 'same', 'same'),
    row('ann', 'x', 'y', 'yes'),
    row('ann', 'x', 'y'),
    row('ann', 'y', 'x', 1.0),
  ]
  message = refused(write(tmp_path / 'mine.csv', rows))
  assert '21 problems' not in message  # contradictions are one, not two
  lines = message.splitlines()
  assert lines[0].endswith('mine.csv: 20 problems of 5 kinds')
  assert lines[1] == '- labels that are no number from 0 to 1: 15'
  assert lines[2] == "    row 1: '2'"
  assert lines[11] == "    row 10: '11'"
  assert lines[12] == '    and 5 more'
  for part in (
    '- users that are empty: 1',
    '- responses that are empty: 2',
    "- pairs of two equal responses: 1\n    row 18: 'same'",
    "row 21: user 'ann' says the opposite in row 20",
    'data.on_problem=drop',
  ):
    assert part in message


def test_dropping_counts_what_goes(tmp_path):
  rows = [
    row('ann', 'a', 'b'),
    row('ann', 'b', 'a', 0.0),  # the same said again
    row('ann', 'a', 'c'),
    row('ann', 'c', 'a'),  # the opposite
    row('ann', 'a', 'd', 7),
    row('', 'a', 'd'),
    row('bob', 'a', 'd'),
  ]
  path = write(tmp_path / 'mine.csv', rows)
  found = read_table(config(path, on_problem='drop'))
  assert found.users == ('ann', 'bob') and len(found.user) == 2
  notes = '\n'.join(found.notes)
  assert '7 rows, of which 2 comparisons of 2 users are kept' in notes
  assert '3 more rows could be read and are left out' in notes
  assert 'contradict an earlier one of the same user: 1.' in notes
  assert 'labels that are no number from 0 to 1: 1.' in notes
  assert 'users that are empty: 1.' in notes
  assert "2 users have one comparison ('ann', 'bob')" in notes


@pytest.mark.parametrize(
  ('changes', 'part'),
  [
    ({'label': None}, 'labels that are no number'),
    ({'label': float('nan')}, 'labels that are no number'),
    ({'label': -0.1}, 'labels that are no number'),
    ({'label': [1]}, 'labels that are no number'),
    ({'user_id': None}, 'users that are empty'),
    ({'user_id': 1.5}, 'users that are no string or whole number'),
    ({'user_id': True}, 'users that are no string or whole number'),
    ({'user_id': '\ud800'}, 'users that are no string or whole number'),
    ({'response_a': None}, 'responses that are empty'),
    ({'response_a': {'text': 'x'}}, 'responses that are no text'),
    ({'response_a': []}, 'responses that are no text'),
    ({'response_a': 'x\ud800'}, 'responses that are no text'),
    ({'prompt': 3}, 'prompts that are no text'),
    ({'weight': -1}, 'weights that are no number from 0 on'),
    ({'weight': 'much'}, 'weights that are no number from 0 on'),
    ({'weight': 1e400}, 'weights that are no number from 0 on'),
    ({'time': 'noon'}, 'times that are no number'),
    ({'time': None}, 'times that are no number'),
    ({'split': 'dev'}, 'splits that are none of train'),
    ({'group': [1]}, 'groups that are no string'),
  ],
)
def test_a_bad_value_is_named_with_its_row(tmp_path, changes, part):
  rows = [row(time=1, weight=1, split='train', group='g', prompt='p')]
  rows.append(rows[0] | {'user_id': 'bob'} | changes)
  message = refused(write(tmp_path / 'mine.jsonl', rows))
  assert part in message and 'row 2: ' in message


def test_users_of_two_groups_or_two_sides(tmp_path):
  rows = [
    row(split='train', group='x'),
    row('ann', 'x', 'y', split='query', group='x'),
    row('bob', split='train', group='x'),
    row('bob', 'x', 'y', split='test', group='z'),
  ]
  message = refused(write(tmp_path / 'mine.csv', rows))
  assert "in support or query: 1\n    user 'ann'" in message
  assert "users of two groups: 1\n    user 'bob'" in message


def test_rows_of_another_length_are_counted(tmp_path):
  path = write(tmp_path / 'mine.csv', [row(), row('bob')])
  with path.open('a') as file:
    file.write('eve,only\r\n')
  message = refused(path)
  assert 'row 3: 2 cells, the header has 4' in message
  assert len(read_table(config(path, on_problem='drop')).users) == 2


def test_lines_that_are_no_json_are_counted(tmp_path):
  path = tmp_path / 'mine.jsonl'
  path.write_bytes(
    json.dumps(row()).encode()
    + b'\n{"user_id": \n\n[1]\n{"a": 1, "a": 2}\n\xff\xfe\n'
    + b'[' * 100_000
    + b'\n'
  )
  message = refused(path)
  assert '- lines that are no JSON in UTF-8: 4' in message
  assert 'row 2: ' in message and 'row 5: a name stands there twice' in message
  assert '- lines that are no JSON object: 1\n    row 4: a list' in message
  assert read_table(config(path, on_problem='drop')).users == ('ann',)


# Files.


@pytest.mark.parametrize(
  ('name', 'content', 'part'),
  [
    ('mine.txt', b'', "ends in '.txt'"),
    ('mine.csv', b'', 'is empty'),
    ('mine.jsonl', b'', 'is empty'),
    ('mine.csv', b'PK\x03\x04zip', 'is a zip archive'),
    ('mine.parquet', b'PK\x03\x04zip', 'is a zip archive'),
    ('mine.jsonl', b'\x80\x04\x95pickle', 'is a pickle'),
    ('mine.csv', b'\x1f\x8bgzip', 'is a gzip archive'),
    ('mine.csv', b'PAR1', 'is Parquet'),
    ('mine.csv', 'user_id'.encode('utf-16'), 'is UTF-16 text'),
    ('mine.csv', b'user_id,\0', 'zero bytes'),
    ('mine.parquet', b'PAR1 cut short', 'cannot be read as Parquet'),
    ('mine.csv', b'user_id,user_id\n', "['user_id'] stand there twice"),
    (
      'mine.csv',
      b'user_id,response_a,response_b,label\n',
      'has a header and no rows',
    ),
    ('mine.csv', b'user_id,label\n1,1\n', "'response_a' (data.columns."),
    (
      'mine.csv',
      b'user_id,response_a,response_b,label\nann,"a\n',
      'cannot be read as CSV in UTF-8 after row 0',
    ),
    (
      'mine.csv',
      b'user_id,response_a,response_b,label\nann,a,b,1\nann,\xff,b,1\n',
      'cannot be read as CSV in UTF-8',
    ),
  ],
)
def test_other_files_are_refused(tmp_path, name, content, part):
  path = tmp_path / name
  path.write_bytes(content)
  assert part in refused(path)


def test_missing_files_and_mistyped_fields_are_told(tmp_path):
  assert 'no such file' in refused(tmp_path / 'none.csv')
  assert 'data.path is empty' in refused('')
  path = write(tmp_path / 'mine.csv', [row()])
  assert "on_problem='ignore' is unknown" in refused(path, on_problem='ignore')
  message = refused(path, **{'columns.prompt': 'question'})
  assert "no column 'question' (data.columns.prompt)" in message
  # Without a prompt by the usual name there is none.
  assert len(read_table(config(path)).prompts) == 1


def test_nothing_left_is_an_error(tmp_path):
  path = write(tmp_path / 'mine.csv', [row(label=3), row('', label=1)])
  message = refused(path, on_problem='drop')
  assert 'no row is left of 2' in message and 'labels that' in message


# Texts on disk.


def test_spooled_texts_are_a_sequence():
  texts = ['', 'tea', 'Käse\n', 'x' * 100_000]
  found = SpooledTexts()
  for i, text in enumerate(texts):
    assert found.append(text) == i
    assert found[i] == text  # read while it grows
  assert len(found) == 4 and list(found) == texts
  assert found[-1] == texts[-1] and found[1:3] == texts[1:3]
  assert 'tea' in found and [*found, *found] == texts * 2
  with pytest.raises(IndexError):
    found[4]
