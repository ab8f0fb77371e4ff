"""adaptation.queries: information by brute force, batches, simulated users."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, xlogy

from pal_jax.adaptation import believe, predict
from pal_jax.adaptation.prior import Prior
from pal_jax.adaptation.queries import (
  MAX_BALD_BATCH,
  STRATEGIES,
  choose_questions,
  entropy,
  score_questions,
  simulate_questions,
)
from pal_jax.errors import InputError
from pal_jax.mixtures import class_log_likelihoods

M, Q = 8, 12  # atoms, pairs
KEY = jax.random.key(0)
LN2 = np.log(2.0)
# Where a batch is not made of the best pairs on their own.
SEEDS = (3, 6, 9)


def make_problem(seed=0, scale=2.0):
  """A belief [M] and logits [Q, M]."""
  rng = np.random.default_rng(seed)
  log_belief = np.float32(log_softmax(rng.normal(size=M)))
  return log_belief, np.float32(scale * rng.normal(size=(Q, M)))


def scores(strategy, log_belief, z, key=KEY):
  found = score_questions(
    strategy, jnp.asarray(log_belief), jnp.asarray(z), key
  )
  return np.asarray(found)


def choose(strategy, log_belief, z, size, key=KEY, available=None):
  available = np.ones(Q, bool) if available is None else available
  rows = choose_questions(
    strategy,
    jnp.asarray(log_belief),
    jnp.asarray(z),
    size,
    key,
    jnp.asarray(available),
  )
  return np.asarray(rows).tolist()


# What the scores say, written again in numpy.


def joint_information(log_belief, z, rows):
  """I(answers to rows; atom) over all 2^m answers, float64."""
  belief = np.exp(np.asarray(log_belief, float))
  belief /= belief.sum()
  p = expit(np.asarray(z, float)[list(rows)])  # [m, M]
  total = 0.0
  for answers in itertools.product((True, False), repeat=len(p)):
    likelihood = np.prod(
      [pi if yes else 1 - pi for pi, yes in zip(p, answers, strict=True)], 0
    )
    mean = likelihood @ belief
    total += belief @ xlogy(likelihood, likelihood) - xlogy(mean, mean)
  return total


def greedy(value, size):
  """Rows taken one at a time by the value of the set they join."""
  rows = []
  for _ in range(size):
    rest = [row for row in range(Q) if row not in rows]
    rows.append(max(rest, key=lambda row: value([*rows, row])))
  return rows


def log_det(log_belief, z, rows):
  """log det (I + L S) of the rows' Gaussian: S covariance, L precisions."""
  belief = np.exp(np.asarray(log_belief, float))
  z = np.asarray(z, float)[list(rows)]
  covariance = np.cov(z, aweights=belief, bias=True).reshape(len(z), len(z))
  p = expit(z) @ belief
  precisions = np.diag(p * (1 - p))
  return np.linalg.slogdet(np.eye(len(z)) + precisions @ covariance)[1]


# One question.


@pytest.mark.parametrize('scale', [0.1, 2.0, 10.0])
def test_bald_is_the_mutual_information(scale):
  log_belief, z = make_problem(scale=scale)
  expected = [joint_information(log_belief, z, [row]) for row in range(Q)]
  np.testing.assert_allclose(
    scores('bald', log_belief, z), expected, rtol=1e-3, atol=1e-6
  )


def test_nothing_is_learned_where_all_atoms_agree():
  log_belief, _ = make_problem()
  z = np.repeat(np.linspace(-30, 30, Q)[:, None], M, 1).astype(np.float32)
  np.testing.assert_allclose(scores('bald', log_belief, z), 0, atol=1e-6)
  np.testing.assert_allclose(
    scores('d_optimality', log_belief, z), 0, atol=1e-6
  )


def test_an_answer_tells_one_bit_at_most():
  log_belief, z = make_problem(scale=100.0)
  found = scores('bald', log_belief, z)
  assert found.min() >= 0.0 and found.max() <= LN2 + 1e-6
  halves = np.where(np.arange(M) < M // 2, 1000.0, -1000.0)
  halves = np.tile(np.float32(halves), (Q, 1))
  even = np.full(M, -np.log(M), np.float32)
  np.testing.assert_allclose(scores('bald', even, halves), LN2, rtol=1e-6)


@pytest.mark.parametrize('strategy', ['bald', 'd_optimality', 'uncertainty'])
def test_scores_do_not_know_which_candidate_is_first_or_atoms_apart(strategy):
  log_belief, z = make_problem(scale=4.0)
  found = scores(strategy, log_belief, z)
  np.testing.assert_allclose(
    scores(strategy, log_belief, -z), found, rtol=1e-5, atol=1e-6
  )
  order = np.random.default_rng(1).permutation(M)
  np.testing.assert_allclose(
    scores(strategy, log_belief[order], z[:, order]),
    found,
    rtol=1e-5,
    atol=1e-6,
  )


def test_the_entropy_of_an_answer_is_accurate_at_both_ends():
  z = np.array([0.0, 0.5, 5.0, 12.0, 20.0, 60.0, 1000.0])
  z = np.concatenate([z, -z])
  expected = expit(z) * np.logaddexp(0, -z) + expit(-z) * np.logaddexp(0, z)
  found = np.asarray(entropy(jnp.asarray(z, jnp.float32)))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-37)
  np.testing.assert_array_equal(found[:7], found[7:])


def test_bald_of_sure_atoms_is_exact():
  """Two sure atoms against one that does not know."""
  z = np.zeros((Q, M), np.float32)
  z[:3, :3] = [1000, -1000, 0], [1000] * 3, [-1000, 1000, 1000]
  belief = np.full(M, 1e-30)
  belief[:3] = 0.2, 0.3, 0.5
  found = scores('bald', np.float32(np.log(belief)), z)[:3]
  half = 0.45
  h = [-q * np.log(q) - (1 - q) * np.log(1 - q) for q in (half, 0.2)]
  np.testing.assert_allclose(
    found, [h[0] - 0.5 * LN2, 0.0, h[1]], rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_scores_and_batches_are_finite_at_logits_of_a_thousand(strategy):
  log_belief, z = make_problem()
  z = np.float32(1000 * np.sign(z))
  for belief in (log_belief, np.float32(np.where(np.arange(M), -200.0, 0.0))):
    assert np.all(np.isfinite(scores(strategy, belief, z)))
    rows = choose(strategy, belief, z, 3)
    assert len(set(rows)) == 3 and min(rows) >= 0


def test_d_optimality_is_the_gain_in_log_determinant():
  log_belief, z = make_problem()
  expected = [log_det(log_belief, z, [row]) for row in range(Q)]
  np.testing.assert_allclose(
    scores('d_optimality', log_belief, z), expected, rtol=1e-4
  )


def test_uncertainty_asks_the_pair_nearest_to_a_half():
  log_belief, z = make_problem()
  p = expit(z.astype(float)) @ np.exp(log_belief.astype(float))
  nearest = np.argsort(np.abs(p - 0.5)).tolist()
  assert choose('uncertainty', log_belief, z, 3) == nearest[:3]


def test_uncertainty_and_information_are_not_the_same():
  """A pair that nobody can answer is uncertain, and tells nothing."""
  z = np.zeros((Q, M), np.float32)
  z[-1] = 4 * (-1.0) ** np.arange(M) + 1
  log_belief = np.full(M, -np.log(M), np.float32)
  assert Q - 1 not in choose('uncertainty', log_belief, z, 3)
  assert choose('bald', log_belief, z, 3)[0] == Q - 1
  assert choose('d_optimality', log_belief, z, 3)[0] == Q - 1


# Batches.


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize(
  'strategy, value',
  [('bald', joint_information), ('d_optimality', log_det)],
)
def test_a_batch_is_greedy_in_what_its_answers_tell_together(
  strategy, value, seed
):
  log_belief, z = make_problem(seed)
  expected = greedy(lambda rows: value(log_belief, z, rows), 3)
  assert choose(strategy, log_belief, z, 3) == expected
  # Which is not the three best on their own, or the example says nothing.
  alone = scores(strategy, log_belief, z)
  assert np.argsort(-alone)[:3].tolist() != expected


@pytest.mark.parametrize('strategy', ['bald', 'd_optimality'])
def test_a_batch_does_not_ask_the_same_pair_twice(strategy):
  """Copies of the best pair, as they are or swapped, lose to another one."""
  # All pairs but the last tell left from right, that one top from bottom.
  side = np.where(np.arange(M) < M // 2, 5.0, -5.0)
  z = np.outer((-1.0) ** np.arange(Q), side)
  z[-1] = 4 * (-1.0) ** np.arange(M)
  log_belief = np.full(M, -np.log(M), np.float32)
  z = np.float32(z)
  assert np.argmax(scores(strategy, log_belief, z)) != Q - 1
  rows = choose(strategy, log_belief, z, 3)
  assert rows[1] == Q - 1 and len(set(rows)) == 3


def test_random_depends_on_the_key_and_never_repeats():
  log_belief, z = make_problem()
  orders = {
    tuple(choose('random', log_belief, z, Q, jax.random.key(i)))
    for i in range(5)
  }
  assert len(orders) == 5
  assert all(sorted(rows) == list(range(Q)) for rows in orders)
  again = choose('random', log_belief, z, Q, jax.random.key(0))
  assert tuple(again) in orders


def test_only_random_uses_the_key():
  log_belief, z = make_problem()
  for strategy in set(STRATEGIES) - {'random'}:
    first, second = (
      choose(strategy, log_belief, z, 3, jax.random.key(i)) for i in (0, 1)
    )
    assert first == second


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_pairs_that_are_not_available_are_not_asked(strategy):
  log_belief, z = make_problem()
  favourites = choose(strategy, log_belief, z, 3)
  available = np.ones(Q, bool)
  available[favourites[:2]] = False
  rows = choose(strategy, log_belief, z, 3, available=available)
  assert len(set(rows)) == 3 and not set(rows) & set(favourites[:2])
  # With two left the third is nobody, and with none all are.
  available = np.isin(np.arange(Q), (5, 7))
  rows = choose(strategy, log_belief, z, 3, available=available)
  assert sorted(rows[:2]) == [5, 7] and rows[2] == -1
  nothing = choose(strategy, log_belief, z, 3, available=np.zeros(Q, bool))
  assert nothing == [-1] * 3


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_users_together_are_users_one_at_a_time(strategy):
  problems = [make_problem(seed) for seed in range(3)]
  log_belief, z = (np.stack(x) for x in zip(*problems, strict=True))
  keys = jax.random.split(KEY, 3)
  together = jax.vmap(
    lambda belief, z, key: choose_questions(strategy, belief, z, 3, key)
  )(log_belief, z, keys)
  alone = [
    choose(strategy, *problem, 3, key)
    for problem, key in zip(problems, keys, strict=True)
  ]
  assert np.asarray(together).tolist() == alone


# Errors.


@pytest.mark.parametrize('size', [0, -1, Q + 1])
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_sizes_out_of_range_are_refused_with_the_range(strategy, size):
  largest = MAX_BALD_BATCH if strategy == 'bald' else Q
  with pytest.raises(InputError, match=f'size={size} .* 1 to {largest} '):
    choose(strategy, *make_problem(), size)


def test_only_bald_limits_the_batch():
  assert MAX_BALD_BATCH < Q
  with pytest.raises(InputError, match='in several batches'):
    choose('bald', *make_problem(), MAX_BALD_BATCH + 1)
  rows = choose('random', *make_problem(), Q)
  assert sorted(rows) == list(range(Q))


def test_unknown_strategies_are_refused_with_the_known_ones():
  log_belief, z = make_problem()
  for call in (
    lambda: scores('entropy', log_belief, z),
    lambda: choose('entropy', log_belief, z, 1),
    lambda: simulate('entropy', make_prior(), *make_users(), 1),
  ):
    with pytest.raises(InputError, match="'entropy' is unknown.*'bald'"):
      call()


# Simulated users. All have one shape, so that little is compiled.

U, T = 64, 8  # more users than the 32 that are simulated together


def make_prior(evidence=1.5, pooling=0.2):
  rng = np.random.default_rng(7)
  return Prior(
    log_weights=jnp.log(jnp.full(2, 0.5)),
    strength=jnp.float32(1.0),
    log_atoms=jnp.asarray(log_softmax(rng.normal(size=(M, 2)), -1)),
    log_masses=jnp.float32(log_softmax(rng.normal(size=M))),
    evidence=jnp.float32(evidence),
    pooling=jnp.float32(pooling),
  )


def make_users():
  """Pools [U, Q, M], answers [U, Q] some of them soft, queries [U, T, M]."""
  rng = np.random.default_rng(8)
  z = np.float32(2 * rng.normal(size=(U, Q, M)))
  answers = rng.integers(0, 2, (U, Q)).astype(np.float32)
  answers[:, ::4] = rng.random(answers[:, ::4].shape)
  return z, answers, np.float32(2 * rng.normal(size=(U, T, M)))


def simulate(strategy, prior, z, answers, queries, steps=Q, key=KEY):
  asked, logits = simulate_questions(
    strategy, prior, z, answers, queries, steps, key
  )
  return np.asarray(asked), np.asarray(logits)


def numpy_belief(prior, z, label):
  """log belief [M] after answers [n] to pairs [n, M], float64."""
  z, label = z.astype(float), label.astype(float)[:, None]
  total = -label * np.logaddexp(0, -z) - (1 - label) * np.logaddexp(0, z)
  masses = np.asarray(prior.log_masses, float)
  return log_softmax(masses + float(prior.evidence) * total.sum(0))


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_no_pair_is_asked_twice(strategy):
  asked, logits = simulate(strategy, make_prior(), *make_users())
  assert asked.shape == (U, Q) and logits.shape == (Q + 1, U, T)
  np.testing.assert_array_equal(
    np.sort(asked, 1), np.tile(np.arange(Q), (U, 1))
  )


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_simulated_users_are_adapted_to_exactly_what_they_were_asked(strategy):
  prior, (z, answers, queries) = make_prior(), make_users()
  asked, logits = simulate(strategy, prior, z, answers, queries)
  for user in (0, 1, U - 1):
    for step in range(Q + 1):
      rows = asked[user, :step]
      belief = np.exp(numpy_belief(prior, z[user, rows], answers[user, rows]))
      p = expit(queries[user].astype(float)) @ belief
      expected = 0.8 * np.log(p / (1 - p)) + 0.2 * (queries[user] @ belief)
      np.testing.assert_allclose(
        logits[step, user], expected, rtol=1e-3, atol=1e-4
      )


def test_they_begin_as_the_prior_and_end_as_adapted_users():
  prior, (z, answers, queries) = make_prior(), make_users()
  asked, logits = simulate('bald', prior, z, answers, queries)
  stranger = believe(prior, jnp.zeros((U, M))).log_belief
  np.testing.assert_allclose(
    logits[0], predict(prior, stranger, queries), rtol=1e-4, atol=1e-5
  )
  rows = asked[:, :4]
  pairs = np.take_along_axis(z, rows[..., None], 1)
  label = np.take_along_axis(answers, rows, 1)
  evidence = class_log_likelihoods(pairs, label, np.ones(label.shape, bool))
  final = believe(prior, evidence).log_belief
  np.testing.assert_allclose(
    logits[4], predict(prior, final, queries), rtol=1e-4, atol=1e-4
  )


def mean_entropy(log_belief, z, rows):
  (row,) = rows
  p = expit(z[row].astype(float)) @ np.exp(log_belief)
  return -p * np.log(p) - (1 - p) * np.log(1 - p)


@pytest.mark.parametrize(
  'strategy, value',
  [
    ('bald', joint_information),
    ('d_optimality', log_det),
    ('uncertainty', mean_entropy),
  ],
)
def test_simulated_users_get_the_best_question_left(strategy, value):
  prior, (z, answers, queries) = make_prior(), make_users()
  asked, _ = simulate(strategy, prior, z, answers, queries)
  for user in (0, U - 1):
    for step in range(Q):
      rows = asked[user, :step]
      belief = numpy_belief(prior, z[user, rows], answers[user, rows])
      left = [value(belief, z[user], [row]) for row in asked[user, step:]]
      assert left[0] >= max(left) - 1e-5


def test_an_answer_that_was_not_asked_for_has_no_effect():
  prior, (z, answers, queries) = make_prior(), make_users()
  asked, logits = simulate('bald', prior, z, answers, queries)
  other = answers.copy()
  late = asked[:, 4:]
  np.put_along_axis(other, late, 1 - np.take_along_axis(other, late, 1), 1)
  same, same_logits = simulate('bald', prior, z, other, queries)
  np.testing.assert_array_equal(asked[:, :5], same[:, :5])
  np.testing.assert_array_equal(logits[:5], same_logits[:5])
  assert np.any(logits[5:] != same_logits[5:])


def test_informative_questions_find_a_user_sooner_than_random_ones():
  """8 atoms of three bits; one pair asks each bit, nine tell nothing."""
  bits = np.array(list(itertools.product((1, -1), repeat=3)))  # [8, 3]
  pool = np.zeros((Q, M), np.float32)
  pool[3::4] = 6.0 * bits.T
  pool[0::4] = 5.0  # nothing to learn, though everybody is sure
  users = np.arange(U) % M
  answers = np.float32(pool[:, users].T > 0)
  queries = np.float32(6.0 * bits.T[np.arange(T) % 3])
  prior = make_prior(evidence=1.0, pooling=0.0)
  prior = prior.replace(log_masses=jnp.full(M, -np.log(M)))
  truth = np.sign(queries[:, users]).T  # [U, T]
  needed = {}
  for strategy in ('bald', 'd_optimality', 'random'):
    _, logits = simulate(
      strategy,
      prior,
      np.tile(pool, (U, 1, 1)),
      answers,
      np.tile(queries, (U, 1, 1)),
    )
    right = np.all(logits * truth > 2.0, -1)  # [Q + 1, U]
    assert right[-1].all() and not right[0].any()
    needed[strategy] = np.argmax(right, 0)
  assert np.all(needed['bald'] == 3)
  assert np.all(needed['d_optimality'] == 3)
  assert needed['random'].mean() > 7


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_on_homogeneous_data_there_is_nothing_to_learn_and_nothing_breaks(
  strategy,
):
  prior, (z, answers, queries) = make_prior(), make_users()
  z, queries = np.tile(z[..., :1], M), np.tile(queries[..., :1], M)
  asked, logits = simulate(strategy, prior, z, answers, queries)
  np.testing.assert_array_equal(
    np.sort(asked, 1), np.tile(np.arange(Q), (U, 1))
  )
  expected = np.tile(queries[..., 0], (Q + 1, 1, 1))
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_equal_scores_do_not_always_fall_on_the_first_pair():
  prior, (z, answers, queries) = make_prior(), make_users()
  users = (np.zeros_like(z), answers, queries)
  asked, _ = simulate('bald', prior, *users)
  assert len(set(asked[:, 0].tolist())) > Q // 2
  other, _ = simulate('bald', prior, *users, key=jax.random.key(1))
  assert np.any(asked != other)


def test_random_users_are_asked_different_questions():
  asked, _ = simulate('random', make_prior(), *make_users())
  assert len({tuple(rows) for rows in asked.tolist()}) == U


def test_pools_that_are_too_small_are_refused():
  with pytest.raises(InputError, match=f'steps={Q + 1} .* only {Q} pairs'):
    simulate('bald', make_prior(), *make_users(), Q + 1)
