"""writer: whole files, plain JSON, and metrics that a resumed run continues."""

import json
import math

import numpy as np
import pytest

from pal_jax import writer


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_text_is_replaced_whole_and_leaves_nothing_behind(tmp_path):
  path = tmp_path / 'a.txt'
  writer.write_text(path, 'first, and longer')
  writer.write_text(path, 'second')
  assert path.read_text() == 'second'
  assert [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
  path = tmp_path / 'a.txt'
  writer.write_text(path, 'old')
  with pytest.raises(UnicodeEncodeError):
    writer.write_text(path, 'new \udcff')  # a lone surrogate is no UTF-8
  assert path.read_text() == 'old'


def test_what_a_kill_leaves_behind_is_hidden(tmp_path, monkeypatch):
  """`prepare_workdir` passes over hidden files in a folder it may take."""

  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr('pathlib.Path.replace', killed)
  with pytest.raises(KeyboardInterrupt):
    writer.write_text(tmp_path / 'config.json', 'x')
  assert all(p.name.startswith('.') for p in tmp_path.iterdir())


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (float('nan'), None),
    (float('inf'), None),
    (np.float32('-inf'), None),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (True, True),
    (0, 0),
    (None, None),
    ('text', 'text'),
    ((1, 2.5), [1, 2.5]),
    (np.array([[1.0, np.nan]]), [[1.0, None]]),
    (np.array(2.0), 2.0),
    ({1: np.arange(2), 'a': {'b': math.inf}}, {'1': [0, 1], 'a': {'b': None}}),
  ],
  ids=str,
)
def test_values_become_plain_json(value, expected):
  plain = writer.to_json(value)
  assert plain == expected and type(plain) is type(expected)
  assert json.loads(json.dumps(plain, allow_nan=False)) == expected


def test_json_files_read_back(tmp_path):
  path = tmp_path / 'a.json'
  writer.write_json(path, {'z': np.float32(1.5), 'a': [np.nan, 'ü']})
  assert json.loads(path.read_text()) == {'z': 1.5, 'a': [None, 'ü']}
  assert path.read_text().endswith('}\n')


def test_metrics_are_one_object_a_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  metrics = writer.MetricsWriter(path, 0)
  metrics.write(1, loss=np.float32(0.5))
  metrics.write(2, loss=float('nan'), accuracy=1)
  assert lines_of(path) == [
    {'step': 1, 'loss': 0.5},
    {'step': 2, 'loss': None, 'accuracy': 1},
  ]


def test_metrics_are_on_disk_after_each_write(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  metrics = writer.MetricsWriter(path, 0)
  assert path.exists()
  metrics.write(1, loss=1.0)
  assert len(lines_of(path)) == 1


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  metrics = writer.MetricsWriter(path, 0)
  for step in (5, 10, 15, 20):
    metrics.write(step, loss=step)
  writer.MetricsWriter(path, 10).write(15, loss=-1)
  assert [(x['step'], x['loss']) for x in lines_of(path)] == [
    (5, 5),
    (10, 10),
    (15, -1),
  ]


def test_a_run_that_starts_again_drops_everything(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  writer.MetricsWriter(path, 0).write(5, loss=1)
  writer.MetricsWriter(path, 0)
  assert path.read_text() == ''


@pytest.mark.parametrize(
  'rest',
  [
    b'{"step": 3, "lo',
    b'{"step": 3, "loss": 1}\0\0\n',
    b'\xff\xfe\n',
    b'{"loss": 1}\n',
    b'{"step": null}\n',
    b'null\n',
    b'[]\n',
    b'\n',
  ],
  ids=repr,
)
def test_a_line_cut_short_or_foreign_is_dropped(tmp_path, rest):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1, "loss": 2}\n' + rest)
  writer.MetricsWriter(path, 4).write(5, loss=3)
  assert [x['step'] for x in lines_of(path)] == [1, 5]


def test_progress_draws_what_it_is_told(capfd):
  bar = writer.Progress(10, 4)
  for _ in range(6):
    bar.advance()
  bar.update(0.25, 0.875, 12345.6)
  bar.close()
  text = capfd.readouterr().err
  for word in ('10/10', 'loss 0.250', 'accuracy 0.875', '12,346 comparisons/s'):
    assert word in text


def test_progress_can_be_silent(capfd):
  bar = writer.Progress(10, 0, enabled=False)
  bar.advance()
  bar.update(1.0, 0.5, 1.0)
  bar.close()
  assert capfd.readouterr() == ('', '')
