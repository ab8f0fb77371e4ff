"""Choosing K, variants and hyper-parameters on validation users.

The judge is the few-shot likelihood: NLL of validation users' validation
comparisons, averaged over all n of the curve. Test sets have no part.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pal_jax.benchmark.cell import Protocol, run_cell
from pal_jax.benchmark.intervals import two_way_error
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
  # [candidates] standard error, over users and items, of the difference from
  # the best
  error: np.ndarray
  losses: np.ndarray  # [candidates, V, Q] nats, NaN for padding


def few_shot_nll(cell: dict) -> np.ndarray:
  """[V, Q] nats of each comparison, mean over n and orders; NaN: padding."""
  label = cell[f'unseen/{UNSEEN_ITEMS}/label']
  z = cell[f'unseen/{UNSEEN_ITEMS}/logit']
  return negative_log_likelihood(z.astype(float), label).mean((0, 1))


def choose(losses: np.ndarray, items: np.ndarray) -> Selection:
  """The first candidate that is not clearly worse than the best.

  Not worse by more than one standard error of the paired difference (the
  one-standard-error rule, Breiman et al. 1984), over users and items:
  candidates stand in order of preference, the simplest first.

  Args:
    losses: [candidates, V, Q] nats, NaN for padding.
    items: [V, Q, 2] of the comparisons.
  """
  nll = np.nanmean(losses, (1, 2))
  best = int(np.argmin(nll))
  worse = nll - nll[best]
  live = np.isfinite(losses[best])
  user = np.nonzero(live)[0]
  gap = (losses - losses[best] - worse[:, None, None])[:, live] / live.sum()
  error = np.array([two_way_error(g, user, items[live])[0] for g in gap])
  index = int(np.flatnonzero(worse <= error)[0])
  return Selection(index, nll, error, losses)


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
  losses = []
  for number, candidate in enumerate(candidates, 1):
    cell = run_cell(candidate, held, table, protocol, seed)
    losses.append(few_shot_nll(cell))
    if on_done is not None:
      on_done(number)
  items = cell[f'unseen/{UNSEEN_ITEMS}/items']
  return choose(np.stack(losses), items)
