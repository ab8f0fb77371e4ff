"""adaptation.statistics: reduced problems are the models' own, every form."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from pal_jax.adaptation import (
  atom_logits,
  fit_users,
  is_convex,
  is_linear,
  place,
  reward_table,
  score,
  statistics,
)
from pal_jax.adaptation.statistics import uses_network, weight_logits
from pal_jax.ideal_points import PREFERENCES
from pal_jax.models.pal_a import POINTS
from pal_jax.models.pal_b import PalB
from pal_jax.structs import FeatureTable
from tests.adaptation import oracle
from tests.adaptation.oracle import K, N, P, U, pal_a, pal_b

# Not by `from`: the package has a function of this name.
module = importlib.import_module('pal_jax.adaptation.statistics')
LINEAR = {'squared_distance', 'inner_product'}
ATOMS = 5


def build(point, preference, **fields):
  if point == 'PAL-B':
    return pal_b(preference=preference, **fields)
  projector = 'identity' if point == 'Pw' else 'mlp1'
  return pal_a(point, projector, preference=preference, **fields)


FORMS = [
  (point, preference, rule)
  for point, preference, rule in itertools.product(
    (*POINTS, 'PAL-B'), sorted(PREFERENCES), ('convex', 'mixture')
  )
]
every_form = pytest.mark.parametrize('point, preference, rule', FORMS)


def some_log_weights(seed=0, num=K):
  """Inside the simplex, close to its border, and its corners."""
  rng = np.random.default_rng(seed)
  inside = log_softmax(rng.normal(size=(ATOMS, num)), -1)
  border = log_softmax(10 * rng.normal(size=(ATOMS, num)), -1)
  corners = np.log(np.maximum(np.eye(num), 1e-12))
  return np.float32(np.concatenate([inside, border, corners]))


def own_logits(model, variables, table, c, log_weights, rule):
  """[U, N, A] by `IdealPointModel.logits`, from features."""
  x = model.apply(variables, table.items, method='embed')[c.items]
  basis = model.apply(variables, table.prompts, method='basis')
  if isinstance(model, PalB):
    basis = basis[c.prompt]
  rows = jnp.broadcast_to(
    log_weights[:, None, None],
    (len(log_weights), *c.label.shape, log_weights.shape[-1]),
  )
  z = model.apply(variables, rows, x, basis, rule, method='logits')
  return np.moveaxis(z, 0, -1)


def assert_same_logits(model, table=None, rule='convex', variables=None):
  """`atom_logits` against the model's own, and both against numpy."""
  variables = variables or oracle.variables_of(model)
  table, c = table or oracle.make_table(), oracle.make_comparisons()
  log_weights = some_log_weights()
  with jax.disable_jit():  # faster than compiling every form
    placed = place(model, variables, table)
    stats = statistics(model, variables, placed, c, rule)
    expected = own_logits(model, variables, table, c, log_weights, rule)
    found = atom_logits(model, variables, rule, log_weights, stats)
  atol = 1e-5 * np.abs(expected).max()
  assert atol > 0
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=10 * atol)
  # And the numpy model of these tests agrees, so that to optimise it is to
  # optimise the model.
  everyone = c.replace(mask=np.ones((U, N), bool))
  logits = oracle.numpy_logits(model, variables, table, everyone, U - 1, rule)
  again = np.stack([logits(np.exp(w)) for w in np.float64(log_weights)], -1)
  if np.all(np.isfinite(again)):  # it has no zero vectors
    np.testing.assert_allclose(
      expected[U - 1], again, rtol=1e-4, atol=10 * atol
    )
  return stats


@every_form
def test_reduced_logits_are_the_models_own(point, preference, rule):
  stats = assert_same_logits(build(point, preference), rule=rule)
  # And they are what the module promises to keep of a comparison.
  if rule == 'mixture' or (preference in LINEAR and point != 'f(Pw)'):
    assert stats.x is None and stats.delta.shape == (U, N, K)
  elif point == 'f(Pw)':
    assert stats.x.shape == (U, N, 2, P) and stats.shared_basis
  else:
    assert stats.x.shape == (U, N, 2, K + 1)
    assert stats.shared_basis == (point != 'PAL-B')


@pytest.mark.parametrize(
  'point, preference, rule',
  [
    ('Pw', 'squared_distance', 'convex'),
    ('f(Pw)', 'cosine', 'convex'),
    ('|f(P)|w', 'distance', 'convex'),
    ('PAL-B', 'cosine', 'convex'),
    ('PAL-B', 'inner_product', 'mixture'),
  ],
)
def test_blocks_of_comparisons_change_nothing(
  point, preference, rule, monkeypatch
):
  model = build(point, preference)
  variables = oracle.variables_of(model)
  table, c = oracle.make_table(), oracle.make_comparisons()
  log_weights = some_log_weights()[:U]

  def both():
    placed = place(model, variables, table)
    jax.clear_caches()  # the limit is no argument of what is compiled
    return (
      statistics(model, variables, placed, c, rule),
      score(model, variables, placed, log_weights, c, rule),
    )

  at_once = both()
  monkeypatch.setattr(module, '_AT_ONCE', 0)
  monkeypatch.setattr(module, '_BLOCK', 3)
  in_blocks = both()
  assert at_once[0].shared_basis == in_blocks[0].shared_basis
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    at_once,
    in_blocks,
  )
  jax.clear_caches()


@pytest.mark.parametrize(
  'point, preference',
  [('Pw', 'cosine'), ('f(P)w', 'distance'), ('Pw', 'inner_product')],
)
def test_more_prototypes_than_dimensions_lose_nothing(point, preference):
  """Their span is then all of R^P: points stay as they are."""
  model = build(point, preference, width=2)
  table = oracle.make_table(width=2 if point == 'Pw' else P)
  stats = assert_same_logits(model, table)
  if stats.x is not None:
    assert stats.x.shape[-1] == 2


def test_prototypes_in_one_line_are_a_basis_too():
  """Points that depend on each other, and two equal ones."""
  model = build('Pw', 'cosine')
  variables = oracle.variables_of(model)
  p = variables['params']['prototypes']
  variables['params']['prototypes'] = np.stack([p[0], 2 * p[0], p[0]])
  c, table = oracle.make_comparisons(), oracle.make_table()
  stats = oracle.reduce(model, variables, c, table)
  w = np.array([0.2, 0.5, 0.3])
  for user in range(1, U):
    live = c.mask[user]
    mine = weight_logits(
      model,
      variables,
      'convex',
      np.float32(np.log(w)),
      stats.map(lambda x, user=user, live=live: x[user][live]),
    )
    expected = oracle.numpy_logits(model, variables, table, c, user)(w)
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('preference', sorted(PREFERENCES))
def test_items_may_be_the_prototypes(preference):
  """Distances of 0 at the corners of the simplex."""
  model = build('Pw', preference)
  variables, table = oracle.variables_of(model), oracle.make_table()
  table.items[:] = variables['params']['prototypes'][np.arange(30) % K]
  assert_same_logits(model, table, variables=variables)


@pytest.mark.parametrize('preference', sorted(PREFERENCES))
def test_prototypes_may_coincide_or_vanish(preference):
  """Their span has fewer than K dimensions."""
  model = build('Pw', preference)
  variables = oracle.variables_of(model)
  variables['params']['prototypes'][1] = variables['params']['prototypes'][0]
  assert_same_logits(model, variables=variables)
  variables['params']['prototypes'][1:] = 0
  assert_same_logits(model, variables=variables)


def test_distances_do_not_cancel_far_from_the_origin():
  """||x||^2 - 2 <x, u> + ||u||^2 would leave nothing of these."""
  model = build('Pw', 'distance')
  variables, table = oracle.variables_of(model), oracle.make_table()
  far = np.float32(1000)
  table = table.replace(items=table.items + far)
  variables['params']['prototypes'] += far
  c, log_weights = oracle.make_comparisons(), some_log_weights()
  with jax.disable_jit():
    placed = place(model, variables, table)
    stats = statistics(model, variables, placed, c, 'convex')
    found = atom_logits(model, variables, 'convex', log_weights, stats)
  c = c.replace(mask=np.ones((U, N), bool))
  logits = oracle.numpy_logits(model, variables, table, c, 0)
  # Of weights that sum to 1 in float64.
  exact = log_softmax(np.float64(log_weights), -1)
  expected = np.stack([logits(np.exp(w)) for w in exact], -1)
  np.testing.assert_allclose(found[0], expected, atol=5e-3)


@pytest.mark.parametrize('rule', ['convex', 'mixture'])
@pytest.mark.parametrize('point', [*POINTS, 'PAL-B'])
def test_a_table_of_rewards_gives_the_same_statistics(point, rule):
  model = build(point, 'squared_distance')
  variables, table = oracle.variables_of(model), oracle.make_table()
  c = oracle.make_comparisons()
  with jax.disable_jit():
    placed = place(model, variables, table)
    rewards = reward_table(model, variables, placed, rule)
    stats = statistics(model, variables, placed, c, rule)
  if point == 'PAL-B' or (point, rule) == ('f(Pw)', 'convex'):
    assert rewards is None
    return
  delta = rewards[c.items[..., 0]] - rewards[c.items[..., 1]]
  np.testing.assert_allclose(delta, stats.delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'point, preference, rule',
  [('Pw', 'distance', 'convex'), ('PAL-B', 'cosine', 'mixture')],
)
def test_scores_and_logits_of_one_user_are_those_of_atoms(
  point, preference, rule
):
  model = build(point, preference)
  variables, c = oracle.variables_of(model), oracle.make_comparisons()
  placed = place(model, variables, oracle.make_table())
  stats = statistics(model, variables, placed, c, rule)
  log_weights = some_log_weights()[:U]
  z = atom_logits(model, variables, rule, log_weights, stats)
  scored = score(model, variables, placed, log_weights, c, rule)
  for user in range(U):
    one = stats.map(lambda x, user=user: x[user])
    alone = weight_logits(model, variables, rule, log_weights[user], one)
    for found in (alone, scored[user]):
      np.testing.assert_allclose(found, z[user, :, user], rtol=1e-4, atol=1e-4)


def test_swapping_candidates_negates_every_logit():
  for point, preference, rule in FORMS[::7]:
    model = build(point, preference)
    variables, table = oracle.variables_of(model), oracle.make_table()
    c, log_weights = oracle.make_comparisons(), some_log_weights()
    with jax.disable_jit():
      placed = place(model, variables, table)

      def logits(c, model=model, variables=variables, placed=placed, rule=rule):
        stats = statistics(model, variables, placed, c, rule)
        return atom_logits(model, variables, rule, some_log_weights(), stats)

      a, b = logits(c), logits(c.replace(items=c.items[..., ::-1]))
    assert a.shape == (U, N, len(log_weights))
    np.testing.assert_allclose(a, -b, atol=2e-5 * np.abs(a).max())


# The point estimate of every form.


def stand_in(model, rule):
  """A model with the same reduced problem, so that fewer are compiled.

  What is left after `statistics` is a function of the statistic, the scale
  and the preference; only `f(Pw)` keeps its network, and PAL-B a basis of
  every comparison.
  """
  if rule == 'mixture' or is_linear(model, rule):
    return pal_a()
  if isinstance(model, PalB) or uses_network(model):
    return model
  return pal_a(preference=model.preference)


def fit_form(model, variables, table, c, prior, rule):
  with jax.disable_jit():
    stats = oracle.reduce(model, variables, c, table, rule)
  other = stand_in(model, rule)
  assert is_convex(other, rule) == is_convex(model, rule)
  assert is_linear(other, rule) == is_linear(model, rule)
  parameters = variables
  if other is not model:
    # Its other parameters must not matter.
    parameters = oracle.variables_of(other, seed=1)
    parameters['params']['log_scale'] = variables['params']['log_scale']
  users = fit_users(
    other,
    parameters,
    rule,
    stats,
    jnp.asarray(c.label),
    jnp.asarray(c.mask),
    prior.log_weights,
    prior.strength,
  )
  return jax.tree.map(np.asarray, users)


@every_form
def test_the_fit_is_that_of_optimising_through_the_model(
  point, preference, rule
):
  """The oracle knows nothing of statistics, log-weights or Newton."""
  model = build(point, preference)
  variables, table = oracle.variables_of(model), oracle.make_table()
  c, prior = oracle.make_comparisons(), oracle.make_prior()
  users = fit_form(model, variables, table, c, prior, rule)
  convex = rule == 'mixture' or (preference in LINEAR and point != 'f(Pw)')
  assert convex == is_convex(model, rule)
  assert np.all(users.converged) or not convex
  for user in range(U):
    problem = oracle.problem_of(model, variables, table, c, prior, user, rule)
    theta = oracle.log_weights_64(users, user)
    value = problem.value(theta)
    scale = max(1, problem.gradient_size(theta))
    np.testing.assert_allclose(
      users.objective[user], value, rtol=1e-4, atol=1e-5
    )
    # Another local minimum may be nearer to the centre than to the prior.
    starts = [problem.log_prior, np.zeros(K)] if convex else [problem.log_prior]
    assert value <= problem.minimum(starts) + 1e-4 * max(1, value)
    residual = problem.residual(theta)
    np.testing.assert_allclose(
      users.residual[user], residual, rtol=0.02, atol=2e-4 * scale
    )
    if not convex:
      assert residual <= (3e-4 if users.converged[user] else 0.03) * scale


@pytest.mark.parametrize(
  'point, preference, width',
  [
    ('f(Pw)', 'normalized_distance', P),
    ('PAL-B', 'normalized_distance', P),
    ('Pw', 'cosine', 2),
  ],
)
def test_steps_within_rounding_do_not_go_round_in_circles(
  point, preference, width
):
  """A full step may overshoot by less of F than float32 can see."""
  model = build(point, preference, width=width)
  table = oracle.make_table(width=width)
  variables = oracle.variables_of(model)
  c, prior = oracle.make_comparisons(), oracle.make_prior()
  users = fit_form(model, variables, table, c, prior, 'convex')
  assert np.all(users.converged) and users.iterations.max() < 100


@pytest.mark.parametrize('preference', ['cosine', 'squared_distance'])
def test_the_fit_with_more_prototypes_than_dimensions(preference):
  model = build('Pw', preference, width=2)
  variables, table = oracle.variables_of(model), oracle.make_table(width=2)
  c, prior = oracle.make_comparisons(), oracle.make_prior()
  users = fit_form(model, variables, table, c, prior, 'convex')
  assert_as_good_as_scipy(users, model, variables, table, c, prior)


@pytest.mark.parametrize('preference', sorted(PREFERENCES))
def test_the_fit_when_items_are_the_prototypes(preference):
  model = build('Pw', preference)
  variables, table = oracle.variables_of(model), oracle.make_table()
  table.items[:] = variables['params']['prototypes'][np.arange(30) % K]
  c = oracle.make_comparisons()
  c = c.replace(items=np.int32(c.items % K))
  prior = oracle.make_prior()
  users = fit_form(model, variables, table, c, prior, 'convex')
  assert_as_good_as_scipy(users, model, variables, table, c, prior)


def assert_as_good_as_scipy(users, model, variables, table, c, prior):
  assert np.all(np.isfinite(users.log_weights))
  for user in range(U):
    problem = oracle.problem_of(model, variables, table, c, prior, user)
    value = problem.value(oracle.log_weights_64(users, user))
    best = problem.minimum([problem.log_prior])
    assert value <= best + 1e-4 * max(1, value)


class Gate:
  """A table on the host that says how many rows it was asked for."""

  def __init__(self, rows):
    self.rows, self.shape, self.asked = rows, rows.shape, []

  def __getitem__(self, index):
    found = self.rows[index]
    self.asked.append(len(found))
    return found


@pytest.mark.parametrize('point', ['f(P)w', 'PAL-B'])
def test_a_long_table_is_placed_in_blocks(monkeypatch, point):
  model = build(point, 'cosine')
  variables = oracle.variables_of(model)
  rng = np.random.default_rng(0)
  width = oracle.make_table().items.shape[1]
  table = FeatureTable(
    *(rng.normal(size=(n, width)).astype(np.float32) for n in (23, 11))
  )
  whole = place(model, variables, table)
  monkeypatch.setattr(module, '_BLOCK', 5)
  gates = FeatureTable(Gate(table.items), Gate(table.prompts))
  found = place(model, variables, gates)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert gates.items.asked == [5] * 5
  # The prototypes of PAL-A are those of any prompt.
  assert gates.prompts.asked == [5] * (3 if point == 'PAL-B' else 1)
