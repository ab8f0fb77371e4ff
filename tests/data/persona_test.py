"""data.persona: what is read and refused, and what is simulated from it."""

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest

from configs import base
from pal_jax.data.persona import (
  PROMPT,
  all_texts,
  create_persona,
  draw_stances,
  read_behavior,
)
from pal_jax.errors import InputError

BEHAVIORS = ('ant', 'bee', 'cat', 'dog')
NUM_STATEMENTS = 60  # of a behaviour, half of them matching


def question(text):
  return f'Would you say "{text}"?'


def line(text, answer=' Yes', **changes):
  row = {
    'question': question(text),
    'statement': text,
    'label_confidence': 0.9,
    'answer_matching_behavior': answer,
  }
  return json.dumps({**row, **changes})


def statements_of(behavior):
  return {f'I say {i} of {behavior}': i % 2 == 0 for i in range(NUM_STATEMENTS)}


def write_behavior(folder, behavior, statements):
  lines = [line(t, (' No', ' Yes')[yes]) for t, yes in statements.items()]
  write_lines(folder, behavior, lines)


def write_lines(folder, behavior, lines):
  (folder / 'persona').mkdir(exist_ok=True)
  path = folder / 'persona' / f'{behavior}.jsonl'
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return path


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  for behavior in BEHAVIORS:
    write_behavior(folder, behavior, statements_of(behavior))
  return folder


@pytest.fixture
def config(corpus):
  return small(corpus)


def small(folder, **changes):
  config = base.persona_data()
  config.update(
    {
      'path': str(folder),
      'behaviors': BEHAVIORS,
      'num_seen_users': 13,
      'num_unseen_users': 7,
      'comparisons_per_user': 20,
      'validation_per_user': 8,
      'seen_query': 12,
      'unseen_support': 15,
      'unseen_query': 11,
      'validation_fraction': 0.2,
    }
  )
  config.update(changes)
  return config


def sets_of(dataset):
  """All sets by name, flat, with users numbered as in the truth."""
  offset = dataset.num_users

  def shifted(c):
    return c.replace(user=c.user + offset).flatten()

  return {
    'train': dataset.train,
    'validation': dataset.validation,
    'support': shifted(dataset.support),
    **{f'seen {k}': c.flatten() for k, c in dataset.seen.items()},
    **{f'unseen {k}': shifted(c) for k, c in dataset.unseen.items()},
  }


def planted_stances(dataset):
  """{behaviour: stance} of each user, from the truth and the notes."""
  rows = []
  for note in dataset.notes:
    found = re.fullmatch(r'persona \d+: (.*)', note)
    if found:
      signs = dict(word.split()[::-1] for word in found[1].split(', '))
      row = {b: {'+': 1, '-': -1, '0': 0}[s] for b, s in signs.items()}
      rows.append(row)
  return [
    {b: sum(w * row[b] for w, row in zip(user, rows, strict=True)) for b in row}
    for user in dataset.truth.weights
  ]


SIGN = {
  text: (behavior, 1 if yes else -1)
  for behavior in BEHAVIORS
  for text, yes in statements_of(behavior).items()
}
BY_QUESTION = {question(text): value for text, value in SIGN.items()}


def utility_of_statement(dataset, stance, prompt, item):
  del prompt
  behavior, sign = SIGN[dataset.item_names[item]]
  return stance[behavior] * sign


def utility_of_answer(dataset, stance, prompt, item):
  asked = dataset.prompt_names[prompt]
  answer = dataset.item_names[item].removeprefix(asked).strip()
  behavior, sign = BY_QUESTION[asked]
  return stance[behavior] * sign * {'Yes': 1, 'No': -1}[answer]


def check_larger_utility_wins(dataset, utility):
  stances = planted_stances(dataset)
  for name, c in sets_of(dataset).items():
    for user, prompt, items, label in zip(
      c.user, c.prompt, c.items, c.label, strict=True
    ):
      first, second = (
        utility(dataset, stances[user], prompt, item) for item in items
      )
      assert abs(first - second) > 1e-9, name  # never a tie
      assert label == float(first > second), name


# Reading.


def test_reads_statements_questions_and_answers_in_order(tmp_path):
  write_lines(tmp_path, 'ant', [line(' a '), '', line('b', 'No'), line('c')])
  found = read_behavior(tmp_path, 'ant')
  assert [s.text for s in found] == ['a', 'b', 'c']
  assert [s.matches for s in found] == [True, False, True]
  assert [s.question for s in found] == [question(t) for t in (' a ', 'b', 'c')]
  assert {s.behavior for s in found} == {'ant'}


def test_a_repeated_statement_is_kept_once(tmp_path):
  write_lines(tmp_path, 'ant', [line('a'), line('b', ' No'), line('a ')])
  assert [s.text for s in read_behavior(tmp_path, 'ant')] == ['a', 'b']


def test_windows_line_ends_are_read(tmp_path):
  path = write_lines(tmp_path, 'ant', [line('a'), line('b', ' No')])
  path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
  assert [s.text for s in read_behavior(tmp_path, 'ant')] == ['a', 'b']


@pytest.mark.parametrize('separator', ['\u2028', '\u2029', '\x85'])
def test_characters_that_only_look_like_line_ends_stay_in_a_statement(
  tmp_path, separator
):
  text = f'one{separator}two'
  row = json.dumps(json.loads(line(text)), ensure_ascii=False)
  assert separator in row
  write_lines(tmp_path, 'ant', [row])
  assert [s.text for s in read_behavior(tmp_path, 'ant')] == [text]


def expect_error(folder, *parts):
  with pytest.raises(InputError) as caught:
    read_behavior(folder, 'ant')
  for part in parts:
    assert part in str(caught.value)


@pytest.mark.parametrize('bad', ['{"statement": ', 'not JSON', '{} {}'])
def test_malformed_json_names_file_and_line(tmp_path, bad):
  path = write_lines(tmp_path, 'ant', [line('a'), bad])
  expect_error(tmp_path, f'{path}, line 2', 'malformed JSON')


@pytest.mark.parametrize('bad', ['[1]', '"text"', '3', 'null'])
def test_a_line_that_is_no_object_names_file_and_line(tmp_path, bad):
  path = write_lines(tmp_path, 'ant', ['', line('a'), bad])
  expect_error(tmp_path, f'{path}, line 3', 'JSON object')


@pytest.mark.parametrize(
  'field', ['statement', 'question', 'answer_matching_behavior']
)
def test_a_missing_field_names_file_line_and_field(tmp_path, field):
  row = json.loads(line('b'))
  del row[field]
  path = write_lines(tmp_path, 'ant', [line('a'), json.dumps(row)])
  expect_error(tmp_path, f'{path}, line 2', f"'{field}' is missing")


@pytest.mark.parametrize('value', ['', '  ', None, 3, ['text'], True])
@pytest.mark.parametrize(
  'field', ['statement', 'question', 'answer_matching_behavior']
)
def test_a_field_that_is_no_text_names_file_line_and_field(
  tmp_path, field, value
):
  path = write_lines(tmp_path, 'ant', [line('a'), line('b', **{field: value})])
  expect_error(tmp_path, f'{path}, line 2', f"'{field}'", 'expected text')


@pytest.mark.parametrize('answer', [' Maybe', 'yes', 'Yes.', '(A)'])
def test_a_wrong_answer_names_file_line_field_and_what_is_expected(
  tmp_path, answer
):
  path = write_lines(tmp_path, 'ant', [line('a'), line('b', answer)])
  expect_error(
    tmp_path,
    f'{path}, line 2',
    "'answer_matching_behavior'",
    repr(answer),
    "' Yes' or ' No'",
  )


def test_a_file_that_is_not_utf8_is_named(tmp_path):
  path = write_lines(tmp_path, 'ant', [line('a')])
  path.write_bytes(path.read_bytes() + b'\xff\xfe')
  expect_error(tmp_path, str(path), 'UTF-8')


@pytest.mark.parametrize('content', ['', '\n \n'])
def test_an_empty_behaviour_is_refused(tmp_path, content):
  path = write_lines(tmp_path, 'ant', [content])
  expect_error(tmp_path, str(path), 'empty')


def test_a_missing_file_lists_those_that_exist(tmp_path):
  for name in ('bee', 'cat'):
    write_lines(tmp_path, name, [line('a')])
  path = tmp_path / 'persona' / 'ant.jsonl'
  expect_error(tmp_path, str(path), "'ant'", 'bee, cat')


def test_a_folder_without_behaviours_says_what_data_path_must_be(tmp_path):
  expect_error(tmp_path, 'data.path', 'persona/*.jsonl')


def test_a_statement_with_both_answers_is_refused(tmp_path):
  path = write_lines(tmp_path, 'ant', [line('a'), line('b'), line('a', ' No')])
  expect_error(tmp_path, f'{path}, line 3', "'a'", 'opposite')


def test_a_bad_line_of_a_configured_behaviour_stops_the_dataset(tmp_path):
  for behavior in BEHAVIORS:
    write_behavior(tmp_path, behavior, statements_of(behavior))
  path = tmp_path / 'persona' / 'cat.jsonl'
  path.write_text(path.read_text() + '{\n')
  with pytest.raises(InputError, match='cat.jsonl, line 61'):
    create_persona(small(tmp_path))


# Stances.


@pytest.mark.parametrize('num_personas', [1, 2, 3, 4, 5, 6, 16])
def test_signed_stances_are_distinct_and_balanced(num_personas):
  for seed in range(20):
    rng = np.random.default_rng(seed)
    stances = draw_stances(rng, num_personas, 4, 'signed')
    assert stances.shape == (num_personas, 4)
    assert set(np.unique(stances)) <= {-1.0, 1.0}
    assert len({tuple(row) for row in stances}) == num_personas
    balance = np.abs(stances.sum(axis=0))
    np.testing.assert_array_equal(balance, num_personas % 2)


@pytest.mark.parametrize('num_personas', [2, 3, 4, 5])
def test_signed_stances_need_as_many_prototypes_as_there_are(num_personas):
  """No mixture of fewer points reaches all of them."""
  for seed in range(20):
    rng = np.random.default_rng(seed)
    stances = draw_stances(rng, num_personas, 4, 'signed')
    edges = stances[1:] - stances[:1]
    assert np.linalg.matrix_rank(edges) == num_personas - 1


def test_signed_stances_can_use_up_every_vector():
  rng = np.random.default_rng(0)
  stances = draw_stances(rng, 8, 3, 'signed')
  every = set(itertools.product((-1.0, 1.0), repeat=3))
  assert {tuple(row) for row in stances} == every


def test_own_stances_are_the_identity():
  rng = np.random.default_rng(0)
  np.testing.assert_array_equal(
    draw_stances(rng, 2, 3, 'own'), [[1, 0, 0], [0, 1, 0]]
  )


@pytest.mark.parametrize(
  'num_personas, num_behaviors, kind, part',
  [
    (9, 3, 'signed', 'only 8'),
    (3, 1, 'signed', 'only 2'),
    (4, 3, 'own', 'data.num_personas=4'),
    (2, 2, 'none', "'signed' or 'own'"),
  ],
)
def test_stances_that_do_not_exist_are_refused(
  num_personas, num_behaviors, kind, part
):
  with pytest.raises(InputError, match=re.escape(part)):
    draw_stances(np.random.default_rng(0), num_personas, num_behaviors, kind)


# Comparisons of statements.


@pytest.mark.parametrize('num_personas', [2, 3, 4])
@pytest.mark.parametrize('mixture', [0.0, 0.7])
@pytest.mark.parametrize('stances', ['signed', 'own'])
def test_the_statement_of_larger_utility_wins(
  corpus, stances, mixture, num_personas
):
  dataset = create_persona(
    small(corpus, stances=stances, mixture=mixture, num_personas=num_personas)
  )
  check_larger_utility_wins(dataset, utility_of_statement)


def test_the_shipped_corpus_obeys_the_same_utilities():
  config = base.persona_data()
  config.update({'num_seen_users': 8, 'num_unseen_users': 4})
  dataset = create_persona(config)
  assert dataset.item_names[0].startswith('I ')
  stances = planted_stances(dataset)
  for c in sets_of(dataset).values():
    groups = np.array(dataset.item_groups)[c.items]
    for user, pair, label in zip(c.user, groups, c.label, strict=True):
      first, second = (
        stances[user][name] * {'+': 1, '-': -1}[sign]
        for name, sign in (group.rsplit(' ', 1) for group in pair)
      )
      assert first != second and label == float(first > second)


def test_opposite_personas_leave_every_single_score_at_chance(corpus):
  """What one persona decides its opposite decides the other way."""
  dataset = create_persona(
    small(corpus, num_personas=2, num_seen_users=40, comparisons_per_user=60)
  )
  c = dataset.train
  wins = {}
  for items, label, user in zip(c.items, c.label, c.user, strict=True):
    winner, loser = items if label else items[::-1]
    group = dataset.truth.group[user]
    wins.setdefault((winner, loser), set()).add(group)
  for (winner, loser), groups in wins.items():
    assert groups.isdisjoint(wins.get((loser, winner), set()))
  positions = c.label.mean()
  assert abs(positions - 0.5) < 4 * 0.5 / np.sqrt(c.label.size)


@pytest.mark.parametrize('stances', ['signed', 'own'])
@pytest.mark.parametrize('fraction', [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_pairs_of_two_behaviours_holds(corpus, stances, fraction):
  """Redrawing ties must not shift it."""
  dataset = create_persona(
    small(
      corpus,
      behaviors=BEHAVIORS[:3],  # more pairs tie within one than across two
      num_personas=3,
      stances=stances,
      cross_fraction=fraction,
      num_seen_users=60,
      comparisons_per_user=40,
    )
  )
  for name, c in sets_of(dataset).items():
    behavior = np.array([SIGN[text][0] for text in dataset.item_names])
    first, second = behavior[c.items].T
    share, n = np.mean(first != second), len(first)
    tolerance = 4 * np.sqrt(fraction * (1 - fraction) / n)
    assert abs(share - fraction) <= tolerance, name


def test_label_noise_flips_that_share_of_training_labels_and_nothing_else(
  corpus,
):
  sizes = {'num_seen_users': 60, 'comparisons_per_user': 40}
  clean = create_persona(small(corpus, **sizes))
  noisy = create_persona(small(corpus, label_noise=0.2, **sizes))
  flipped = clean.train.label != noisy.train.label
  assert abs(flipped.mean() - 0.2) < 4 * np.sqrt(0.16 / flipped.size)
  assert set(np.unique(noisy.train.label)) == {0.0, 1.0}
  relabelled = noisy.train.replace(label=clean.train.label)
  same = dataclasses.replace(noisy, train=relabelled)
  assert_equal_datasets(clean, same)


def test_support_noise_flips_support_labels_and_nothing_else(corpus):
  sizes = {'num_unseen_users': 60, 'unseen_support': 40}
  clean = create_persona(small(corpus, **sizes))
  noisy = create_persona(small(corpus, support_noise=0.1, **sizes))
  flipped = clean.support.label != noisy.support.label
  assert abs(flipped.mean() - 0.1) < 4 * np.sqrt(0.09 / flipped.size)
  relabelled = noisy.support.replace(label=clean.support.label)
  assert_equal_datasets(clean, dataclasses.replace(noisy, support=relabelled))


def assert_equal_datasets(a, b):
  trees = [vars(d) | {'truth': vars(d.truth)} for d in (a, b)]
  jax.tree.map(np.testing.assert_array_equal, *trees)


# Splits.


def test_shapes_and_user_names(config):
  dataset = create_persona(config)
  assert dataset.num_users == 13 and len(set(dataset.user_ids)) == 13
  assert len(set(dataset.unseen_user_ids)) == 7
  assert set(dataset.user_ids).isdisjoint(dataset.unseen_user_ids)
  assert dataset.train.shape == (13 * 20,)
  assert dataset.validation.shape == (13 * 8,)
  assert dataset.support.shape == (7, 15)
  for c in dataset.seen.values():
    assert c.shape == (13, 12)
  for c in dataset.unseen.values():
    assert c.shape == (7, 11)
  np.testing.assert_array_equal(
    np.bincount(dataset.train.user), np.full(13, 20)
  )
  for c in (dataset.support, *dataset.unseen.values()):
    np.testing.assert_array_equal(
      c.user, np.broadcast_to(np.arange(7)[:, None], c.shape)
    )
  assert dataset.prompt_names == (PROMPT,)
  assert dataset.item_features is None


def shown_texts(dataset, c):
  """Everything that the comparisons show: statements, or the questions."""
  items = {dataset.item_names[i] for i in np.unique(c.items)}
  prompts = {dataset.prompt_names[i] for i in np.unique(c.prompt)}
  return (items | prompts) - {PROMPT, 'Yes', 'No'}


def shared_corpus(folder):
  """Two files that share half of their statements, with other answers."""
  shared = {f'I share {i}': i % 2 == 0 for i in range(20)}
  for k, behavior in enumerate(BEHAVIORS[:2]):
    own = {f'I {behavior} {i}': i % 2 == 0 for i in range(20)}
    both = {t: yes == (k == 0) for t, yes in shared.items()}
    write_behavior(folder, behavior, own | both)
  return small(folder, behaviors=BEHAVIORS[:2], num_personas=2)


@pytest.mark.parametrize('form', ['statements', 'yes_no'])
@pytest.mark.parametrize('join_prompt', [True, False])
@pytest.mark.parametrize('shared', [True, False])
def test_no_text_of_the_test_split_is_shown_before(
  corpus, tmp_path, form, join_prompt, shared
):
  config = shared_corpus(tmp_path) if shared else small(corpus)
  config.update({'form': form, 'comparisons_per_user': 12, 'seen_query': 5})
  config.update({'unseen_support': 8, 'unseen_query': 5})
  config.validation_per_user = 3
  dataset = create_persona(config, join_prompt=join_prompt)
  shown = {
    name: shown_texts(dataset, c) for name, c in sets_of(dataset).items()
  }
  test = shown['seen unseen_items'] | shown['unseen unseen_items']
  assert test
  for name in ('train', 'support', 'seen seen_items', 'unseen seen_items'):
    assert test.isdisjoint(shown[name]), name
    assert shown['validation'].isdisjoint(shown[name]), name
  assert test.isdisjoint(shown['validation'])


def test_equal_texts_in_several_files_get_equal_splits(tmp_path):
  for seed in range(5):
    config = shared_corpus(tmp_path)
    config.seed = seed
    dataset = create_persona(config)
    assert len(dataset.item_names) == 80
    splits = {}
    for text, split in zip(dataset.item_names, dataset.item_split, strict=True):
      splits.setdefault(text, set()).add(int(split))
    assert len(splits) == 60
    assert all(len(found) == 1 for found in splits.values())


def test_no_statement_is_compared_with_itself(tmp_path):
  """A text of two files is two items with one meaning to the model."""
  config = shared_corpus(tmp_path)
  config.update({'cross_fraction': 1.0, 'num_seen_users': 40})
  config.num_personas = 4  # all stances: some disagree about what is shared
  dataset = create_persona(config)
  for name, c in sets_of(dataset).items():
    first, second = np.array(dataset.item_names)[c.items].T
    assert not np.any(first == second), name


def test_split_shares_of_each_behaviour(config):
  config.update({'validation_fraction': 0.2, 'test_fraction': 0.3})
  dataset = create_persona(config)
  behavior = np.array([SIGN[text][0] for text in dataset.item_names])
  for name in BEHAVIORS:
    np.testing.assert_array_equal(
      np.bincount(dataset.item_split[behavior == name]), [30, 12, 18]
    )


def pairs_of(dataset, c):
  """(user, question, unordered pair of texts), as a list."""
  return [
    (
      int(user),
      dataset.prompt_names[prompt],
      frozenset(dataset.item_names[i] for i in items),
    )
    for user, prompt, items in zip(c.user, c.prompt, c.items, strict=True)
  ]


@pytest.mark.parametrize('form', ['statements', 'yes_no'])
@pytest.mark.parametrize('join_prompt', [True, False])
def test_a_user_never_meets_a_pair_twice_in_either_order(
  corpus, form, join_prompt
):
  # Nearly all pairs there are, so that a clash would happen.
  dataset = create_persona(
    small(corpus, form=form, comparisons_per_user=50, unseen_support=50),
    join_prompt=join_prompt,
  )
  pairs = {name: pairs_of(dataset, c) for name, c in sets_of(dataset).items()}
  for name, found in pairs.items():
    assert len(set(found)) == len(found), name
  for who, shown in (('seen', 'train'), ('unseen', 'support')):
    for where in ('seen_items', 'unseen_items'):
      assert set(pairs[shown]).isdisjoint(pairs[f'{who} {where}'])
  assert set(pairs['train']).isdisjoint(pairs['validation'])


# Users.


def test_personas_are_balanced_among_seen_and_among_unseen(config):
  config.num_personas = 4
  dataset = create_persona(config)
  group = dataset.truth.group
  for part in (group[:13], group[13:]):
    count = np.bincount(part, minlength=4)
    assert count.max() - count.min() <= 1
  np.testing.assert_array_equal(dataset.truth.weights, np.eye(4)[group])


def test_a_mixture_has_weights_on_the_simplex_and_no_groups(config):
  config.mixture = 0.5
  truth = create_persona(config).truth
  assert truth.group is None
  assert truth.weights.shape == (20, 4) and np.all(truth.weights >= 0)
  np.testing.assert_allclose(truth.weights.sum(-1), 1.0, atol=1e-12)
  assert np.all(truth.weights.max(-1) < 1.0)


def test_the_same_seed_gives_the_same_data_and_another_gives_other(config):
  first, again = create_persona(config), create_persona(config)
  assert_equal_datasets(first, again)
  config.seed += 1
  other = create_persona(config)
  assert not np.array_equal(first.train.items, other.train.items)
  assert not np.array_equal(first.item_split, other.item_split)
  assert not np.array_equal(first.truth.group, other.truth.group)


# Questions and answers.


@pytest.mark.parametrize('mixture', [0.0, 0.7])
@pytest.mark.parametrize('stances', ['signed', 'own'])
@pytest.mark.parametrize('join_prompt', [True, False])
def test_the_answer_of_larger_utility_wins(
  corpus, join_prompt, stances, mixture
):
  dataset = create_persona(
    small(
      corpus,
      form='yes_no',
      stances=stances,
      mixture=mixture,
      comparisons_per_user=10,
      seen_query=5,
      validation_per_user=3,
      unseen_support=10,
      unseen_query=5,
    ),
    join_prompt=join_prompt,
  )
  check_larger_utility_wins(dataset, utility_of_answer)


def test_joined_candidates_are_the_question_with_its_two_answers(config):
  config.form = 'yes_no'
  dataset = create_persona(config)
  assert len(dataset.item_names) == 2 * len(dataset.prompt_names)
  assert len(dataset.item_groups) == len(dataset.item_names)
  for name, c in sets_of(dataset).items():
    for prompt, items in zip(c.prompt, c.items, strict=True):
      asked = dataset.prompt_names[prompt]
      shown = sorted(dataset.item_names[i] for i in items)
      assert shown == [f'{asked} No', f'{asked} Yes'], name


def test_candidates_apart_are_the_two_answers(config):
  config.form = 'yes_no'
  dataset = create_persona(config, join_prompt=False)
  assert dataset.item_names == ('Yes', 'No')
  assert len(dataset.prompt_names) == 4 * NUM_STATEMENTS
  for c in sets_of(dataset).values():
    assert np.all(np.sort(c.items, axis=-1) == [0, 1])


def test_the_first_candidate_is_yes_half_of_the_time(config):
  config.update({'form': 'yes_no', 'num_seen_users': 60})
  c = create_persona(config, join_prompt=False).train
  n = c.label.size
  assert abs(np.mean(c.items[:, 0] == 0) - 0.5) < 2 / np.sqrt(n)
  assert abs(c.label.mean() - 0.5) < 2 / np.sqrt(n)


def test_joined_and_apart_ask_the_same_questions_with_the_same_labels(config):
  config.form = 'yes_no'
  joined = create_persona(config, join_prompt=True)
  apart = create_persona(config, join_prompt=False)
  for name, c in sets_of(joined).items():
    other = sets_of(apart)[name]
    np.testing.assert_array_equal(c.prompt, other.prompt)
    np.testing.assert_array_equal(c.label, other.label)
    np.testing.assert_array_equal(c.items, 2 * c.prompt[:, None] + other.items)


# What is refused.


@pytest.mark.parametrize(
  'changes, part',
  [
    ({'behaviors': ()}, 'data.behaviors'),
    ({'behaviors': ('ant,bee',)}, 'comma'),
    ({'behaviors': ('ant', 'bee', 'ant')}, 'twice'),
    ({'behaviors': ('ant', 'elk')}, 'elk'),
    ({'form': 'essay'}, 'data.form'),
    ({'stances': 'both'}, 'data.stances'),
    ({'cross_fraction': -0.1}, 'data.cross_fraction'),
    ({'cross_fraction': 1.1}, 'data.cross_fraction'),
    ({'behaviors': ('ant',), 'num_personas': 2}, 'data.cross_fraction'),
    ({'num_personas': 14}, 'data.num_seen_users'),
    ({'stances': 'own', 'num_personas': 5}, 'data.num_personas=5'),
    ({'label_noise': 0.5}, 'data.label_noise'),
    ({'label_noise': -0.1}, 'data.label_noise'),
    ({'support_noise': 0.7}, 'data.support_noise'),
    ({'mixture': -1.0}, 'data.mixture'),
    ({'test_fraction': 0.0}, 'data.test_fraction'),
    ({'validation_fraction': 0.0}, 'data.validation_fraction'),
    ({'validation_fraction': 0.5, 'test_fraction': 0.5}, 'training'),
    ({'path': '/no/such/folder'}, '/no/such/folder'),
    *(
      ({field: value}, f'data.{field}={value}')
      for value in (0, -1)
      for field in (
        'num_personas',
        'num_seen_users',
        'num_unseen_users',
        'comparisons_per_user',
        'validation_per_user',
        'seen_query',
        'unseen_support',
        'unseen_query',
      )
    ),
  ],
)
def test_a_bad_field_is_refused_by_its_name(config, changes, part):
  config.update(changes)
  with pytest.raises(InputError, match=re.escape(part)):
    create_persona(config)


@pytest.mark.parametrize(
  'statements',
  [
    {'I one': True, 'I two': False, 'I three': True},
    {f'I {i}': True for i in range(40)},  # nobody would say the opposite
    {f'I {i}': i == 0 for i in range(40)},
  ],
)
def test_too_few_statements_for_the_split_are_refused(tmp_path, statements):
  write_behavior(tmp_path, 'ant', statements_of('ant'))
  write_behavior(tmp_path, 'bee', statements)
  with pytest.raises(InputError, match='bee: too few statements') as caught:
    create_persona(small(tmp_path, behaviors=('ant', 'bee'), num_personas=2))
  assert f'of {len(statements)} in all' in str(caught.value)


@pytest.mark.parametrize(
  'field',
  [
    'comparisons_per_user',
    'validation_per_user',
    'seen_query',
    'unseen_support',
    'unseen_query',
  ],
)
def test_more_comparisons_than_there_are_pairs_end_in_an_error(config, field):
  # 30 training, 12 validation and 18 test questions of the one behaviour that
  # a persona cares about.
  config.update({'form': 'yes_no', 'stances': 'own'})
  config.update({'comparisons_per_user': 8, 'seen_query': 6})
  config.update({'validation_per_user': 2})
  config.update({'unseen_support': 8, 'unseen_query': 6})
  create_persona(config)
  config[field] = 31
  with pytest.raises(InputError, match=f'data.{field}'):
    create_persona(config)


def test_training_and_test_pairs_together_cannot_exceed_what_exists(config):
  config.update({'form': 'yes_no', 'stances': 'own'})
  config.update({'comparisons_per_user': 25, 'seen_query': 6})
  config.update({'validation_per_user': 2})
  config.update({'unseen_support': 8, 'unseen_query': 6})
  with pytest.raises(InputError, match='seen_items .data.seen_query'):
    create_persona(config)


def test_all_texts_are_those_of_every_form(corpus):
  texts = all_texts(corpus, list(BEHAVIORS))
  assert len(set(texts)) == len(texts)
  expected = {PROMPT, 'Yes', 'No'}
  for form in ('statements', 'yes_no'):
    for join_prompt in (True, False):
      dataset = create_persona(
        small(corpus, form=form), join_prompt=join_prompt
      )
      expected |= {*dataset.item_names, *dataset.prompt_names}
  assert set(texts) == expected


def test_the_path_may_begin_at_home(corpus, monkeypatch):
  monkeypatch.setenv('HOME', str(corpus.parent))
  home = create_persona(small(f'~/{corpus.name}'))
  assert_equal_datasets(home, create_persona(small(corpus)))
