"""Evaluation metrics of log odds against labels (METHOD section 5), in numpy.

`label` is the probability that the first candidate is preferred, NaN where
there is no comparison (padding). Ties (0.5) are left out of accuracies and
counted; a logit of exactly 0 is worth half.
"""

import numpy as np
from scipy.special import expit

NUM_BINS = 15


def pair_accuracy(logit: np.ndarray, label: np.ndarray) -> np.ndarray:
  """1, 0 or one half per comparison; NaN for ties and for no comparison."""
  logit, label = np.broadcast_arrays(logit, label)
  right = np.where(label > 0.5, logit > 0, logit < 0).astype(float)
  right = np.where(logit == 0, 0.5, right)
  return np.where((label == 0.5) | np.isnan(label), np.nan, right)


def negative_log_likelihood(logit: np.ndarray, label: np.ndarray) -> np.ndarray:
  """Nats per comparison; NaN where there is none."""
  return np.logaddexp(0.0, -logit) * label + np.logaddexp(0.0, logit) * (
    1.0 - label
  )


def expected_calibration_error(
  logit: np.ndarray, label: np.ndarray, num_bins: int = NUM_BINS
) -> float:
  """ECE of the predicted side with equal-mass bins, in [0, 1].

  Bins hold equal numbers of comparisons sorted by confidence max(p, 1 - p);
  in each, mean confidence is compared with how often that side was preferred.
  Swapping candidates changes nothing.
  """
  p = expit(np.ravel(logit).astype(float))
  y = np.ravel(label).astype(float)
  p, y = p[np.isfinite(y)], y[np.isfinite(y)]
  confidence = np.maximum(p, 1.0 - p)
  agreement = np.where(p > 0.5, y, np.where(p < 0.5, 1.0 - y, 0.5))
  order = np.argsort(confidence, kind='stable')
  total = 0.0
  for rows in np.array_split(order, min(num_bins, max(order.size, 1))):
    if rows.size:
      gap = abs(confidence[rows].mean() - agreement[rows].mean())
      total += gap * rows.size / order.size
  return float(total)


def worst_decile(user_accuracy: np.ndarray) -> float:
  """Mean accuracy of the worst 10% of users (rounded up), in [0, 1]."""
  values = np.sort(user_accuracy[np.isfinite(user_accuracy)])
  if not values.size:
    return float('nan')
  return float(values[: int(np.ceil(0.1 * values.size))].mean())


def user_accuracies(logit: np.ndarray, label: np.ndarray) -> np.ndarray:
  """[U] accuracy of each user over pairs and resamples; NaN if all tie or none
  is there.

  Args:
    logit: [U, N] or [R, U, N].
    label: [U, N].
  """
  logit = np.asarray(logit, float).reshape((-1, *label.shape))
  decided = (label != 0.5) & ~np.isnan(label)
  right = np.nansum(pair_accuracy(logit, label), axis=-1).mean(0)
  return np.where(
    decided.any(-1), right / np.maximum(decided.sum(-1), 1), np.nan
  )


def bootstrap_interval(
  per_user: np.ndarray, seed: int = 0, num_draws: int = 1000
) -> list[float]:
  """95% percentile interval of the mean over users, resampling users.

  NaN, [nan, nan], if no user has a finite value.
  """
  values = per_user[np.isfinite(per_user)]
  if not values.size:
    return [float('nan'), float('nan')]
  rng = np.random.default_rng([seed, 3])
  draws = rng.integers(0, values.size, (num_draws, values.size))
  low, high = np.percentile(values[draws].mean(-1), [2.5, 97.5])
  return [float(low), float(high)]


def evaluate_logits(logit: np.ndarray, label: np.ndarray) -> dict[str, float]:
  """All metrics of a table of comparisons.

  Args:
    logit: [U, N], or [R, U, N] with R resamples, which are averaged (each
      user's accuracy over resamples first, then over users).
    label: [U, N].

  Returns:
    accuracy (over pairs), user_accuracy (mean over users),
    worst_decile_accuracy, nll (nats), brier, ece, ties (a count).
  """
  logit = np.asarray(logit, float).reshape((-1, *label.shape))
  label = np.asarray(label, float)
  right = pair_accuracy(logit, label)
  tied = label == 0.5
  per_user = user_accuracies(logit, label)
  labels = np.broadcast_to(label, logit.shape)
  return {
    'accuracy': _mean(right),
    'user_accuracy': _mean(per_user),
    'worst_decile_accuracy': worst_decile(per_user),
    'nll': _mean(negative_log_likelihood(logit, label)),
    'brier': _mean((expit(logit) - label) ** 2),
    'ece': float(
      np.mean(
        [
          expected_calibration_error(z, y)
          for z, y in zip(logit, labels, strict=True)
        ]
      )
    ),
    'ties': int(tied.sum()),
  }


def _mean(x: np.ndarray) -> float:
  values = x[np.isfinite(x)]
  return float(values.mean()) if values.size else float('nan')


def _pairs(n):
  return n * (n - 1) / 2


def adjusted_rand_index(a: np.ndarray, b: np.ndarray) -> float:
  """Agreement of two partitions, 1 if equal, about 0 by chance.

  Hubert and Arabie (1985). [U] labels of any kind; two trivial partitions
  (all in one group, or each alone, in both) agree: 1.
  """
  _, a = np.unique(a, return_inverse=True)
  _, b = np.unique(b, return_inverse=True)
  table = np.zeros((a.max() + 1, b.max() + 1))
  np.add.at(table, (a, b), 1)
  together = _pairs(table).sum()
  rows, columns = _pairs(table.sum(1)).sum(), _pairs(table.sum(0)).sum()
  expected = rows * columns / max(_pairs(a.size), 1)
  maximum = (rows + columns) / 2
  if maximum == expected:
    return 1.0
  return float((together - expected) / (maximum - expected))
