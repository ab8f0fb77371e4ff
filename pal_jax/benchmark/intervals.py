"""How sure a mean is: bootstrap over people, and over people and items.

A draw gives every cluster a count, and a mean is a ratio of weighted sums:
thousands of draws of dozens of metrics are one matrix product. Methods are
compared by `two_way_error`, which counts people and items without draws.
"""

import numpy as np
from scipy import stats

NUM_DRAWS = 1000
LEVELS = (2.5, 97.5)


def person_weights(
  person: np.ndarray, seed: int = 0, draws: int = NUM_DRAWS
) -> np.ndarray:
  """[draws, U] how often each row is in a draw of people with replacement.

  Args:
    person: [U] ids. Rows of one person, who may be in several seeds, are
      drawn together.
    seed: of the draws; the same ids and seed give the same draws.
    draws: their number.
  """
  _, row = np.unique(person, return_inverse=True)
  people = int(row.max()) + 1
  rng = np.random.default_rng([seed, 6])
  counts = rng.multinomial(people, np.full(people, 1 / people), draws)
  return counts[:, row].astype(np.float64)


def interval(draws: np.ndarray) -> tuple[float, float]:
  """95% percentile interval of [draws]; NaN if there is nothing."""
  draws = draws[np.isfinite(draws)]
  if not draws.size:
    return float('nan'), float('nan')
  low, high = np.percentile(draws, LEVELS)
  return float(low), float(high)


def mean_over_users(
  value: np.ndarray, weights: np.ndarray
) -> tuple[float, float, float]:
  """Mean of [U] over users, NaN left out, with its interval."""
  known = np.isfinite(value)
  if not known.any():
    return float('nan'), float('nan'), float('nan')
  w = weights[:, known]
  with np.errstate(invalid='ignore'):
    draws = (w @ value[known]) / w.sum(-1)
  return float(value[known].mean()), *interval(draws)


def ratio_of_sums(
  total: np.ndarray, count: np.ndarray, weights: np.ndarray
) -> tuple[float, float, float]:
  """Mean over comparisons, from sums and counts a user [U]."""
  if not count.sum():
    return float('nan'), float('nan'), float('nan')
  with np.errstate(invalid='ignore', divide='ignore'):
    draws = (weights @ total) / (weights @ count)
  return float(total.sum() / count.sum()), *interval(draws)


def two_way_error(
  part: np.ndarray, person: np.ndarray, items: np.ndarray
) -> tuple[float, int]:
  """Standard error of a sum over comparisons that share people and items.

  Clustered both ways (Cameron, Gelbach and Miller 2011; of pairs, Aronow,
  Samii and Assenova 2015): comparisons of one person, or of one item, are not
  independent. With a dozen items it is they who decide, however many people
  judged them.

  Args:
    part: [C] what each comparison adds, less its expectation.
    person: [C] whole numbers.
    items: [C, 2] whole numbers.

  Returns:
    (standard error, degrees of freedom: people or items, whichever are fewer,
    less one).
  """
  people, rows = np.unique(person, return_inverse=True)
  objects, places = np.unique(items, return_inverse=True)
  a, b = np.sort(places.reshape(-1, 2), axis=-1).T
  number = len(objects)
  pair = np.unique(a * number + b, return_inverse=True)[1]

  def squares(key, values=part):
    """Of the sums over clusters."""
    return float(np.sum(np.bincount(key, values) ** 2))

  def by_item(key):
    """Of comparisons that share a key and at least one item."""
    keys = np.concatenate([key * number + a, key * number + b])
    keys = np.unique(keys, return_inverse=True)[1]
    both = np.unique(key * len(part) + pair, return_inverse=True)[1]
    return squares(keys, np.concatenate([part, part])) - squares(both)

  of_people = len(people) / max(len(people) - 1, 1) * squares(rows)
  # Those that share a person, or an item, or both.
  total = of_people + by_item(np.zeros_like(rows)) - by_item(rows)
  degrees = max(min(len(people), number) - 1, 1)
  return float(np.sqrt(max(of_people, total))), degrees


def two_way_interval(
  part: np.ndarray, person: np.ndarray, items: np.ndarray, mean: float
) -> tuple[float, float]:
  """95% interval by `two_way_error` and Student's distribution."""
  error, degrees = two_way_error(part, person, items)
  half = float(stats.t.ppf(0.975, degrees)) * error
  return mean - half, mean + half


def over_users_and_items(
  value: np.ndarray, person: np.ndarray, items: np.ndarray, seed: int = 0
) -> tuple[float, float]:
  """Interval of a mean over comparisons when people and items are both drawn.

  The pigeonhole bootstrap (Owen 2007): a comparison counts for the product of
  how often its person and both its items were drawn, which is a little too
  wide rather than too narrow.

  Args:
    value: [U, Q], NaN where there is no comparison.
    person: [U].
    items: [U, Q, 2] rows of items.
    seed: of the draws.
  """
  known = np.isfinite(value)
  if not known.any():
    return float('nan'), float('nan')
  draws = 200
  people = person_weights(person, seed, draws)
  user = np.nonzero(known)[0]
  _, item = np.unique(items[known], return_inverse=True)
  item = item.reshape(-1, 2)
  size = int(item.max()) + 1
  rng = np.random.default_rng([seed, 7])
  counts = rng.multinomial(size, np.full(size, 1 / size), draws)
  x = value[known]
  means = np.empty(draws)
  for i in range(draws):
    w = people[i, user] * counts[i, item].prod(-1)
    means[i] = w @ x / w.sum() if w.sum() else np.nan
  return interval(means)
