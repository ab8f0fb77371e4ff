"""The notebooks run from top to bottom, without a Jupyter server."""

import pathlib

import nbclient
import nbformat
import pytest

from benchmarks import tiny_runs

COLABS = pathlib.Path(__file__).parents[1] / 'colabs'


def execute(name: str) -> tuple[list[str], int]:
  """Lines that a notebook printed, and how many images it shows."""
  path = COLABS / f'{name}.ipynb'
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=900, resources={'metadata': {'path': str(path.parent)}}
  )
  client.execute()
  outputs = [
    output
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  ]
  text = ''.join(output.get('text', '') for output in outputs)
  images = sum('image/png' in output.get('data', {}) for output in outputs)
  return text.splitlines(), images


def last_number(lines: list[str], start: str) -> float:
  """At the end of the one line that starts so."""
  (line,) = (x for x in lines if x.startswith(start))
  return float(line.split()[-1])


def check_quickstart(lines, images):
  assert last_number(lines, 'seen users') > 0.75
  assert images == 3


def check_your_own_data(lines, images):
  assert any(x.endswith('damaged.csv: 5 problems of 4 kinds') for x in lines)
  seen = last_number(lines, 'seen users')
  assert seen > 0.75
  assert seen > last_number(lines, 'one score for everybody') + 0.2
  assert last_number(lines, 'accuracy, 5 answers') > 0.7
  assert last_number(lines, 'accuracy, 8 answers') > 0.75
  widths = [
    last_number(lines, f'width, {stage}')
    for stage in ('nothing known', '5 answers', '8 answers')
  ]
  assert widths == sorted(widths, reverse=True)
  assert widths[-1] < 0.5 * widths[0]
  assert last_number(lines, 'largest difference') < 1e-4
  assert images == 2


def check_adapt_many_users(lines, images):
  for method in ('map', 'posterior'):
    (line,) = (x for x in lines if x.startswith(f'{method} '))
    assert '100,000 users adapted' in line
  assert 'converged: 100,000 of 100,000' in lines
  assert last_number(lines, 'largest relative gap') <= 1e-5
  header = next(i for i, x in enumerate(lines) if x.startswith(' n '))
  rows = [[float(v) for v in x.split()] for x in lines[header + 1 : header + 7]]
  accuracy = {int(n): values for n, *values in rows}
  for method in range(2):
    assert accuracy[20][method] > accuracy[5][method] > accuracy[0][method]
    assert accuracy[20][method] > accuracy[0][method] + 0.05
  for _, posterior, bayes in accuracy.values():
    assert abs(posterior - bayes) < 0.03
  assert last_number(lines, 'largest difference of a weight') < 0.01
  assert images == 4


CHECKS = {
  'adapt_many_users': check_adapt_many_users,
  'quickstart': check_quickstart,
  'your_own_data': check_your_own_data,
}


# Their models are small: to compile them well takes longer than to run them.
SMALL = ('quickstart', 'your_own_data')


@pytest.mark.parametrize('name', CHECKS)
def test_notebook_runs_and_learns(name, monkeypatch):
  if name in SMALL:
    monkeypatch.setenv('XLA_FLAGS', tiny_runs.environment()['XLA_FLAGS'])
  CHECKS[name](*execute(name))


def test_notebooks_are_all_run_and_hold_no_outputs():
  paths = list(COLABS.glob('*.ipynb'))
  assert {path.stem for path in paths} == set(CHECKS)
  for path in paths:
    for cell in nbformat.read(path, as_version=4).cells:
      assert not cell.get('outputs') and cell.get('execution_count') is None
