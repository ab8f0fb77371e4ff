"""metrics: hand values, slow oracles and extremes."""

import warnings

import numpy as np
import pytest
from scipy.special import expit

from pal_jax import metrics


@pytest.fixture(scope='module')
def table():
  """Logits [30, 12] and labels with ties and soft values."""
  rng = np.random.default_rng(0)
  logit = rng.normal(size=(30, 12)) * 2.0
  label = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], size=(30, 12))
  return logit, label


def test_accuracy_of_each_kind_of_pair():
  logit = np.array([2.0, -2.0, 2.0, -2.0, 0.0, 0.0, 2.0, 0.0])
  label = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.5, 0.5])
  np.testing.assert_array_equal(
    metrics.pair_accuracy(logit, label),
    [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, np.nan, np.nan],
  )


def test_soft_labels_count_by_their_side():
  found = metrics.pair_accuracy(np.array([1.0, 1.0]), np.array([0.51, 0.49]))
  np.testing.assert_array_equal(found, [1.0, 0.0])


def test_a_nan_logit_is_wrong_whatever_the_label():
  found = metrics.pair_accuracy(np.array([np.nan] * 2), np.array([0.0, 1.0]))
  np.testing.assert_array_equal(found, 0.0)


def test_swapping_candidates_keeps_every_metric(table):
  logit, label = table
  first = metrics.evaluate_logits(logit, label)
  swapped = metrics.evaluate_logits(-logit, 1.0 - label)
  assert first == pytest.approx(swapped, abs=1e-12)


def test_negative_log_likelihood_equals_the_formula(table):
  logit, label = table
  p = expit(logit)
  np.testing.assert_allclose(
    metrics.negative_log_likelihood(logit, label),
    -(label * np.log(p) + (1 - label) * np.log1p(-p)),
    rtol=1e-9,
  )


def test_negative_log_likelihood_at_extremes():
  logit = np.array([1000.0, 1000.0, 1000.0, -1000.0, -1000.0, 0.0])
  label = np.array([1.0, 0.0, 0.5, 1.0, 0.0, 1.0])
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    found = metrics.negative_log_likelihood(logit, label)
  np.testing.assert_allclose(
    found, [0.0, 1000.0, 500.0, 1000.0, 0.0, np.log(2)]
  )


def test_brier_hand_value():
  logit = np.array([[0.0, 1000.0, -1000.0, np.log(3.0)]])
  label = np.array([[1.0, 1.0, 1.0, 0.5]])
  expected = (0.25 + 0.0 + 1.0 + 0.0625) / 4
  found = metrics.evaluate_logits(logit, label)['brier']
  assert found == pytest.approx(expected)


# Calibration.


def slow_ece(logit, label, num_bins):
  """One comparison at a time: the side predicted, and how often it won."""
  rows = []
  for z, y in zip(np.ravel(logit), np.ravel(label), strict=True):
    p = 1.0 / (1.0 + np.exp(-z))
    if p == 0.5:
      rows.append((0.5, 0.5))
    elif p > 0.5:
      rows.append((p, y))
    else:
      rows.append((1.0 - p, 1.0 - y))
  rows.sort(key=lambda row: row[0])
  number = len(rows)
  bins = min(num_bins, number)
  size, longer = divmod(number, bins)
  total, start = 0.0, 0
  for b in range(bins):
    chunk = rows[start : start + size + (b < longer)]
    start += len(chunk)
    confidence = sum(row[0] for row in chunk) / len(chunk)
    frequency = sum(row[1] for row in chunk) / len(chunk)
    total += abs(confidence - frequency) * len(chunk) / number
  return total


@pytest.mark.parametrize('number', [1, 2, 14, 15, 16, 359])
@pytest.mark.parametrize('num_bins', [1, 10, 15])
def test_ece_equals_a_slow_oracle(number, num_bins):
  rng = np.random.default_rng(number)
  logit = rng.normal(size=number) * 3.0
  label = rng.choice([0.0, 0.3, 1.0], size=number)
  assert metrics.expected_calibration_error(
    logit, label, num_bins
  ) == pytest.approx(slow_ece(logit, label, num_bins), abs=1e-12)


def test_ece_hand_value():
  """Four at 0.75: three right is calibrated, none right is 0.75 off."""
  z = np.full(4, np.log(3.0))
  of = metrics.expected_calibration_error
  assert of(z, np.array([1.0, 1, 1, 0]), 1) == pytest.approx(0.0, abs=1e-12)
  assert of(z, np.zeros(4), 1) == pytest.approx(0.75)
  assert of(z, np.ones(4), 1) == pytest.approx(0.25)


def test_ece_does_not_depend_on_which_candidate_is_first():
  rng = np.random.default_rng(1)
  logit = rng.normal(size=300)
  label = rng.choice([0.0, 1.0], size=300)
  flip = rng.uniform(size=300) < 0.5
  mixed = np.where(flip, -logit, logit), np.where(flip, 1 - label, label)
  assert metrics.expected_calibration_error(*mixed) == pytest.approx(
    metrics.expected_calibration_error(logit, label), abs=1e-12
  )


def test_ece_of_truth_is_small_and_of_overconfidence_large():
  rng = np.random.default_rng(2)
  logit = rng.normal(size=20000)
  label = (rng.uniform(size=20000) < expit(logit)).astype(float)
  assert metrics.expected_calibration_error(logit, label) < 0.02
  assert metrics.expected_calibration_error(20.0 * logit, label) > 0.2


def test_ece_at_extremes_and_of_nothing():
  of = metrics.expected_calibration_error
  assert of(np.array([1000.0, -1000.0]), np.array([1.0, 0.0])) == 0.0
  assert of(np.array([1000.0, -1000.0]), np.array([0.0, 1.0])) == 1.0
  assert of(np.zeros(4), np.array([1.0, 1, 1, 1])) == 0.0  # says nothing
  assert of(np.zeros(0), np.zeros(0)) == 0.0


# Users.


@pytest.mark.parametrize(
  ('users', 'worst'),
  [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3), (70, 7), (100, 10)],
)
def test_worst_decile_rounds_up(users, worst):
  accuracy = np.random.default_rng(3).permutation(np.arange(users) / users)
  expected = np.mean(np.arange(worst) / users)
  assert metrics.worst_decile(accuracy) == pytest.approx(expected)


def test_worst_decile_of_tens_is_exact():
  """0.1 * n must not be rounded up to the next user by its last bit."""
  for tens in range(1, 101):
    accuracy = np.r_[np.zeros(tens), np.ones(9 * tens)]
    assert metrics.worst_decile(accuracy) == 0.0


def test_worst_decile_leaves_out_users_without_an_answer():
  accuracy = np.r_[np.full(50, np.nan), np.arange(10) / 10.0]
  assert metrics.worst_decile(accuracy) == 0.0
  assert np.isnan(metrics.worst_decile(np.full(3, np.nan)))


def test_user_accuracies_leave_ties_out():
  logit = np.array([[1.0, -1.0, 5.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
  label = np.array([[1.0, 1.0, 0.5], [1.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
  np.testing.assert_allclose(
    metrics.user_accuracies(logit, label), [0.5, 0.5, np.nan]
  )


def test_user_accuracies_average_resamples():
  label = np.array([[1.0, 1.0], [0.0, 0.5]])
  logit = np.array([[[1.0, 1.0], [1.0, 1.0]], [[1.0, -1.0], [-1.0, 1.0]]])
  np.testing.assert_allclose(metrics.user_accuracies(logit, label), [0.75, 0.5])


def test_accuracy_over_pairs_and_over_users_differ_with_ties():
  """User 0 has one decided pair and user 1 three."""
  logit = np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
  label = np.array([[1.0, 0.5, 0.5], [1.0, 1.0, 1.0]])
  found = metrics.evaluate_logits(logit, label)
  assert found['accuracy'] == 0.25
  assert found['user_accuracy'] == 0.5
  assert found['worst_decile_accuracy'] == 0.0
  assert found['ties'] == 2


def test_evaluate_logits_equals_its_pieces(table):
  logit, label = table
  found = metrics.evaluate_logits(logit, label)
  nll = metrics.negative_log_likelihood(logit, label).mean()
  assert found['nll'] == pytest.approx(nll)
  assert found['ece'] == metrics.expected_calibration_error(logit, label)
  assert found['accuracy'] == np.nanmean(metrics.pair_accuracy(logit, label))
  assert found['ties'] == int((label == 0.5).sum())


def test_resamples_are_averaged_not_pooled(table):
  """Pooled ECE would hide that each resample is off in its own way."""
  logit, label = table
  other = np.random.default_rng(4).normal(size=logit.shape)
  both = metrics.evaluate_logits(np.stack([logit, other]), label)
  each = [metrics.evaluate_logits(z, label) for z in (logit, other)]
  for name in ('accuracy', 'user_accuracy', 'nll', 'brier', 'ece'):
    mean = np.mean([one[name] for one in each])
    assert both[name] == pytest.approx(mean), name
  assert both['ties'] == each[0]['ties']


def test_order_of_users_and_pairs_changes_nothing(table):
  logit, label = table
  rng = np.random.default_rng(5)
  users, pairs = rng.permutation(30), rng.permutation(12)
  shuffled = metrics.evaluate_logits(
    logit[users][:, pairs], label[users][:, pairs]
  )
  assert shuffled == pytest.approx(metrics.evaluate_logits(logit, label))


def test_a_table_of_ties_has_no_accuracy():
  found = metrics.evaluate_logits(np.ones((2, 3)), np.full((2, 3), 0.5))
  assert np.isnan(found['accuracy']) and np.isnan(found['user_accuracy'])
  assert np.isnan(found['worst_decile_accuracy']) and found['ties'] == 6
  assert np.isfinite(found['nll'])


def test_perfect_logits_are_perfect_at_extremes():
  label = np.array([[1.0, 0.0], [0.0, 1.0]])
  found = metrics.evaluate_logits(np.where(label > 0, 1000.0, -1000.0), label)
  assert found['accuracy'] == found['user_accuracy'] == 1.0
  assert found['nll'] == found['brier'] == found['ece'] == 0.0


# Intervals.


def test_bootstrap_interval_is_that_of_the_mean():
  """Against the normal approximation; 1000 draws, so within a tenth."""
  values = np.random.default_rng(6).normal(0.7, 0.2, size=400)
  low, high = metrics.bootstrap_interval(values)
  width = 2 * 1.96 * values.std() / np.sqrt(400)
  assert high - low == pytest.approx(width, rel=0.1)
  assert (low + high) / 2 == pytest.approx(values.mean(), abs=width / 10)


def test_bootstrap_interval_covers_the_truth():
  rng = np.random.default_rng(7)
  covered = 0
  for seed in range(100):
    low, high = metrics.bootstrap_interval(
      rng.normal(0.5, 0.1, size=50), seed, 300
    )
    covered += low <= 0.5 <= high
  assert 87 <= covered <= 100


def test_bootstrap_interval_repeats_with_its_seed():
  values = np.random.default_rng(8).uniform(size=20)
  one = metrics.bootstrap_interval(values, seed=1)
  assert one == metrics.bootstrap_interval(values, seed=1)
  assert one != metrics.bootstrap_interval(values, seed=2)


def test_bootstrap_interval_of_equal_users_is_a_point():
  assert metrics.bootstrap_interval(np.full(10, 0.75)) == [0.75, 0.75]
  values = np.r_[np.full(10, 0.75), np.nan]
  assert metrics.bootstrap_interval(values) == [0.75, 0.75]


def test_bootstrap_interval_of_nobody_is_nan():
  for values in (np.zeros(0), np.full(3, np.nan)):
    assert np.isnan(metrics.bootstrap_interval(values)).all()


# Partitions. Values from scikit-learn 1.9's adjusted_rand_score.


@pytest.mark.parametrize(
  ('a', 'b', 'expected'),
  [
    ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
    ([0, 0, 1, 1], [1, 1, 0, 0], 1.0),
    ([0, 0, 1, 1], [0, 0, 1, 2], 0.5714285714285714),
    ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], 0.24242424242424243),
    ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
    ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
    ([0, 0, 0, 0], [0, 0, 1, 1], 0.0),
    (
      [0, 0, 0, 1, 1, 2, 2, 2, 2, 2],
      [0, 0, 1, 1, 1, 2, 2, 2, 0, 1],
      0.1366906474820144,
    ),
  ],
)
def test_adjusted_rand_index_known_values(a, b, expected):
  for first, second in ((a, b), (b, a)):
    found = metrics.adjusted_rand_index(np.array(first), np.array(second))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('groups', [[0] * 5, list(range(5)), [3]])
def test_equal_trivial_partitions_agree(groups):
  found = metrics.adjusted_rand_index(np.array(groups), np.array(groups))
  assert found == 1.0


def test_labels_of_any_kind_and_any_name():
  a = np.array(['x', 'x', 'keys', 'a.b'])
  b = np.array([7, 7, -2, 100])
  assert metrics.adjusted_rand_index(a, b) == 1.0


def test_chance_agreement_is_about_zero():
  rng = np.random.default_rng(9)
  found = [
    metrics.adjusted_rand_index(*rng.integers(0, 4, (2, 500)))
    for _ in range(20)
  ]
  assert abs(np.mean(found)) < 0.01


def slow_rand(a, b):
  """The formula over all pairs of users, one at a time."""
  same_a = same_b = same_both = total = 0
  for i in range(len(a)):
    for j in range(i):
      in_a, in_b = a[i] == a[j], b[i] == b[j]
      same_a, same_b = same_a + in_a, same_b + in_b
      same_both, total = same_both + (in_a and in_b), total + 1
  expected = same_a * same_b / total
  return (same_both - expected) / ((same_a + same_b) / 2 - expected)


def test_adjusted_rand_index_equals_counting_pairs():
  rng = np.random.default_rng(10)
  for _ in range(5):
    a, b = rng.integers(0, 3, (2, 25))
    found = metrics.adjusted_rand_index(a, b)
    assert found == pytest.approx(slow_rand(a, b), abs=1e-12)


def test_padding_changes_no_metric():
  rng = np.random.default_rng(11)
  logit, label = rng.normal(size=(3, 7, 12)), rng.integers(0, 2, (7, 12)) * 1.0
  label[0, :2] = 0.5
  expected = metrics.evaluate_logits(logit, label)
  wide = np.concatenate([logit, 50 * rng.normal(size=(3, 7, 5))], -1)
  padded = np.concatenate([label, np.full((7, 5), np.nan)], -1)
  found = metrics.evaluate_logits(wide, padded)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)
  nobody = np.concatenate([padded, np.full((1, 17), np.nan)])
  assert np.isnan(metrics.user_accuracies(np.zeros((8, 17)), nobody)[-1])
