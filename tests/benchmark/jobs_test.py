"""benchmark.jobs: what has to be run, once, and is found again."""

import json

import numpy as np
import pytest

from configs import benchmark
from pal_jax import methods
from pal_jax.benchmark import jobs
from pal_jax.benchmark.jobs import make_plan, parse_seeds
from pal_jax.benchmark.store import describe, digest
from pal_jax.data.dataset import UNSEEN_ITEMS, fingerprint
from pal_jax.errors import InputError

SIZES = {
  'dimension': 3,
  'num_items': 60,
  'num_seen_users': 12,
  'num_unseen_users': 5,
  'comparisons_per_user': 8,
  'validation_per_user': 4,
  'seen_query': 5,
  'unseen_support': 6,
  'unseen_query': 5,
  'validation_fraction': 0.2,
}


def make_config(**changes):
  """Two planted sets of a second or so."""
  config = benchmark.get_config('tiny')
  config.methods = 'random,btl'
  config.datasets = 'length,low_rank'
  config.seeds = '2'
  for name in ('length', 'low_rank'):
    config.sets[name].data.update(SIZES)
    config.sets[name].num_support = (0, 2, 5)
  config.sets.low_rank.data.update({'rank': 2, 'spread': 0.0})
  config.update(changes)
  return config


def refused(*parts, **changes):
  with pytest.raises(InputError) as caught:
    make_plan(make_config(**changes))
  for part in parts:
    assert part in str(caught.value)


# Names and numbers.


@pytest.mark.parametrize(
  'text, seeds',
  [
    ('1', (0,)),
    ('5', (0, 1, 2, 3, 4)),
    (' 2 ', (0, 1)),
    ('3,', (3,)),
    (',3', (3,)),
    ('0,3', (0, 3)),
    ('4, 1,4', (4, 1)),
  ],
)
def test_seeds_are_a_number_of_them_or_a_list(text, seeds):
  assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
  'text', ['', ',', '0', '-1', '-1,', '2,-3', 'x', '1,x', '1.5', '1;2']
)
def test_other_seeds_are_refused(text):
  with pytest.raises(InputError) as caught:
    parse_seeds(text)
  for part in (f'config.seeds={text!r}', 'number of seeds', "'3,'"):
    assert part in str(caught.value)


def test_a_plan_has_names_and_seeds():
  plan = make_plan(make_config(methods=' btl,random , btl,', seeds='1,'))
  assert plan.methods == ('btl', 'random')
  assert plan.datasets == ('length', 'low_rank')
  assert plan.seeds == (1,)
  protocol = plan.protocol('length')
  assert (protocol.num_support, protocol.resamples) == ((0, 2, 5), 2)


def test_all_are_all_methods():
  plan = make_plan(make_config(methods='all'))
  assert {'random', 'btl', 'em', 'rfm', 'pal_a', 'pal_b'} <= set(plan.methods)
  for name in plan.methods:
    assert 1 <= len(plan.candidates(name)) <= 2  # config.max_candidates


def test_an_unknown_name_lists_those_there_are():
  refused(
    "config.datasets='length,nowhere': 'nowhere' is unknown",
    'persona_partition',
    'homogeneous',
    datasets='length,nowhere',
  )
  refused(
    "config.methods='btl,nobody': 'nobody' is unknown",
    'random',
    'pal_b',
    methods='btl,nobody',
  )


@pytest.mark.parametrize('text', ['', ' , '])
@pytest.mark.parametrize(
  'field, known', [('methods', 'btl'), ('datasets', 'homogeneous')]
)
def test_no_name_is_refused(field, known, text):
  refused(f'config.{field}={text!r}: names nothing', known, **{field: text})


@pytest.mark.parametrize(
  'field, value, low',
  [('resamples', 0, 1), ('max_candidates', -1, 0), ('max_steps', -5, 0)],
)
def test_numbers_out_of_range_are_refused(field, value, low):
  refused(f'config.{field}={value} must be at least {low}', **{field: value})


def test_unknown_features_are_refused():
  config = make_config()
  config.sets.low_rank.features = 'sound'
  with pytest.raises(InputError) as caught:
    make_plan(config)
  for part in ("config.sets.low_rank.features='sound'", 'text', 'ids'):
    assert part in str(caught.value)


# Keys.


def key_of(config, dataset='length', seed=0):
  return digest(make_plan(config).data_key(dataset, seed))


def test_a_key_changes_with_every_field_of_the_data():
  before = key_of(make_config())
  data = make_config().sets.length.data
  assert len(list(data)) > 15
  for field, value in data.items():
    if field == 'seed':
      continue  # that of the cell
    config = make_config()
    new = value + 'x' if isinstance(value, str) else value + type(value)(1)
    config.sets.length.data[field] = new
    assert key_of(config) != before, field


def test_a_key_changes_with_the_seed_and_the_features():
  before = key_of(make_config())
  assert key_of(make_config(), seed=1) != before
  config = make_config()
  config.sets.length.data.seed = 7
  assert key_of(config) == before
  config.sets.length.features = 'ids'
  assert key_of(config) != before
  config = make_config()
  config.features.pooling = 'cls'
  assert key_of(config) != before


@pytest.mark.parametrize(
  'dataset, kind',
  [('persona_partition', 'persona'), ('brexit', 'polis')],
)
def test_where_a_download_lies_is_no_part_of_a_key(dataset, kind):
  keys = []
  for path in ('', '/here', '/there/it/is'):
    config = make_config()
    config.paths[kind] = path
    plan = make_plan(config)
    assert plan.data_config(dataset, 0).path == path
    keys.append(key_of(config, dataset))
  assert keys[0] != keys[1] == keys[2]  # the first is what is shipped


def test_where_features_are_kept_is_no_part_of_a_key():
  config = make_config()
  config.features.cache_dir = '/elsewhere'
  assert key_of(config) == key_of(make_config())


# Data.


def test_ids_are_a_column_an_item():
  config = make_config()
  config.sets.length.features = 'ids'
  for joined in (True, False):
    dataset, table = jobs.load_data(make_plan(config), 'length', 0, joined)
    count = len(dataset.item_names)
    assert count == 60
    # Of mean square one, as other features.
    np.testing.assert_allclose(table.items, np.sqrt(60) * np.eye(60), rtol=1e-6)
    np.testing.assert_allclose(np.mean(table.items**2, -1), 1.0, rtol=1e-6)
    assert table.prompts.shape == (len(dataset.prompt_names), count)
    assert table.items.dtype == table.prompts.dtype == np.float32


def test_other_features_are_those_of_the_data():
  dataset, table = jobs.load_data(make_plan(make_config()), 'length', 1, True)
  np.testing.assert_array_equal(table.items, dataset.item_features)


def test_a_seed_makes_other_data():
  plan = make_plan(make_config())
  zero, again, one = (
    fingerprint(jobs.load_data(plan, 'length', seed, True)[0])
    for seed in (0, 0, 1)
  )
  assert zero == again and zero['comparisons'] != one['comparisons']


def test_tuples_of_a_config_survive():
  """Behaviours are a tuple; the data are found by JSON, which has none."""
  plan = make_plan(make_config(datasets='persona_partition'))
  dataset, table = jobs.load_data(plan, 'persona_partition', 0, True)
  assert dataset.num_users == 20
  assert len(table.items) == len(dataset.item_names)


# Jobs.


@pytest.fixture
def two_settings(monkeypatch):
  """Each method has two settings: chance and one score."""
  monkeypatch.setattr(
    jobs.Plan,
    'candidates',
    lambda self, method: (methods.Random(), methods.BradleyTerry()),
  )


def forbid(monkeypatch, *names):
  def never(*args, **kwargs):
    raise AssertionError('this has been run')

  for name in names:
    monkeypatch.setattr(jobs, name, never)


def test_a_job_is_done_once_and_found_again(tmp_path, monkeypatch):
  plan = make_plan(make_config())
  job = plan, tmp_path, 'length', 'btl'
  assert jobs.count_finished(*job) == 0
  assert jobs.finished_cell(*job, 0) is None
  jobs.run_job(*job)
  assert jobs.count_finished(*job) == 2
  forbid(monkeypatch, 'run_cell', 'select')
  jobs.run_job(*job)
  cell = jobs.finished_cell(*job, 1)
  assert (cell.dataset, cell.method, cell.seed) == ('length', 'btl', 1)
  assert cell.arrays['num_support'].tolist() == [0, 2, 5]
  assert cell.arrays[f'unseen/{UNSEEN_ITEMS}/logit'].shape == (3, 2, 5, 5)
  # Others are still to run.
  assert jobs.count_finished(plan, tmp_path, 'length', 'random') == 0
  assert jobs.count_finished(plan, tmp_path, 'low_rank', 'btl') == 0


def test_a_cell_tells_what_it_is_of(tmp_path):
  plan = make_plan(make_config(seeds='1,'))
  jobs.run_job(plan, tmp_path, 'length', 'random')
  meta = jobs.finished_cell(plan, tmp_path, 'length', 'random', 1).meta
  dataset, _ = jobs.load_data(plan, 'length', 1, True)
  assert meta['seen_users'] == list(dataset.user_ids)
  assert meta['unseen_users'] == list(dataset.unseen_user_ids)
  assert meta['group'] == dataset.truth.group[12:].tolist()
  assert meta['fingerprint'] == fingerprint(dataset)
  assert meta['train_comparisons'] == 12 * 8
  assert meta['method'] == {'class': 'Random'}
  assert meta['repeated_people'] is False


def test_a_cell_tells_the_seed_of_its_data(tmp_path):
  plan = make_plan(make_config(seeds='1,'))
  jobs.run_job(plan, tmp_path, 'length', 'random')
  meta = jobs.finished_cell(plan, tmp_path, 'length', 'random', 1).meta
  assert meta['data']['seed'] == 1


def test_only_what_is_missing_or_broken_is_run_again(tmp_path, monkeypatch):
  plan = make_plan(make_config(seeds='3'))
  job = plan, tmp_path, 'length', 'random'
  jobs.run_job(*job)
  paths = sorted(tmp_path.rglob('seed*.npz'))
  assert len(paths) == 3
  before = [path.read_bytes() for path in paths]
  paths[0].unlink()
  paths[2].write_bytes(before[2][:100])
  assert jobs.finished_cell(*job, 2) is None
  run, real = [], jobs.run_cell

  def counted(method, dataset, table, protocol, seed):
    run.append(seed)
    return real(method, dataset, table, protocol, seed)

  monkeypatch.setattr(jobs, 'run_cell', counted)
  jobs.run_job(*job)
  assert run == [0, 2]
  assert sorted(tmp_path.rglob('seed*.npz')) == paths
  assert all(jobs.finished_cell(*job, seed) for seed in range(3))


@pytest.mark.parametrize(
  'changes', [{'resamples': 3}, {'seeds': '7,'}, {'num_items': 61}]
)
def test_other_settings_are_other_cells(tmp_path, changes):
  plan = make_plan(make_config())
  jobs.run_job(plan, tmp_path, 'length', 'random')
  items = changes.pop('num_items', None)
  config = make_config(**changes)
  if items:
    config.sets.length.data.num_items = items
  other = make_plan(config)
  assert jobs.count_finished(other, tmp_path, 'length', 'random') == 0


def test_what_cannot_be_run_says_which(tmp_path):
  config = make_config()
  config.sets.length.data.short_share = 0.7
  with pytest.raises(InputError, match='random on length: data.short_share'):
    jobs.run_job(make_plan(config), tmp_path, 'length', 'random')
  assert not list(tmp_path.rglob('*.npz'))


# Tuning.


def test_one_setting_needs_no_tuning(tmp_path, monkeypatch):
  plan = make_plan(make_config())
  forbid(monkeypatch, 'select')
  found = jobs.tune(plan, tmp_path, 'length', 'btl')
  assert found == jobs.read_tuning(plan, tmp_path, 'length', 'btl')
  assert found['index'] == 0 and found['nll'] == [None]
  assert not list(tmp_path.iterdir())


def test_a_choice_is_made_once_and_used(tmp_path, monkeypatch, two_settings):
  plan = make_plan(make_config())
  job = plan, tmp_path, 'low_rank', 'em'
  assert jobs.read_tuning(*job) is None
  assert jobs.finished_cell(*job, 0) is None and jobs.count_finished(*job) == 0
  jobs.run_job(*job)
  found = jobs.read_tuning(*job)
  assert found['index'] == int(np.argmin(found['nll'])) == 1
  assert len(found['nll']) == len(found['error']) == 2
  assert found['chosen'] == describe(methods.BradleyTerry())
  assert found['validation_users'] == 6
  assert found['validation_comparisons'] == 6 * 4
  assert jobs.finished_cell(*job, 1).meta['method'] == found['chosen']
  forbid(monkeypatch, 'select', 'run_cell')
  assert jobs.tune(*job) == found
  jobs.run_job(*job)


@pytest.mark.parametrize('damage', ['', '{"index": ', 'garbage'])
def test_a_broken_choice_is_made_again(tmp_path, two_settings, damage):
  plan = make_plan(make_config())
  job = plan, tmp_path, 'low_rank', 'em'
  found = jobs.tune(*job)
  (path,) = tmp_path.rglob('tuning-*.json')
  assert json.loads(path.read_text('utf-8')) == found
  path.write_text(damage, 'utf-8')
  assert jobs.read_tuning(*job) is None
  assert jobs.tune(*job) == found == jobs.read_tuning(*job)


@pytest.mark.parametrize(
  'changes', [{'validation_share': 0.4}, {'resamples': 1}]
)
def test_other_settings_are_other_choices(tmp_path, two_settings, changes):
  plan, other = make_plan(make_config()), make_plan(make_config(**changes))
  jobs.tune(plan, tmp_path, 'low_rank', 'em')
  assert jobs.read_tuning(other, tmp_path, 'low_rank', 'em') is None
  assert jobs.read_tuning(plan, tmp_path, 'length', 'em') is None


def test_a_choice_is_for_all_seeds(tmp_path, two_settings):
  few, many = make_plan(make_config()), make_plan(make_config(seeds='9,'))
  found = jobs.tune(few, tmp_path, 'low_rank', 'em')
  assert jobs.read_tuning(many, tmp_path, 'low_rank', 'em') == found
