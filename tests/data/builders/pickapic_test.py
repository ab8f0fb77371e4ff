"""Pick-a-Pic and Pick-a-Filter: rows kept, splits, filters; runs of configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from pyarrow import csv

from configs import pick_a_filter, pickapic_v1, pickapic_v2
from pal_jax import data, models
from pal_jax.data.builders import pickapic, prepare
from pal_jax.data.dataset import UNSEEN_ITEMS
from pal_jax.errors import InputError
from pal_jax.train import train_and_evaluate
from tests.data.builders import files
from tests.slow import SLOW


def make_config(folder, which=pickapic_v1, **changes):
  config = which.get_config().unlock()
  config.data.path = str(folder)
  config.data.tfds_dir = str(folder / 'prepared')
  config.data.unseen_fraction = 0.2
  config.data.min_support = 5
  config.data.max_support = 5
  config.evaluation.num_support = (0, 2, 5)
  config.data.update(changes)
  return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('pick')
  files.write_pick_tables(root)
  return root


def rows_of(builder, split='train'):
  return list(prepare.read_split(builder, split))


def prepared(folder, train, config='v1', **tables):
  folder.mkdir(exist_ok=True)
  other = [files.pick_row('u', 'c', 'a', 'b', 1)]
  everything = {'train': train, 'validation': other, 'test': other, **tables}
  for name, rows in everything.items():
    files.write_parquet(folder / f'{name}.parquet', rows)
  kind = pickapic.PickAPic if isinstance(config, str) else pickapic.PickAFilter
  return prepare.prepare(
    kind,
    config,
    files=pickapic.PickAPic.find_files(folder),
    data_dir=folder / 'prepared',
  )


def test_rows_without_a_label_or_an_image_are_left_out(tmp_path):
  row = files.pick_row
  builder = prepared(
    tmp_path,
    [
      row(7, 'a cat', 'a', 'b', 1),
      row(7, 'a cat', 'a', 'b', 0.5),
      row(7, 'a cat', 'a', 'b', 1, has_label=False),
      row(7, 'a cat', 'a', 'b', 1, label_0=None),
      row(7, 'a cat', 'a', 'a', 1),
      row(None, 'a cat', 'a', 'b', 1),
      row(7, None, 'a', 'b', 1),
    ],
  )
  train = rows_of(builder)
  assert [r['label'] for r in train] == [1.0, 0.5]
  assert {r['user_id'] for r in train} == {'7'}
  note = prepare.note(builder)
  assert '2 without a label' in note
  assert '2 with a null user, caption or image' in note
  assert '1 of an image against itself' in note


def test_csv_and_parquet_are_the_same(tmp_path, folder):
  other = tmp_path / 'csv'
  other.mkdir()
  files.write_pick_tables(other, 'csv')
  one = data.create(make_config(folder).data)
  two = data.create(make_config(other).data)
  assert one.item_names == two.item_names
  assert one.user_ids == two.user_ids
  np.testing.assert_array_equal(one.train.items, two.train.items)
  np.testing.assert_array_equal(one.train.label, two.train.label)


def test_captions_may_hold_line_breaks_and_the_word_null(tmp_path):
  captions = ['null', 'two\nlines', 'a "quoted", one']
  rows = [
    files.pick_row('u', caption, f'{i}', f'{i}x', 1)
    for i, caption in enumerate(captions)
  ]
  table = pyarrow.Table.from_pylist(
    [{k: v for k, v in row.items() if k[:3] != 'jpg'} for row in rows]
  )
  for split in pickapic.SPLITS:
    csv.write_csv(table, tmp_path / f'{split}.csv')
  builder = prepare.prepare(
    pickapic.PickAPic,
    'v1',
    files=pickapic.PickAPic.find_files(tmp_path),
    data_dir=tmp_path / 'prepared',
  )
  assert [row['prompt'] for row in rows_of(builder)] == captions


def test_one_user_is_one_however_its_number_is_written(tmp_path):
  row = files.pick_row
  builder = prepared(tmp_path, [row(7.0, 'c', 'a', 'b', 1)])
  assert {r['user_id'] for r in rows_of(builder)} == {'7'}


def test_people_without_training_rows_are_left_out(tmp_path):
  files.write_pick_tables(tmp_path)
  test = files.pick_rows('test', 90)
  test += [files.pick_row(4711, 'c', 'p', 'q', 1)]
  for path in tmp_path.glob('test*'):
    path.unlink()
  files.write_parquet(tmp_path / 'test.parquet', test)
  dataset = data.create(make_config(tmp_path).data)
  assert '4711' not in {*dataset.user_ids, *dataset.unseen_user_ids}
  assert any(
    '1 validation and test rows are of people' in n for n in dataset.notes
  )


def test_published_splits_are_kept(folder):
  dataset = data.create(make_config(folder).data, join_prompt=False)
  names = np.array(dataset.item_names)

  def stems(comparisons):
    used = names[comparisons.items[comparisons.mask]]
    return {name.split('-')[0] for name in used.ravel()}

  assert stems(dataset.train) == stems(dataset.support) == {'train'}
  assert stems(dataset.validation) == {'validation'}
  assert stems(dataset.seen[UNSEEN_ITEMS]) == {'test'}
  assert stems(dataset.unseen[UNSEEN_ITEMS]) == {'test'}
  # A fifth of 30 users, who have 8 of the 240 training rows each.
  assert len(dataset.unseen_user_ids) == 6
  assert len(dataset.user_ids) == 24
  assert dataset.train.label.size == 24 * 8
  assert (dataset.support.mask.sum(-1) == 5).all()
  prompt = np.array(dataset.prompt_names)[dataset.train.prompt]
  assert all(p.startswith('train caption') for p in prompt)


def test_overlap_is_by_the_pair_of_images_in_either_order(tmp_path):
  row = files.pick_row
  test = [
    row('u', 'c', 'a', 'b', 1),
    row('u', 'c', 'b', 'a', 0),
    row('u', 'c', 'a', 'x', 1),
  ]
  builder = prepared(
    tmp_path,
    [row('u', 'c', 'q', 'r', 1)],
    'v2',
    test=test,
    v1_train=[row('w', 'd', 'b', 'a', 1)],
  )
  assert [r['overlap'] for r in rows_of(builder, 'test')] == [1, 1, 0]
  builder = prepared(tmp_path / 'without', test, 'v2')
  assert {r['overlap'] for r in rows_of(builder)} == {-1}


def test_overlap_may_be_listed_by_ranking_id(tmp_path):
  row = files.pick_row
  test = [row('u', 'c', 'a', 'b', 1, ranking_id=i) for i in (11, 12)]
  (tmp_path / pickapic.OVERLAP).write_text('12\n99\n')
  builder = prepared(tmp_path, test, 'v2', test=test)
  assert [r['overlap'] for r in rows_of(builder, 'test')] == [0, 1]


def test_only_the_rows_asked_for_are_tested(tmp_path):
  files.write_pick_tables(tmp_path)
  config = make_config(tmp_path, pickapic_v2)
  with pytest.raises(InputError, match='needs the training table of v1'):
    data.create(config.data)
  test = files.pick_rows('test', 90)
  files.write_parquet(tmp_path / 'v1_train.parquet', test[:30])

  people = []

  def count(which):
    config.data.test_rows = which
    dataset = data.create(config.data)
    people.append((dataset.user_ids, dataset.unseen_user_ids))
    sets = dataset.seen[UNSEEN_ITEMS], dataset.unseen[UNSEEN_ITEMS]
    return sum(int(s.mask.sum()) for s in sets)

  assert count('overlap') == 30
  assert count('no_overlap') == 60
  assert count('all') == 90
  # The same model for all three.
  assert people[0] == people[1] == people[2]


def test_filters_go_to_a_share_of_the_pairs(tmp_path):
  rows = [
    files.pick_row(i % 200, 'c', f'{i}a', f'{i}b', i % 2) for i in range(4000)
  ]
  rows.append(files.pick_row(0, 'c', 'tie-a', 'tie-b', 0.5))
  builder = prepared(tmp_path, rows, pickapic.filter_config(0.6, 3))
  found = rows_of(builder)
  groups = {}
  winner = {0: [], 1: []}
  filtered = 0
  for row in found:
    assert groups.setdefault(row['user_id'], row['group']) == row['group']
    sides = [row[f'image_{s}'].split('-', 1)[1:] for s in (0, 1)]
    if row['image_0'] == 'tie-a':
      assert row['image_1'] == 'tie-b'
      continue
    assert not (sides[0] and sides[1])
    for side, color in enumerate(sides):
      if not color:
        continue
      filtered += 1
      liked = pickapic.COLORS[row['group']]
      is_winner = side == (0 if row['label'] == 1 else 1)
      assert is_winner == (color[0] == liked)
      winner[row['group']].append(is_winner)
  # Six standard errors.
  assert filtered / 4000 == pytest.approx(0.6, abs=0.05)
  assert np.mean(winner[0]) == pytest.approx(0.5, abs=0.1)
  assert np.mean(winner[1]) == pytest.approx(0.5, abs=0.1)
  assert np.mean(list(groups.values())) == pytest.approx(0.5, abs=0.2)


def test_beta_is_part_of_what_is_prepared(folder):
  assert (
    data.create(make_config(folder, pick_a_filter, beta=0.0).data).item_names
    == data.create(make_config(folder).data).item_names
  )
  full = data.create(make_config(folder, pick_a_filter, beta=1.0).data)
  assert any(name.endswith('-blue') for name in full.item_names)
  with pytest.raises(InputError, match='data.beta=2.0 must lie in'):
    data.create(make_config(folder, pick_a_filter, beta=2.0).data)


def test_the_paper_model_has_its_number_of_parameters():
  config = pickapic_v1.get_config()
  model = models.create(config.model, num_users=4725, feature_width=1024)
  variables = jax.eval_shape(
    lambda key: model.init(
      key,
      jnp.zeros(1, jnp.int32),
      jnp.zeros((1, 2, 1024)),
      jnp.zeros((1, 1024)),
    ),
    jax.random.key(0),
  )
  params = variables['params']
  projectors = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if 'projector' in jax.tree_util.keystr(path)
  ]
  number = sum(int(np.prod(leaf.shape)) for leaf in projectors)
  assert number == 2 * 3_148_800  # 6.298 million


@pytest.mark.parametrize(
  'which',
  [
    pytest.param(pickapic_v1, marks=SLOW),
    pytest.param(pickapic_v2, marks=SLOW),
    pick_a_filter,
  ],
)
def test_a_full_run(which, tmp_path):
  tables = tmp_path / 'tables'
  tables.mkdir()
  # Of filtered pairs nothing but the colour tells who wins.
  rows = files.write_pick_tables(
    tables, sizes=(900, 120, 300), by_chance=which is pick_a_filter
  )
  if which is pickapic_v2:
    test = files.pick_rows('test', 300)
    files.write_parquet(tables / 'v1_train.parquet', test[:60])
  path = tmp_path / 'clip'
  path.mkdir()
  captions = {row['caption'] for row in rows}
  names = files.pick_names(rows, filtered=True)
  files.write_embeddings(path / 'captions.npz', sorted(captions))
  images = [name for name in names if name not in captions]
  files.write_embeddings(path / 'images.npz', images)
  config = make_config(tables, which)
  config.features.path = str(path)
  config.model.width = 8
  config.train.num_steps = 200
  config.train.batch_size = 256
  config.train.checkpoint_every = 200
  config.optimizer.groups.projectors.learning_rate = 1e-2
  config.optimizer.groups.points.learning_rate = 0.1
  results = train_and_evaluate(
    config.lock(), tmp_path / 'run', progress=False, say=lambda _: None
  )
  if which is pick_a_filter:
    # Two groups with opposite tastes: one score for everybody cannot.
    homogeneous = results['controls']['homogeneous_seen']['accuracy']
    assert homogeneous < 0.65
    assert results['seen']['accuracy'] > homogeneous + 0.15
    assert results['ari'] is not None
  else:
    assert results['seen']['accuracy'] > 0.75
    assert results['num_prototypes'] == 1


def test_what_is_missing_is_named(tmp_path):
  config = make_config(tmp_path / 'no')
  with pytest.raises(InputError, match='no such folder; fetch the tables'):
    data.create(config.data)
  (tmp_path / 'no').mkdir()
  with pytest.raises(InputError, match='no table of train, validation, test'):
    data.create(config.data)
  rows = [{'user_id': 1, 'caption': 'c'}]
  for split in pickapic.SPLITS:
    files.write_parquet(tmp_path / 'no' / f'{split}.parquet', rows)
  with pytest.raises(InputError, match="column 'image_0_uid' is missing"):
    data.create(config.data)
  (tmp_path / 'no' / 'train.parquet').write_bytes(b'PK\x03\x04')
  with pytest.raises(InputError, match='train.parquet: is not a parquet'):
    data.create(config.data)


def test_a_label_out_of_range_is_named(tmp_path):
  row = files.pick_row('u', 'c', 'a', 'b', 1, label_0=0.3)
  with pytest.raises(InputError, match="row 0: the column 'label_0' is 0.3"):
    prepared(tmp_path, [row])
