"""Two hundred malformed tables: an error or a count, never a traceback."""

import json
import pickle
import zipfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from configs import table as table_config
from pal_jax.data.table import read_table
from pal_jax.errors import InputError
from pal_jax.train import train_and_evaluate
from tests.data.table.table_test import SUFFIXES, config, row, write

VALUES = (
  None,
  '',
  ' ',
  'nan',
  float('nan'),
  float('inf'),
  -1,
  2,
  10**400,
  True,
  [],
  {},
  [{'role': 'user'}],
  'x' * 1_000_000,
  '\x00',
  'e\u0301\u202e',
  '=1+1',
  '"',
  '\n\r\n',
)


def rows(rng):
  return [
    row(
      f'u{i % 7}',
      f'a{rng.integers(99)}',
      f'b{rng.integers(99)}',
      1.0,
      prompt='p',
    )
    for i in range(40)
  ]


def wrong_values(rng, path):
  found = rows(rng)
  for _ in range(int(rng.integers(1, 20))):
    name = rng.choice(list(found[0]))
    value = VALUES[rng.integers(len(VALUES))]
    if path.suffix == '.parquet':  # one type a column
      for r in found:
        r[name] = value
    else:
      found[rng.integers(len(found))][name] = value
  write(path, found)


def cut(rng, path):
  write(path, rows(rng))
  content = path.read_bytes()
  path.write_bytes(content[: int(rng.integers(len(content)))])


def flipped(rng, path):
  write(path, rows(rng))
  content = bytearray(path.read_bytes())
  for _ in range(int(rng.integers(1, 30))):
    content[rng.integers(len(content))] = rng.integers(256)
  path.write_bytes(bytes(content))


def other_encoding(rng, path):
  write(path, rows(rng))
  name = rng.choice(['utf-16', 'utf-32', 'latin-1', 'cp037'])
  text = path.read_bytes().decode('latin-1') + 'é'
  path.write_bytes(text.encode(str(name), 'replace'))


def disguised(rng, path):
  kind = rng.integers(3)
  if kind == 0:
    path.write_bytes(pickle.dumps(rows(rng), protocol=int(rng.integers(0, 6))))
  elif kind == 1:
    with zipfile.ZipFile(path, 'w') as file:
      file.writestr('rows.csv', 'user_id\n')
  else:
    path.write_bytes(rng.bytes(int(rng.integers(1, 2000))))


def columns(rng, path):
  """Missing, repeated and strange columns."""
  found = rows(rng)
  if path.suffix == '.parquet':
    table = pyarrow.Table.from_pylist(found)
    names = list(table.column_names)
    names[rng.integers(len(names))] = str(rng.choice(['label', 'x', '']))
    parquet.write_table(table.rename_columns(names), path)
  elif path.suffix == '.csv':
    write(path, found)
    head, rest = path.read_text().split('\n', 1)
    names = head.strip().split(',')
    names[rng.integers(len(names))] = str(rng.choice(['label', 'x', '', '"']))
    path.write_text(','.join(names) + '\n' + rest)
  else:
    for r in found[: int(rng.integers(1, 40))]:
      del r[rng.choice(list(r))]
    path.write_text(''.join(json.dumps(r) + '\n' for r in found))


DAMAGES = (wrong_values, cut, flipped, other_encoding, disguised, columns)


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('damage', DAMAGES)
def test_malformed_tables_are_told_or_counted(tmp_path, suffix, damage):
  ends = {'read': 0, 'refused': 0}
  for seed in range(13):  # 6 damages, 3 formats: 234 tables
    path = tmp_path / f'mine{seed}{suffix}'
    try:
      damage(np.random.default_rng(seed), path)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
      continue  # not even written
    try:
      found = read_table(config(path))
      assert found.users and found.notes
      ends['read'] += 1
    except InputError as error:
      assert str(path) in str(error) and len(str(error)) < 20_000
      ends['refused'] += 1
    try:
      found = read_table(config(path, on_problem='drop'))
      assert len(found.user) and np.isfinite(found.label).all()
    except InputError as error:
      assert str(path) in str(error)
  assert ends['read'] + ends['refused'] >= 5
  if damage in (cut, other_encoding, disguised, columns):
    assert ends['refused'] > 0


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_bad_table_leaves_no_workdir(tmp_path, suffix):
  path = write(tmp_path / f'mine{suffix}', [row(label=3.0)])
  wanted = table_config.get_config().copy_and_resolve_references()
  with wanted.unlocked():
    wanted.data.path = str(path)
  with pytest.raises(InputError, match='1 problem of 1 kind\n'):
    train_and_evaluate(wanted, tmp_path / 'work', progress=False)
  assert not (tmp_path / 'work').exists()
