"""benchmark.page: who wins, in words, tables and bold."""

import dataclasses

import numpy as np
import pytest

from pal_jax.benchmark.page import (
  choose_pal,
  control_table,
  dataset_table,
  score,
  totals,
  verdicts,
)
from pal_jax.benchmark.summary import cell_rows
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.metrics import negative_log_likelihood, user_accuracies
from tests.benchmark.planted_cells import make_cell

SIZES = {'users': 80, 'queries': 20}
LOGIT = f'unseen/{UNSEEN_ITEMS}/logit'
LABEL = f'unseen/{UNSEEN_ITEMS}/label'


def cells_of(seeds=(0, 1), **right):
  """{method: how often it is right}."""
  return [
    make_cell(method, seed, right=share, **SIZES)
    for method, share in right.items()
    for seed in seeds
  ]


def clear():
  """`pal_a` is better than everybody; `even` and `equal` are alike."""
  cells = cells_of(pal_a=0.85, even=0.7, random=0.5)
  copies = [
    dataclasses.replace(cell, method='equal')
    for cell in cells
    if cell.method == 'even'
  ]
  return score('planted', cells + copies)


def both(*, better, other):
  """The two named methods with 0.8 and 0.6."""
  return score('planted', cells_of(**{better: 0.8, other: 0.6}))


# Scores.


def test_means_are_over_the_users_of_all_seeds():
  cells = cells_of(m=0.7, other=0.6)
  scores = score('planted', cells)
  assert (scores.counts, scores.seeds) == ([0, 3], [0, 1])
  mine = [cell for cell in cells if cell.method == 'm']
  for i in range(2):
    accuracy = [
      user_accuracies(c.arrays[LOGIT][i], c.arrays[LABEL]) for c in mine
    ]
    nll = [
      negative_log_likelihood(c.arrays[LOGIT][i].astype(float), c.arrays[LABEL])
      for c in mine
    ]
    for metric, values in (('user_accuracy', accuracy), ('nll', nll)):
      mean, low, high = scores.mean(metric, 'm', i)
      assert mean == pytest.approx(np.mean(values))
      assert low < mean < high
      gap, *_ = scores.difference(metric, 'm', 'other', i)
      other = scores.mean(metric, 'other', i)[0]
      assert gap == pytest.approx(mean - other)


def test_seeds_that_a_method_lacks_are_left_out():
  cells = cells_of(seeds=(0, 1, 5), m=0.8, other=0.6)
  some = [c for c in cells if (c.method, c.seed) != ('other', 1)]
  scores = score('planted', some[::-1])  # in any order
  assert scores.seeds == [0, 5]
  expected = score('planted', cells_of(seeds=(0, 5), m=0.8, other=0.6))
  for method in ('m', 'other'):
    assert [c.seed for c in scores.cells[method]] == [0, 5]
    for metric in ('user_accuracy', 'nll'):
      assert scores.mean(metric, method, 1) == expected.mean(metric, method, 1)


def test_only_n_that_every_seed_has_are_compared():
  cells = [
    make_cell(method, seed, counts=counts)
    for method in ('m', 'other')
    for seed, counts in ((0, (0, 2, 5)), (1, (0, 5)))
  ]
  scores = score('planted', cells)
  assert scores.counts == [0, 5]
  # n = 5 is at another place in each cell.
  mine = [c for c in cells if c.method == 'm']
  expected = np.mean(
    [
      user_accuracies(c.arrays[LOGIT][i], c.arrays[LABEL])
      for c, i in zip(mine, (2, 1), strict=True)
    ]
  )
  assert scores.mean('user_accuracy', 'm', 1)[0] == pytest.approx(expected)


def test_methods_of_other_people_are_refused():
  cells = [make_cell('m'), make_cell('other', users=11)]
  with pytest.raises(ValueError, match='planted: other has other users'):
    score('planted', cells)


# Verdicts.


@pytest.mark.parametrize('metric', ['user_accuracy', 'nll'])
@pytest.mark.parametrize('i', [0, 1])
def test_a_better_method_wins_and_the_other_loses(metric, i):
  scores = clear()
  assert scores.verdict(metric, 'pal_a', 'even', i) == 'win'
  assert scores.verdict(metric, 'even', 'pal_a', i) == 'loss'
  assert scores.verdict(metric, 'even', 'equal', i) == 'tie'
  assert scores.best(metric, i) == 'pal_a'


def test_lower_nats_are_better_and_lower_accuracy_is_not():
  scores = both(better='a', other='b')
  gaps = {m: scores.difference(m, 'a', 'b', 1) for m in scores.values}
  assert gaps['user_accuracy'][1] > 0 and gaps['nll'][2] < 0


def test_accuracy_and_nats_are_judged_apart():
  """A method that is right as often but too sure of itself."""
  cells = cells_of(m=0.7)
  sure = [
    dataclasses.replace(
      c, method='sure', arrays=c.arrays | {LOGIT: 20 * c.arrays[LOGIT]}
    )
    for c in cells
  ]
  scores = score('planted', cells + sure)
  assert scores.verdict('user_accuracy', 'm', 'sure', 0) == 'tie'
  assert scores.verdict('nll', 'm', 'sure', 0) == 'win'


def test_a_difference_that_could_be_none_is_a_tie():
  """As often right, on other comparisons."""
  scores = score('planted', cells_of(a=0.7, b=0.7))
  gap, low, high = scores.difference('user_accuracy', 'a', 'b', 0)
  assert gap != 0 and low < 0 < high
  assert scores.verdict('user_accuracy', 'a', 'b', 0) == 'tie'


# The table.


def lines_of(scores, title):
  """{method: its cells} under a title."""
  text = dataset_table(scores, 'python -m x').split(f'## {title}\n')[1]
  table = text.split('##')[0].strip().splitlines()
  rows = [[c.strip() for c in row.strip('| ').split('|')] for row in table]
  assert rows[0] == ['method', *(f'n = {n}' for n in scores.counts)]
  return {name: cells for name, *cells in rows[2:]}


@pytest.mark.parametrize('title', ['accuracy', 'NLL'])
def test_bold_is_who_beats_everybody(title):
  found = lines_of(clear(), title)
  assert list(found) == ['pal_a', 'even', 'random', 'equal']
  assert all(cell.startswith('**') for cell in found['pal_a'])
  for name in ('even', 'random', 'equal'):
    assert not any('*' in cell or '†' in cell for cell in found[name])


@pytest.mark.parametrize('title', ['accuracy', 'NLL'])
def test_nobody_is_bold_where_the_best_is_not_told_from_another(title):
  cells = cells_of(a=0.8, worse=0.55)
  # Nearly as `a`, which is not told apart from it.
  rng = np.random.default_rng(0)
  near = []
  for c in (c for c in cells if c.method == 'a'):
    z = c.arrays[LOGIT] * rng.uniform(0.99, 1.01, c.arrays[LOGIT].shape)
    near.append(
      dataclasses.replace(c, method='near', arrays=c.arrays | {LOGIT: z})
    )
  found = lines_of(score('planted', cells + near), title)
  assert not any('**' in cell for cells in found.values() for cell in cells)
  for name in ('a', 'near'):
    assert all('†' in cell for cell in found[name])
  assert not any('†' in cell for cell in found['worse'])


def test_better_than_most_is_not_bold():
  """Clearly ahead of one, but not of another, by the paired interval."""
  scores = score('planted', cells_of(a=0.7, b=0.7, worse=0.5))
  best = scores.best('user_accuracy', 0)
  other = {'a': 'b', 'b': 'a'}[best]
  assert scores.verdict('user_accuracy', best, 'worse', 0) == 'win'
  assert scores.verdict('user_accuracy', best, other, 0) == 'tie'
  found = lines_of(scores, 'accuracy')
  assert not found[best][0].startswith('**')


def test_a_table_shows_means_and_intervals():
  scores = clear()
  found = lines_of(scores, 'accuracy')
  for name, cells in found.items():
    for i, cell in enumerate(cells):
      mean, low, high = scores.mean('user_accuracy', name, i)
      assert cell.replace('*', '') == f'{mean:.3f} [{low:.3f}, {high:.3f}]'
  text = dataset_table(scores, 'python -m x --seeds=2')
  assert text.startswith('# planted\n')
  assert '    python -m x --seeds=2\n' in text
  assert 'seeds 0, 1' in text


# PAL.


@pytest.mark.parametrize(
  'tuned, expected',
  [
    ({'pal_a': ([0.6, 0.5], 1), 'pal_b': ([0.55, 0.7], 0)}, 'pal_a'),
    ({'pal_a': ([0.6, 0.5], 0), 'pal_b': ([0.55, 0.7], 0)}, 'pal_b'),
    ({'pal_b': ([0.6], 0), 'rfm': ([0.1], 0)}, 'pal_b'),
    ({'rfm': ([0.1], 0)}, None),
    ({}, None),
  ],
)
def test_pal_is_chosen_by_its_tuned_nats(tuned, expected):
  given = {m: {'nll': nll, 'index': i} for m, (nll, i) in tuned.items()}
  assert choose_pal(given) == expected


def test_verdicts_name_methods_and_n():
  cells = cells_of(pal_a=0.85, pal_b=0.5, even=0.7, random=0.5)
  for c in cells:  # at n = 3 `late` is far better than anybody
    if c.method == 'even':
      z = c.arrays[LOGIT].copy()
      z[1] = 3 * np.where(c.arrays[LABEL] == 1, 1, -1)
      cells.append(
        dataclasses.replace(c, method='late', arrays=c.arrays | {LOGIT: z})
      )
  found = verdicts(score('planted', cells), 'pal_a')
  assert found == [
    '- accuracy: wins against even (all n); late (n = 0).',
    '- accuracy: ties with none.',
    '- accuracy: loses to late (n = 3).',
    '- NLL: wins against even (all n); late (n = 0).',
    '- NLL: ties with none.',
    '- NLL: loses to late (n = 3).',
  ]


def test_totals_count_over_datasets_and_n():
  first = clear()
  second = dataclasses.replace(
    both(better='even', other='pal_a'), dataset='another'
  )
  third = dataclasses.replace(
    both(better='even', other='random'), dataset='without'
  )
  chosen = {'planted': 'pal_a', 'another': 'pal_a'}
  found = totals([first, second, third], chosen)
  # Two n in each: wins in the first, losses in the second, no PAL in the third.
  assert found[2:] == [
    '| even | 2 | 0 | 2 | 2 | 0 | 2 |',
    '| random | 2 | 0 | 0 | 2 | 0 | 0 |',
    '| equal | 2 | 0 | 0 | 2 | 0 | 0 |',
  ]


def test_controls_are_means_over_seeds_at_the_largest_n():
  cells = cells_of(btl=0.6, m=0.8)
  reference = {c.seed: c for c in cells if c.method == 'btl'}
  rows = [row for c in cells for row in cell_rows(c, reference[c.seed])]
  header, _, *lines = control_table(rows)
  assert header == (
    '| method | n = 3 | no adaptation | swapped users | shuffled support | '
    'flipped labels | majority | minority |'
  )
  found = {}
  for line in lines:
    name, *values = (x.strip() for x in line.strip('| ').split('|'))
    found[name] = values
  assert list(found) == ['btl', 'm']

  def mean(metric, n):
    return np.mean(
      [
        r['mean']
        for r in rows
        if (r['method'], r['metric'], r['n']) == ('m', metric, n)
      ]
    )

  expected = [
    mean('user_accuracy', 3),
    mean('user_accuracy', 0),
    mean('user_accuracy, swapped_users', 3),
    mean('user_accuracy, shuffled_support', 3),
    mean('user_accuracy, flipped_labels', 3),
    mean('majority_accuracy', 3),
    mean('minority_accuracy', 3),
  ]
  assert found['m'] == [f'{x:.3f}' for x in expected]


def test_without_a_reference_majority_and_minority_stay_empty():
  rows = [row for c in cells_of(m=0.8) for row in cell_rows(c, None)]
  *_, line = control_table(rows)
  assert line.endswith('|  |  |')
