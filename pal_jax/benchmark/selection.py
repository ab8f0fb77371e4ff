"""Choosing K, variants and hyper-parameters on validation users.

The judge is the few-shot likelihood: NLL of validation users' validation
comparisons, averaged over all n of the curve. Test sets have no part.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pal_jax.benchmark.cell import Protocol, run_cell
from pal_jax.data.dataset import UNSEEN_ITEMS, Dataset
from pal_jax.data.validation_users import validation_users
from pal_jax.errors import InputError
from pal_jax.methods import Method
from pal_jax.metrics import negative_log_likelihood
from pal_jax.structs import FeatureTable


@dataclasses.dataclass(frozen=True)
class Selection:
  """What was tried, and the choice."""

  index: int  # of the choice
  nll: np.ndarray  # [candidates] mean over validation users' comparisons
  # [candidates] standard error, over users, of the difference from the best
  error: np.ndarray
  per_user: np.ndarray  # [candidates, V] sums of nats over comparisons
  count: np.ndarray  # [V] comparisons


def few_shot_nll(cell: dict) -> tuple[np.ndarray, np.ndarray]:
  """Nats of each user [V] over comparisons, mean over n; and their counts."""
  label = cell[f'unseen/{UNSEEN_ITEMS}/label']
  z = cell[f'unseen/{UNSEEN_ITEMS}/logit']
  each = negative_log_likelihood(z.astype(float), label).mean((0, 1))
  return np.nansum(each, -1), np.isfinite(label).sum(-1)


def choose(per_user: np.ndarray, count: np.ndarray) -> Selection:
  """The first candidate that is not clearly worse than the best.

  Not worse by more than one standard error of the paired difference (the
  one-standard-error rule, Breiman et al. 1984): candidates stand in order of
  preference, the simplest first.

  Args:
    per_user: [candidates, V] nats.
    count: [V] comparisons.
  """
  nll = per_user.sum(-1) / count.sum()
  best = int(np.argmin(nll))
  # Of a ratio of sums over users (linearised).
  gap = per_user - per_user[best] - (nll - nll[best])[:, None] * count
  users = len(count)
  error = np.sqrt(users / max(users - 1, 1) * np.sum(gap**2, -1)) / count.sum()
  index = int(np.flatnonzero(nll - nll[best] <= error)[0])
  return Selection(index, nll, error, per_user, count)


def select(
  candidates: Sequence[Method],
  dataset: Dataset,
  table: FeatureTable,
  protocol: Protocol,
  *,
  share: float = 0.5,
  seed: int = 0,
  on_done: Callable[[int], None] | None = None,
) -> Selection:
  """Chooses among methods, for example PAL with several K and variants.

  On homogeneous data, with K = 1 before others, it chooses K = 1. Labels of
  training and validation must be equally noisy: a model that is less confident
  than clean labels warrant would lose for that alone.

  Args:
    candidates: in order of preference.
    dataset: only its seen users' training and validation sets are used.
    table: its features.
    protocol: n and resamples.
    share: of the seen users, to choose on.
    seed: of who they are, and of the fits.
    on_done: called with the number of candidates that are done.

  Raises:
    InputError: if there is no candidate, or one cannot be fitted.
  """
  if not candidates:
    raise InputError('there is nothing to choose from: give a candidate')
  if len({c.join_prompt for c in candidates}) > 1:
    raise InputError(
      'candidates must all see prompt and response together, or all apart: '
      'select PAL-A and PAL-B each on its own features'
    )
  held = validation_users(dataset, share, max(protocol.num_support), seed)
  sums = []
  for number, candidate in enumerate(candidates, 1):
    cell = run_cell(candidate, held, table, protocol, seed)
    nats, count = few_shot_nll(cell)
    sums.append(nats)
    if on_done is not None:
      on_done(number)
  return choose(np.stack(sums), count)
