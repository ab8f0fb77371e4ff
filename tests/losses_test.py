"""losses: hand values, extremes, and token weighting against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pal_jax import losses

E = np.exp(1.0)
LOGIT_LOSSES = sorted(losses.LOSSES)
EXTREMES = jnp.array([-1000.0, -1.0, 0.0, 1.0, 1000.0])
every_loss = pytest.mark.parametrize('name', LOGIT_LOSSES)


def apply(name, logit, label):
  return losses.LOSSES[name](
    jnp.asarray(logit, jnp.float32), jnp.asarray(label, jnp.float32)
  )


@pytest.mark.parametrize(
  ('name', 'logit', 'label', 'expected'),
  [
    ('logistic', 0.0, 1.0, np.log(2)),
    ('logistic', 1.0, 1.0, np.log(1 + 1 / E)),
    ('logistic', 1.0, 0.0, np.log(1 + E)),
    ('logistic', 1.0, 0.25, 0.25 * np.log(1 + 1 / E) + 0.75 * np.log(1 + E)),
    ('logistic', -1000.0, 1.0, 1000.0),
    ('logistic', 1000.0, 1.0, 0.0),
    ('logistic', 1000.0, 0.5, 500.0),
    ('cross_entropy', 1.0, 1.0, np.log(1 + 1 / E)),
    ('cross_entropy', -1000.0, 1.0, 1000.0),
    ('cross_entropy', 1000.0, 0.5, 500.0),
    ('hinge', 0.0, 1.0, 1.0),
    ('hinge', 0.25, 1.0, 0.75),
    ('hinge', 0.25, 0.0, 1.25),
    ('hinge', 1.0, 1.0, 0.0),
    ('hinge', 3.0, 1.0, 0.0),
    ('hinge', 3.0, 0.5, 2.0),
    ('hinge', -1000.0, 1.0, 1001.0),
    ('smoothed_hinge', 2.0, 1.0, 0.0),
    ('smoothed_hinge', 1.0, 1.0, 0.0),
    ('smoothed_hinge', 0.0, 1.0, 0.1),  # s = 1: 1 / 10
    ('smoothed_hinge', -1.0, 1.0, 0.4),  # s = 2: 4 / 10
    ('smoothed_hinge', -4.0, 1.0, 2.5),  # s = 5, the end of the zone
    ('smoothed_hinge', -9.0, 1.0, 7.5),  # s = 10, linear
    ('smoothed_hinge', 9.0, 0.0, 7.5),
    ('smoothed_hinge', 0.0, 0.5, 0.1),
    ('smoothed_hinge', -1000.0, 1.0, 998.5),
  ],
)
def test_hand_values(name, logit, label, expected):
  assert float(apply(name, logit, label)) == pytest.approx(
    expected, rel=1e-6, abs=1e-7
  )


@every_loss
@pytest.mark.parametrize('label', [0.0, 0.3, 0.5, 1.0])
def test_values_and_gradients_are_finite_at_extremes(name, label):
  def total(z):
    return apply(name, z, label).sum()

  assert np.isfinite(apply(name, EXTREMES, label)).all()
  assert np.isfinite(jax.grad(total)(EXTREMES)).all()


@every_loss
def test_a_confident_mistake_has_slope_one(name):
  """A vanishing gradient there would never mend it."""
  slope = jax.grad(lambda z: apply(name, z, 1.0))
  assert float(slope(-1000.0)) == pytest.approx(-1.0, abs=1e-6)
  slope = jax.grad(lambda z: apply(name, z, 0.0))
  assert float(slope(1000.0)) == pytest.approx(1.0, abs=1e-6)


@every_loss
def test_a_soft_label_is_the_expectation(name):
  z = jnp.linspace(-8.0, 8.0, 33)
  for y in (0.1, 0.5, 0.9):
    np.testing.assert_allclose(
      apply(name, z, y),
      y * apply(name, z, 1.0) + (1 - y) * apply(name, z, 0.0),
      rtol=1e-5,
    )


@every_loss
def test_swapping_candidates_and_label_changes_nothing(name):
  z = jnp.linspace(-8.0, 8.0, 33)
  for y in (0.0, 0.2, 0.5, 1.0):
    np.testing.assert_allclose(
      apply(name, z, y), apply(name, -z, 1.0 - y), rtol=1e-5, atol=1e-6
    )


@every_loss
def test_a_tie_is_least_at_zero_and_even(name):
  z = jnp.linspace(-8.0, 8.0, 33)
  value = np.asarray(apply(name, z, 0.5))
  np.testing.assert_allclose(value, value[::-1], rtol=1e-5)
  assert value.min() == pytest.approx(value[16], abs=1e-6)
  assert float(jax.grad(lambda z: apply(name, z, 0.5))(0.0)) == pytest.approx(
    0.0, abs=1e-6
  )


@every_loss
def test_losses_fall_as_the_logit_grows_towards_the_label(name):
  value = np.asarray(apply(name, jnp.linspace(-8.0, 8.0, 33), 1.0))
  assert (np.diff(value) <= 1e-7).all()
  assert value[0] > value[16] > value[-1] >= 0.0


@every_loss
def test_losses_are_unreduced(name):
  assert apply(name, np.zeros((2, 3)), np.ones((2, 3))).shape == (2, 3)


@pytest.mark.parametrize('label', [0.0, 0.3, 0.5, 1.0])
def test_cross_entropy_is_the_logistic_of_the_difference(label):
  rewards = jnp.array(
    [[0.3, -1.2], [5.0, 5.0], [1000.0, -1000.0], [-1000.0, 999.0]]
  )
  expected = losses.logistic(rewards[:, 0] - rewards[:, 1], label)
  np.testing.assert_allclose(
    losses.cross_entropy(rewards, label), expected, rtol=1e-5
  )
  gradient = jax.grad(lambda r: losses.cross_entropy(r, label).sum())(rewards)
  assert np.isfinite(gradient).all()
  np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=1e-6)


@pytest.mark.parametrize('gamma', [0.5, 5.0])
def test_smoothed_hinge_is_continuous_with_its_slope(gamma):
  def loss(z):
    return losses.smoothed_hinge(z, 1.0, gamma)

  slope = jax.vmap(jax.grad(loss))
  for joint in (1.0, 1.0 - gamma):
    around = jnp.array([joint - 1e-3, joint + 1e-3])
    assert np.ptp(loss(around)) < 2.1e-3
    # The slope changes by at most 1 / gamma per unit.
    assert np.ptp(slope(around)) < 2.1e-3 / gamma
  inside = jnp.linspace(1.0 - gamma, 1.0, 9)
  np.testing.assert_allclose(
    loss(inside), (1.0 - inside) ** 2 / (2 * gamma), atol=1e-6
  )
  np.testing.assert_allclose(slope(inside), -(1.0 - inside) / gamma, atol=1e-5)


def test_smoothed_hinge_nears_the_hinge_as_gamma_shrinks():
  z = jnp.linspace(-5.0, 5.0, 41)
  np.testing.assert_allclose(
    losses.smoothed_hinge(z, 1.0, 1e-4), losses.hinge(z, 1.0), atol=1e-4
  )


def test_smoothed_hinge_at_huge_logits_does_not_overflow():
  value, slope = jax.value_and_grad(losses.smoothed_hinge)(-1e30, 1.0)
  assert np.isfinite(value) and float(slope) == -1.0


def test_hinge_margin():
  assert float(losses.hinge(0.5, 1.0, margin=2.0)) == 1.5


def test_bound_is_positive_above_the_radius_only():
  norm = jnp.array([0.0, 3.9, 4.0, 4.5, 23.0])
  np.testing.assert_allclose(
    losses.ideal_point_bound(norm, 4.0, 1.0), [0, 0, 0, 0.5, 19.0], atol=1e-6
  )
  np.testing.assert_allclose(
    losses.ideal_point_bound(norm, 4.0, 0.1), [0, 0, 0, 0.05, 1.9], atol=1e-6
  )
  slope = jax.vmap(jax.grad(losses.ideal_point_bound), (0, None, None))
  np.testing.assert_allclose(np.delete(slope(norm, 4.0, 2.0), 2), [0, 0, 2, 2])


def test_bound_off_is_zero():
  norm = jnp.array([0.0, 1e6])
  np.testing.assert_array_equal(losses.ideal_point_bound(norm, 4.0, 0.0), 0.0)


# Token weighting.

KINDS = ('mean', 'last', 'cumulative')
TOKENS = np.array([[7, 7, 1, 2, 3, 0], [7, 7, 4, 2, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]], bool)


def oracle_weights(tokens, mask, kind):
  """METHOD section 2, one position at a time."""
  lengths = [int(row.sum()) for row in mask]
  weight = np.zeros(tokens.shape[-1])
  if not max(lengths):
    return weight
  last = max(lengths) - 1
  first = last
  for t in range(last + 1):
    both = t < lengths[0] and t < lengths[1]
    if not both or tokens[0, t] != tokens[1, t]:
      first = t
      break
  count = last - first + 1
  for t in range(first, last + 1):
    if kind == 'mean':
      weight[t] = 1.0 / count
    elif kind == 'last':
      weight[t] = float(t == last)
    else:
      weight[t] = (t - first + 1) / (count * (count + 1) / 2)
  return weight


def oracle_loss(rewards, tokens, mask, label, kind):
  weight = oracle_weights(tokens, mask, kind)
  total = 0.0
  for t in np.flatnonzero(weight):
    held = [
      float(rewards[c, min(t, max(int(mask[c].sum()) - 1, 0))]) for c in (0, 1)
    ]
    z = held[0] - held[1]
    each = label * np.logaddexp(0, -z) + (1 - label) * np.logaddexp(0, z)
    total += weight[t] * each
  return total


def random_pair(rng, length=8, vocabulary=3):
  """Responses that share a prefix, of any lengths from 1 on."""
  tokens = rng.integers(0, vocabulary, (2, length))
  shared = rng.integers(0, length)
  tokens[1, :shared] = tokens[0, :shared]
  mask = np.arange(length) < rng.integers(1, length + 1, (2, 1))
  return tokens, mask


@pytest.mark.parametrize(
  ('kind', 'expected'),
  [
    ('mean', [0, 0, 1 / 3, 1 / 3, 1 / 3, 0]),
    ('last', [0, 0, 0, 0, 1, 0]),
    ('cumulative', [0, 0, 1 / 6, 2 / 6, 3 / 6, 0]),
  ],
)
def test_window_runs_from_the_first_difference_to_the_last_token(
  kind, expected
):
  found = losses.token_weights(TOKENS, MASK, kind)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_cumulative_is_the_formula_of_the_method():
  """sum_t t * l_t / (T (T + 1) / 2), with t from 1 to T."""
  tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
  each = np.array([0.3, 1.0, 2.0, 0.7])
  weight = losses.token_weights(tokens, np.ones((2, 4), bool), 'cumulative')
  expected = (1 * 0.3 + 2 * 1.0 + 3 * 2.0 + 4 * 0.7) / (4 * 5 / 2)
  assert float(weight @ each) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_ending_earlier_is_a_difference(kind):
  """The same tokens, one response longer: the window is what it adds."""
  tokens = np.array([[1, 2, 3, 9], [1, 2, 3, 9]])
  mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
  found = np.asarray(losses.token_weights(tokens, mask, kind))
  assert (found[:2] == 0).all() and found[3] > 0
  assert (found[2] > 0) == (kind != 'last')


@pytest.mark.parametrize('kind', KINDS)
def test_identical_responses_weigh_their_last_token_alone(kind):
  tokens = np.array([[4, 5, 6, 0], [4, 5, 6, 0]])
  mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0]], bool)
  np.testing.assert_array_equal(
    losses.token_weights(tokens, mask, kind), [0, 0, 1, 0]
  )


@pytest.mark.parametrize('kind', KINDS)
def test_nothing_real_weighs_nothing(kind):
  mask = np.zeros((2, 6), bool)
  np.testing.assert_array_equal(losses.token_weights(TOKENS, mask, kind), 0.0)
  loss = losses.token_loss(
    np.ones((2, 6)), TOKENS, mask, jnp.ones(()), losses.logistic, kind
  )
  assert float(loss) == 0.0


@pytest.mark.parametrize('kind', KINDS)
def test_the_pad_id_is_never_assumed(kind):
  expected = losses.token_weights(TOKENS, MASK, kind)
  for pad in (0, 1, 2, 3, 50256, -1):
    tokens = np.where(MASK, TOKENS, pad)
    np.testing.assert_array_equal(
      losses.token_weights(tokens, MASK, kind), expected
    )


@pytest.mark.parametrize('kind', KINDS)
def test_a_real_token_may_have_any_id(kind):
  """Zeros inside the responses are tokens like others."""
  tokens = np.where(MASK, TOKENS, 99)
  zeros = np.where(tokens == 2, 0, tokens)
  np.testing.assert_array_equal(
    losses.token_weights(zeros, MASK, kind),
    losses.token_weights(tokens, MASK, kind),
  )


@pytest.mark.parametrize('kind', KINDS)
def test_token_weights_and_loss_equal_a_loop(kind):
  rng = np.random.default_rng(0)
  pairs = [random_pair(rng) for _ in range(60)]
  tokens = np.stack([t for t, _ in pairs])
  mask = np.stack([m for _, m in pairs])
  rewards = rng.normal(size=tokens.shape) * 3.0
  label = rng.choice([0.0, 0.5, 0.8, 1.0], size=60)
  weights = losses.token_weights(tokens, mask, kind)
  found = losses.token_loss(
    jnp.array(rewards), tokens, mask, label, losses.logistic, kind
  )
  assert weights.shape == (60, 8) and found.shape == (60,)
  for i in range(60):
    expected = oracle_weights(tokens[i], mask[i], kind)
    np.testing.assert_allclose(weights[i], expected, rtol=1e-6)
    assert float(found[i]) == pytest.approx(
      oracle_loss(rewards[i], tokens[i], mask[i], label[i], kind), rel=1e-5
    )
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_padded_rewards_are_never_read(kind):
  rewards = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)

  def loss(r):
    return losses.token_loss(
      r, TOKENS, MASK, jnp.ones(()), losses.logistic, kind
    )

  value, gradient = jax.value_and_grad(loss)(jnp.array(rewards))
  for other in (1e9, np.nan, np.inf):
    changed = jnp.array(np.where(MASK, rewards, other))
    found, found_gradient = jax.value_and_grad(loss)(changed)
    assert float(found) == float(value)
    np.testing.assert_array_equal(found_gradient, gradient)
  np.testing.assert_array_equal(gradient[~MASK], 0.0)


@pytest.mark.parametrize('kind', KINDS)
def test_the_shared_prefix_is_outside_loss_and_gradient(kind):
  """Positions without weight may hold anything, infinity included."""
  rewards = np.random.default_rng(2).normal(size=(2, 6)).astype(np.float32)

  def loss(r):
    return losses.token_loss(
      r, TOKENS, MASK, jnp.zeros(()), losses.logistic, kind
    )

  value, gradient = jax.value_and_grad(loss)(jnp.array(rewards))
  rewards[:, :2] = np.inf
  found, found_gradient = jax.value_and_grad(loss)(jnp.array(rewards))
  assert float(found) == float(value)
  np.testing.assert_array_equal(found_gradient, gradient)
  assert np.abs(gradient[:, 2:]).max() > 0


def test_last_reads_each_response_at_its_own_last_token():
  rewards = jnp.array([[0, 0, 0, 0, 2.0, 9.0], [0, 0, 0, -1.0, 9.0, 9.0]])
  found = losses.token_loss(
    rewards, TOKENS, MASK, jnp.ones(()), losses.logistic, 'last'
  )
  assert float(found) == pytest.approx(np.log1p(np.exp(-3.0)), rel=1e-6)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', LOGIT_LOSSES)
def test_token_loss_is_finite_at_extremes(kind, name):
  rewards = jnp.where(jnp.arange(6) % 2 == 0, 500.0, -500.0) * jnp.array(
    [[1.0], [-1.0]]
  )
  value, gradient = jax.value_and_grad(losses.token_loss)(
    rewards, TOKENS, MASK, jnp.ones(()), losses.LOSSES[name], kind
  )
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_an_unknown_weighting_lists_the_known_ones():
  with pytest.raises(ValueError, match="'median'.*mean.*last.*cumulative"):
    losses.token_weights(TOKENS, MASK, 'median')
