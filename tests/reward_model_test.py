"""RewardModel: rewards by their definition, users, files, and wrong inputs."""

import json
import shutil

import jax
import numpy as np
import pytest
from scipy.special import expit, log_softmax, logsumexp

import pal_jax
from configs import base, tiny
from pal_jax import adaptation
from pal_jax.adaptation.users import UserTable
from pal_jax.errors import InputError
from pal_jax.models.pal_b import PalB
from pal_jax.reward_model import RewardModel, User
from pal_jax.saved_model import (
  CARD,
  FORMAT,
  TENSORS,
  USERS,
  SavedModel,
  load_model,
  make_card,
)
from pal_jax.train import train_and_evaluate
from tests.adaptation import oracle

MODELS = {
  f'{preference} {point} {membership}': (preference, point, membership)
  for preference, point, membership in (
    ('squared_distance', 'Pw', 'convex'),
    ('squared_distance', 'f(Pw)', 'convex'),
    ('squared_distance', 'f(P)w', 'partition'),
    ('inner_product', 'Pw', 'convex'),
    ('inner_product', '|f(P)|w', 'mixture_likelihood'),
    ('cosine', 'Pw', 'convex'),
    ('distance', 'f(Pw)', 'convex'),
    ('normalized_distance', 'Pw', 'mixture_likelihood'),
    ('squared_distance', 'pal_b', 'convex'),
    ('cosine', 'pal_b', 'convex'),
  )
}
ANSWERS = 4


def make(name, users=3, method='posterior', **network):
  preference, point, membership = MODELS[name]
  fields = {'preference': preference, 'membership': membership, **network}
  shallow = 'mlp0' if point == 'pal_b' else 'mlp1'
  projector = fields.pop('projector', shallow)
  if point == 'pal_b':
    model = PalB(
      num_users=oracle.U,
      num_prototypes=oracle.K,
      width=oracle.P,
      projector=projector,
      **fields,
    )
  else:
    model = oracle.pal_a(point, projector, **fields)
  variables = oracle.variables_of(model)
  if model.batch_norm:
    variables['batch_stats'] = running_averages(model)
  prior = oracle.make_prior()
  if adaptation.has_classes(model):
    corners = adaptation.prior.vertices(oracle.K)
    prior = prior.replace(log_atoms=corners, log_masses=prior.log_weights)
  table = UserTable(model, variables, prior, method=method)
  c = oracle.make_comparisons(users=users)
  stats = oracle.reduce(model, variables, c)
  table.add([f'user {i}' for i in range(users)], stats, c.label, c.mask)
  joined = point != 'pal_b'
  config = base.get_config()
  config.adaptation.method = method
  config.model.update(
    {
      'name': 'pal_a' if joined else 'pal_b',
      'num_prototypes': oracle.K,
      'width': oracle.P,
      'projector': model.projector,
      'dropout': 0.0,
      **fields,
    }
  )
  if joined:
    config.model.point = point
  card = make_card(
    config,
    num_users=oracle.U,
    feature_width=oracle.P,
    encoder=None,
    data={},
    metrics={},
  )
  return RewardModel(SavedModel(model, variables, prior, table, card))


def running_averages(model):
  """Random ones: those of a new model do nothing."""
  rng = np.random.default_rng(5)
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    np.zeros(2, np.int32),
    np.zeros((2, 2, oracle.P), np.float32),
    np.zeros((2, oracle.P), np.float32),
  )['batch_stats']
  return jax.tree.map(
    lambda x: np.float32(rng.uniform(0.5, 2.0, x.shape)), shapes
  )


def numpy_rewards(found, weights, items, prompts):
  """[n] rewards at weights [K], in float64 and with their natural origin."""
  saved = found._saved
  model, rule = saved.model, saved.model.adaptation_rule
  # Against the origin: a comparison with an item whose reward is then added.
  table = oracle.make_table()
  zero = np.zeros((len(items), 1), int)
  logits = oracle.numpy_convex_logits(
    model,
    saved.variables,
    table,
    np.concatenate([items[:, None], zero + items[0]], -1),
    prompts,
  )
  if rule == 'convex':
    return logits(weights)
  return sum(weights[k] * logits(v) for k, v in enumerate(np.eye(oracle.K)))


def features(found, items, prompts):
  table = oracle.make_table()
  prompt = None if found.card['join_prompt'] else table.prompts[prompts]
  return prompt, table.items[items]


@pytest.mark.parametrize('name', MODELS)
def test_a_reward_is_the_mean_over_the_belief(name):
  found = make(name)
  items, prompts = np.arange(9), np.full(9, 2)
  who = ['user 0', None, 'user 2']
  rewards = found.reward(*features(found, items, prompts), who)
  assert rewards.shape == (3, 9)
  for user, mine in zip(who, rewards, strict=True):
    person = found.user(user)
    belief = np.exp(person.log_belief.astype(float))
    expected = sum(
      mass * numpy_rewards(found, w, items, prompts)
      for mass, w in zip(
        belief, np.exp(person.log_atoms.astype(float)), strict=True
      )
    )
    # Only differences mean something.
    np.testing.assert_allclose(
      mine - mine[0], expected - expected[0], rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize(
  'name', [n for n in MODELS if MODELS[n][0] == 'squared_distance']
)
def test_a_squared_distance_has_its_origin_at_zero(name):
  found = make(name)
  saved = found._saved
  prompt, h = features(found, np.arange(6), np.full(6, 1))
  weights = [0.2, 0.5, 0.3]
  placed = adaptation.place(saved.model, saved.variables, oracle.make_table())
  x = np.asarray(placed.x[:6], float)
  basis = placed.basis if placed.basis.ndim == 2 else placed.basis[1]
  if saved.model.adaptation_rule == 'mixture':
    u = np.asarray(weights) @ np.asarray(basis, float)
  else:
    u = saved.model.apply(
      saved.variables, np.float32(weights), basis, method='ideal_points'
    )
  u = np.asarray(u, float)
  expected = oracle.TAU * (2 * x @ u - np.sum(x * x, -1))
  np.testing.assert_allclose(
    found.reward(prompt, h, weights), expected, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('name', MODELS)
def test_a_preference_is_what_adaptation_predicts(name):
  found = make(name)
  saved = found._saved
  a, b, prompts = np.arange(5), np.arange(5, 10), np.arange(5) % oracle.Q
  prompt, first = features(found, a, prompts)
  _, second = features(found, b, prompts)
  answer = found.prefer(prompt, first, second, 'user 1', level=0.8)
  c = oracle.make_comparisons(users=1, n=5).replace(
    items=np.stack([a, b], -1)[None].astype(np.int32),
    prompt=prompts[None].astype(np.int32),
  )
  stats = oracle.reduce(saved.model, saved.variables, c)
  state = saved.users.lookup(['user 1']).users
  logit = adaptation.predict_users(
    saved.model, saved.variables, state, stats, saved.prior
  )
  np.testing.assert_allclose(
    answer.probability, expit(np.asarray(logit[0], float)), rtol=1e-4
  )
  assert (answer.low <= answer.high).all()
  z = adaptation.atom_logits(
    saved.model,
    saved.variables,
    saved.model.adaptation_rule,
    saved.prior.log_atoms,
    stats.map(lambda x: x[0]),
  )
  low, high = adaptation.credible_interval(state.log_belief[0], z, 0.8)
  np.testing.assert_allclose(answer.low, expit(np.asarray(low)), rtol=1e-4)
  np.testing.assert_allclose(answer.high, expit(np.asarray(high)), rtol=1e-4)
  swapped = found.prefer(prompt, second, first, 'user 1')
  np.testing.assert_allclose(
    swapped.probability, 1 - answer.probability, atol=1e-5
  )
  one = found.prefer(
    None if prompt is None else prompt[0], first[0], second[0], 'user 1'
  )
  assert one.probability == pytest.approx(answer.probability[0], abs=1e-5)
  assert isinstance(one.low, float)


def pairs(found, labels=True, count=ANSWERS, seed=0):
  rng = np.random.default_rng(seed)
  table, out = oracle.make_table(), []
  for i in range(count):
    # Small, so that probabilities are not 0 or 1 to float32.
    a, b = 0.3 * table.items[rng.permutation(oracle.M)[:2]]
    prompt = None if found.card['join_prompt'] else table.prompts[i % oracle.Q]
    out.append((prompt, a, b, float(rng.random() < 0.5)))
  return out if labels else [p[:3] for p in out]


@pytest.mark.parametrize('name', MODELS)
def test_adapting_is_bayes_rule_on_the_atoms(name):
  found = make(name)
  answers = pairs(found)
  person = found.adapt(answers)
  prior = found._saved.prior
  z = np.stack(
    [
      [
        np.log(v) - np.log1p(-v)
        for v in [
          found.prefer(p, a, b, User(atom[None], np.zeros(1))).probability
          for p, a, b, _ in answers
        ]
      ]
      for atom in np.asarray(prior.log_atoms)
    ]
  )  # [M, N]
  y = np.array([label for *_, label in answers])
  log_likelihood = -oracle.negative_log_likelihood(z, y).sum(-1)
  expected = log_softmax(np.asarray(prior.log_masses, float) + log_likelihood)
  np.testing.assert_allclose(
    np.exp(person.log_belief), np.exp(expected), atol=2e-3
  )
  # The same answers in the other notation, by id and in two parts.
  rows = [
    {'prompt': p, 'response_a': a, 'response_b': b, 'label': y}
    for p, a, b, y in answers
  ]
  found.adapt(rows[:1], user='ann')
  ann = found.adapt(
    [
      {
        'prompt': p,
        'chosen': a if y else b,
        'rejected': b if y else a,
      }
      for p, a, b, y in answers[1:]
    ],
    user='ann',
  )
  assert 'ann' in found.users
  np.testing.assert_allclose(ann.log_belief, person.log_belief, atol=1e-4)
  found.forget('ann')
  assert 'ann' not in found.users


def test_nothing_learnt_is_the_population():
  found = make('squared_distance Pw convex')
  nobody = found.user(None)
  np.testing.assert_array_equal(found.adapt([]).log_belief, nobody.log_belief)
  np.testing.assert_allclose(
    nobody.log_belief, found._saved.prior.log_masses, atol=1e-6
  )
  before = found.user('user 1').log_belief
  np.testing.assert_array_equal(found.adapt([], 'user 1').log_belief, before)


def test_weights_are_normalised():
  found = make('squared_distance Pw convex')
  _, h = features(found, np.arange(4), None)
  np.testing.assert_allclose(
    found.reward(None, h, [1, 2, 1]), found.reward(None, h, [0.25, 0.5, 0.25])
  )
  np.testing.assert_allclose(found.user([2.0, 0, 0]).weights, [1, 0, 0])


def test_a_mixture_of_users_has_the_mean_of_their_rewards():
  found = make('cosine Pw convex')
  _, h = features(found, np.arange(4), None)
  one, two = found.reward(None, h, ['user 1', 'user 2'])
  mixed = found.reward(None, h, {'user 1': 3, 'user 2': 1})
  np.testing.assert_allclose(mixed, 0.75 * one + 0.25 * two, atol=1e-5)
  vertex = found.user([1, 0, 0])
  np.testing.assert_allclose(
    found.reward(None, h, {'user 1': 1, vertex: 1}),
    0.5 * one + 0.5 * found.reward(None, h, vertex),
    atol=1e-5,
  )


def test_lists_are_of_users_and_numbers_are_weights():
  found = make('inner_product Pw convex')
  _, h = features(found, np.arange(4), None)
  several = found.reward(None, h, ['user 1', None, [0, 1, 0]])
  assert several.shape == (3, 4)
  np.testing.assert_allclose(several[2], found.reward(None, h, [0, 1, 0]))
  assert found.reward(None, h[0], ['user 1', None]).shape == (2,)
  alone = found.reward(None, h[0], 'user 1')
  assert isinstance(alone, float)
  assert alone == pytest.approx(several[0, 0], abs=1e-5)


def test_many_candidates_are_scored_in_pieces(monkeypatch):
  found = make('squared_distance pal_b convex')
  table = oracle.make_table()
  prompts = table.prompts[np.arange(20) % oracle.Q]
  whole = found.reward(prompts, table.items[:20], 'user 1')
  shared = found.reward(table.prompts[0], table.items[:20], 'user 1')
  monkeypatch.setattr('pal_jax.reward_model._BATCH', 7)
  np.testing.assert_allclose(
    found.reward(prompts, table.items[:20], 'user 1'), whole, atol=1e-5
  )
  np.testing.assert_allclose(
    found.reward(table.prompts[0], table.items[:20], 'user 1'),
    shared,
    atol=1e-5,
  )


def test_ranking_is_by_reward():
  found = make('squared_distance f(Pw) convex')
  _, h = features(found, np.arange(8), None)
  ranked = found.rank(None, h, 'user 1')
  np.testing.assert_allclose(
    ranked.rewards, found.reward(None, h, 'user 1'), atol=1e-5
  )
  np.testing.assert_array_equal(ranked.order, np.argsort(-ranked.rewards))


def test_thompson_sampling_draws_people_from_the_belief():
  found = make('squared_distance Pw convex')
  _, h = features(found, np.arange(8), None)
  person = found.user('user 0')
  every = found.reward(
    None, h, [User(a[None], np.zeros(1)) for a in person.log_atoms]
  )
  draws = 300
  count = np.zeros(len(every))
  for seed in range(draws):
    rewards = found.rank(None, h, 'user 0', seed=seed).rewards
    gap = np.abs(every - rewards).max(-1)
    assert gap.min() < 1e-4
    count[np.argmin(gap)] += 1
  mass = np.exp(person.log_belief.astype(float))
  spread = np.sqrt(mass * (1 - mass) / draws)
  assert (np.abs(count / draws - mass) < 4 * spread + 1e-3).all()


@pytest.mark.parametrize('name', ['cosine Pw convex', 'cosine pal_b convex'])
def test_the_next_question_has_the_most_information(name):
  found = make(name)
  pool = pairs(found, labels=False, count=12)
  (best,) = found.next_question('user 1', pool)
  person = found.user('user 1')
  belief = np.exp(person.log_belief.astype(float))

  def entropy(p):
    return -p * np.log(p) - (1 - p) * np.log1p(-p)

  gains = []
  for p, a, b in pool:
    each = np.array(
      [
        found.prefer(p, a, b, User(atom[None], np.zeros(1))).probability
        for atom in person.log_atoms
      ]
    )
    gains.append(entropy(belief @ each) - belief @ entropy(each))
  assert gains[best] == pytest.approx(max(gains), abs=1e-4)
  three = found.next_question('user 1', pool, size=3)
  assert len(set(three)) == 3
  assert three[0] == best


def test_a_pool_that_shrinks_is_asked_in_order():
  found = make('squared_distance Pw convex')
  pool = pairs(found, labels=False, count=6)
  asked, left = [], list(range(6))
  while left:
    (best,) = found.next_question('user 1', [pool[i] for i in left])
    asked.append(left.pop(best))
  assert sorted(asked) == list(range(6))


def test_nobody_can_change_what_users_share():
  found = make('squared_distance Pw convex')
  for user in (None, 'user 1', [1, 2, 3], {'user 1': 1, None: 2}):
    person = found.user(user)
    for array in (person.log_atoms, person.log_belief):
      with pytest.raises(ValueError, match='read-only'):
        array[:] = 0
  # Members of a mixture share their atoms, and so does the mixture.
  assert len(found.user({'user 0': 1, 'user 1': 1}).log_atoms) == oracle.ATOMS


def test_several_users_may_be_a_tuple_or_an_array():
  found = make('squared_distance Pw convex')
  _, h = features(found, np.arange(4), None)
  expected = found.reward(None, h, ['user 0', 'user 1'])
  for users in (('user 0', 'user 1'), np.array(['user 0', 'user 1'])):
    np.testing.assert_array_equal(found.reward(None, h, users), expected)


def test_a_model_is_saved_where_a_link_points(tmp_path):
  found = make('squared_distance Pw convex')
  found.save(tmp_path / 'real')
  (tmp_path / 'link').symlink_to(tmp_path / 'real')
  found.adapt(pairs(found), user='ann')
  found.save(tmp_path / 'link')
  assert (tmp_path / 'link').is_symlink()
  assert 'ann' in RewardModel.load(tmp_path / 'real').users
  assert sorted(p.name for p in tmp_path.iterdir()) == ['link', 'real']


def test_point_estimates_have_no_interval():
  found = make('squared_distance Pw convex', method='map')
  _, h = features(found, np.arange(2), None)
  for user in ('user 1', None, found.adapt(pairs(found))):
    answer = found.prefer(None, h[0], h[1], user)
    assert answer.low == pytest.approx(answer.probability, abs=1e-5)
    assert answer.high == pytest.approx(answer.probability, abs=1e-5)


# Files.


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
    assert np.asarray(x).dtype == np.asarray(y).dtype


@pytest.mark.parametrize('name', MODELS)
def test_a_saved_model_is_the_same_model(name, tmp_path):
  found = make(name)
  found.adapt(pairs(found), user='ann')
  folder = found.save(tmp_path / 'model')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['model']
  assert sorted(p.name for p in folder.iterdir()) == sorted(
    [CARD, TENSORS, USERS]
  )
  back = RewardModel.load(folder)
  assert back._saved.model == found._saved.model
  same(back._saved.variables, found._saved.variables)
  same(back._saved.prior, found._saved.prior)
  assert back.users == found.users
  prompt, h = features(found, np.arange(3), np.arange(3))
  for user in ('ann', None):
    np.testing.assert_array_equal(
      back.reward(prompt, h, user), found.reward(prompt, h, user)
    )
  # Once more over itself, with more users.
  back.adapt(pairs(back, seed=1), user='bob')
  back.save(folder)
  assert RewardModel.load(folder).users[-2:] == ('ann', 'bob')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['model']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'model'
  return make('squared_distance Pw convex').save(folder)


@pytest.mark.parametrize('name', [TENSORS, USERS])
@pytest.mark.parametrize('damage', ['cut', 'changed', 'gone'])
def test_a_damaged_file_is_named(saved, tmp_path, name, damage):
  folder = tmp_path / 'copy'
  shutil.copytree(saved, folder)
  path = folder / name
  content = path.read_bytes()
  if damage == 'gone':
    path.unlink()
  else:
    middle = len(content) // 2
    path.write_bytes(
      content[:middle]
      if damage == 'cut'
      else content[:middle] + b'x' + content[middle + 1 :]
    )
  expected = 'cannot be read' if damage == 'gone' else 'is not what card.json'
  with pytest.raises(InputError, match=f'{name} {expected}'):
    load_model(folder)


@pytest.mark.parametrize(
  ('card', 'message'),
  [
    ('{', 'cannot be read as JSON'),
    ('[]', 'expected "format"'),
    ('{"format": "pal_jax model 2"}', 'expected "format"'),
    (json.dumps({'format': FORMAT}), 'has no "sha256"'),
    (json.dumps({'format': FORMAT, 'sha256': {}}), 'is not what card.json'),
  ],
)
def test_a_wrong_card_is_refused(saved, tmp_path, card, message):
  folder = tmp_path / 'copy'
  shutil.copytree(saved, folder)
  (folder / CARD).write_text(card)
  with pytest.raises(InputError, match=message):
    load_model(folder)


def test_a_folder_without_a_card_is_neither_read_nor_replaced(tmp_path):
  (tmp_path / 'precious').mkdir()
  (tmp_path / 'precious' / 'thesis.txt').write_text('all of it')
  with pytest.raises(InputError, match='holds no card.json'):
    RewardModel.load(tmp_path / 'precious')
  found = make('squared_distance Pw convex')
  with pytest.raises(InputError, match='is left alone'):
    found.save(tmp_path / 'precious')
  # Neither does a card of something else, nor a file beside a model.
  (tmp_path / 'precious' / CARD).write_text('{"name": "baseball card"}')
  with pytest.raises(InputError, match='is left alone'):
    found.save(tmp_path / 'precious')
  (tmp_path / 'precious' / CARD).unlink()
  found.save(tmp_path / 'model')
  (tmp_path / 'model' / 'notes.txt').write_text('mine')
  with pytest.raises(InputError, match='is left alone'):
    found.save(tmp_path / 'model')
  assert (tmp_path / 'model' / 'notes.txt').exists()
  assert [p.name for p in (tmp_path / 'precious').iterdir()] == ['thesis.txt']
  with pytest.raises(InputError, match='holds no card.json'):
    RewardModel.load(tmp_path / 'nothing')


# Wrong inputs.


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m, h: m.reward(None, h, 'nobody'), "user 'nobody' is unknown"),
    (lambda m, h: m.reward(None, h, [1, -1, 1]), 'none is negative'),
    (lambda m, h: m.reward(None, h, [1.0, 1.0]), 'expected 3 numbers'),
    (lambda m, h: m.reward(None, h, [0, 0, 0]), 'one is positive'),
    (lambda m, h: m.reward(None, h, np.full(3, np.nan)), 'one is positive'),
    (lambda m, h: m.reward(None, h, {'user 1': -1}), 'none is negative'),
    (lambda m, h: m.reward(None, h, {}), 'shares of users'),
    (lambda m, h: m.reward('prompt', h), 'of prompt and response together'),
    (lambda m, h: m.reward(None, 'text'), 'give features'),
    (lambda m, h: m.reward(None, []), 'no response to score'),
    (lambda m, h: m.reward(None, h[:, :2]), r'shape \(3, 2\)'),
    (lambda m, h: m.reward(None, h * np.nan), 'row 0 holds NaN'),
    (lambda m, h: m.reward(h[:2], h), '2 prompts for 3 responses'),
    (lambda m, h: m.prefer(h[:2], h, h), '2 prompts for 3 pairs'),
    (lambda m, h: m.reward(None, [h[0], [1.0]]), 'neither strings nor'),
    (lambda m, h: m.prefer(None, h, h[:2]), '3 responses a and 2'),
    (lambda m, h: m.prefer(None, h, h, level=1), r'level=1 must lie'),
    (lambda m, h: m.adapt([(None, h[0], h[1])]), 'comparison 0: expected'),
    (lambda m, h: m.reward(None, h, []), 'list of users is empty'),
    (lambda m, h: m.reward(None, h, ('user 0', 'nobody')), "'nobody' is unk"),
    (lambda m, h: m.reward(None, np.ones((1, 2, 3))), 'neither a string'),
    (
      lambda m, h: m.next_question([1, 1, 1], [(None, h[0], h[1])]),
      'a point is known',
    ),
    (
      lambda m, h: m.adapt([{'chosen': h[0], 'rejected': h[1], 'label': 1}]),
      'chosen and rejected, and a label',
    ),
    (lambda m, h: m.adapt([(None, h[0], h[1], 2)]), 'label 2 must be'),
    (lambda m, h: m.adapt([(None, h[0], h[1], '1')]), "label '1' must be"),
    (lambda m, h: m.adapt([{'label': 1}]), "no 'response_a'"),
    (lambda m, h: m.adapt([], user=3), 'an id is a string'),
    (lambda m, h: m.adapt([(0, h[0], h[1], 1)], 3), 'an id is a string'),
    (lambda m, h: m.forget('nobody'), 'is not in the table'),
    (lambda m, h: m.next_question(None, []), 'the pool is empty'),
    (
      lambda m, h: m.next_question(None, [(None, h[0], h[1])], size=2),
      'size',
    ),
    (
      lambda m, h: m.next_question(None, [(None, h[0], h[1])], strategy='x'),
      "strategy='x' is unknown",
    ),
  ],
)
def test_wrong_inputs_are_told(call, message):
  found = make('squared_distance Pw convex')
  with pytest.raises(InputError, match=message):
    call(found, oracle.make_table().items[:3])
  assert found.users == ('user 0', 'user 1', 'user 2')


def test_pal_b_needs_the_prompt():
  found = make('squared_distance pal_b convex')
  with pytest.raises(InputError, match='needs the features of the prompt'):
    found.reward(None, oracle.make_table().items[:3])


# A run leaves one behind.


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run') / 'work'
  train_and_evaluate(tiny.get_config(), folder, progress=False)
  return folder


def test_strings_go_through_the_encoder_of_the_run(workdir):
  found = pal_jax.RewardModel.load(workdir)
  assert found.users == tuple(f'seen-{i}' for i in range(20))
  texts = _statements(workdir)
  rewards = found.reward(None, texts, 'seen-3')
  assert rewards.shape == (len(texts),)
  np.testing.assert_allclose(
    found.reward(None, found.features(texts), 'seen-3'), rewards, atol=1e-5
  )
  ranked = found.rank(None, texts, 'seen-3')
  assert rewards[ranked.order[0]] == rewards.max()
  known = found.card
  assert known['encoder']['name'] == 'minilm'
  assert known['metrics']['seen']['accuracy'] > 0
  known['features']['normalize'] = None
  assert found.card['features']['normalize'] == 'rms'


def test_a_seen_user_is_adapted_to_what_was_trained_on(workdir):
  found = RewardModel.load(workdir)
  table = found._saved.users
  assert [table.num_comparisons(u) for u in table.ids] == [10] * 20
  beliefs = np.stack([found.user(u).log_belief for u in found.users])
  np.testing.assert_allclose(logsumexp(beliefs, axis=-1), 0, atol=1e-4)
  assert np.ptp(np.exp(beliefs), axis=0).max() > 0.01


def test_trained_weights_of_people_are_not_kept(workdir):
  found = RewardModel.load(workdir)
  assert not found.variables['params']['user_logits'].any()
  assert found.model.num_users == found.model.num_prototypes
  found.forget('seen-3')
  assert 'seen-3' not in found.users


def test_texts_are_scored_without_writing_a_cache(
  workdir, tmp_path, monkeypatch
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  found = RewardModel.load(workdir)
  texts = _statements(workdir)
  first = found.reward(None, texts[:4])
  monkeypatch.setattr('pal_jax.reward_model._REMEMBERED', 5)
  np.testing.assert_array_equal(found.reward(None, texts)[:4], first)
  np.testing.assert_array_equal(found.reward(None, texts[:4]), first)
  assert not any(tmp_path.rglob('*.npy'))


def test_another_encoder_is_refused(workdir, tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(workdir / 'model', folder)
  card = json.loads((folder / CARD).read_text())
  card['encoder']['version'] = 'another'
  (folder / CARD).write_text(json.dumps(card))
  found = RewardModel.load(folder)
  with pytest.raises(InputError, match='the model was trained with minilm'):
    found.reward(None, 'anything')


def _statements(workdir):
  from pal_jax.data import create

  config = tiny.get_config()
  return list(create(config.data).item_names[:6])
