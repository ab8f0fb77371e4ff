"""The TL;DR variant: people who want long summaries, and people who want short.

PAL (arXiv 2406.08469), section 5, after Li et al. 2024 (arXiv 2402.05133):
the ten workers with most training rows are the seen users; three of them
(ranks 3, 4 and 5) prefer the shorter summary, the others the longer, and the
human label is replaced. METHOD section 4 has the counts.
"""

import dataclasses
import importlib

import numpy as np

from pal_jax.data.dataset import Dataset
from pal_jax.data.given import Rows, create_given, without_known
from pal_jax.data.people import Items, rows_by_person
from pal_jax.errors import InputError

NUM_SEEN = 10
# In each ten of the unseen workers, too: 9 of 31, as in the paper.
SHORT_RANKS = (3, 4, 5)
LABELS = ('length', 'human')
TEMPLATES = ('plain', 'paper')


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of the prepared dataset, with the distinct posts and summaries."""

  workers: tuple[str, ...]
  posts: tuple[str, ...]  # Q
  summaries: tuple[str, ...]  # M
  post_of: np.ndarray  # [M] row of the post of each summary
  worker: np.ndarray  # [N]
  items: np.ndarray  # [N, 2]
  choice: np.ndarray  # [N] 0 or 1
  validation: np.ndarray  # [N] bool: of the source's validation split
  note: str


def read_table(config) -> Table:
  """Prepares and reads the comparisons. Raises InputError."""
  # Here, because it imports TensorFlow Datasets.
  prepare = importlib.import_module('pal_jax.data.builders.prepare')
  builders = importlib.import_module('pal_jax.data.builders.tldr')
  files = ()
  if config.path or not config.download:
    folder = prepare.check_folder(config.path, builders.HOW)
    files = builders.TldrComparisons.find_files(folder)
  builder = prepare.prepare(
    builders.TldrComparisons,
    files=files,
    data_dir=config.tfds_dir,
    download=config.download,
  )
  workers: dict[str, int] = {}
  posts: dict[str, int] = {}
  summaries: dict[tuple[int, str], int] = {}
  rows = []
  for split in ('train', 'validation'):
    for row in prepare.read_split(builder, split):
      post = posts.setdefault(row['post'], len(posts))
      pair = [
        summaries.setdefault((post, row[f'summary_{side}']), len(summaries))
        for side in (0, 1)
      ]
      worker = workers.setdefault(row['worker'], len(workers))
      rows.append((worker, *pair, row['choice'], split == 'validation'))
  worker, one, two, choice, validation = np.array(rows, np.int64).T
  return Table(
    workers=tuple(workers),
    posts=tuple(posts),
    summaries=tuple(text for _, text in summaries),
    post_of=np.array([post for post, _ in summaries]),
    worker=worker,
    items=np.stack([one, two], axis=-1),
    choice=choice,
    validation=validation.astype(bool),
    note=prepare.note(builder),
  )


def check_config(config) -> None:
  """Refuses fields out of range. Raises InputError."""
  for field, known in (('labels', LABELS), ('template', TEMPLATES)):
    if config[field] not in known:
      raise InputError(
        f'data.{field}={config[field]!r} is unknown: expected one of {known}'
      )
  for field in ('min_rows', 'max_support', 'min_query'):
    if config[field] < 1:
      raise InputError(f'data.{field}={config[field]} must be at least 1')
  if config.min_rows <= config.min_query:
    raise InputError(
      f'data.min_rows={config.min_rows} must be more than '
      f'data.min_query={config.min_query}, or nothing is left to adapt from'
    )
  if not 0.0 < config.validation_fraction < 1.0:
    raise InputError(
      f'data.validation_fraction={config.validation_fraction} must lie in '
      '(0, 1)'
    )


def stratified(
  rng: np.random.Generator, user: np.ndarray, share: float
) -> np.ndarray:
  """[n] bool: a share of everybody's rows, ceil(share * n) in all.

  Each user gives share * n_i, rounded so that the total is right: the largest
  remainders are rounded up.
  """
  count = np.bincount(user)
  wanted = share * count
  take = np.floor(wanted).astype(int)
  left = int(np.ceil(share * len(user))) - int(take.sum())
  take[np.argsort(take - wanted, kind='stable')[:left]] += 1
  out = np.zeros(len(user), bool)
  everything = np.ones(len(user), bool)
  for rows, number in zip(
    rows_by_person(user, everything, len(count)), take, strict=True
  ):
    out[rng.permutation(rows)[:number]] = True
  return out


def ranked(worker: np.ndarray, number: int) -> np.ndarray:
  """Workers by their rows, most first; ties by who came first."""
  return np.argsort(-np.bincount(worker, minlength=number), kind='stable')


def length_labels(lengths: np.ndarray, prefers_short: np.ndarray):
  """[n] labels by length alone.

  Args:
    lengths: [n, 2] characters.
    prefers_short: [n] bool.

  Returns:
    1 where the first is preferred, 0 where the second is, 0.5 for equal
    lengths: nobody who goes by length prefers either. (The reference
    implementation calls these "second preferred" for both groups.)
  """
  longer = 0.5 + 0.5 * np.sign(lengths[:, 0] - lengths[:, 1])
  return np.where(prefers_short, 1 - longer, longer).astype(np.float32)


def create_tldr(config, *, join_prompt: bool = True) -> Dataset:
  """Ten seen workers, and unseen ones who judged a hundred validation rows.

  Args:
    config: `configs.base.tldr_data`.
    join_prompt: whether a candidate is post and summary together (PAL-A with
      the paper's template) or apart (PAL-B).

  Raises:
    InputError: if files or fields are not as expected, or nobody is unseen.
  """
  check_config(config)
  table = read_table(config)
  number = len(table.workers)
  rng = np.random.default_rng(config.seed)
  train = ~table.validation
  seen = ranked(table.worker[train], number)[:NUM_SEEN]
  # The order of unseen workers is that of their validation rows.
  order = ranked(table.worker[table.validation], number)
  judged = np.bincount(table.worker[table.validation], minlength=number)
  unseen = order[~np.isin(order, seen)]
  unseen = unseen[judged[unseen] >= config.min_rows]
  if not len(unseen):
    raise InputError(
      f'data.name=tldr: of {number} workers none but the ten seen ones has '
      f'data.min_rows={config.min_rows} validation rows; lower it, or give '
      'the whole of the data'
    )
  short = _who_prefers_short(config, table.workers, seen, unseen)
  lengths = np.array([len(text) for text in table.summaries])
  label = _labels(config, table, lengths, short)
  everything = Rows(table.worker, table.items, label)

  at = np.flatnonzero(train & np.isin(table.worker, seen))
  held = stratified(rng, table.worker[at], config.validation_fraction)
  test = np.flatnonzero(table.validation & np.isin(table.worker, seen))
  support, query = _unseen_rows(config, rng, table, unseen)
  sets = {
    'train': everything.take(at[~held]),
    'validation': everything.take(at[held]),
    'support': everything.take(support),
  }
  sets['test'] = without_known(everything.take(test), sets['train'])
  sets['validation'] = without_known(sets['validation'], sets['train'])
  sets['query'] = without_known(everything.take(query), sets['support'])
  again = len(test) + len(query) - len(sets['test']) - len(sets['query'])
  group = short.astype(int) if config.labels == 'length' else None
  return create_given(
    'tldr',
    users=table.workers,
    sets=sets,
    items=_items(config, table, join_prompt),
    group=group,
    item_lengths=lengths,
    notes=(
      table.note,
      *_notes(config, table, sets, short, seen, unseen),
      f'{again:,} test rows of a pair that the worker had before are left out.',
    ),
  )


def _who_prefers_short(config, workers, seen, unseen) -> np.ndarray:
  """[workers] bool, by rank, or as the config names them."""
  short = np.zeros(len(workers), bool)
  if config.short_workers:
    unknown = set(config.short_workers) - set(workers)
    if unknown:
      raise InputError(
        f'data.short_workers names {sorted(unknown)[0]!r}, who has no row; '
        'expected ids of workers in the data'
      )
    return np.isin(np.array(workers), list(config.short_workers))
  for who in (seen, unseen):
    short[who] = np.isin(np.arange(len(who)) % NUM_SEEN, SHORT_RANKS)
  return short


def _labels(config, table: Table, lengths, short) -> np.ndarray:
  if config.labels == 'human':
    return (1 - table.choice).astype(np.float32)
  return length_labels(lengths[table.items], short[table.worker])


def _unseen_rows(config, rng, table: Table, unseen):
  """(support, query): validation rows of each unseen worker, apart."""
  support, query = [], []
  mine = rows_by_person(table.worker, table.validation, len(table.workers))
  for worker in unseen:
    # Post by post: no summary that was learnt from is asked about.
    post = table.post_of[table.items[mine[worker], 0]]
    names, post = np.unique(post, return_inverse=True)
    place = rng.permutation(len(names))[post]
    rows = mine[worker][np.argsort(place, kind='stable')]
    number = min(config.max_support, len(rows) - config.min_query)
    known = np.isin(np.sort(place)[number:], np.sort(place)[:number])
    support.append(rows[:number])
    query.append(rows[number:][~known])
  return np.concatenate(support), np.concatenate(query)


def _items(config, table: Table, join_prompt: bool) -> Items:
  """Candidates and prompts as the encoder reads them."""
  posts, summaries = table.posts, table.summaries
  if config.template == 'paper':
    posts = tuple(f'Human: {post} Assistant:' for post in posts)
    # The published files begin a summary with a space; the template has one.
    summaries = tuple(f' {text}<|endoftext|>' for text in summaries)
    if join_prompt:
      summaries = tuple(
        posts[post] + text
        for post, text in zip(table.post_of, summaries, strict=True)
      )
  return Items(
    names=summaries,
    groups=('',) * len(summaries),
    # PAL-A never reads a prompt apart: posts need not be encoded.
    prompts=('',) if join_prompt else posts,
    prompt=np.zeros_like(table.post_of) if join_prompt else table.post_of,
    split=np.full(len(summaries), -1, np.int8),
  )


def _notes(config, table, sets, short, seen, unseen) -> tuple[str, ...]:
  counts = np.bincount(table.worker[~table.validation])
  rows = ', '.join(f'{counts[w]:,}' for w in seen)
  notes = [
    f'{len(seen)} seen workers with {rows} training rows; {len(unseen)} '
    f'unseen ones with at least {config.min_rows} validation rows. Train, '
    f'validation, test: {len(sets["train"]):,}, '
    f'{len(sets["validation"]):,}, {len(sets["test"]):,}.',
  ]
  if config.labels == 'length':
    ties = sum(int((rows.label == 0.5).sum()) for rows in sets.values())
    decided = sets['test'].label != 0.5
    of_long = ~short[sets['test'].user] & decided
    best = max(of_long.sum(), decided.sum() - of_long.sum())
    notes.append(
      f'The label is the length in characters: {int(short[seen].sum())} of '
      f'the seen and {int(short[unseen].sum())} of the unseen workers prefer '
      f'the shorter summary, the others the longer; {ties:,} comparisons of '
      'equal lengths are ties. One score for everybody reaches at most '
      f'{best / max(1, decided.sum()):.1%} of the test rows.'
    )
  else:
    notes.append("Labels are the workers' own.")
  return tuple(notes)
