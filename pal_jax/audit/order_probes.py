"""Whether the order of presentation predicts held-out labels."""

import numpy as np

from pal_jax.audit.finding import Finding
from pal_jax.audit.measure import above, measure, shrunk_rates, subset
from pal_jax.audit.sets import HELD_OUT, SHOWN, decided, join
from pal_jax.data import Dataset


def order_findings(dataset: Dataset, sets, seed: int) -> list[Finding]:
  """Of position, alone and by user and prompt; [] if nothing is decided.

  Position is held against a fair order. Users and prompts are held against
  the rate of the more frequent label, which position alone predicts.

  Args:
    dataset: any.
    sets: from `sets.named_sets`.
    seed: of subset and bootstrap.
  """
  train, held = decided(join(sets, SHOWN)), decided(join(sets, HELD_OUT))
  if not (train.label.size and held.label.size):
    return []
  held = subset(held, seed)
  first = (train.label > 0.5).astype(float)
  rate = float(first.mean())
  logits = {'position': np.full(held.label.size, rate - 0.5)}
  users = dataset.num_users + len(dataset.unseen_user_ids)
  by_user = shrunk_rates(train.user, first, users)
  logits['user id'] = by_user[held.user] - 0.5
  if len(dataset.prompt_names) > 1:
    by_prompt = shrunk_rates(train.prompt, first, len(dataset.prompt_names))
    logits['prompt id'] = by_prompt[held.prompt] - 0.5
  found = measure(logits, held, seed)
  share = float((held.label > 0.5).mean())
  majority = max(share, 1.0 - share)
  return [
    _position(found.pop('position'), rate),
    *(_by_id(name, each, majority) for name, each in found.items()),
  ]


def _position(found, rate: float) -> Finding:
  leaks = above(found.users, 0.5)
  return Finding(
    'position',
    'leak' if leaks else 'ok',
    f'The first candidate is preferred in {rate:.1%} of training. '
    + (
      'Which stands first tells the label: draw the order at random, and swap '
      'labels with it.'
      if leaks
      else 'The order does not clearly tell the label.'
    ),
    found.mean,
    found.users,
    0.5,
  )


def _by_id(name: str, found, majority: float) -> Finding:
  who = name.removesuffix(' id')
  leaks = above(found.users, majority)
  return Finding(
    name,
    'leak' if leaks else 'ok',
    f'The {who} alone tells whether the first or the second candidate is '
    f'preferred, whatever they are: draw the order at random within each {who}.'
    if leaks
    else f'The {who} alone does not clearly tell the label.',
    found.mean,
    found.users,
    majority,
  )
