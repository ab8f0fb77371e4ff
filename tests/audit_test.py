"""audit: planted leaks are found, and clean data raises nothing."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import tiny
from pal_jax import data
from pal_jax.audit import Finding, audit, has_leak, render
from pal_jax.audit import measure as measure_lib
from pal_jax.audit import text as text_lib
from pal_jax.data import SEEN_ITEMS, UNSEEN_ITEMS, Dataset, Truth
from pal_jax.structs import make_comparisons

ROOT = Path(__file__).resolve().parents[1]
SEEN, UNSEEN = 40, 20
LENGTHS = {'length', 'longer wins', 'shorter wins', 'length by user'}
PLAIN = ['river', 'stone', 'walk', 'seven', 'blue', 'nice', 'on', 'a', 'the']
WORDS = [
  *PLAIN,
  *('Paris,', 'really:', "isn't", '7.5', 'café', '*very*', 'so;', 'maybe?'),
  *('"quoted"', '(aside)', '[note]', 'end\nnext', '42', 'YES!'),
]


def sentence(rng, number=None, words=WORDS):
  """Of 6 to 30 words, and a full stop."""
  return ' '.join(rng.choice(words, number or rng.integers(6, 31))) + '.'


def build(first_wins, texts=None, render_texts=None, num_prompts=1, seed=0):
  """Every comparison has two texts of its own.

  Args:
    first_wins: (rng, user, a, b, prompt) -> label; unseen users from SEEN on.
    texts: rng -> two texts.
    render_texts: (preferred, rejected) -> the same, as they are shown.
  """
  rng = np.random.default_rng(seed)
  texts = texts or (lambda rng: (sentence(rng), sentence(rng)))
  names, split = [], []

  def draw(users, offset, number, where):
    label = np.zeros((users, number))
    prompt = rng.integers(0, num_prompts, (users, number))
    start = len(names)
    for u in range(users):
      for n in range(number):
        pair = texts(rng)
        y = first_wins(rng, offset + u, *pair, prompt[u, n])
        if render_texts:
          pair = render_texts(*pair) if y else render_texts(*pair[::-1])[::-1]
        label[u, n] = y
        names.extend(pair)
        split.extend([where] * 2)
    items = start + np.arange(2 * label.size).reshape(users, number, 2)
    user = np.repeat(np.arange(users), number).reshape(users, number)
    return make_comparisons(user, items, label, prompt=prompt)

  train, validation = draw(SEEN, 0, 20, 0), draw(SEEN, 0, 10, 1)
  seen = {SEEN_ITEMS: draw(SEEN, 0, 5, 0), UNSEEN_ITEMS: draw(SEEN, 0, 10, 2)}
  support = draw(UNSEEN, SEEN, 20, 0)
  unseen = {
    SEEN_ITEMS: draw(UNSEEN, SEEN, 5, 0),
    UNSEEN_ITEMS: draw(UNSEEN, SEEN, 10, 2),
  }
  return Dataset(
    name='planted',
    user_ids=tuple(f'seen-{i}' for i in range(SEEN)),
    unseen_user_ids=tuple(f'unseen-{i}' for i in range(UNSEEN)),
    item_names=tuple(names),
    item_groups=('x',) * len(names),
    prompt_names=tuple(f'prompt {q}' for q in range(num_prompts)),
    item_split=np.array(split, np.int8),
    train=train.flatten(),
    validation=validation.flatten(),
    seen=seen,
    support=support,
    unseen=unseen,
    truth=Truth(),
  )


def coin(rng, user, a, b, prompt):
  return rng.integers(0, 2)


def persona(rng, user, a, b, prompt):
  """Users who like, or dislike, something that is nothing to see."""
  score = sum(map(ord, a)) % 7 - sum(map(ord, b)) % 7
  if not score:
    return rng.integers(0, 2)
  return float(score > 0) if user % 2 else float(score < 0)


def longer(rng, user, a, b, prompt):
  return 0.5 if len(a) == len(b) else float(len(a) > len(b))


def listed(preferred, rejected):
  return preferred, str([rejected])


@pytest.fixture(scope='module')
def clean():
  return build(persona)


def found(dataset, **kwargs):
  return {f.name: f for f in audit(dataset, **kwargs)}


def names_of(findings, *severities):
  return {f.name for f in findings.values() if f.severity in severities}


def test_clean_data_raises_nothing(clean):
  findings = found(clean)
  assert not names_of(findings, 'leak', 'warning'), render(findings.values())
  assert {'formatting', 'position', 'user id', *LENGTHS} <= set(findings)
  for finding in findings.values():
    if finding.accuracy is not None:
      low, high = finding.interval
      assert low <= finding.accuracy <= high
      assert low < finding.chance + measure_lib.MARGIN


# Formatting and length.


def test_rejected_texts_rendered_as_a_list_leak():
  findings = found(build(persona, render_texts=listed))
  assert names_of(findings, 'leak') == {'formatting'}
  formatting = findings['formatting']
  assert formatting.accuracy > 0.99 and formatting.chance == 0.5
  assert 'less "' in formatting.message and 'list' in formatting.message


@pytest.mark.parametrize('words', [WORDS, PLAIN], ids=['varied', 'plain'])
@pytest.mark.parametrize('rule', ['longer wins', 'shorter wins'])
def test_labels_of_pure_length_leak_as_length_alone(rule, words):
  def label(rng, *args):
    y = longer(rng, *args)
    return y if rule == 'longer wins' else 1.0 - y

  findings = found(
    build(
      label,
      lambda rng: (sentence(rng, words=words), sentence(rng, words=words)),
    )
  )
  assert names_of(findings, 'leak') == {'length', rule, 'length by user'}
  assert findings[rule].accuracy == 1.0
  formatting = findings['formatting']
  assert formatting.severity == 'ok' and 'see there' in formatting.message
  # Of one full stop in a text, its share does say how long the text is.
  assert formatting.interval[0] > (0.95 if words is PLAIN else 0.55)


def test_length_in_a_direction_of_each_user():
  def label(rng, user, a, b, prompt):
    y = longer(rng, user, a, b, prompt)
    return y if user % 2 else 1.0 - y

  findings = found(build(label))
  assert names_of(findings, 'leak', 'warning') == {'length by user'}
  assert findings['length by user'].severity == 'leak'


def test_a_taste_for_length_is_a_warning():
  def label(rng, *args):
    return longer(rng, *args) if rng.random() < 0.5 else rng.integers(0, 2)

  findings = found(build(label))
  assert not names_of(findings, 'leak')
  assert names_of(findings, 'warning') == LENGTHS - {'shorter wins'}
  assert findings['length'].accuracy == pytest.approx(0.75, abs=0.04)


def test_long_texts_with_markdown_are_no_leak_of_formatting():
  """A mark that comes with length tells no more than length does."""

  def texts(rng):
    pair = sentence(rng), sentence(rng)
    return tuple(f'- {t}' if len(t) > 100 else t for t in pair)

  findings = found(build(longer, texts))
  assert findings['formatting'].severity == 'ok'
  assert findings['longer wins'].severity == 'leak'


def test_lists_that_are_also_longer_leak_as_both():
  findings = found(
    build(
      coin,
      lambda rng: (sentence(rng, 10), sentence(rng, 10)),
      lambda preferred, rejected: (preferred, str([rejected] * 5)),
    )
  )
  assert {'formatting', 'shorter wins'} <= names_of(findings, 'leak')


def test_formatting_is_found_where_the_first_is_always_preferred():
  """The majority rate is 1 there, but a probe of texts is blind to order."""

  def first(rng, user, a, b, prompt):
    return 1.0

  findings = found(build(first, render_texts=listed))
  assert {'formatting', 'position'} == names_of(findings, 'leak')


def test_few_items_that_agree_by_accident_are_a_warning():
  """Everybody likes the one item of each split that stands in brackets."""
  rng = np.random.default_rng(5)

  def few(c, split):
    items = rng.permuted(np.tile(np.arange(8), (c.label.size, 1)), axis=-1)
    liked = items[:, :2] == 0
    coins = rng.integers(0, 2, c.label.size)
    label = np.where(liked.any(-1), liked[:, 0], coins).astype(float)
    return c.replace(
      items=(8 * split + items[:, :2]).reshape(c.items.shape),
      label=label.reshape(c.label.shape),
    )

  def both(sets):
    return {k: few(c, 2 * (k == UNSEEN_ITEMS)) for k, c in sets.items()}

  dataset = build(coin)
  dataset = dataclasses.replace(
    dataset,
    item_names=tuple(
      f'it{i:02}yz' if i % 8 else f'[it{i:02}]' for i in range(24)
    ),
    item_groups=('x',) * 24,
    item_split=np.repeat([0, 1, 2], 8).astype(np.int8),
    train=few(dataset.train, 0),
    validation=few(dataset.validation, 1),
    seen=both(dataset.seen),
    support=few(dataset.support, 0),
    unseen=both(dataset.unseen),
  )
  finding = found(dataset)['formatting']
  assert finding.severity == 'warning', finding
  assert 'items are resampled' in finding.message


# Order.


def test_the_first_preferred_more_often_leaks_as_position():
  findings = found(build(lambda rng, *args: float(rng.random() < 0.8)))
  assert names_of(findings, 'leak', 'warning') == {'position'}
  assert findings['position'].accuracy == pytest.approx(0.8, abs=0.03)
  assert findings['user id'].chance == pytest.approx(
    findings['position'].accuracy
  )


def test_each_user_preferring_a_side_leaks_as_user_id():
  findings = found(
    build(lambda rng, user, a, b, prompt: float(rng.random() < user % 2))
  )
  assert names_of(findings, 'leak', 'warning') == {'user id'}
  assert findings['user id'].accuracy == 1.0
  assert findings['user id'].chance < 0.55


def test_each_prompt_preferring_a_side_leaks_as_prompt_id(clean):
  findings = found(
    build(lambda rng, user, a, b, prompt: prompt % 2, num_prompts=20)
  )
  assert names_of(findings, 'leak', 'warning') == {'prompt id'}
  assert 'prompt id' not in found(clean)  # of a single prompt


# Structure.


def with_items(comparisons, rows, items, label=None):
  """The comparisons with `rows` of the flat arrays set anew."""
  new = comparisons.items.reshape(-1, 2).copy()
  new[rows] = items
  comparisons = comparisons.replace(items=new.reshape(comparisons.items.shape))
  if label is None:
    return comparisons
  labels = comparisons.label.ravel().copy()
  labels[rows] = label
  return comparisons.replace(label=labels.reshape(comparisons.label.shape))


def with_names(dataset, changed):
  names = list(dataset.item_names)
  for row, text in changed.items():
    names[row] = text
  return dataclasses.replace(dataset, item_names=tuple(names))


def test_a_text_in_two_splits(clean):
  train, test = (int(np.flatnonzero(clean.item_split == s)[3]) for s in (0, 2))
  twin = '  ' + clean.item_names[train].upper().replace(' ', '  ')
  findings = found(with_names(clean, {test: twin}))
  assert names_of(findings, 'leak', 'warning') == {'texts in two splits'}
  assert findings['texts in two splits'].count == 1


def test_a_pair_of_training_asked_again_in_the_other_order(clean):
  queries = clean.seen[SEEN_ITEMS]
  pair = clean.train.items[clean.train.user == 0][0][::-1]
  seen = {**clean.seen, SEEN_ITEMS: with_items(queries, [0], pair)}
  findings = found(dataclasses.replace(clean, seen=seen))
  assert findings['pairs of training asked again'].count == 1
  assert findings['pairs of training asked again'].severity == 'leak'
  # Another user's pair is no repetition.
  seen = {**clean.seen, SEEN_ITEMS: with_items(queries, [5], pair)}
  findings = found(dataclasses.replace(clean, seen=seen))
  assert findings['pairs of training asked again'].count == 0


def test_a_pair_of_the_support_asked_again(clean):
  unseen = {
    **clean.unseen,
    SEEN_ITEMS: with_items(
      clean.unseen[SEEN_ITEMS], [0, 1], clean.support.items[0, :2]
    ),
  }
  findings = found(dataclasses.replace(clean, unseen=unseen))
  assert findings['pairs of the support asked again'].count == 2
  assert findings['pairs of training asked again'].count == 0


def test_padding_is_no_comparison(clean):
  unseen = {
    **clean.unseen,
    SEEN_ITEMS: with_items(
      clean.unseen[SEEN_ITEMS], [0], clean.support.items[0, 0]
    ),
  }
  mask = clean.support.mask.copy()
  mask[0, 0] = False
  support = clean.support.replace(mask=mask)
  findings = found(dataclasses.replace(clean, unseen=unseen, support=support))
  assert findings['pairs of the support asked again'].count == 0


def test_a_user_seen_and_unseen(clean):
  ids = ('seen-3', *clean.unseen_user_ids[1:])
  findings = found(dataclasses.replace(clean, unseen_user_ids=ids))
  assert names_of(findings, 'leak', 'warning') == {'users seen and unseen'}
  assert 'seen-3' in findings['users seen and unseen'].message


def test_identical_and_empty_texts(clean):
  a, b = clean.train.items[7]
  findings = found(with_names(clean, {a: 'Same  text.', b: 'same text.'}))
  assert names_of(findings, 'leak', 'warning') == {'identical candidates'}
  assert findings['identical candidates'].count == 1
  findings = found(with_names(clean, {a: ' \n'}))
  assert names_of(findings, 'leak', 'warning') == {'empty texts'}
  assert findings['empty texts'].count == 1


@pytest.mark.parametrize(
  ('labels', 'count'),
  [((1.0, 1.0), 1), ((1.0, 0.0), 0), ((1.0, 0.5), 0), ((0.9, 0.6), 1)],
)
def test_contradictions(clean, labels, count):
  """The pair comes again the other way round: equal labels contradict."""
  rows = np.flatnonzero(clean.train.user == 4)[:2]
  pair = clean.train.items[rows[0]]
  train = with_items(clean.train, rows, [pair, pair[::-1]], labels)
  findings = found(dataclasses.replace(clean, train=train))
  assert findings['contradictions'].count == count
  assert findings['contradictions'].severity == ('warning' if count else 'ok')


@pytest.mark.parametrize(
  ('where', 'severity'), [(SEEN_ITEMS, 'ok'), (UNSEEN_ITEMS, 'warning')]
)
def test_both_items_known(clean, where, severity):
  """Unseen user 2 met a and b, c and d; then is asked about a and c."""
  (a, _), (c, _) = clean.support.items[2, :2]
  row = 2 * clean.unseen[where].shape[1]
  unseen = {
    **clean.unseen,
    where: with_items(clean.unseen[where], [row], [a, c]),
  }
  findings = found(dataclasses.replace(clean, unseen=unseen))
  finding = findings[f'both items known, {where.replace("_", " ")}']
  assert (finding.count, finding.severity) == (1, severity)


# Ties, no text, repetition.


def test_ties_are_left_out_and_counted():
  def label(rng, *args):
    return 0.5 if rng.random() < 0.5 else longer(rng, *args)

  dataset = build(label)
  parts = (dataset.train, dataset.validation, dataset.support)
  parts = (*parts, *dataset.seen.values(), *dataset.unseen.values())
  findings = found(dataset)
  assert findings['ties'].count == sum((c.label == 0.5).sum() for c in parts)
  assert findings['ties'].count > 1000
  assert findings['longer wins'].accuracy == 1.0


def test_nothing_but_ties():
  findings = found(build(lambda *args: 0.5))
  assert names_of(findings, 'warning') == {'ties'}
  assert 'formatting' not in findings and 'position' not in findings


def test_items_without_text_are_told_apart_by_their_rows():
  dataset = data.create(tiny.get_config('simulation').data)
  findings = found(dataset)
  assert 'not checked' in findings['text'].message
  assert not {'formatting', 'empty texts', *LENGTHS} & set(findings)
  assert not names_of(findings, 'leak', 'warning')
  assert findings['both items known, seen items'].count > 0
  assert findings['identical candidates'].count == 0


def test_the_shipped_corpus_has_no_leak():
  assert not has_leak(audit(data.create(tiny.get_config().data)))


def test_the_same_seed_gives_the_same_findings(clean, monkeypatch):
  monkeypatch.setattr(measure_lib, 'MAX_COMPARISONS', 300)
  assert audit(clean) == audit(clean)
  assert audit(clean) != audit(clean, seed=1)


# The pieces.


def slow_shares(text):
  def share(test):
    return sum(map(test, text)) / len(text) if text else 0.0

  return [
    share(lambda c: c in '.,;:!?'),
    share(lambda c: c in '()[]{}<>'),
    share(lambda c: c in '"\'`“”‘’«»'),
    share(lambda c: c in '\n\r'),
    share(lambda c: c in '*#_|~`'),
    share(str.isdigit),
    share(str.isupper),
    share(lambda c: ord(c) > 127),
  ]


def test_features_equal_a_slow_oracle(monkeypatch):
  monkeypatch.setattr(text_lib, '_CHUNK', 7)
  rng = np.random.default_rng(0)
  texts = [sentence(rng) for _ in range(30)]
  texts += [
    '',
    ' ',
    '',
    'É 😀\r\n\n x',
    '\ud800 lone',
    'ONE',
    '',
    '\u2003a b\t',
  ]
  marks, shares, lengths = text_lib.features(texts)
  assert marks.shape == (len(texts), len(text_lib.MARKS))
  np.testing.assert_allclose(shares, [slow_shares(t) for t in texts], rtol=1e-6)
  characters, words = [len(t) for t in texts], [len(t.split()) for t in texts]
  np.testing.assert_array_equal(lengths[:, 0], characters)
  np.testing.assert_array_equal(lengths[:, 1], words)
  np.testing.assert_allclose(lengths[:, 2], np.log1p(characters), rtol=1e-6)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ("['a list']", {0, 1, 4}),
    ('[1, 2]\n', {0, 1, 4, 7}),
    ("{'a': 1}", {0, 1, 4}),
    ('[]', {0, 1, 4}),
    ('[sic] he said [so]', {0, 1}),
    ('(see above)', {0, 1}),
    ('"quoted"', {2, 3}),
    (' - item', {6}),
    ('- item', {5}),
    ('text\n## heading', {5}),
    ('a **bold** one', {5}),
    ('2 * 3 and -4', set()),
    ('plain.', set()),
    ('', set()),
  ],
)
def test_marks(text, expected):
  marks = text_lib.features([text])[0][0]
  assert set(np.flatnonzero(marks)) == expected


def test_normalised_texts_are_equal():
  ids = text_lib.text_ids(['A  b', 'a b\n', 'ab', 'STRASSE', 'straße'])
  assert ids.tolist() == [0, 0, 1, 2, 2]


def test_bootstrap_over_users_follows_their_sizes():
  """A mean over comparisons, not over users; its spread is over users."""
  rng = np.random.default_rng(0)
  user = np.repeat(np.arange(200), rng.integers(1, 20, 200))
  value = (rng.random(200)[user] < 0.5).astype(float)
  draws = measure_lib.bootstrap(value[:, None], user[:, None], 0)[:, 0]
  assert draws.mean() == pytest.approx(value.mean(), abs=0.01)
  error = np.bincount(user, value - value.mean())
  expected = np.sqrt(np.sum(error**2)) / value.size
  assert draws.std() == pytest.approx(expected, rel=0.15)


def test_bootstrap_over_items_is_wider_where_items_matter():
  rng = np.random.default_rng(1)
  items = rng.integers(0, 30, (5000, 2))
  quality = rng.integers(0, 2, (30, 30)).astype(float)
  value = (quality[items[:, 0]].mean(-1) > 0.5).astype(float)[:, None]
  users = rng.integers(0, 100, (5000, 1))
  over_users = measure_lib.bootstrap(value, users, 0).std()
  assert measure_lib.bootstrap(value, items, 0).std() > 3 * over_users


def test_render_puts_leaks_first():
  page = render(
    [
      Finding('fine', 'ok', 'All well.', count=0),
      Finding('bad', 'leak', 'Mend it.', 0.9, (0.8, 0.95), 0.5),
    ]
  )
  assert page.splitlines()[0] == '# Audit: 1 leak, 0 warning, 1 ok'
  assert '(accuracy 0.900 [0.800, 0.950], chance 0.500). Mend it.' in page
  assert page.index('bad') < page.index('fine')


# The command.


def command(*args):
  return subprocess.run(
    [sys.executable, '-m', 'pal_jax.audit', *args],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_the_command_prints_findings_and_ends_with_0():
  done = command('--config=configs/tiny.py:simulation')
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('# Audit: 0 leak')


def test_the_command_ends_with_3_if_there_is_a_leak(tmp_path):
  """Statements that nobody with the behaviour would say, as Python lists."""
  (tmp_path / 'persona').mkdir()
  rng = np.random.default_rng(2)
  with (tmp_path / 'persona' / 'planted.jsonl').open('w') as file:
    for i in range(100):
      text = sentence(rng)
      row = {
        'question': 'Say it?',
        'statement': text if i % 2 else str([text]),
        'answer_matching_behavior': ' Yes' if i % 2 else ' No',
      }
      file.write(json.dumps(row) + '\n')
  done = command(
    '--config=configs/tiny.py',
    f'--config.data.path={tmp_path}',
    "--config.data.behaviors=('planted',)",
    '--config.data.stances=own',
    '--config.data.num_personas=1',
    '--config.data.cross_fraction=0.0',
  )
  assert done.returncode == 3, done.stderr
  assert 'leak: formatting' in done.stdout
  assert 'Traceback' not in done.stderr


def test_the_command_refuses_a_bad_dataset_with_2():
  done = command('--config=configs/tiny.py', '--config.data.name=nothing')
  assert done.returncode == 2
  assert done.stderr.count('error: ') == 1 and 'nothing' in done.stderr
  assert done.stdout == ''
