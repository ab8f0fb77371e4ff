"""benchmark.intervals: draws of people, and of people and items."""

import numpy as np
import pytest

from pal_jax.benchmark.intervals import (
  NUM_DRAWS,
  interval,
  mean_over_users,
  over_users_and_items,
  person_weights,
  ratio_of_sums,
  two_way_error,
)
from tests.benchmark.planted_cells import two_way

Z = 1.96  # half a 95% interval in standard errors


def people(number):
  return np.array([f'person {i}' for i in range(number)])


def width(low, high):
  assert low <= high
  return high - low


# Draws of people.


def test_a_draw_has_as_many_people_as_there_are():
  weights = person_weights(people(30))
  assert weights.shape == (NUM_DRAWS, 30)
  np.testing.assert_array_equal(weights, np.round(weights))
  assert weights.min() == 0
  np.testing.assert_array_equal(weights.sum(-1), 30)


def test_counts_are_those_of_drawing_with_replacement():
  weights = person_weights(people(20), draws=20_000)
  # Binomial(20, 1 / 20): four standard errors of 20 000 draws.
  np.testing.assert_allclose(weights.mean(0), 1.0, atol=0.03)
  np.testing.assert_allclose(weights.var(0), 0.95, atol=0.06)


def test_rows_of_a_person_are_drawn_together():
  person = np.array(['b', 'a', 'b', 'c', 'a', 'b'])
  weights = person_weights(person)
  for name in 'abc':
    mine = weights[:, person == name]
    np.testing.assert_array_equal(mine, np.repeat(mine[:, :1], len(mine.T), 1))
  each = weights[:, [0, 1, 3]]
  np.testing.assert_array_equal(each.sum(-1), 3)
  assert len(np.unique(each, axis=0)) == 10  # all multisets of 3 of 3


def test_a_seed_decides_the_draws():
  first = person_weights(people(9), seed=1)
  np.testing.assert_array_equal(first, person_weights(people(9), seed=1))
  assert np.any(first != person_weights(people(9), seed=2))


# Intervals.


def test_an_interval_is_of_the_finite_draws():
  draws = np.concatenate([np.arange(1001.0), [np.nan, np.inf, -np.inf]])
  assert interval(draws) == (25.0, 975.0)


@pytest.mark.parametrize('draws', [np.array([]), np.full(3, np.nan)])
def test_an_interval_of_nothing_is_nan(draws):
  assert np.isnan(interval(draws)).all()


def test_a_mean_over_users_has_its_standard_error():
  value = np.random.default_rng(0).normal(3.0, 2.0, 400)
  mean, low, high = mean_over_users(value, person_weights(people(400)))
  assert mean == pytest.approx(value.mean())
  error = value.std() / np.sqrt(400)
  assert width(low, high) == pytest.approx(2 * Z * error, rel=0.1)
  assert (low + high) / 2 == pytest.approx(mean, abs=0.2 * error)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
  rng = np.random.default_rng(1)
  weights = person_weights(people(60), draws=400)
  covered = 0
  for value in rng.exponential(size=(400, 60)):
    _, low, high = mean_over_users(value, weights)
    covered += low <= 1.0 <= high
  # Skewed, hence a little less than 95%; 3 standard errors are 3.3%.
  assert 0.89 <= covered / 400 <= 0.983


def test_a_person_in_several_seeds_counts_once():
  """Copies of the same people tell nothing new; new people do."""
  value = np.random.default_rng(2).normal(size=100)
  three = np.tile(value, 3)
  _, low, high = mean_over_users(value, person_weights(people(100)))
  again = mean_over_users(three, person_weights(np.tile(people(100), 3)))
  apart = mean_over_users(three, person_weights(people(300)))
  assert width(*again[1:]) == pytest.approx(width(low, high), rel=1e-9)
  assert width(*apart[1:]) == pytest.approx(
    width(low, high) / np.sqrt(3), rel=0.12
  )


def test_a_mean_over_comparisons_has_its_standard_error():
  rng = np.random.default_rng(3)
  count = rng.integers(1, 30, 500).astype(float)
  total = rng.binomial(count.astype(int), rng.beta(6, 2, 500)).astype(float)
  mean, low, high = ratio_of_sums(total, count, person_weights(people(500)))
  assert mean == total.sum() / count.sum()
  gap = total - mean * count  # linearised, of a ratio
  error = np.sqrt(np.sum(gap**2)) / count.sum()
  assert width(low, high) == pytest.approx(2 * Z * error, rel=0.1)


def test_a_user_without_comparisons_changes_no_mean():
  weights = person_weights(people(4))
  total, count = np.array([3.0, 0.0, 1.0, 0.0]), np.array([4.0, 0.0, 2.0, 0.0])
  mean, low, high = ratio_of_sums(total, count, weights)
  assert mean == 4 / 6
  # The draws without the first or the third person are of the other alone;
  # those without both are none.
  assert (low, high) == (0.5, 0.75)


def test_unknown_users_are_left_out():
  value = np.random.default_rng(4).normal(size=50)
  value[10:20] = np.nan
  weights, known = person_weights(people(50)), np.isfinite(value)
  found = mean_over_users(value, weights)
  assert found == mean_over_users(value[known], weights[:, known])
  assert found[0] == pytest.approx(np.nanmean(value))
  assert np.isfinite(found).all()


def test_equal_users_have_no_width():
  weights = person_weights(people(7))
  found = mean_over_users(np.full(7, 0.25), weights)
  assert found == pytest.approx((0.25,) * 3)
  found = ratio_of_sums(np.full(7, 2.0), np.full(7, 8.0), weights)
  assert found == pytest.approx((0.25,) * 3)


def test_nothing_known_is_nan():
  weights = person_weights(people(3))
  assert np.isnan(mean_over_users(np.full(3, np.nan), weights)).all()
  assert np.isnan(mean_over_users(np.zeros(0), weights[:, :0])).all()
  assert np.isnan(ratio_of_sums(np.zeros(3), np.zeros(3), weights)).all()
  nothing = np.full((3, 2), np.nan)
  found = over_users_and_items(nothing, people(3), np.zeros((3, 2, 2), int))
  assert np.isnan(found).all()


# People and items.


def comparisons(
  item_spread, person_spread=0.0, users=80, queries=12, size=25, seed=0
):
  """Values [U, Q] to which a person and both items add what is theirs."""
  rng = np.random.default_rng(seed)
  items = rng.integers(0, size, (users, queries, 2))
  value = rng.normal(size=(users, queries))
  value += item_spread * rng.normal(size=size)[items].sum(-1)
  value += person_spread * rng.normal(size=(users, 1))
  return value, items


def both_widths(value, items):
  """Over users alone, and over users and items."""
  person = people(len(value))
  known = np.isfinite(value)
  _, low, high = ratio_of_sums(
    np.nansum(value, -1), known.sum(-1).astype(float), person_weights(person)
  )
  both = over_users_and_items(value, person, items)
  return width(low, high), width(*both)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('spread', [0.3, 1.0])
def test_items_that_matter_widen_the_interval(seed, spread):
  users, both = both_widths(*comparisons(spread, seed=seed))
  assert both > 1.3 * users


@pytest.mark.parametrize('position', [0, 1])
def test_either_item_counts(position):
  """One item of each pair matters, the other comes nowhere else."""
  rng = np.random.default_rng(5)
  _, items = comparisons(0.0)
  items[..., 1 - position] = 25 + np.arange(80 * 12).reshape(80, 12)
  value = rng.normal(size=(80, 12))
  value += 3 * rng.normal(size=25)[items[..., position]]
  users, both = both_widths(value, items)
  assert both > 2 * users


@pytest.mark.parametrize('seed', range(3))
def test_people_who_matter_widen_it_as_they_do_without_items(seed):
  users, both = both_widths(*comparisons(0.0, 3.0, seed=seed))
  alike, _ = both_widths(*comparisons(0.0, seed=seed))
  assert users > 3 * alike
  assert both > 0.9 * users


def test_the_more_items_matter_the_wider_the_interval():
  widths = [both_widths(*comparisons(s))[1] for s in (0.0, 0.3, 1.0)]
  assert widths == sorted(widths)
  assert widths[2] > 2 * widths[0]


def test_comparisons_that_are_none_change_nothing():
  value, items = comparisons(1.0)
  value[::2, 6:] = np.nan
  found = over_users_and_items(value, people(80), items)
  items[::2, 6:] = 999
  assert over_users_and_items(value, people(80), items) == found
  padded = np.pad(value, ((0, 0), (0, 3)), constant_values=np.nan)
  more = np.pad(items, ((0, 0), (0, 3), (0, 0)))
  assert over_users_and_items(padded, people(80), more) == found


def test_equal_comparisons_have_no_width_over_items_either():
  _, items = comparisons(1.0)
  found = over_users_and_items(np.full((80, 12), 0.5), people(80), items)
  assert found == pytest.approx((0.5, 0.5))


# People and items without draws.


@pytest.mark.parametrize(
  ('own', 'shared', 'alone'),
  [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.3, 1.0, 0.5), (0.0, 0.0, 1.0)],
)
@pytest.mark.parametrize(('users', 'items'), [(60, 12), (40, 200)])
def test_the_error_is_that_of_users_and_items_drawn_anew(
  users, items, own, shared, alone
):
  means, errors = [], []
  for seed in range(300):
    rng = np.random.default_rng(seed)
    gap, rows = two_way(rng, users, items, 5, own, shared, alone)
    means.append(gap.mean())
    part = (gap - gap.mean()).ravel() / gap.size
    person = np.repeat(np.arange(users), 5)
    error, degrees = two_way_error(part, person, rows.reshape(-1, 2))
    assert degrees == min(users, len(np.unique(rows))) - 1
    errors.append(error)
  # Of a dozen items and their own mean, as of any small sample, a little low.
  assert 0.8 < np.sqrt(np.mean(np.square(errors))) / np.std(means) < 1.15


@pytest.mark.parametrize(('effect', 'pairs'), [('pair', 6), ('both', 20)])
def test_pairs_that_come_again_are_counted_once(effect, pairs):
  """Everybody judges the same pairs, or one item several times."""
  means, errors = [], []
  users = 40
  for seed in range(300):
    rng = np.random.default_rng(seed)
    if effect == 'pair':  # disjoint pairs, judged by all
      items = np.tile(np.arange(2 * pairs).reshape(-1, 2), (users, 1, 1))
      gap = np.tile(rng.normal(size=pairs), (users, 1))
    else:  # what a person makes of an item, in two of its comparisons
      hub = rng.integers(0, 400, (users, pairs // 2))
      first = np.repeat(hub, 2, axis=1)
      items = np.stack(
        [first, 400 + np.arange(first.size).reshape(first.shape)]
      )
      items = np.moveaxis(items, 0, -1)
      gap = np.repeat(rng.normal(size=hub.shape), 2, axis=1)
    means.append(gap.mean())
    part = (gap - gap.mean()).ravel() / gap.size
    person = np.repeat(np.arange(users), gap.shape[1])
    errors.append(two_way_error(part, person, items.reshape(-1, 2))[0])
  assert 0.8 < np.sqrt(np.mean(np.square(errors))) / np.std(means) < 1.15
