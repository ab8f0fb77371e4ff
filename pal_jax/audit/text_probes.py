"""Whether formatting or length predicts held-out labels.

Probes see differences of features without an intercept. They are blind to
which candidate stands first, so chance is one half, however often the first is
preferred.
"""

import numpy as np

from pal_jax.audit.finding import Finding
from pal_jax.audit.measure import (
  Measured,
  above,
  measure,
  shrunk_rates,
  subset,
)
from pal_jax.audit.sets import SHOWN, UNSEEN, decided, join
from pal_jax.audit.text import LENGTHS, MARKS, SHARES, features
from pal_jax.data import Dataset
from pal_jax.models.bradley_terry import fit_bradley_terry

CHANCE = 0.5
NEARLY_ALL = 0.95  # accuracy of what explains the labels
RIDGE = 1.0  # on features of root mean square 1

_NAMES = (*MARKS, *SHARES, *LENGTHS)
_MARKS = slice(0, len(MARKS))
_FORM = slice(0, len(MARKS) + len(SHARES))
_LENGTH = slice(len(MARKS) + len(SHARES), len(_NAMES))


def text_findings(dataset: Dataset, sets, seed: int) -> list[Finding]:
  """Of formatting and of length; [] if no comparison is decided.

  Args:
    dataset: with texts.
    sets: from `sets.named_sets`.
    seed: of subsets and bootstrap.
  """
  shown, held = decided(join(sets, SHOWN)), decided(join(sets, UNSEEN))
  if not (shown.label.size and held.label.size):
    return []
  train, held = subset(shown, seed), subset(held, seed)
  pairs = np.concatenate([train.items, held.items])
  used, row = np.unique(pairs, return_inverse=True)
  table = np.concatenate(
    features([dataset.item_names[i] for i in used]), axis=-1
  )
  row = row.reshape(pairs.shape)
  difference = table[row[:, 0]] - table[row[:, 1]]
  seen, asked = np.split(difference, [train.label.size])
  scale = np.sqrt(np.mean(np.square(seen), axis=0))
  scale[scale == 0.0] = 1.0
  side = (train.label > 0.5).astype(np.float32)
  probes = {
    name: _fit(seen / scale, side, columns)
    for name, columns in (
      ('formatting', _FORM),
      ('marks', _MARKS),
      ('length', _LENGTH),
      ('both', slice(None)),
    )
  }
  logits = {name: (asked / scale) @ v for name, v in probes.items()}
  characters = np.array([len(text) for text in dataset.item_names])

  def longer_of(c):
    return np.sign(characters[c.items[:, 0]] - characters[c.items[:, 1]])

  longer = longer_of(held)
  logits |= {'longer wins': longer, 'shorter wins': -longer}
  # Of each user: how much more often the longer text was preferred.
  taste = shrunk_rates(
    shown.user,
    np.sign(shown.label - 0.5) * longer_of(shown),
    dataset.num_users + len(dataset.unseen_user_ids),
  )
  logits['length by user'] = taste[held.user] * longer
  found = measure(logits, held, seed, over_items=True, gain=('both', 'length'))
  return [
    _formatting(found, _strongest(probes['formatting'])),
    *(
      _length(name, found[name], what)
      for name, what in (
        ('length', 'a probe on the differences of characters and words'),
        ('longer wins', 'the rule that the longer text wins'),
        ('shorter wins', 'the rule that the shorter text wins'),
        ('length by user', 'every user liking longer, or shorter, texts'),
      )
    ),
  ]


def _fit(difference, side, columns) -> np.ndarray:
  """A logistic probe [F] that sees `columns`; the others weigh nothing."""
  # Blanked rather than cut, so that one program is compiled for all probes.
  blank = np.zeros(difference.shape[1], np.float32)
  blank[columns] = 1.0
  weight = np.ones_like(side)
  v, _ = fit_bradley_terry(difference * blank, side, weight, RIDGE)
  return np.asarray(v)


def _strongest(v: np.ndarray) -> str:
  """The three heaviest features, in words."""
  top = [i for i in np.argsort(-np.abs(v), kind='stable')[:3] if v[i]]
  return ', '.join(
    f'{"more" if v[i] > 0 else "less"} "{_NAMES[i]}"' for i in top
  )


def _accident(found: Measured) -> str:
  """Whether a few items that people judge alike might explain it."""
  if above(found.items, CHANCE):
    return ''
  low, high = found.items
  return (
    f' With other items it might be otherwise: [{low:.3f}, {high:.3f}] when '
    'items are resampled.'
  )


def _formatting(found: dict[str, Measured], described: str) -> Finding:
  alone, gain, marks = found['formatting'], found['gain'], found['marks']
  # Length changes how texts look. What counts is what formatting knows beyond
  # length, or that marks alone, which hardly scale with it, tell nearly all.
  adds = above(gain.users, 0.0) or marks.users[0] >= NEARLY_ALL
  if above(alone.users, CHANCE) and adds:
    severity = 'leak' if above(alone.items, CHANCE) else 'warning'
    message = (
      'How the texts look, whatever they say, tells which was preferred; '
      f'preferred texts have {described}. A model can learn that instead of '
      'preferences: render both candidates alike, and look for lists or quoted '
      f'strings where texts were meant.{_accident(alone)}'
    )
  elif above(alone.users, CHANCE):
    severity = 'ok'
    message = (
      f'Formatting predicts the label but adds only {100 * gain.mean:+.1f} '
      'points to length, by which texts look different: see there.'
    )
  else:
    severity, message = 'ok', 'Formatting does not clearly predict the label.'
  return Finding(
    'formatting', severity, message, alone.mean, alone.users, CHANCE
  )


def _length(name: str, found: Measured, what: str) -> Finding:
  if not above(found.users, CHANCE):
    severity = 'ok'
    message = f'Not clearly above chance: {what}.'
  elif found.mean >= NEARLY_ALL:
    severity = 'leak'
    message = (
      f'Length explains nearly every label ({what}), so results say nothing '
      'about content: print a length-only scorer beside them, or take labels '
      'that people gave.'
    )
  else:
    severity = 'warning'
    message = (
      f'Length predicts the label ({what}), as a preference or a shortcut: '
      'print a length-only scorer beside the results, or balance lengths.'
      f'{_accident(found)}'
    )
  return Finding(name, severity, message, found.mean, found.users, CHANCE)
