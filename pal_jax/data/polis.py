"""Polis: people who agree and disagree with each other's statements.

Reads exports of Polis conversations (Small et al. 2021, Polis: Scaling
Deliberation by Mapping High Dimensional Opinion Spaces), as published in
github.com/compdemocracy/openData. METHOD sections 4 and 5.
"""

import csv
import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np

from pal_jax.data.dataset import Dataset
from pal_jax.data.people import (
  Division,
  Items,
  Pairs,
  check_people,
  create_people,
  num_fit,
)
from pal_jax.data.sampling import split_items
from pal_jax.errors import InputError

# What PAL-B is asked: pairs of statements have no prompt of their own.
PROMPT = 'Which of these two statements do you agree with?'
_VOTES = ('1', '-1', '0', '')
_MODERATED = ('1', '0', '-1')
_DOWNLOAD = (
  'download the folder of a conversation from '
  'github.com/compdemocracy/openData (CC BY 4.0, attributed to The '
  'Computational Democracy Project) and set --config.data.path=FOLDER, where '
  'FOLDER/<conversation>/comments.csv and participants-votes.csv lie'
)


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Votes on the distinct statements that moderators let stand."""

  statements: tuple[str, ...]  # M
  people: tuple[str, ...]  # participants' ids
  agreed: np.ndarray  # [people, M] bool
  disagreed: np.ndarray  # [people, M] bool; passed or unseen is neither
  notes: tuple[str, ...]


def _read_csv(path: Path, needed: tuple[str, ...]):
  """(header, [(line number, row)]) of a CSV file.

  Raises:
    InputError: if the file is missing or is no table with these columns.
  """
  if not path.is_file():
    known = sorted(
      p.parent.name for p in path.parents[1].glob(f'*/{path.name}')
    )
    raise InputError(
      f'{path}: no such file; '
      + (
        f'data.conversation may be one of {", ".join(known)}'
        if known
        else _DOWNLOAD
      )
    )
  rows = []
  try:
    with path.open(encoding='utf-8-sig', newline='') as file:
      reader = csv.reader(file, strict=True)
      for row in reader:
        if row:
          rows.append((reader.line_num, row))
  except UnicodeDecodeError as error:
    raise InputError(f'{path}: is not UTF-8 text ({error})') from error
  except csv.Error as error:
    raise InputError(
      f'{path}, line {reader.line_num}: malformed CSV ({error}); export the '
      'conversation again'
    ) from error
  if not rows:
    raise InputError(f'{path}: is empty; expected a header with {needed}')
  (_, header), *rows = rows
  for column in needed:
    if column not in header:
      raise InputError(
        f'{path}, line 1: the column {column!r} is missing; the header begins '
        f'with {header[:8]}'
      )
  double = [name for name, n in Counter(header).items() if n > 1]
  if double:
    raise InputError(f'{path}, line 1: the column {double[0]!r} stands twice')
  for number, row in rows:
    if len(row) != len(header):
      raise InputError(
        f'{path}, line {number}: {len(row)} values, expected {len(header)} as '
        'in the header'
      )
  if not rows:
    raise InputError(f'{path}: has a header but no rows')
  return header, rows


def _read_comments(path: Path):
  """({comment id: text}, notes); the text is None where it is not used."""
  header, rows = _read_csv(path, ('comment-id', 'comment-body'))
  texts: dict[str, str | None] = {}
  rejected = empty = 0
  for number, row in rows:
    value = dict(zip(header, row, strict=True))
    comment, text = value['comment-id'], value['comment-body'].strip()
    if not comment.isdecimal():
      raise InputError(
        f"{path}, line {number}: the column 'comment-id' is {comment!r}, "
        'expected a whole number'
      )
    if comment in texts:
      raise InputError(
        f'{path}, line {number}: comment {comment} stands twice; remove one'
      )
    moderated = value.get('moderated', '0')
    if moderated not in _MODERATED:
      raise InputError(
        f"{path}, line {number}: the column 'moderated' is {moderated!r}, "
        f'expected one of {_MODERATED} (accepted, not decided, rejected)'
      )
    rejected += moderated == '-1'
    empty += moderated != '-1' and not text
    texts[comment] = None if moderated == '-1' or not text else text
  note = f'Left out: {rejected} statements that moderators rejected'
  return texts, (f'{note} and {empty} without text.',)


def read_conversation(folder: Path) -> Conversation:
  """Reads `folder/comments.csv` and `folder/participants-votes.csv`.

  Statements of one text, but for white space, become one; who agreed with one
  and disagreed with another copy has no vote on it.

  Raises:
    InputError: if a file is missing or a value is not as expected, with the
      file, the line and the column.
  """
  texts, notes = _read_comments(folder / 'comments.csv')
  path = folder / 'participants-votes.csv'
  header, rows = _read_csv(path, ('participant',))
  columns = [c for c, name in enumerate(header) if name.isdecimal()]
  unknown = [header[c] for c in columns if header[c] not in texts]
  if unknown:
    raise InputError(
      f'{path}, line 1: {len(unknown)} columns of votes, the first '
      f'{unknown[0]!r}, have no comment in comments.csv; both files must be of '
      'one export'
    )
  people = tuple(row[header.index('participant')] for _, row in rows)
  first_line: dict[str, int] = {}
  for (number, _), person in zip(rows, people, strict=True):
    if not person or person in first_line:
      raise InputError(
        f"{path}, line {number}: the column 'participant' is {person!r}, "
        + (
          f'as in line {first_line[person]}; expected a row for each'
          if person
          else 'expected an id'
        )
      )
    first_line[person] = number
  votes = np.array([[row[c] for c in columns] for _, row in rows])
  bad = np.argwhere(~np.isin(votes, _VOTES))
  if bad.size:
    r, c = bad[0]
    raise InputError(
      f'{path}, line {rows[r][0]}: the vote on comment {header[columns[c]]} is '
      f'{str(votes[r, c])!r}, expected 1 (agree), -1 (disagree), 0 (pass) or '
      'nothing'
    )
  item_of_text: dict[str, int] = {}
  statements = []
  item = []  # of each column, or -1
  for c in columns:
    text = texts[header[c]]
    if text is None:
      item.append(-1)
      continue
    item.append(
      item_of_text.setdefault(' '.join(text.split()), len(statements))
    )
    if item[-1] == len(statements):
      statements.append(text)
  agreed = np.zeros((len(people), len(statements)), bool)
  disagreed = np.zeros_like(agreed)
  for c, i in enumerate(item):
    if i >= 0:
      agreed[:, i] |= votes[:, c] == '1'
      disagreed[:, i] |= votes[:, c] == '-1'
  both = agreed & disagreed
  copies = sum(i >= 0 for i in item) - len(statements)
  notes += (
    f'{len(people)} people, {len(statements)} statements with votes, '
    f'{int(agreed.sum())} agreements and {int(disagreed.sum())} disagreements. '
    f'{copies} statements are copies of others and count as one with them; '
    f'{int(both.sum())} votes on copies contradict each other and are left '
    'out.',
  )
  if 'group-id' in header:
    sizes = Counter(row[header.index('group-id')] for _, row in rows)
    listed = ', '.join(f'{g or "none"}: {n}' for g, n in sorted(sizes.items()))
    notes += (
      f"Polis's own clusters of the participants have sizes {listed}; they are "
      'computed from the votes and are no truth to recover.',
    )
  return Conversation(
    tuple(statements), people, agreed & ~both, disagreed & ~both, notes
  )


def balanced_pairs(
  agreed: np.ndarray, disagreed: np.ndarray, most: int, each: int
) -> np.ndarray:
  """Pairs of an agreed and a disagreed statement, all different.

  Rounds of the shorter list against the longer one, so that statements stand
  in equally many pairs, as far as possible.

  Args:
    agreed: [a] items, shuffled.
    disagreed: [d] items, shuffled.
    most: pairs at most.
    each: pairs with one statement at most.

  Returns:
    [n, 2], agreed first, n = min(most, each * min(a, d), a * d).
  """
  a, d = len(agreed), len(disagreed)
  t = np.arange(min(most, each * min(a, d), a * d))
  # After lcm(a, d) steps the two indices would repeat: one is shifted.
  rounds = t // max(1, math.lcm(a, d))
  i, j = (t, t + rounds) if a < d else (t + rounds, t)
  return np.stack([agreed[i % max(1, a)], disagreed[j % max(1, d)]], axis=-1)


def _pairs(rng: np.random.Generator, pairs: np.ndarray) -> Pairs:
  """Puts the agreed statement, first in [n, 2], first or second at random."""
  first = rng.integers(0, 2, len(pairs)).astype(bool)
  items = np.where(first[:, None], pairs, pairs[:, ::-1])
  return Pairs(items, first.astype(np.float32))


def create_polis(config, *, join_prompt: bool = True) -> Dataset:
  """Statements a person agreed with against those the person disagreed with.

  Within a person, votes learnt from and votes tested on are of different
  statements. Only training pairs share statements: each pair of the support
  and of every query has two of its own, or n would overstate the information.

  Args:
    config: `configs.base.polis_data`.
    join_prompt: of no effect, a pair of statements has no prompt of its own.

  Raises:
    InputError: if files, fields or sizes are not as expected.
  """
  check_people(config)
  if config.max_pairs_per_statement < 1:
    raise InputError(
      f'data.max_pairs_per_statement={config.max_pairs_per_statement} must be '
      'at least 1'
    )
  if not config.path:
    raise InputError(f'data.path is empty: {_DOWNLOAD}')
  talk = read_conversation(Path(config.path).expanduser() / config.conversation)
  rng = np.random.default_rng(config.seed)
  num_items = len(talk.statements)
  split = split_items(
    rng,
    np.zeros(num_items, int),
    talk.statements,
    config.validation_fraction,
    config.test_fraction,
  )

  def votes(rng, person, which):
    """The person's agreed and disagreed items of a split, shuffled."""
    return tuple(
      rng.permutation(np.flatnonzero(vote[person] & (split == which)))
      for vote in (talk.agreed, talk.disagreed)
    )

  def query(rng, agreed, disagreed):
    return _pairs(rng, balanced_pairs(agreed, disagreed, config.max_query, 1))

  def divide(rng, person, unseen):
    agreed, disagreed = votes(rng, person, 0)
    available = min(len(agreed), len(disagreed))
    fit = num_fit(config, available, unseen)
    held_out = min(available - fit, config.max_query)
    most, each = (
      (fit, 1)
      if unseen
      else (config.max_pairs_per_user, config.max_pairs_per_statement)
    )
    # What is held out comes first: of the longer list all the rest, and not
    # only `fit` statements, may be trained on.
    learnt = agreed[held_out:], disagreed[held_out:]
    return Division(
      fit=_pairs(rng, balanced_pairs(*learnt, most, each)),
      held_out=query(rng, agreed[:held_out], disagreed[:held_out]),
      validation=query(rng, *votes(rng, person, 1)),
      test=query(rng, *votes(rng, person, 2)),
    )

  return create_people(
    config,
    rng,
    name='polis',
    people=talk.people,
    items=Items(
      names=talk.statements,
      groups=(config.conversation,) * num_items,
      prompts=(PROMPT,),
      prompt=np.zeros(num_items, np.int32),
      split=split,
    ),
    divide=divide,
    notes=(*talk.notes, _split_note(talk, split)),
  )


def _split_note(talk: Conversation, split: np.ndarray) -> str:
  """Counts the pairs that the split of the statements leaves out."""

  def count(within):
    return int(
      (talk.agreed[:, within].sum(1) * talk.disagreed[:, within].sum(1)).sum()
    )

  every = count(slice(None))
  across = every - sum(count(split == s) for s in range(3))
  return (
    f'Statements are split {np.bincount(split, minlength=3).tolist()} (train, '
    f'validation, test); of {every} possible pairs, {across} would '
    'set statements of two splits against each other and are left out.'
  )
