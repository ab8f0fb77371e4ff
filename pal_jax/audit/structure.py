"""What is counted rather than predicted: duplicates and overlaps."""

import numpy as np

from pal_jax.audit.finding import Finding
from pal_jax.audit.sets import HELD_OUT, SHOWN, join
from pal_jax.data import SEEN_ITEMS, UNSEEN_ITEMS, Dataset

_SEEN_HELD_OUT = tuple(n for n in HELD_OUT if not n.startswith('unseen'))
_QUERIES = tuple(n for n in HELD_OUT if n.startswith('unseen'))


def _codes(*columns: np.ndarray) -> np.ndarray:
  """[N] int64 from columns [N] >= 0, equal where all columns are."""
  code = np.zeros(columns[0].size, np.int64)
  for column in columns:
    column = column.astype(np.int64)
    # Renumbered after each column, so that products stay small.
    code = np.unique(
      code * (column.max(initial=0) + 1) + column, return_inverse=True
    )[1]
  return code


def _in(codes: np.ndarray, among: np.ndarray, size: int) -> np.ndarray:
  """Whether each code, of `size` from 0 on, is `among` others."""
  table = np.zeros(size, bool)
  table[among] = True
  return table[codes]


def label_finding(sets) -> Finding:
  """How many comparisons there are, and how many of them are ties."""
  label = join(sets, sets).label
  ties = int((label == 0.5).sum())
  return Finding(
    'ties',
    'ok' if ties < label.size else 'warning',
    f'{ties:,} of {label.size:,} comparisons are ties and left out of every '
    'accuracy.',
    count=ties,
  )


def _found(name, severity, count, one, advice) -> Finding:
  """`severity` if the count is not 0."""
  if not count:
    return Finding(name, 'ok', f'No {one}.', count=0)
  return Finding(name, severity, f'{count:,} {one}: {advice}', count=count)


def item_findings(dataset: Dataset, text: np.ndarray) -> list[Finding]:
  """Of the texts themselves.

  Args:
    dataset: with texts.
    text: [M] ids, equal for equal texts.
  """
  split = dataset.item_split
  pairs = np.unique(np.stack([text, split], -1)[split >= 0], axis=0)
  shared = int((np.bincount(pairs[:, 0], minlength=1) > 1).sum())
  empty = sum(not t.strip() for t in dataset.item_names)
  return [
    _found(
      'texts in two splits',
      'leak',
      shared,
      'texts stand in several splits, apart from whitespace and case',
      'what is called unseen was seen in training; split by text.',
    ),
    _found(
      'empty texts',
      'warning',
      empty,
      'candidates are empty',
      'there is nothing to prefer; find out why and leave them out.',
    ),
  ]


def pair_findings(sets, text, prompt) -> list[Finding]:
  """Of comparisons that come again, or compare nothing.

  Args:
    sets: from `named_sets`.
    text: [M] ids of items, equal for equal texts.
    prompt: [Q] ids of prompts.
  """
  every = join(sets, sets)
  sides = text[every.items]
  pair = _codes(every.user, prompt[every.prompt], sides.min(-1), sides.max(-1))
  size = int(pair.max(initial=-1)) + 1
  ends = np.cumsum([c.label.size for c in sets.values()])
  pairs_of = dict(zip(sets, np.split(pair, ends[:-1]), strict=True))

  def repeated(shown: str, held: tuple[str, ...]) -> int:
    asked = np.concatenate([pairs_of[name] for name in held])
    return int(_in(asked, pairs_of[shown], size).sum())

  same = sides[:, 0] == sides[:, 1]
  # The label of the text of the smaller id, whichever stands first.
  label = np.where(sides[:, 0] < sides[:, 1], every.label, 1.0 - every.label)
  wins = np.bincount(pair[~same & (label > 0.5)], minlength=size)
  losses = np.bincount(pair[~same & (label < 0.5)], minlength=size)
  return [
    _found(
      'pairs of training asked again',
      'leak',
      repeated('train', _SEEN_HELD_OUT),
      'held-out comparisons of a seen user also stand in training',
      'their answers were shown; leave them out of one side.',
    ),
    _found(
      'pairs of the support asked again',
      'leak',
      repeated('support', _QUERIES),
      'queries of an unseen user also stand in the support',
      'their answers were shown; leave them out of one side.',
    ),
    _found(
      'identical candidates',
      'warning',
      int(same.sum()),
      'comparisons set a text against itself, apart from whitespace and case',
      'their labels are noise; leave them out.',
    ),
    _found(
      'contradictions',
      'warning',
      int(((wins > 0) & (losses > 0)).sum()),
      'pairs were answered both ways by the same user',
      'no model can get both right; keep one or make it a tie.',
    ),
  ]


def user_finding(dataset: Dataset) -> Finding:
  both = set(dataset.user_ids) & set(dataset.unseen_user_ids)
  shown = ', '.join(sorted(both)[:5])
  return _found(
    'users seen and unseen',
    'leak',
    len(both),
    'users stand among the seen and the unseen',
    f'they are not new to the model ({shown}); split by user.',
  )


def known_findings(sets, text: np.ndarray) -> list[Finding]:
  """Held-out pairs whose two items the user has met, in other pairs.

  Then transitivity may tell the answer: a > b and b > c.

  Args:
    sets: from `named_sets`.
    text: [M] ids of items, equal for equal texts.
  """
  held = [
    join(sets, (f'seen, {where}', f'unseen, {where}'))
    for where in (SEEN_ITEMS, UNSEEN_ITEMS)
  ]
  parts = [join(sets, SHOWN), *held]
  met = _codes(
    np.concatenate([np.repeat(c.user, 2) for c in parts]),
    np.concatenate([text[c.items].ravel() for c in parts]),
  )
  ends = np.cumsum([2 * c.label.size for c in parts])
  shown, *asked = np.split(met, ends[:-1])
  size = int(met.max(initial=-1)) + 1
  findings = []
  for where, codes in zip((SEEN_ITEMS, UNSEEN_ITEMS), asked, strict=True):
    known = _in(codes, shown, size).reshape(-1, 2).all(-1)
    share = known.mean() if known.size else 0.0
    warns = where == UNSEEN_ITEMS and known.any()
    findings.append(
      Finding(
        f'both items known, {where.replace("_", " ")}',
        'warning' if warns else 'ok',
        f'{share:.1%} of these held-out pairs hold two items that the user has '
        'met in training or support, so that transitivity may tell the answer'
        + (
          '; this split claims unseen items: split by item.' if warns else '.'
        ),
        count=int(known.sum()),
      )
    )
  return findings
