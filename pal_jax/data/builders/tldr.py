"""TL;DR comparisons of OpenAI's `summarize_from_feedback`, as a TFDS builder.

Stiennon et al. 2020, Learning to summarize from human feedback (arXiv
2009.01325), github.com/openai/summarize-from-feedback. A line of a file, or a
row of the Parquet files of the same dataset on the Hugging Face hub:

    {"info": {"id": ..., "post": ..., "title": ..., "subreddit": ...},
     "summaries": [{"text": ..., "policy": ..., "note": ...}, {...}],
     "choice": 0 or 1, "worker": ..., "batch": ..., "split": "train",
     "extra": {"confidence": ...}}

Kept are the rows in which both policies contain `sup` and neither contains
`ppo` (the PAL paper, section 5; METHOD section 4).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from pal_jax.data.builders.local import LocalBuilder
from pal_jax.errors import InputError
from pal_jax.optional import require

_URL = (
  'https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/'
  'comparisons/{}.json'
)
# As published; three others are of CNN/DM and have no post.
FILES = tuple(
  [f'batch{n}' for n in (*range(3, 21), 22)] + ['edit_b2_eval_test']
)
HOW = (
  'fetch the comparisons of openai/summarize_from_feedback, either batch3.json '
  'to batch20.json, batch22.json and edit_b2_eval_test.json from '
  'openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/'
  'comparisons/ or the Parquet files of its config "comparisons" from the '
  'Hugging Face hub, put them into one folder, and set '
  '--config.data.path=FOLDER; or set --config.data.download=True'
)
# What rows are left out for, in the words of the report.
_NULL = 'with a null post, text or worker'
_POLICY = 'of other policies'


class TldrComparisons(LocalBuilder):
  """Pairs of summaries of a post, and which one a worker chose."""

  name = 'tldr_comparisons'
  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = HOW
  SUFFIXES = ('.json', '.jsonl', '.parquet')
  url = _URL

  @classmethod
  def find_files(cls, folder: Path) -> tuple[Path, ...]:
    """The files of a folder, batch 3 before batch 10. Raises InputError."""
    files = tuple(sorted(super().find_files(folder), key=_natural))
    if not files:
      raise InputError(
        f'{folder}: has no file that ends in one of {cls.SUFFIXES}; {HOW}'
      )
    return files

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      homepage='https://github.com/openai/summarize-from-feedback',
      features=tfds.features.FeaturesDict(
        {
          'worker': tfds.features.Text(),
          'post_id': tfds.features.Text(),
          'post': tfds.features.Text(),
          'summary_0': tfds.features.Text(),
          'summary_1': tfds.features.Text(),
          'choice': np.int64,  # 0 or 1
          'batch': tfds.features.Text(),
        }
      ),
      metadata=tfds.core.MetadataDict({}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    files = self.local_files(dl_manager)
    if not files:
      found = dl_manager.download([self.url.format(name) for name in FILES])
      files = tuple(map(Path, found))
    return {
      split: self._generate_examples(files, split)
      for split in ('train', 'validation')
    }

  def _generate_examples(self, files, split):
    number = 0
    for path in files:
      for where, row in read_rows(path):
        if _split_of(where, row) != split:
          continue
        example, why = _parse(where, row)
        if example is None:
          self.info.metadata[why] = self.info.metadata.get(why, 0) + 1
          continue
        yield number, example
        number += 1
    if not number:
      raise InputError(
        f'{files[0].parent}: no {split} row of {len(files)} files is kept; '
        f'expected rows whose "split" is '
        f'{"train" if split == "train" else "valid1 or valid2"} and whose '
        'policies contain "sup". ' + HOW
      )


def _natural(path: Path) -> list:
  """batch3 before batch10, as they are downloaded."""
  parts = re.split('([0-9]+)', path.name)
  return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
  """(where, row) of every row, with a Parquet file's as in the JSON files.

  Raises:
    InputError: if the file is not JSON lines or Parquet, with the line.
  """
  if path.suffix == '.parquet':
    yield from _parquet_rows(path)
    return
  try:
    with path.open(encoding='utf-8') as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        where = f'{path}, line {number}'
        try:
          row = json.loads(line)
        except json.JSONDecodeError as error:
          raise InputError(
            f'{where}: malformed JSON ({error.msg}); expected one JSON object '
            'a line'
          ) from error
        yield where, row
  except UnicodeDecodeError as error:
    raise InputError(f'{path}: is not UTF-8 text ({error})') from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
  parquet = require(
    'pyarrow.parquet', f'reading {path.name}', 'pip install pyarrow'
  )
  pyarrow = require('pyarrow', f'reading {path.name}', 'pip install pyarrow')
  # Files of the hub are named by split; their rows have the column, too.
  named = path.name.split('-')[0]
  try:
    with parquet.ParquetFile(path) as file:
      number = 0
      for batch in file.iter_batches(1024):
        for row in batch.to_pylist():
          if 'split' not in row and named in ('train', 'validation'):
            row['split'] = 'train' if named == 'train' else 'valid1'
          yield f'{path}, row {number}', row
          number += 1
  except (pyarrow.ArrowException, OSError) as error:
    raise InputError(f'{path}: is not a Parquet file ({error})') from error


def _split_of(where: str, row) -> str:
  split = row.get('split') if isinstance(row, dict) else None
  if split == 'train':
    return 'train'
  if split in ('valid1', 'valid2'):
    return 'validation'
  raise InputError(
    f"{where}: the field 'split' is {split!r}, expected 'train', 'valid1' or "
    f"'valid2'; {HOW}"
  )


def _parse(where: str, row: dict) -> tuple[dict | None, str]:
  """(example, '') or (None, why the row is left out)."""
  try:
    info, (one, two) = row['info'], row['summaries']
    # Articles have no post: null in Parquet, missing in the JSON files.
    texts = [info.get('post'), one['text'], two['text'], row['worker']]
    policies = [one['policy'], two['policy']]
    choice = row['choice']
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(
      f'{where}: expected info.post, two summaries with text and policy, '
      f'choice and worker, and found {error!r}; {HOW}'
    ) from error
  if any(text is None or not str(text).strip() for text in texts):
    return None, _NULL
  if not all(_supervised(policy) for policy in policies):
    return None, _POLICY
  if choice not in (0, 1) or isinstance(choice, bool):
    raise InputError(
      f"{where}: the field 'choice' is {choice!r}, expected 0 or 1"
    )
  post, left, right, worker = map(str, texts)
  return {
    'worker': worker,
    'post_id': str(info.get('id') or ''),
    'post': post,
    'summary_0': left,
    'summary_1': right,
    'choice': int(choice),
    'batch': str(row.get('batch') or ''),
  }, ''


def _supervised(policy) -> bool:
  return isinstance(policy, str) and 'sup' in policy and 'ppo' not in policy
