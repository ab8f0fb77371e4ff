"""Rows of a Parquet, CSV or JSON-lines file, a few thousand at a time.

Whole numbers, floats, strings, None and what JSON nests come out as Python's;
of CSV everything is a string, and an empty cell is None. Rows count from 1,
without the header.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pal_jax import optional
from pal_jax.data.table.problems import Problems
from pal_jax.errors import InputError

_BATCH = 4096
_MOST_CHARACTERS = 2**27  # of a CSV cell
SUFFIXES = ('.parquet', '.csv', '.jsonl')
# First bytes of files that are something else, whatever their name.
_DISGUISES = {
  b'PK\x03\x04': 'a zip archive',
  b'\x1f\x8b': 'a gzip archive',
  b'\x80\x02': 'a pickle',
  b'\x80\x03': 'a pickle',
  b'\x80\x04': 'a pickle',
  b'\x80\x05': 'a pickle',
  b'PAR1': 'Parquet',
  b'\xff\xfe': 'UTF-16 text',
  b'\xfe\xff': 'UTF-16 text',
}

Row = tuple[int, dict[str, Any]]


def column_names(path: Path) -> list[str]:
  """Of a Parquet or CSV file; of JSON lines those of the first row.

  Raises:
    InputError: if the file is missing, something else or without a header, or
      a name stands there twice.
  """
  _check_file(path)
  if path.suffix == '.parquet':
    names = _open_parquet(path).schema_arrow.names
  elif path.suffix == '.csv':
    names = next(_csv_rows(path), [])
  else:
    first = next(_json_rows(path, Problems()), None)
    names = list(first[1]) if first else []
  if not names:
    raise InputError(f'{path}: is empty; expected rows with named columns')
  twice = sorted({n for n in names if names.count(n) > 1})
  if twice:
    raise InputError(
      f'{path}: the columns {twice} stand there twice: name them apart'
    )
  return names


def read_rows(
  path: Path, columns: list[str], problems: Problems
) -> Iterator[Row]:
  """(row number, {column: value}) of every row that can be read.

  Args:
    path: that `column_names` accepted.
    columns: wanted; the others are not read.
    problems: takes rows that cannot be read.
  """
  if path.suffix == '.parquet':
    yield from _parquet_rows(path, columns)
  elif path.suffix == '.csv':
    rows = _csv_rows(path)
    names = next(rows)
    places = {name: names.index(name) for name in columns}
    for number, cells in enumerate(rows, 1):
      if len(cells) != len(names):
        problems.add(
          'rows with another number of cells than the header',
          f'row {number}: {len(cells)} cells, the header has {len(names)}',
        )
        continue
      yield number, {n: cells[i] or None for n, i in places.items()}
  else:
    for number, row in _json_rows(path, problems):
      yield number, {name: row.get(name) for name in columns}


def _check_file(path: Path) -> None:
  if path.suffix not in SUFFIXES:
    raise InputError(
      f'data.path={path}: its name ends in {path.suffix!r}; expected one of '
      f'{SUFFIXES}'
    )
  if not path.is_file():
    raise InputError(f'data.path={path}: no such file')
  with path.open('rb') as file:
    start = file.read(1024)
  for magic, what in _DISGUISES.items():
    wanted = path.suffix == '.parquet' and magic == b'PAR1'
    if start.startswith(magic) and not wanted:
      raise InputError(
        f'{path}: is {what}, not {path.suffix[1:]}; it was not opened further'
      )
  if path.suffix != '.parquet' and b'\0' in start:
    raise InputError(f'{path}: holds zero bytes: it is no text')


def _open_parquet(path: Path):
  parquet = optional.require(
    'pyarrow.parquet', f'reading {path}', 'pip install pyarrow'
  )
  pyarrow = optional.require(
    'pyarrow', f'reading {path}', 'pip install pyarrow'
  )
  try:
    return parquet.ParquetFile(path, memory_map=True)
  except (pyarrow.ArrowException, OSError) as error:
    raise InputError(f'{path}: cannot be read as Parquet ({error})') from error


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Row]:
  file, number = _open_parquet(path), 0
  try:
    for batch in file.iter_batches(_BATCH, columns=columns):
      # Decoding fails on strings that are no UTF-8.
      lists = {name: batch.column(name).to_pylist() for name in columns}
      for values in zip(*(lists[name] for name in columns), strict=True):
        number += 1
        yield number, dict(zip(columns, values, strict=True))
  except (OSError, ValueError, NotImplementedError) as error:
    raise InputError(
      f'{path}: cannot be read after row {number} ({error}); write it again'
    ) from error
  finally:
    file.close()


def _csv_rows(path: Path) -> Iterator[list[str]]:
  csv.field_size_limit(min(_MOST_CHARACTERS, sys.maxsize))
  done = 0  # with the header
  with path.open(encoding='utf-8-sig', newline='') as file:
    try:
      for cells in csv.reader(file, strict=True):
        done += 1
        yield cells
    except (csv.Error, UnicodeDecodeError) as error:
      raise InputError(
        f'{path}: cannot be read as CSV in UTF-8 after row {max(done - 1, 0)} '
        f'({error}); write it again'
      ) from error


def _json_rows(path: Path, problems: Problems) -> Iterator[Row]:
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line.decode('utf-8-sig'), object_pairs_hook=_no_twins)
      except (ValueError, RecursionError) as error:
        problems.add(
          'lines that are no JSON in UTF-8', f'row {number}: {error}'
        )
        continue
      if not isinstance(row, dict):
        problems.add(
          'lines that are no JSON object',
          f'row {number}: a {type(row).__name__}',
        )
        continue
      yield number, row


def _no_twins(pairs):
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError('a name stands there twice')
  return found
