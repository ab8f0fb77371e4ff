"""UKPConvArg1: which of two arguments on a topic is more convincing.

Judgments of crowd workers, one by one (Habernal and Gurevych, ACL 2016, Which
argument is more convincing?), converted from
github.com/UKPLab/acl2016-convincing-arguments.
"""

import dataclasses
from pathlib import Path

import numpy as np

from pal_jax.data.dataset import Dataset
from pal_jax.data.people import (
  Items,
  Pairs,
  check_people,
  create_people,
  divide_rows,
  rows_by_person,
)
from pal_jax.data.sampling import split_items
from pal_jax.data.texts import together
from pal_jax.errors import InputError

_COLUMNS = (
  'user_id',
  'prompt',
  'response_a',
  'response_b',
  'response_a_id',
  'response_b_id',
  'label',
)
_LABELS = (0.0, 0.5, 1.0)
_DOWNLOAD = (
  'download UKPConvArg1 from '
  'github.com/UKPLab/acl2016-convincing-arguments (CC BY 4.0, Habernal and '
  'Gurevych, ACL 2016), write one row a judgment with the columns '
  f'{", ".join(_COLUMNS)} (label 1 a, 0 b, 0.5 equal) to comparisons.parquet, '
  'and set --config.data.path=FOLDER, where that file lies'
)


@dataclasses.dataclass(frozen=True)
class Judgments:
  """Every judgment, and the distinct arguments of each topic."""

  workers: tuple[str, ...]
  topics: tuple[str, ...]  # Q
  arguments: tuple[str, ...]  # M
  topic: np.ndarray  # [M] row of the topic of each argument
  worker: np.ndarray  # [N] row of the worker
  items: np.ndarray  # [N, 2] rows of arguments
  label: np.ndarray  # [N] 1 the first, 0 the second, 0.5 equal
  notes: tuple[str, ...]


def _read_columns(path: Path) -> dict[str, list]:
  """The columns of the file, none of their values null.

  Raises:
    InputError: if pyarrow or the file is missing, or the file is none of
      Parquet with these columns.
  """
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise InputError(
      f'data.name=convarg needs the package pyarrow to read Parquet, which '
      f'cannot be imported ({error}). Install it with: pip install pyarrow'
    ) from error
  if not path.is_file():
    raise InputError(f'{path}: no such file; {_DOWNLOAD}')
  try:
    # Not the path itself: read_table would take the names of its folders,
    # like `year=2016`, for columns.
    with path.open('rb') as file:
      table = parquet.read_table(file)
  except (pyarrow.ArrowException, OSError) as error:
    raise InputError(f'{path}: is not a Parquet file ({error})') from error
  for column in _COLUMNS:
    if column not in table.column_names:
      raise InputError(
        f'{path}: the column {column!r} is missing; the file has '
        f'{table.column_names}'
      )
  if not table.num_rows:
    raise InputError(f'{path}: has columns but no rows')
  columns = {name: table.column(name).to_pylist() for name in _COLUMNS}
  for name, values in columns.items():
    for row, value in enumerate(values):
      if name == 'label':
        good, expected = value in _LABELS, f'one of {_LABELS}'
      elif name in ('prompt', 'response_a', 'response_b'):
        good = isinstance(value, str) and value.strip()
        expected = 'text'
      else:
        good = isinstance(value, (str, int)) and str(value)
        expected = 'an id'
      if not good:
        raise InputError(
          f'{path}, row {row}: the column {name!r} is {value!r}, expected '
          f'{expected}'
        )
  return columns


def read_judgments(path: Path) -> Judgments:
  """Reads comparisons.parquet.

  Arguments of one topic and one text become one. Of judgments of one worker
  on one pair the first counts.

  Raises:
    InputError: if the file is missing or a value is not as expected, with
      the file, the row (from 0) and the column.
  """
  columns = _read_columns(path)
  topics = tuple(dict.fromkeys(columns['prompt']))
  topic_row = {topic: row for row, topic in enumerate(topics)}
  first: dict[str, tuple[int, str, str]] = {}  # row, topic and text of an id
  rows: dict[tuple[str, str], int] = {}  # of the arguments
  items = np.empty((len(columns['label']), 2), np.int64)
  for side, name in enumerate(('response_a', 'response_b')):
    for row, (argument, topic, text) in enumerate(
      zip(columns[f'{name}_id'], columns['prompt'], columns[name], strict=True)
    ):
      text = text.strip()
      old, *known = first.setdefault(str(argument), (row, topic, text))
      if known != [topic, text]:
        what = 'topic' if known[0] != topic else 'text'
        raise InputError(
          f'{path}, row {row}: argument {argument!r} has another {what} than '
          f'in row {old}; expected one topic and one text for an id'
        )
      items[row, side] = rows.setdefault((topic, text), len(rows))
  workers = tuple(dict.fromkeys(map(str, columns['user_id'])))
  worker_row = {worker: row for row, worker in enumerate(workers)}
  worker = np.array([worker_row[str(u)] for u in columns['user_id']])
  label = np.array(columns['label'], np.float32)
  topic = np.array([topic_row[name] for name, _ in rows])
  same = items[:, 0] == items[:, 1]
  key = np.stack([worker, items.min(-1), items.max(-1)], axis=-1)
  again = np.ones(len(label), bool)
  again[np.unique(key, axis=0, return_index=True)[1]] = False
  keep = ~same & ~again
  notes = (
    f'{len(workers)} workers, {len(rows)} arguments on {len(topics)} topics '
    f'and {len(label)} judgments. {len(first) - len(rows)} arguments are '
    f'copies of others and count as one with them; {int(same.sum())} judgments '
    f'of an argument against its copy and {int((again & ~same).sum())} '
    'repeated ones are left out.',
  )
  return Judgments(
    workers=workers,
    topics=topics,
    arguments=tuple(text for _, text in rows),
    topic=topic,
    worker=worker[keep],
    items=items[keep],
    label=label[keep],
    notes=notes,
  )


def create_convarg(config, *, join_prompt: bool = True) -> Dataset:
  """Workers' judgments of arguments, split by argument within each topic.

  What is held out of a seen user are pairs, whose arguments it may have
  judged in other pairs: a worker judged a few arguments many times. An unseen
  user's queries share no argument with its support.

  Args:
    config: `configs.base.convarg_data`.
    join_prompt: whether a candidate is topic and argument together (PAL-A)
      or the argument alone (PAL-B).

  Raises:
    InputError: if the file, fields or sizes are not as expected.
  """
  check_people(config)
  if config.ties not in ('keep', 'drop'):
    raise InputError(
      f"data.ties={config.ties!r} is unknown: expected 'keep' or 'drop'"
    )
  if not config.path:
    raise InputError(f'data.path is empty: {_DOWNLOAD}')
  data = read_judgments(Path(config.path).expanduser() / 'comparisons.parquet')
  rng = np.random.default_rng(config.seed)
  split = split_items(
    rng,
    data.topic,
    data.arguments,
    config.validation_fraction,
    config.test_fraction,
  )
  tied = data.label == 0.5
  use = ~tied if config.ties == 'drop' else np.ones_like(tied)
  across = split[data.items[:, 0]] != split[data.items[:, 1]]
  rows_of = rows_by_person(data.worker, use & ~across, len(data.workers))
  split_of_row = split[data.items[:, 0]]

  def pairs(rows):
    return Pairs(data.items[rows], data.label[rows])

  def divide(rng, person, unseen):
    rows = rng.permutation(rows_of[person])
    return divide_rows(config, rows, split_of_row, pairs, unseen)

  note = (
    f'{int(tied.sum())} judgments are ties, '
    f'{"left out" if config.ties == "drop" else "kept with the label 0.5"}. '
    f'Arguments are split {np.bincount(split, minlength=3).tolist()} (train, '
    f'validation, test); {int((use & across).sum())} judgments of arguments of '
    'two splits are left out.'
  )
  topics = [data.topics[t] for t in data.topic]
  names = data.arguments
  if join_prompt:
    names = tuple(map(together, topics, names))
  return create_people(
    config,
    rng,
    name='convarg',
    people=data.workers,
    items=Items(
      names=names,
      groups=tuple(topics),
      prompts=data.topics,
      prompt=data.topic,
      split=split,
    ),
    divide=divide,
    notes=(*data.notes, note),
  )
