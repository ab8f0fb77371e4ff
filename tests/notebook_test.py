"""The notebooks run from top to bottom, without a Jupyter server."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('name', ['quickstart'])
def test_notebook_runs_and_learns(name):
  path = ROOT / 'colabs' / f'{name}.ipynb'
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(path.parent)}}
  )
  client.execute()
  text = ''.join(
    output.get('text', '')
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  )
  (line,) = (x for x in text.splitlines() if x.startswith('seen users'))
  assert float(line.split()[-1]) > 0.75
  images = [
    output
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
    if 'image/png' in output.get('data', {})
  ]
  assert len(images) == 3
