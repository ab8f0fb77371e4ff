"""adaptation.users: a table of users, what it keeps, forgets and writes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from pal_jax.adaptation import (
  Prior,
  Statistics,
  adapt,
  atom_log_likelihoods,
  fit_users,
  place,
  statistics,
)
from pal_jax.adaptation.users import UserTable
from pal_jax.errors import InputError
from pal_jax.models.pal_a import PalA
from pal_jax.models.pal_b import PalB
from pal_jax.structs import FeatureTable, make_comparisons

K, P, M, Q, ATOMS = 3, 4, 20, 5, 6
# Four users and 5 to 8 comparisons: what a table compiles is padded to 4 x 8.
U, N, EARLY = 4, 8, 5
IDS = ('ann', 'bob', 'cem', 'dee')
ODD_IDS = (
  '',
  'a.b/c',
  '..',
  'keys',
  'ユーザー',
  'a\x00b',
  '\ud800',
  '\ud83d\ude00',  # two halves of a character, which are not the character
  '😀',
  'x' * 10_000,
  ' ',
  'null',
)

FORMS = {
  'delta': (PalA, {'point': 'Pw'}),
  'shared basis': (PalA, {'point': 'Pw', 'preference': 'cosine'}),
  'own basis': (PalB, {'projector': 'mlp0', 'preference': 'cosine'}),
  'f(Pw)': (PalA, {'point': 'f(Pw)', 'projector': 'mlp1'}),
}
METHODS = ('posterior', 'map')
CASES = [(form, method) for form in FORMS for method in METHODS]


def make_model(cls=PalA, num_prototypes=K, **fields):
  fields = {'projector': 'identity', 'learn_scale': True, **fields}
  if cls is PalA:
    fields = {'feature_width': P, **fields}
  return cls(num_users=2, num_prototypes=num_prototypes, width=P, **fields)


def make_variables(model):
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    np.zeros(2, np.int32),
    np.zeros((2, 2, P), np.float32),
    np.zeros((2, P), np.float32),
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: np.float32(rng.normal(size=x.shape)), shapes['params']
  )
  return {'params': params}


def make_prior(num_prototypes=K, atoms=ATOMS):
  rng = np.random.default_rng(3)
  return Prior(
    log_weights=jnp.float32(log_softmax(rng.normal(size=num_prototypes))),
    strength=jnp.float32(0.5),
    log_atoms=jnp.float32(
      log_softmax(2 * rng.normal(size=(atoms, num_prototypes)), -1)
    ),
    log_masses=jnp.float32(log_softmax(rng.normal(size=atoms))),
    evidence=jnp.float32(1.5),
    pooling=jnp.float32(0.2),
  )


@functools.cache
def make_case(form):
  """(model, variables, prior), (statistics, label) of U users, N each."""
  cls, fields = FORMS[form]
  model = make_model(cls, **fields)
  variables = make_variables(model)
  rng = np.random.default_rng(1)
  table = FeatureTable(
    items=np.float32(rng.normal(size=(M, P))),
    prompts=np.float32(rng.normal(size=(Q, P))),
  )
  label = rng.integers(0, 2, (U, N)).astype(np.float32)
  label[:, ::5] = rng.random(label[:, ::5].shape)
  comparisons = make_comparisons(
    np.arange(U)[:, None],
    np.argsort(rng.random((U, N, M)), -1)[..., :2],
    label,
    prompt=rng.integers(0, Q, (U, N)),
  )
  placed = place(model, variables, table)
  stats = statistics(
    model, variables, placed, comparisons, model.adaptation_rule
  )
  stats = jax.tree.map(np.asarray, stats)
  return (model, variables, make_prior()), (stats, label)


def make_table(form='delta', method='posterior'):
  """An empty table, and the data of its users."""
  frozen, data = make_case(form)
  return UserTable(*frozen, method=method), *data


def part(stats, users=slice(None), comparisons=slice(None)):
  return stats.map(lambda x: x[users, comparisons])


def full_table(form='delta', method='posterior', ids=IDS):
  """Up to U users with all their comparisons."""
  table, stats, label = make_table(form, method)
  rows = slice(len(ids))
  table.add(ids, part(stats, rows), label[rows])
  return table, stats, label


def assert_same(first, second, **kwargs):
  """Bit by bit, or with a tolerance."""
  check = (
    np.testing.assert_allclose if kwargs else np.testing.assert_array_equal
  )
  jax.tree.map(lambda x, y: check(x, y, **kwargs), first, second)


def everything(table):
  """Of every user: state and number of comparisons."""
  return {
    i: (
      jax.tree.map(np.copy, table.lookup([i]).users),
      table.num_comparisons(i),
    )
    for i in table.ids
  }


def read(path):
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def test_the_cases_are_all_forms_of_statistics():
  forms = {form: make_case(form)[1][0] for form in FORMS}
  assert forms['delta'].delta is not None and forms['delta'].x is None
  assert forms['shared basis'].shared_basis
  assert forms['own basis'].basis.shape == (U, N, K, 4)
  assert forms['f(Pw)'].shared_basis and forms['f(Pw)'].x.shape[-1] == P
  assert forms['f(Pw)'].basis.shape == (K, P)


# What a user's state is.


@pytest.mark.parametrize('form, method', CASES)
def test_adding_is_adapting(form, method):
  (model, variables, prior), (stats, label) = make_case(form)
  mask = np.arange(N) < np.array([0, 5, 7, 8])[:, None]
  expected = adapt(model, variables, stats, label, mask, prior, method=method)
  table, *_ = make_table(form, method)
  # Padding may hold anything.
  users = table.add(IDS, stats, np.where(mask, label, np.nan), mask)
  assert_same(users, expected, rtol=1e-5, atol=1e-5)
  assert np.all(users.converged)
  assert_same(table.lookup(IDS).users, users)
  assert [table.num_comparisons(i) for i in IDS] == [0, 5, 7, 8]
  assert table.ids == IDS and len(table) == U and 'ann' in table
  weights = np.exp(users.log_weights)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  assert np.ptp(weights, 0).max() > 0.05


@pytest.mark.parametrize('form, method', CASES)
def test_updates_are_adding_everything_at_once(form, method):
  table, stats, label = make_table(form, method)
  table.add(IDS, part(stats, comparisons=slice(EARLY)), label[:, :EARLY])
  before = table.lookup(IDS).users
  late = slice(EARLY, N)
  users = table.update(IDS, part(stats, comparisons=late), label[:, late])
  whole, *_ = full_table(form, method)
  assert_same(users, whole.lookup(IDS).users, rtol=1e-6, atol=1e-6)
  assert np.any(before.log_weights != users.log_weights)
  assert [table.num_comparisons(i) for i in IDS] == [N] * U


@pytest.mark.parametrize('form, method', CASES)
def test_the_order_of_updates_does_not_matter(form, method):
  table, stats, label = make_table(form, method)
  for piece in (slice(3, N), slice(0, 3)):
    table.update(IDS, part(stats, comparisons=piece), label[:, piece])
  users = table.lookup(IDS).users
  expected = full_table(form, method)[0].lookup(IDS).users
  np.testing.assert_allclose(
    np.exp(users.log_weights), np.exp(expected.log_weights), atol=1e-3
  )
  np.testing.assert_allclose(users.objective, expected.objective, rtol=1e-4)


def test_update_adds_users_who_are_not_there():
  (model, variables, prior), (stats, label) = make_case('delta')
  table, *_ = make_table()
  table.add(IDS[:3], part(stats, slice(3), slice(EARLY)), label[:3, :EARLY])
  late = slice(EARLY, N)
  table.update(IDS[1:], part(stats, slice(1, 4), late), label[1:, late])
  assert table.ids == IDS
  assert [table.num_comparisons(i) for i in IDS] == [5, 8, 8, 3]
  first, last = [EARLY, N, N, N], [0, 0, 0, EARLY]
  number = np.arange(N)
  mask = (number < np.c_[first]) & (number >= np.c_[last])
  expected = adapt(model, variables, stats, label, mask, prior)
  assert_same(table.lookup(IDS).users, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('method', METHODS)
def test_other_users_are_not_touched(method):
  table, stats, label = make_table('delta', method)
  table.add(IDS, stats, label, np.arange(N) < np.c_[[N, N, EARLY, N]])
  others = everything(table)
  cem = others.pop('cem')[0]
  new = ('cem', 'eve', 'fay', 'gus')
  table.update(new, part(stats, comparisons=slice(3)), 1 - label[:, :3])
  assert np.any(table.lookup(['cem']).users.log_weights != cem.log_weights)
  for user_id in new:
    table.forget(user_id)
  after = everything(table)
  assert list(after) == ['ann', 'bob', 'dee'] == list(others)
  for user, (state, count) in others.items():
    assert_same(after[user][0], state)
    assert after[user][1] == count


def test_masks_of_numbers_are_masks():
  _, (stats, label) = make_case('delta')
  mask = np.arange(N) % 2 == 0
  mask = np.tile(mask, (U, 1))
  first, second = make_table()[0], make_table()[0]
  expected = first.add(IDS, stats, label, mask)
  assert_same(second.add(IDS, stats, label, mask.astype(int)), expected)
  assert second.num_comparisons('ann') == N // 2


def test_later_changes_of_the_callers_arrays_do_not_reach_the_table():
  table, stats, label = make_table('shared basis')
  mine, labels = jax.tree.map(np.copy, stats), label.copy()
  table.add(IDS, mine, labels)
  for x in (mine.x, mine.basis, labels):
    x[:] = 0.5
  late = part(stats, comparisons=slice(1))
  users = table.update(IDS, late, label[:, :1])
  twice, *_ = full_table('shared basis')
  assert_same(users, twice.update(IDS, late, label[:, :1]))


# Strangers.


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
  'fields', [{}, {'membership': 'partition'}], ids=['convex', 'partition']
)
def test_strangers_are_the_population(fields, method):
  model, prior = make_model(point='Pw', **fields), make_prior()
  table = UserTable(model, make_variables(model), prior, method=method)
  _, (stats, label) = make_case('delta')
  # The last user has said nothing.
  added = table.add(IDS, stats, label, np.tile(np.arange(U) < 3, (N, 1)).T)
  found = table.lookup(['zoe', 'ann', 'zoe', ''])
  assert found.known.tolist() == [False, True, False, False]
  first, silent = (
    jax.tree.map(lambda x, row=row: x[row : row + 1], added) for row in (0, 3)
  )
  assert_same(jax.tree.map(lambda x: x[1:2], found.users), first)
  for row in (0, 2, 3):
    stranger = jax.tree.map(lambda x, row=row: x[row : row + 1], found.users)
    assert_same(stranger, silent, rtol=1e-5, atol=1e-5)
  if added.log_belief is not None:
    np.testing.assert_allclose(
      found.users.log_belief[0], prior.log_masses, rtol=1e-5
    )
  else:
    np.testing.assert_allclose(
      found.users.log_weights[0], prior.log_weights, rtol=1e-5
    )
  assert table.num_comparisons('zoe') == 0 and 'zoe' not in table


def test_an_empty_table_knows_nobody():
  table, *_ = make_table()
  assert len(table) == 0 and table.ids == ()
  found = table.lookup(['ann'])
  assert not found.known[0] and found.users.log_weights.shape == (1, K)
  nobody = table.lookup([])
  assert nobody.known.shape == (0,)
  assert nobody.users.log_weights.shape == (0, K)


def test_nobody_can_be_added():
  table, stats, label = make_table()
  users = table.add([], part(stats, slice(0)), label[:0])
  assert users.log_weights.shape == (0, K) and len(table) == 0


# Files.


@pytest.mark.parametrize('form, method', CASES)
def test_a_loaded_table_is_the_saved_one_and_goes_on_alike(
  form, method, tmp_path
):
  table, stats, label = make_table(form, method)
  mask = np.arange(EARLY) < np.array([0, 2, 4, 5])[:, None]
  early = part(stats, comparisons=slice(EARLY))
  table.add(IDS, early, label[:, :EARLY], mask)
  path = tmp_path / 'users.npz'
  table.save(path)
  loaded = UserTable.load(path, *make_case(form)[0])
  assert loaded.ids == table.ids
  assert_same(everything(loaded), everything(table))
  late = slice(N - 3, N)
  updated = [
    t.update(IDS, part(stats, comparisons=late), label[:, late])
    for t in (table, loaded)
  ]
  assert_same(*updated)
  assert_same(loaded.lookup(['zoe']), table.lookup(['zoe']))
  again = tmp_path / 'again'
  for t in (table, loaded):
    t.save(again)
    t.save(again)  # over the old one
  assert_same(
    everything(UserTable.load(again, *make_case(form)[0])), everything(table)
  )


def test_any_string_is_an_id(tmp_path):
  table, stats, label = make_table()
  rows = np.arange(len(ODD_IDS)) % U
  labels = label[rows]
  labels[:, 0] = np.linspace(0, 1, len(ODD_IDS))
  for start in range(0, len(ODD_IDS), U):
    four = slice(start, start + U)
    table.add(ODD_IDS[four], part(stats, rows[four]), labels[four])
  table.save(tmp_path / 'users')
  loaded = UserTable.load(tmp_path / 'users', *make_case('delta')[0])
  assert loaded.ids == ODD_IDS
  assert_same(everything(loaded), everything(table))
  assert loaded.lookup(ODD_IDS).known.all()
  for user_id in ODD_IDS:
    loaded.forget(user_id)
    assert user_id not in loaded
  assert len(loaded) == 0


def test_an_empty_table_can_be_saved(tmp_path):
  table, stats, label = full_table()
  for user_id in IDS:
    table.forget(user_id)
  table.save(tmp_path / 'users.npz')
  loaded = UserTable.load(tmp_path / 'users.npz', *make_case('delta')[0])
  assert len(loaded) == 0
  loaded.add(IDS, stats, label)
  assert_same(everything(loaded), everything(full_table()[0]))


@pytest.mark.parametrize('method', METHODS)
def test_what_is_forgotten_is_gone(method, tmp_path):
  table, stats, label = full_table('own basis', method)
  path = tmp_path / 'users.npz'
  table.save(path)
  before = read(path)
  table.forget('bob')
  assert 'bob' not in table and table.ids == ('ann', 'cem', 'dee')
  assert table.num_comparisons('bob') == 0
  assert not table.lookup(['bob']).known[0]
  table.save(path)
  after = read(path)
  assert before.keys() == after.keys()
  assert b'bob' in before['ids'].tobytes()
  assert b'bob' not in after['ids'].tobytes()
  assert b'bob' not in path.read_bytes()
  for name in before:
    if name.startswith('stats_') or name == 'label':
      assert len(before[name]) == U * N and len(after[name]) == (U - 1) * N
      kept = np.delete(before[name], np.arange(N, 2 * N), 0)
    elif name.startswith('state_') or name == 'num_comparisons':
      kept = np.delete(before[name], 1, 0)
    elif name != 'ids':
      kept = before[name]
    else:
      continue
    np.testing.assert_array_equal(after[name], kept)
  # Who comes back is new.
  table.add(['bob', 'eve', 'fay', 'gus'], stats, label)
  assert table.num_comparisons('bob') == N
  with pytest.raises(InputError, match="'zoe' is not in the table"):
    table.forget('zoe')


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
  table, *_ = full_table()
  path = tmp_path / 'users.npz'
  table.save(path)
  old = path.read_bytes()
  table.forget('ann')

  def full_disk(file, **arrays):
    file.write(b'half of it')
    raise OSError('no space left on device')

  monkeypatch.setattr(np, 'savez', full_disk)
  with pytest.raises(OSError, match='no space'):
    table.save(path)
  assert path.read_bytes() == old
  assert list(tmp_path.iterdir()) == [path]
  with pytest.raises(OSError, match='no space'):
    table.save(tmp_path / 'other')
  assert list(tmp_path.iterdir()) == [path]


def rewrite(path, **changes):
  """The file with some arrays changed, or left out where None."""
  arrays = {**read(path), **changes}
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


DAMAGE = {
  'truncated': lambda path: path.write_bytes(path.read_bytes()[:-200]),
  'cut early': lambda path: path.write_bytes(path.read_bytes()[:50]),
  'empty': lambda path: path.write_bytes(b''),
  'text': lambda path: path.write_text('ann, bob'),
  'one array': lambda path: np.save(path.open('wb'), np.ones(3)),
  'other arrays': lambda path: np.savez(path, a=np.ones(3)),
  'other format': lambda path: rewrite(
    path, format=np.frombuffer(b'pal_jax users 9', np.uint8)
  ),
  'pickled': lambda path: rewrite(path, ids=np.array([{'a': 1}], object)),
  'broken ids': lambda path: rewrite(
    path, ids=np.frombuffer(b'["ann", ', np.uint8)
  ),
  'more ids than users': lambda path: rewrite(
    path,
    ids=np.frombuffer(json.dumps([*IDS, 'eve']).encode(), np.uint8),
  ),
  'the same id twice': lambda path: rewrite(
    path,
    ids=np.frombuffer(json.dumps(['ann', *IDS[:-1]]).encode(), np.uint8),
  ),
  'no labels': lambda path: rewrite(path, label=None),
  'fewer labels': lambda path: rewrite(path, label=np.zeros(3, np.float32)),
  'no statistics': lambda path: rewrite(path, stats_delta=None),
  'fewer comparisons': lambda path: rewrite(
    path, stats_delta=np.zeros((3, K), np.float32)
  ),
  'no objective': lambda path: rewrite(path, state_objective=None),
  'fewer states': lambda path: rewrite(
    path, state_log_weights=np.zeros((2, K), np.float32)
  ),
  'something else': lambda path: rewrite(path, state_mood=np.zeros(U)),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_files_that_are_no_tables_are_refused_by_name(damage, tmp_path):
  table, *_ = full_table()
  path = tmp_path / 'users.npz'
  table.save(path)
  DAMAGE[damage](path)
  with pytest.raises(InputError, match='users.npz'):
    UserTable.load(path, *make_case('delta')[0])


def test_missing_files_are_refused_by_name(tmp_path):
  for path in (tmp_path / 'users.npz', tmp_path):
    with pytest.raises(InputError, match=path.name):
      UserTable.load(path, *make_case('delta')[0])


@pytest.mark.parametrize('method', METHODS)
def test_tables_of_another_model_or_prior_are_refused(method, tmp_path):
  table, *_ = full_table('delta', method)
  path = tmp_path / 'users.npz'
  table.save(path)
  wide = make_model(point='Pw', num_prototypes=K + 1)
  with pytest.raises(InputError, match=r'users.npz: .*\(3,\).*\(4,\)'):
    UserTable.load(path, wide, make_variables(wide), make_prior(K + 1))
  if method == 'posterior':
    (model, variables, _), _ = make_case('delta')
    with pytest.raises(InputError, match='log_belief'):
      UserTable.load(path, model, variables, make_prior(atoms=ATOMS + 1))


# Errors, after which the table is as it was.


def wrong_arrays():
  _, (stats, label) = make_case('delta')
  high, nan = label.copy(), label.copy()
  high[1, 2], nan[3, 0] = 1.5, np.nan
  short = part(stats, comparisons=slice(N - 1))
  wide = Statistics(np.zeros((U, N, K + 1), np.float32), None, None)
  other = make_case('shared basis')[1][0]
  new = ('eve', 'fay', 'gus', 'hal')
  return {
    'twice': (('eve', 'fay', 'eve', 'gus'), stats, label, "'eve'.*twice"),
    'no string': ((1, 2, 3, 4), stats, label, '1 is a int'),
    'bytes': ((b'a', b'b', b'c', b'd'), stats, label, 'strings'),
    'one string': ('efgh', stats, label, 'one string'),
    'range': (new, stats, high, "'fay', comparison 2: label 1.5"),
    'negative': (new, stats, -1 - label, "'eve', comparison 0: label -"),
    'nan': (new, stats, nan, "'hal', comparison 0: label nan"),
    'fewer ids': (new[:2], stats, label, '2 users'),
    'flat labels': (new, stats, label[0], 'label and mask'),
    'fewer statistics': (new, short, label, 'delta is'),
    'other users': (new, part(stats, slice(2)), label, 'delta is'),
    'other K': (new, wide, label, 'delta is'),
    'other form': (new, other, label, 'statistics'),
  }


@pytest.mark.parametrize('call', ['add', 'update'])
@pytest.mark.parametrize('wrong', wrong_arrays())
def test_wrong_arguments_are_refused_and_change_nothing(call, wrong):
  table, *_ = full_table()
  before = everything(table)
  ids, stats, label, message = wrong_arrays()[wrong]
  with pytest.raises(InputError, match=message):
    getattr(table, call)(ids, stats, label)
  assert_same(everything(table), before)


def test_wrong_arguments_are_refused_by_an_empty_table_too():
  for ids, stats, label, message in wrong_arrays().values():
    if message == 'statistics':
      continue  # nothing to compare the form with
    table, *_ = make_table()
    with pytest.raises(InputError, match=message):
      table.add(ids, stats, label)
    assert len(table) == 0


def test_users_who_are_there_cannot_be_added():
  table, stats, label = full_table(ids=IDS[:2])
  before = everything(table)
  with pytest.raises(InputError, match=r"\['bob'\] are in .*: use update"):
    table.add(['eve', 'bob'], part(stats, slice(2)), label[:2])
  assert_same(everything(table), before)


def test_masks_of_another_shape_are_refused():
  table, stats, label = make_table()
  with pytest.raises(InputError, match='label and mask'):
    table.add(IDS, stats, label, np.ones((U, N + 1), bool))
  assert len(table) == 0


def test_an_error_while_fitting_changes_nothing(monkeypatch):
  table, stats, label = full_table()
  before = everything(table)

  def fail(*args, **kwargs):
    raise MemoryError

  monkeypatch.setattr('pal_jax.adaptation.users.adapt', fail)
  with pytest.raises(MemoryError):
    table.update((*IDS[:3], 'eve'), stats, label)
  assert_same(everything(table), before)


def test_one_string_is_no_list_of_ids():
  table, *_ = full_table()
  with pytest.raises(InputError, match='one string'):
    table.lookup('ann')


def test_unknown_methods_are_refused():
  with pytest.raises(InputError, match="'mean' is unknown.*'posterior'"):
    make_table(method='mean')


# Compilation.


@pytest.mark.parametrize(
  'method, compiled', [('posterior', atom_log_likelihoods), ('map', fit_users)]
)
def test_few_shapes_are_compiled(method, compiled):
  table, stats, label = make_table('delta', method)
  wide, labels = np.tile(stats.delta, (1, 2, 1)), np.tile(label, (1, 2))
  # A model of its own, so that no other test has compiled for it.
  model = make_model(point='Pw', init_user_scale=0.5 + len(method))
  variables, prior = make_case('delta')[0][1:]
  table = UserTable(model, variables, prior, method=method)
  before = compiled._cache_size()
  # Widths 1, 2, 4, 8 and 16 for `posterior`; the solver takes longer to
  # compile, and one width shows the same.
  for n in range(1, 17) if method == 'posterior' else range(5, 9):
    ids = [f'{i}, {n}' for i in range(U - n % 2)]
    delta = wide[: len(ids), :n]
    table.add(ids, Statistics(delta, None, None), labels[: len(ids), :n])
  limit = 5 if method == 'posterior' else 1
  assert 0 < compiled._cache_size() - before <= limit
