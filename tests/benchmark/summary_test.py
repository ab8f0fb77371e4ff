"""benchmark.summary: rows are what `metrics` says, with intervals around."""

import dataclasses

import numpy as np
import pytest

from pal_jax.benchmark.cell import CONTROLS, WHERE
from pal_jax.benchmark.intervals import person_weights
from pal_jax.benchmark.summary import (
  Clusters,
  UserSums,
  cell_rows,
  clusters,
  majority,
  metrics_of,
  paired,
  people,
  pooled,
)
from pal_jax.data.dataset import SEEN_ITEMS, UNSEEN_ITEMS
from pal_jax.metrics import (
  evaluate_logits,
  expected_calibration_error,
  negative_log_likelihood,
  pair_accuracy,
  user_accuracies,
)
from tests.benchmark.planted_cells import make_cell

METRICS = (
  'accuracy',
  'user_accuracy',
  'worst_decile_accuracy',
  'nll',
  'brier',
  'ece',
)
SAMPLES = pytest.mark.parametrize(
  'resamples, padded', [(1, False), (1, True), (3, False), (3, True)]
)
GROUP = (0, 1, 2) * 4


def rows_of(cell, reference=None):
  """{(n, metric): row}."""
  rows = cell_rows(cell, reference)
  found = {(row['n'], row['metric']): row for row in rows}
  assert len(found) == len(rows)  # nothing stands twice
  return found


def unseen(cell, what, where=UNSEEN_ITEMS):
  return cell.arrays[f'unseen/{where}/{what}']


def full(**changes):
  """A cell with everything, and its reference."""
  cell = make_cell(group=GROUP, **changes)
  return cell, make_cell('btl', right=0.6, **changes)


# Means.


@SAMPLES
def test_means_are_those_of_the_metrics(resamples, padded):
  cell = make_cell(resamples=resamples, padded=padded)
  rows = rows_of(cell)
  for i, n in enumerate((0, 3)):
    logit, label = unseen(cell, 'logit')[i], unseen(cell, 'label')
    expected = evaluate_logits(logit, label)
    # Of the resamples together, not of each.
    expected['ece'] = expected_calibration_error(
      logit, np.broadcast_to(label, logit.shape)
    )
    for metric in METRICS:
      mean = rows[n, metric]['mean']
      assert mean == pytest.approx(expected[metric], abs=1e-6), metric
  assert rows[0, 'nll']['mean'] != rows[3, 'nll']['mean']


def test_with_one_order_the_calibration_error_is_that_of_the_metrics():
  cell = make_cell(padded=True)
  expected = evaluate_logits(unseen(cell, 'logit')[1], unseen(cell, 'label'))
  found = rows_of(cell)[3, 'ece']['mean']
  assert found == pytest.approx(expected['ece'], abs=1e-6)


@SAMPLES
def test_accuracies_over_items_have_the_mean_over_comparisons(
  resamples, padded
):
  rows = rows_of(make_cell(resamples=resamples, padded=padded))
  for n in (0, 3):
    both, one = rows[n, 'accuracy, users x items'], rows[n, 'accuracy']
    assert both['mean'] == one['mean']
    assert (both['low'], both['high']) != (one['low'], one['high'])


def test_a_fitted_temperature_divides_the_log_odds():
  cell = make_cell(resamples=2)
  rows = rows_of(cell)
  z, label = unseen(cell, 'logit')[1] / 1.7, unseen(cell, 'label')
  expected = negative_log_likelihood(z.astype(float), label).mean()
  assert rows[3, 'nll, fitted']['mean'] == pytest.approx(expected, rel=1e-5)
  ece = expected_calibration_error(z, np.broadcast_to(label, z.shape))
  assert rows[3, 'ece, fitted']['mean'] == pytest.approx(ece, abs=1e-6)


def test_without_a_temperature_nothing_is_divided():
  cell = make_cell()
  del cell.arrays['temperature']
  rows = rows_of(cell)
  for metric in ('nll', 'ece'):
    for end in ('mean', 'low', 'high'):
      assert rows[3, f'{metric}, fitted'][end] == rows[3, metric][end]


@SAMPLES
def test_the_worst_group_is_the_one_served_worst(resamples, padded):
  cell, _ = full(resamples=resamples, padded=padded)
  accuracy = user_accuracies(unseen(cell, 'logit')[0], unseen(cell, 'label'))
  each = [np.nanmean(accuracy[np.array(GROUP) == g]) for g in range(3)]
  found = rows_of(cell)[0, 'worst_group_accuracy']
  assert found['mean'] == pytest.approx(min(each))
  assert min(each) < max(each)


@SAMPLES
def test_majority_and_minority_are_by_the_reference_without_answers(
  resamples, padded
):
  cell, reference = full(resamples=resamples, padded=padded)
  rows = rows_of(cell, reference)
  label = unseen(cell, 'label')
  side = pair_accuracy(unseen(reference, 'logit')[0, 0], label)
  right = pair_accuracy(unseen(cell, 'logit')[1], label).mean(0)
  for name, which in (('majority', 1), ('minority', 0)):
    expected = right[side == which].mean()
    mean = rows[3, f'{name}_accuracy']['mean']
    assert mean == pytest.approx(expected), name
  # Together they are everything that is no tie.
  decided = np.isfinite(side)
  share = np.mean(side[decided])
  both = rows[3, 'accuracy']['mean']
  parts = [rows[3, f'{x}_accuracy']['mean'] for x in ('majority', 'minority')]
  assert share * parts[0] + (1 - share) * parts[1] == pytest.approx(both)


def test_the_reference_itself_is_right_about_the_majority_alone():
  reference = make_cell('btl')
  rows = rows_of(reference, reference)
  assert rows[0, 'majority_accuracy']['mean'] == 1
  assert rows[0, 'minority_accuracy']['mean'] == 0


def test_a_score_of_zero_is_on_no_side():
  reference = make_cell('btl')
  unseen(reference, 'logit')[0, 0, 0, 0] = 0
  side = majority(reference, unseen(reference, 'label'))
  assert side[0, 0] == 0.5
  assert set(side.ravel()[1:].tolist()) == {0.0, 1.0}


def test_controls_stand_at_the_largest_n():
  cell = make_cell(padded=True)
  rows = rows_of(cell)
  for name in CONTROLS:
    accuracy = user_accuracies(
      cell.arrays[f'control/{name}'], unseen(cell, 'label')
    )
    found = rows[3, f'user_accuracy, {name}']
    assert found['mean'] == pytest.approx(np.nanmean(accuracy))
    assert (0, f'user_accuracy, {name}') not in rows


def test_other_users_and_items_stand_under_their_own_name():
  cell = make_cell(resamples=2, padded=True)
  rows = rows_of(cell)
  logit = unseen(cell, 'logit', SEEN_ITEMS)
  for i, n in enumerate((0, 3)):
    expected = evaluate_logits(logit[i], unseen(cell, 'label', SEEN_ITEMS))
    for metric in ('user_accuracy', 'accuracy', 'nll'):
      found = rows[n, f'{metric} at unseen_users, {SEEN_ITEMS}']
      assert found['mean'] == pytest.approx(expected[metric], abs=1e-6)
  for where in WHERE:
    expected = evaluate_logits(
      cell.arrays[f'seen/{where}/logit'], cell.arrays[f'seen/{where}/label']
    )
    for metric in ('user_accuracy', 'accuracy', 'nll'):
      found = rows[None, f'{metric} at seen_users, {where}']
      assert found['mean'] == pytest.approx(expected[metric], abs=1e-6)


# Rows.


def test_a_row_has_its_keys_and_no_others():
  cell, reference = full()
  rows = cell_rows(cell, reference)
  assert len(rows) > 30
  for row in rows:
    assert list(row) == [
      'method',
      'dataset',
      'seed',
      'n',
      'metric',
      'mean',
      'low',
      'high',
    ]
    assert (row['method'], row['dataset'], row['seed']) == ('m', 'planted', 0)
    assert row['n'] is None or type(row['n']) is int
    for end in ('mean', 'low', 'high'):
      assert type(row[end]) is float, row['metric']


def test_every_metric_is_there_at_every_n():
  cell, reference = full()
  found = rows_of(cell, reference)
  at_n = {
    *METRICS,
    'accuracy, users x items',
    'nll, fitted',
    'ece, fitted',
    'worst_group_accuracy',
    'majority_accuracy',
    'minority_accuracy',
    *(
      f'{metric} at unseen_users, {SEEN_ITEMS}'
      for metric in ('user_accuracy', 'accuracy', 'nll')
    ),
  }
  assert {metric for n, metric in found if n == 0} == at_n
  controls = {f'user_accuracy, {name}' for name in CONTROLS}
  assert {metric for n, metric in found if n == 3} == at_n | controls


def test_what_a_cell_lacks_has_no_rows():
  cell = make_cell()
  for key in list(cell.arrays):
    if key.startswith('seen/') or f'/{SEEN_ITEMS}/' in key:
      del cell.arrays[key]
  metrics = {metric for _, metric in rows_of(cell)}
  assert not [m for m in metrics if ' at ' in m or 'group' in m]
  assert 'majority_accuracy' not in metrics


@SAMPLES
def test_accuracies_lie_in_their_intervals(resamples, padded):
  cell, reference = full(resamples=resamples, padded=padded)
  rows = cell_rows(cell, reference)
  for row in rows:
    if 'accuracy' in row['metric']:
      assert 0 <= row['low'] <= row['mean'] <= row['high'] <= 1, row
      assert row['low'] < row['high'], row


def test_equal_people_have_no_interval():
  cell = make_cell()
  label = unseen(cell, 'label')
  unseen(cell, 'logit')[:] = 2 * np.where(label == 1, 1, -1)
  rows = rows_of(cell)
  for metric, mean in (
    ('user_accuracy', 1.0),
    ('worst_decile_accuracy', 1.0),
    ('nll', np.log1p(np.exp(-2.0))),
  ):
    row = rows[3, metric]
    assert row['low'] == pytest.approx(mean)
    assert row['mean'] == pytest.approx(mean)
    assert row['high'] == pytest.approx(mean)


def test_orders_of_the_support_are_no_new_people():
  """Copies of a resample leave means and intervals as they are."""
  cell = make_cell()
  copies = dataclasses.replace(cell, arrays=dict(cell.arrays))
  for where in WHERE:
    key = f'unseen/{where}/logit'
    copies.arrays[key] = np.repeat(cell.arrays[key], 4, axis=1)
  one, four = rows_of(cell), rows_of(copies)
  for key, row in one.items():
    for end in ('mean', 'low', 'high'):
      assert four[key][end] == pytest.approx(row[end], abs=1e-6), key


def test_intervals_are_over_people_not_over_comparisons():
  """Twice the same comparisons of everybody narrow no interval."""
  cell = make_cell()
  label, logit = unseen(cell, 'label'), unseen(cell, 'logit')[0]
  weights = person_weights(people([cell]))
  once = metrics_of(UserSums(logit, label), weights)
  twice = metrics_of(
    UserSums(np.tile(logit, (1, 1, 2)), np.tile(label, 2)), weights
  )
  for metric, values in once.items():
    assert twice[metric] == pytest.approx(values, abs=1e-6), metric


# People.


def test_people_who_come_again_are_the_same():
  cells = [make_cell(seed=0), make_cell(seed=3)]
  found = people(cells)
  assert found.shape == (24,) and len(set(found)) == 12
  np.testing.assert_array_equal(found[:12], found[12:])
  assert len(set(people(cells, 'seen_users'))) == 16


def test_simulated_people_are_new_in_every_seed():
  cells = [make_cell(seed=0, repeated=False), make_cell(seed=3, repeated=False)]
  assert len(set(people(cells))) == 24
  assert len(set(people(cells, 'seen_users'))) == 32


# Pooling.


@pytest.mark.parametrize('padded', [False, True])
def test_pooled_sums_give_the_metrics_of_all_seeds(padded):
  cells = [make_cell(seed=s, resamples=2, padded=padded) for s in range(3)]
  accuracies, nats = [], []
  for cell in cells:
    logit, label = unseen(cell, 'logit')[1], unseen(cell, 'label')
    accuracies.append(user_accuracies(logit, label))
    nats.append(negative_log_likelihood(logit.astype(float), label).ravel())
  who = clusters(cells)
  for metric, expected in (
    ('user_accuracy', accuracies),
    ('nll', nats),
  ):
    total, count = pooled(cells, 3, metric)
    assert total.shape == count.shape == who.row.shape == (36 * 15,)
    expected = np.nanmean(np.concatenate(expected))
    assert total.sum() / count.sum() == pytest.approx(expected)
  # Users whose comparisons are all ties have no accuracy.
  _, count = pooled(cells, 3, 'user_accuracy')
  per_user = np.bincount(who.row, count)
  assert per_user.sum() == pytest.approx(36 - 3 * padded)
  assert set(per_user.round(6)) <= {0.0, 1.0}


def test_clusters_are_people_and_items_over_the_seeds():
  for repeated in (True, False):
    cells = [make_cell(seed=s, repeated=repeated) for s in (0, 3)]
    who = clusters(cells)
    assert len(who.row) == len(who.person) == len(who.items) == 2 * 12 * 15
    assert len(set(who.row)) == 24
    assert len(set(who.person)) == (12 if repeated else 24)
    items = [unseen(cell, 'items') for cell in cells]
    found = len(np.unique(who.items))
    apart = sum(len(np.unique(x)) for x in items)
    assert found == (len(np.unique(items)) if repeated else apart)


def test_a_difference_from_itself_is_nothing():
  mine = pooled([make_cell()], 0, 'nll')
  assert paired(mine, mine, clusters([make_cell()])) == (0, 0, 0)


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('metric', ['user_accuracy', 'nll'])
def test_differences_are_of_means_and_change_sign(metric, padded):
  cells = [
    make_cell(method, right=right, users=60, padded=padded)
    for method, right in (('m', 0.8), ('other', 0.7))
  ]
  who = clusters(cells[:1])
  a, b = (pooled([cell], 3, metric) for cell in cells)
  mean, low, high = paired(a, b, who)
  expected = a[0].sum() / a[1].sum() - b[0].sum() / b[1].sum()
  assert mean == pytest.approx(expected)
  assert low < mean < high
  assert paired(b, a, who) == pytest.approx((-mean, -high, -low))


def test_what_all_methods_find_hard_is_no_uncertainty():
  """Paired intervals of nearly equal methods are narrower than their own."""
  rng = np.random.default_rng(0)
  hard = rng.random(200)
  a, b = (hard + 0.01 * rng.normal(size=200) for _ in range(2))
  count, rows = np.ones(200), np.arange(200)
  who = Clusters(rows, rows, np.arange(400).reshape(200, 2))
  _, low, high = paired((a, count), (b + 0.1, count), who)
  assert -0.11 < low < high < -0.09


def test_two_methods_are_not_told_apart_on_a_dozen_items():
  """Ten thousand judgments, one lucky item."""
  rng = np.random.default_rng(1)
  items = np.stack([rng.permutation(12)[:2] for _ in range(10_000)])
  lucky = np.where((items == 3).any(-1), 1.0, 0.0)
  count = np.ones(10_000)
  rows = np.arange(10_000) // 10
  few = Clusters(rows, rows, items)
  many = Clusters(rows, rows, np.arange(20_000).reshape(-1, 2))
  against = np.full(10_000, 0.0)
  _, low, high = paired((lucky, count), (against, count), many)
  assert low > 0.1
  _, low, high = paired((lucky, count), (against, count), few)
  assert low < 0 < high
