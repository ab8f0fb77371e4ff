"""adaptation.reference: the reference implementation's recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax

from pal_jax.adaptation.reference import (
  BATCH_SIZE,
  LEARNING_RATE,
  NUM_EPOCHS,
  WEIGHT_DECAY,
  fit_reference,
)
from tests.adaptation import oracle
from tests.adaptation.oracle import K, N, U, pal_a

TEMPERATURE = 0.8


@pytest.fixture(scope='module')
def model():
  return pal_a()


@pytest.fixture(scope='module')
def variables(model):
  variables = oracle.variables_of(model)
  variables['params']['log_temperature'] = np.float32(np.log(TEMPERATURE))
  return variables


def start_of(seed=0):
  return np.float32(np.random.default_rng(seed).normal(size=(U, K)))


def fit(model, variables, stats, c, start, seed=0):
  found = fit_reference(
    model,
    variables,
    'convex',
    stats,
    jnp.asarray(c.label),
    jnp.asarray(c.mask),
    jnp.asarray(start),
    jax.random.key(seed),
  )
  return np.asarray(found)


def counted(counts, seed=0):
  c = oracle.make_comparisons(seed)
  return c.replace(mask=np.arange(N) < np.asarray(counts)[:, None])


def numpy_adamw(delta, label, start, epochs):
  """torch's AdamW on the mean loss of one batch, in float64."""
  theta = np.float64(start)
  first, second = np.zeros(K), np.zeros(K)
  for step in range(1, epochs + 1):
    w = softmax(theta / TEMPERATURE)
    in_w = (expit(delta @ w) - label) @ delta / len(label)
    gradient = w * (in_w - w @ in_w) / TEMPERATURE
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    update = (first / (1 - 0.9**step)) / (
      np.sqrt(second / (1 - 0.999**step)) + 1e-8
    )
    theta = theta - LEARNING_RATE * (update + WEIGHT_DECAY * theta)
  return theta


def test_the_recipe_is_the_papers():
  assert (LEARNING_RATE, WEIGHT_DECAY) == (5e-3, 0.01)
  assert (NUM_EPOCHS, BATCH_SIZE) == (20, 4)


def test_without_comparisons_the_start_comes_back(model, variables):
  c, start = counted([0] * U), start_of()
  stats = oracle.reduce(model, variables, c)
  found = fit(model, variables, stats, c, start)
  np.testing.assert_allclose(
    found, log_softmax(start / TEMPERATURE, -1), atol=1e-6
  )


def test_users_with_one_batch_take_the_steps_of_adamw(model, variables):
  """Their order does not matter: every epoch is one step on all of them."""
  counts = [1, 2, 3, 4, 4, 0]
  c, start = counted(counts), start_of()
  stats = oracle.reduce(model, variables, c)
  found = fit(model, variables, stats, c, start)
  delta = np.float64(stats.delta)
  for user, n in enumerate(counts[:-1]):
    theta = numpy_adamw(
      delta[user, :n], np.float64(c.label[user, :n]), start[user], NUM_EPOCHS
    )
    expected = log_softmax(theta / TEMPERATURE)
    np.testing.assert_allclose(found[user], expected, atol=2e-5)
    # The steps are no rounding error.
    assert (
      np.abs(expected - log_softmax(start[user] / TEMPERATURE)).max() > 0.01
    )


def test_no_logit_moves_further_than_its_steps(model, variables):
  """Up to the decay and a few per cent that Adam's moments allow."""
  counts = np.array([1, 3, 4, 5, 9, 12])
  c, start = counted(counts), start_of()
  c = c.replace(label=np.ones_like(c.label))
  stats = oracle.reduce(model, variables, c)
  stats = stats.replace(delta=stats.delta * 10)
  found = fit(model, variables, stats, c, start)
  moved = TEMPERATURE * (found - log_softmax(start / TEMPERATURE, -1))
  # Log-weights are logits up to a constant a user.
  spread = moved.max(-1) - moved.min(-1)
  steps = NUM_EPOCHS * -(-counts // BATCH_SIZE)
  decay = WEIGHT_DECAY * np.abs(start).max(-1)
  limit = 2 * LEARNING_RATE * steps * (1.1 + decay)
  assert np.all(spread <= limit)
  assert np.all(spread[:3] > 0.01)


def test_only_the_order_depends_on_the_key(model, variables):
  c, start = counted([0, 1, 4, 5, 8, 12]), start_of()
  stats = oracle.reduce(model, variables, c)
  a, again, b = (fit(model, variables, stats, c, start, s) for s in (0, 0, 1))
  np.testing.assert_array_equal(a, again)
  np.testing.assert_allclose(a[:3], b[:3], atol=1e-5)
  assert np.all(np.abs(a - b)[3:].max(-1) > 1e-5)


def test_what_is_masked_changes_nothing(model, variables):
  c, start = counted([0, 1, 4, 5, 8, 11]), start_of()
  stats = oracle.reduce(model, variables, c)
  found = fit(model, variables, stats, c, start)
  dirty = stats.map(lambda x: jnp.where(c.mask[..., None], x, jnp.float32(1e6)))
  flipped = c.replace(label=np.where(c.mask, c.label, 1 - c.label))
  other = fit(model, variables, dirty, flipped, start)
  np.testing.assert_array_equal(found, other)


def test_weights_stay_on_the_simplex(model, variables):
  c = counted([12] * U)
  stats = oracle.reduce(model, variables, c)
  stats = stats.replace(delta=stats.delta * 1000)
  found = fit(model, variables, stats, c, 30 * start_of())
  assert np.all(np.isfinite(found))
  np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-5)
