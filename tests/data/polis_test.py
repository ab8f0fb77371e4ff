"""data.polis: what is read and refused, and how votes become comparisons."""

import csv
import os
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base
from configs.polis import get_config
from pal_jax import data
from pal_jax.data.dataset import (
  SEEN_ITEMS,
  UNSEEN_ITEMS,
  check_dataset,
  fingerprint,
)
from pal_jax.data.polis import (
  PROMPT,
  balanced_pairs,
  create_polis,
  read_conversation,
)
from pal_jax.errors import InputError

TALK = 'a-talk'
COMMENTS = 'comments.csv'
VOTES = 'participants-votes.csv'
COMMENT_HEADER = (
  'timestamp',
  'datetime',
  'comment-id',
  'author-id',
  'agrees',
  'disagrees',
  'moderated',
  'comment-body',
)
PERSON_HEADER = (
  'participant',
  'group-id',
  'n-comments',
  'n-votes',
  'n-agree',
  'n-disagree',
)


def write_csv(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', encoding='utf-8', newline='') as file:
    csv.writer(file).writerows(rows)


def write_comments(folder, comments, header=COMMENT_HEADER):
  """`comments` are (id, text, moderated)."""
  rows = [
    (151, 'Tue Feb 13 12:58:16 WIB 2018', i, 7, 1, 0, moderated, text)
    for i, text, moderated in comments
  ]
  write_csv(folder / COMMENTS, [header, *rows])


def write_votes(folder, ids, votes, header=PERSON_HEADER):
  """`votes` are {participant: a vote on each of the ids}."""
  rows = [
    (person, len(person) % 2, *[0] * (len(header) - 2), *vote)
    for person, vote in votes.items()
  ]
  write_csv(folder / VOTES, [(*header, *ids), *rows])


def talk(tmp_path, comments, votes, **kwargs):
  """A conversation; `votes` are in the order of the comments."""
  write_comments(tmp_path, comments)
  write_votes(tmp_path, [c[0] for c in comments], votes, **kwargs)
  return read_conversation(tmp_path)


def text(i):
  return f'Statement {i}, "quoted",\nand on a second line.'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """60 people and 100 statements; the last people have but a few votes."""
  path = tmp_path_factory.mktemp('polis')
  rng = np.random.default_rng(0)
  comments = [(i, text(i), (1, 0)[i % 2]) for i in range(100)]
  comments += [(100, 'Rejected.', -1), (101, text(3), 1), (102, text(4), 1)]
  votes = {}
  for person in range(60):
    vote = rng.choice(['1', '-1', '0', ''], 103, p=[0.45, 0.3, 0.1, 0.15])
    if person >= 50:
      vote[5:] = ''
    votes[f'p{person}'] = vote.tolist()
  votes['yes to all'] = ['1'] * 103
  write_comments(path / TALK, comments)
  write_votes(path / TALK, range(103), votes)
  return path


def small(folder, **changes):
  config = base.polis_data()
  config.update({'path': str(folder), 'conversation': TALK, **changes})
  return config


@pytest.fixture(scope='module')
def dataset(folder):
  return create_polis(small(folder))


@pytest.fixture(scope='module')
def votes(folder):
  """{(participant, text): the votes on its copies}."""
  with (folder / TALK / COMMENTS).open(newline='', encoding='utf-8') as file:
    texts = {r['comment-id']: r['comment-body'] for r in csv.DictReader(file)}
  found = {}
  with (folder / TALK / VOTES).open(newline='', encoding='utf-8') as file:
    for row in csv.DictReader(file):
      for comment, body in texts.items():
        key = row['participant'], body
        found.setdefault(key, set()).add(row[comment])
  return found


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


def items_of_users(comparisons):
  """{user: Counter of the items of its comparisons}."""
  flat = comparisons.flatten()
  flat = flat[flat.mask]
  found = {}
  for user, pair in zip(flat.user.tolist(), flat.items.tolist(), strict=True):
    found.setdefault(user, Counter()).update(pair)
  return found


# Reading.


def test_votes_are_read_by_comment_id(tmp_path):
  comments = [('4', 'four', 1), ('0', 'zero', 1), ('12', 'twelve', 0)]
  write_comments(tmp_path, comments)
  write_votes(tmp_path, ['0', '12', '4'], {'a': [1, -1, 0], 'b': ['', 1, -1]})
  found = read_conversation(tmp_path)
  assert found.people == ('a', 'b')
  assert found.statements == ('zero', 'twelve', 'four')
  np.testing.assert_array_equal(found.agreed, [[1, 0, 0], [0, 1, 0]])
  np.testing.assert_array_equal(found.disagreed, [[0, 1, 0], [0, 0, 1]])


def test_quotes_commas_and_lines_inside_a_statement_survive(tmp_path):
  body = 'He said: "No, ""never""",\n\nand left; ünïcode, too.'
  found = talk(tmp_path, [(0, body, 1)], {'a': [1]})
  assert found.statements == (body,)


def test_an_xid_column_and_a_byte_order_mark_are_no_trouble(tmp_path):
  header = ('participant', 'xid', *PERSON_HEADER[1:])
  found = talk(
    tmp_path, [(1, 'x', 1), (4, 'y', 1)], {'a': [1, -1]}, header=header
  )
  for name in (COMMENTS, VOTES):
    path = tmp_path / name
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
  again = read_conversation(tmp_path)
  for one in (found, again):
    assert one.agreed.tolist() == [[True, False]]
    assert one.disagreed.tolist() == [[False, True]]


def test_rejected_and_empty_statements_are_left_out_and_counted(tmp_path):
  comments = [(0, 'kept', 0), (1, 'no', -1), (2, ' ', 1), (3, 'too', 1)]
  found = talk(tmp_path, comments, {'a': [1, 1, 1, -1]})
  assert found.statements == ('kept', 'too')
  assert found.agreed.tolist() == [[True, False]]
  assert '1 statements that moderators rejected and 1 without' in found.notes[0]


def test_without_a_moderated_column_nothing_is_rejected(tmp_path):
  write_csv(
    tmp_path / COMMENTS, [('comment-id', 'comment-body'), (0, 'x'), (1, 'y')]
  )
  write_votes(tmp_path, [0, 1], {'a': [1, -1]})
  assert read_conversation(tmp_path).statements == ('x', 'y')


def test_copies_are_one_statement_and_contradictions_no_vote(tmp_path):
  comments = [(0, 'x  y', 1), (1, 'x\ny', 1), (2, 'z', 1)]
  votes = {'a': [1, -1, 1], 'b': [1, '', -1], 'c': ['', -1, 0], 'd': [0, 1, '']}
  found = talk(tmp_path, comments, votes)
  assert found.statements == ('x  y', 'z')
  assert found.agreed[:, 0].tolist() == [False, True, False, True]
  assert found.disagreed[:, 0].tolist() == [False, False, True, False]
  assert '1 statements are copies' in found.notes[1]
  assert '1 votes on copies contradict' in found.notes[1]


def test_the_clusters_of_polis_stand_in_the_notes_alone(dataset):
  (note,) = (n for n in dataset.notes if 'clusters' in n)
  assert 'sizes 0: 11, 1: 50;' in note  # as `write_votes` makes them
  assert all(value is None for value in vars(dataset.truth).values())


# What is refused.


def refused(folder, *parts):
  with pytest.raises(InputError) as caught:
    read_conversation(folder)
  for part in parts:
    assert part in str(caught.value)


def test_no_path_says_what_to_download_and_how_to_set_it():
  with pytest.raises(InputError) as caught:
    data.create(get_config().data)
  for part in (
    'data.path is empty',
    'github.com/compdemocracy/openData',
    'CC BY 4.0',
    '--config.data.path=',
    'participants-votes.csv',
  ):
    assert part in str(caught.value)


def test_an_unknown_conversation_lists_those_there_are(folder):
  with pytest.raises(InputError, match=f'elsewhere.*one of {TALK}'):
    create_polis(small(folder, conversation='elsewhere'))


def test_a_folder_without_conversations_says_what_to_download(tmp_path):
  with pytest.raises(InputError, match='no such file; download'):
    create_polis(small(tmp_path))


@pytest.mark.parametrize('name', [COMMENTS, VOTES])
@pytest.mark.parametrize(
  'content, part',
  [
    (b'', 'is empty'),
    (b'comment-id,comment-body,participant\n', 'no rows'),
    (b'a,b\n1,2\n', "line 1: the column '"),
    (b'participant,comment-id,comment-body,0,0\n', "'0' stands twice"),
    (b'participant,comment-id,comment-body\n1,2\n', 'line 2: 2 values'),
    (b'participant,comment-id,comment-body\n1,2,"x\n', 'malformed CSV'),
    (b'participant,comment-id,comment-body\n1,2,\xff\n', 'not UTF-8'),
  ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path, name, content, part):
  talk(tmp_path, [(0, 'x', 1)], {'a': [1]})
  (tmp_path / name).write_bytes(content)
  refused(tmp_path, str(tmp_path / name), part)


def test_a_missing_votes_file_is_refused(tmp_path):
  write_comments(tmp_path, [(0, 'x', 1)])
  refused(tmp_path, str(tmp_path / VOTES), 'no such file')


@pytest.mark.parametrize(
  'comment, parts',
  [
    (('x1', 'text', 1), ("'comment-id' is 'x1'", 'whole number')),
    (('', 'text', 1), ("'comment-id' is ''",)),
    (('0', 'text', 1), ('comment 0 stands twice',)),
    (('1', 'text', 2), ("'moderated' is '2'", "'1', '0', '-1'")),
    (('1', 'text', ''), ("'moderated' is ''",)),
  ],
)
def test_a_bad_comment_is_refused_with_its_line(tmp_path, comment, parts):
  write_comments(tmp_path, [('0', 'two\nlines', 1), comment])
  write_votes(tmp_path, [0], {'a': [1]})
  refused(tmp_path, f'{tmp_path / COMMENTS}, line 4', *parts)


@pytest.mark.parametrize('vote', ['2', '1.0', 'agree', ' 1', 'nan'])
def test_a_bad_vote_is_refused_with_line_and_comment(tmp_path, vote):
  write_comments(tmp_path, [(0, 'x', 1), (7, 'y', 1)])
  write_votes(tmp_path, [0, 7], {'a': [1, -1], 'b': ['', vote]})
  refused(
    tmp_path, f'{tmp_path / VOTES}, line 3', 'comment 7', repr(vote), 'agree'
  )


@pytest.mark.parametrize('person', ['a', ''])
def test_a_participant_without_an_id_of_its_own_is_refused(tmp_path, person):
  write_comments(tmp_path, [(0, 'x', 1)])
  rows = [(*PERSON_HEADER, 0), ('a', *'000001'), (person, *'000001')]
  write_csv(tmp_path / VOTES, rows)
  refused(tmp_path, 'line 3', "'participant'", repr(person))


def test_votes_on_an_unknown_comment_are_refused(tmp_path):
  write_comments(tmp_path, [(0, 'x', 1)])
  write_votes(tmp_path, [0, 8, 9], {'a': [1, 1, -1]})
  refused(tmp_path, '2 columns of votes', "'8'", 'one export')


@pytest.mark.parametrize(
  'changes, part',
  [
    ({'min_comparisons': 0}, 'data.min_comparisons=0 must be at least 1'),
    ({'min_query': 0}, 'data.min_query=0'),
    ({'max_pairs_per_user': 0}, 'data.max_pairs_per_user=0'),
    ({'max_pairs_per_statement': 0}, 'data.max_pairs_per_statement=0'),
    ({'unseen_fraction': 0.0}, 'data.unseen_fraction=0.0'),
    ({'unseen_fraction': 1.0}, 'data.unseen_fraction=1.0'),
    ({'heldout_fraction': 1.0}, 'data.heldout_fraction=1.0'),
    ({'min_support': 11}, 'data.min_support=11 must be at most data.max_supp'),
    ({'min_query': 51}, 'data.min_query=51 must be at most data.max_query'),
    ({'test_fraction': 0.95}, 'data.test_fraction=0.95'),
    ({'min_comparisons': 999}, '0 are left as seen users'),
    ({'min_support': 99, 'max_support': 99}, 'and 0 of 18 as unseen'),
    ({'validation_fraction': 0.001}, 'on validation items; raise their share'),
  ],
)
def test_sizes_out_of_range_are_refused(folder, changes, part):
  with pytest.raises(InputError) as caught:
    create_polis(small(folder, **changes))
  assert part in str(caught.value)


# Pairs.


@pytest.mark.parametrize('a', [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize('d', [0, 1, 3, 4, 9])
@pytest.mark.parametrize(
  'most, each', [(1000, 1000), (1000, 2), (5, 1), (7, 3)]
)
def test_pairs_differ_and_use_statements_evenly(a, d, most, each):
  agreed, disagreed = np.arange(a), 100 + np.arange(d)
  pairs = balanced_pairs(agreed, disagreed, most, each)
  n = min(most, each * min(a, d), a * d)
  assert pairs.shape == (n, 2)
  assert len({tuple(p) for p in pairs.tolist()}) == n
  assert set(pairs[:, 0]) <= set(agreed)
  assert set(pairs[:, 1]) <= set(disagreed)
  for side, pool in ((pairs[:, 0], agreed), (pairs[:, 1], disagreed)):
    if len(pool):
      counts = [int(np.sum(side == item)) for item in pool]
      assert max(counts) <= each
      assert max(counts) - min(counts) <= 1


def test_the_agreed_statement_wins(dataset, votes):
  for name, (c, users) in sets_of(dataset).items():
    assert c.label.size, name
    for user, pair, label in zip(c.user, c.items, c.label, strict=True):
      won, lost = pair if label else pair[::-1]
      assert '1' in votes[users[user], dataset.item_names[won]]
      assert '-1' not in votes[users[user], dataset.item_names[won]]
      assert '-1' in votes[users[user], dataset.item_names[lost]]
      assert '1' not in votes[users[user], dataset.item_names[lost]]


def test_the_position_of_the_winner_is_random(dataset):
  for name, (c, _) in sets_of(dataset).items():
    assert set(c.label.tolist()) == {0.0, 1.0}, name
  # Four standard errors of a fair coin.
  label = dataset.train.label
  assert abs(label.mean() - 0.5) < 2.0 / np.sqrt(label.size)


# The protocol.


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'max_support': 30, 'min_support': 3},
    {'heldout_fraction': 0.0},
    {'min_query': 9, 'min_comparisons': 38},
    {'max_query': 4, 'max_pairs_per_user': 7},
  ],
)
def test_every_rule_of_the_protocol(folder, seed, changes):
  config = small(folder, seed=seed, **changes)
  found = create_polis(config)
  assert check_dataset(found) is found
  # People: seen or unseen.
  assert not set(found.user_ids) & set(found.unseen_user_ids)
  assert len(set(found.user_ids)) == found.num_users
  assert 'yes to all' not in found.user_ids + found.unseen_user_ids
  # Items: every set holds those of one split alone.
  splits = {
    'train': 0,
    'validation': 1,
    'support': 0,
    f'seen {SEEN_ITEMS}': 0,
    f'seen {UNSEEN_ITEMS}': 2,
    f'unseen {SEEN_ITEMS}': 0,
    f'unseen {UNSEEN_ITEMS}': 2,
  }
  for name, (c, _) in sets_of(found).items():
    assert set(found.item_split[c.items].ravel()) <= {splits[name]}, name
    assert np.all(c.items[:, 0] != c.items[:, 1])
  # Copies are in one split.
  assert len(set(found.item_names)) == len(found.item_names) == 100
  # Training: statements in few pairs, users with enough of them.
  counts = Counter(found.train.user.tolist())
  assert set(counts) == set(range(found.num_users))
  assert min(counts.values()) >= config.min_comparisons
  assert max(counts.values()) <= config.max_pairs_per_user
  for used in items_of_users(found.train).values():
    assert max(used.values()) <= config.max_pairs_per_statement
  # Everywhere else each statement of a user stands in one pair.
  disjoint = (
    found.validation,
    found.support,
    *found.seen.values(),
    *found.unseen.values(),
  )
  for c in disjoint:
    for used in items_of_users(c).values():
      assert max(used.values()) == 1
  # What is tested was not learnt from, not even in another pair.
  for learnt, tested in (
    (found.train, found.seen[SEEN_ITEMS]),
    (found.support, found.unseen[SEEN_ITEMS]),
  ):
    known = items_of_users(learnt)
    for user, used in items_of_users(tested).items():
      assert not set(used) & set(known[user])
  # The cohort.
  support = found.support.mask.sum(-1)
  assert config.min_support <= support.min()
  assert support.max() <= config.max_support
  assert found.unseen[UNSEEN_ITEMS].mask.sum(-1).min() >= config.min_query
  for c in (*found.seen.values(), *found.unseen.values()):
    assert c.shape[1] <= config.max_query


def test_sets_are_padded_by_user(dataset):
  num_unseen = len(dataset.unseen_user_ids)
  for c, users in (
    (dataset.support, num_unseen),
    *((c, dataset.num_users) for c in dataset.seen.values()),
    *((c, num_unseen) for c in dataset.unseen.values()),
  ):
    assert c.shape[0] == users
    assert c.items.shape == (*c.shape, 2)
    rows = np.broadcast_to(np.arange(users)[:, None], c.shape)
    np.testing.assert_array_equal(c.user, rows)
    # Padding comes last and is a tie.
    assert np.all(np.diff(c.mask.astype(int), axis=-1) <= 0)
    assert np.all(c.label[~c.mask] == 0.5)
  assert dataset.train.mask.all() and dataset.validation.mask.all()


def test_by_default_no_support_is_padded(dataset):
  assert dataset.support.mask.all()


def test_people_without_test_pairs_stay_as_masked_rows(tmp_path, folder):
  with (folder / TALK / VOTES).open(newline='', encoding='utf-8') as file:
    rows = list(csv.reader(file))
  # Blanks the test statements of one seen user; the splits do not change.
  before = create_polis(small(folder))
  test = {before.item_names[i] for i in np.flatnonzero(before.item_split == 2)}
  person = before.user_ids[0]
  with (folder / TALK / COMMENTS).open(newline='', encoding='utf-8') as file:
    blank = {
      r['comment-id'] for r in csv.DictReader(file) if r['comment-body'] in test
    }
  for row in rows[1:]:
    if row[0] == person:
      row[:] = [
        '' if h in blank else v for h, v in zip(rows[0], row, strict=True)
      ]
  write_csv(tmp_path / TALK / VOTES, rows)
  (tmp_path / TALK / COMMENTS).write_bytes(
    (folder / TALK / COMMENTS).read_bytes()
  )
  after = create_polis(small(tmp_path))
  assert after.user_ids == before.user_ids
  assert not after.seen[UNSEEN_ITEMS].mask[0].any()
  assert before.seen[UNSEEN_ITEMS].mask[0].any()


def test_the_notes_count_who_and_what_is_left_out(dataset, folder):
  talk = read_conversation(folder / TALK)
  split = dataset.item_split
  across = 0
  for agreed, disagreed in zip(talk.agreed, talk.disagreed, strict=True):
    one, two = split[agreed], split[disagreed]
    across += int((one[:, None] != two).sum())
  assert f'{across} would' in ' '.join(dataset.notes)
  left = 61 - dataset.num_users - len(dataset.unseen_user_ids)
  words = dataset.notes[-1].replace(',', '').split()
  numbers = [int(w) for w in words if w.isdigit()]
  assert numbers[:3] == [
    61,
    dataset.num_users,
    len(dataset.unseen_user_ids),
  ]
  assert numbers[3] + numbers[5] == left > 0


def test_texts_prompt_and_truth(dataset, folder):
  assert dataset.prompt_names == (PROMPT,)
  assert set(dataset.item_names) == {text(i) for i in range(100)}
  assert dataset.item_groups == (TALK,) * 100
  apart = create_polis(small(folder), join_prompt=False)
  assert fingerprint(apart) == fingerprint(dataset)


# Determinism and fingerprints.


def test_a_seed_decides_everything(folder, dataset):
  again = create_polis(small(folder))
  jax.tree.map(np.testing.assert_array_equal, again.train, dataset.train)
  jax.tree.map(np.testing.assert_array_equal, again.unseen, dataset.unseen)
  assert fingerprint(again) == fingerprint(dataset)
  other = fingerprint(create_polis(small(folder, seed=1)))
  assert all(other[k] != v for k, v in fingerprint(dataset).items())


def test_a_fingerprint_tells_what_changed(folder, dataset):
  before = fingerprint(dataset)
  assert set(before) == {'users', 'items', 'comparisons'}
  assert all(len(v) == 16 and int(v, 16) >= 0 for v in before.values())
  after = fingerprint(create_polis(small(folder, max_pairs_per_user=39)))
  assert after['items'] == before['items']
  assert after['comparisons'] != before['comparisons']


def test_data_create_finds_it(folder, dataset):
  assert fingerprint(data.create(small(folder))) == fingerprint(dataset)


def test_the_config_names_the_conversation():
  config = get_config('brexit-consensus')
  assert config.is_locked
  assert config.data.conversation == 'brexit-consensus'
  assert max(config.evaluation.num_support) <= config.data.min_support


@pytest.mark.skipif(
  'PAL_JAX_DATA' not in os.environ,
  reason='PAL_JAX_DATA names no folder with polis/',
)
def test_the_real_conversation():
  folder = Path(os.environ['PAL_JAX_DATA']) / 'polis'
  found = create_polis(
    small(folder, conversation=base.polis_data().conversation)
  )
  assert '2031 people, 607 statements' in ' '.join(found.notes)
  assert len(found.item_names) == 607
  assert found.num_users > 800 and len(found.unseen_user_ids) > 100
