"""The tiny benchmark: all of it, from the config to the report, and again."""

import json

import pytest

from configs import benchmark
from experiments import benchmark as experiment
from pal_jax.benchmark import jobs
from pal_jax.errors import InputError


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  out = tmp_path_factory.mktemp('benchmark')
  plan = jobs.make_plan(benchmark.get_config('tiny'))
  problems = experiment.run_jobs(plan, out / 'cells', workers=1)
  experiment.write_results(plan, out / 'cells', out, 'COMMAND', problems)
  return plan, out, problems


def test_every_cell_is_run(run):
  plan, out, problems = run
  assert not problems
  rows = json.loads((out / 'results.json').read_text())
  assert all(
    set(row)
    == {'method', 'dataset', 'seed', 'n', 'metric', 'mean', 'low', 'high'}
    for row in rows
  )
  found = {(r['method'], r['dataset'], r['seed']) for r in rows}
  assert found == {
    (m, d, s) for m in plan.methods for d in plan.datasets for s in plan.seeds
  }
  assert {r['n'] for r in rows if r['metric'] == 'nll'} == {0, 2, 5}
  controls = {'swapped_users', 'shuffled_support', 'flipped_labels'}
  assert {f'user_accuracy, {c}' for c in controls} <= {
    r['metric'] for r in rows
  }


def test_the_report_has_every_part(run):
  plan, out, _ = run
  report = (out / 'report.md').read_text()
  assert 'COMMAND' in report and '## Where PAL wins, ties and loses' in report
  assert 'Controls' in report and 'Hashes' in report
  for name in plan.datasets:
    assert f'## {name}' in report
    assert (out / f'{name}.md').read_text().count('| pal_a |') == 2
    assert (out / f'{name}.png').stat().st_size > 10_000
  assert (out / 'calibration.png').stat().st_size > 5_000
  assert 'Audit' in (out / 'audit.md').read_text()


def test_finished_cells_are_kept(run):
  plan, out, _ = run
  before = {p: p.stat().st_mtime_ns for p in (out / 'cells').rglob('*.npz')}
  assert len(before) == len(plan.methods) * len(plan.seeds)
  lost, damaged = sorted(before)[:2]
  lost.unlink()
  damaged.write_bytes(damaged.read_bytes()[:100])
  assert not experiment.run_jobs(plan, out / 'cells', workers=1)
  after = {p: p.stat().st_mtime_ns for p in (out / 'cells').rglob('*.npz')}
  assert set(after) == set(before)
  assert {p for p in after if after[p] != before[p]} == {lost, damaged}


def test_a_mistake_is_said_before_anything_runs():
  config = benchmark.get_config('tiny')
  for field, value, message in (
    ('methods', 'btl,nobody', "'nobody' is unknown.*pal_a"),
    ('datasets', 'persona', "'persona' is unknown.*persona_partition"),
    ('seeds', 'many', "config.seeds='many'"),
    ('resamples', 0, 'config.resamples=0'),
  ):
    wrong = config.copy_and_resolve_references()
    with wrong.unlocked():
      wrong[field] = value
    with pytest.raises(InputError, match=message):
      jobs.make_plan(wrong)
  wrong = config.copy_and_resolve_references()
  with wrong.unlocked():
    wrong.datasets = 'bowling_green'
  with pytest.raises(InputError, match='data.path is empty: download'):
    jobs.load_data(jobs.make_plan(wrong), 'bowling_green', 0, True)
