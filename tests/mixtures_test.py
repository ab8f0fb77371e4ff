"""mixtures: likelihoods in log space against brute force in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from pal_jax import mixtures
from pal_jax.losses import logistic

EXTREMES = (-1000.0, -30.0, 0.0, 30.0, 1000.0)


def log_simplex(rng, *shape):
  logits = rng.normal(size=shape) * 2.0
  return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.fixture(scope='module')
def user():
  """One user of 5 comparisons under 3 classes, with a tie and soft labels."""
  rng = np.random.default_rng(0)
  return {
    'log_prior': log_simplex(rng, 3),
    'delta': rng.normal(size=(5, 3)) * 2.0,
    'label': np.array([1.0, 0.0, 0.5, 0.8, 1.0]),
    'mask': np.array([True, True, True, True, False]),
  }


def brute_class_likelihoods(delta, label, mask):
  """prod_j p(y_j | k), multiplied out, never in log space."""
  product = np.ones(delta.shape[-1])
  for z, y, live in zip(delta, label, mask, strict=True):
    if live:
      product = product * expit(z) ** y * expit(-z) ** (1.0 - y)
  return product


def test_comparison_level_equals_brute_force():
  rng = np.random.default_rng(1)
  log_w, delta = log_simplex(rng, 20, 4), rng.normal(size=(20, 4)) * 3.0
  p = (np.exp(log_w) * expit(delta)).sum(-1)
  logit = mixtures.mixture_logit(jnp.array(log_w), jnp.array(delta))
  np.testing.assert_allclose(logit, np.log(p / (1.0 - p)), atol=1e-5)
  for label in (0.0, 0.3, 0.5, 1.0):
    expected = -(label * np.log(p) + (1.0 - label) * np.log1p(-p))
    np.testing.assert_allclose(logistic(logit, label), expected, atol=1e-5)


def test_a_mixture_is_between_its_prototypes():
  rng = np.random.default_rng(2)
  log_w, delta = log_simplex(rng, 50, 4), rng.normal(size=(50, 4)) * 5.0
  logit = np.asarray(mixtures.mixture_logit(jnp.array(log_w), jnp.array(delta)))
  assert (logit >= delta.min(-1) - 1e-5).all()
  assert (logit <= delta.max(-1) + 1e-5).all()


def test_likelihoods_are_mixed_not_logits():
  """At w = 1/2 and logits of +-z the probability is exactly one half."""
  log_w = jnp.log(jnp.array([0.9, 0.1]))
  p = expit(float(mixtures.mixture_logit(log_w, jnp.array([1000.0, -1000.0]))))
  assert p == pytest.approx(0.9, rel=1e-5)


@pytest.mark.parametrize('size', [1.0, 1000.0])
def test_swapping_candidates_negates_the_mixture_logit(size):
  rng = np.random.default_rng(3)
  log_w = jnp.array(log_simplex(rng, 20, 4))
  delta = jnp.array(rng.normal(size=(20, 4)) * size)
  np.testing.assert_array_equal(
    mixtures.mixture_logit(log_w, delta), -mixtures.mixture_logit(log_w, -delta)
  )


def test_comparison_level_is_finite_at_extremes():
  delta = jnp.array(list(itertools.product(EXTREMES, repeat=2)))
  log_w = jnp.log(jnp.array([0.25, 0.75]))
  for label in (0.0, 0.5, 1.0):

    def loss(w, d, y=label):
      return logistic(mixtures.mixture_logit(w, d), y)

    value, gradients = jax.vmap(
      jax.value_and_grad(loss, argnums=(0, 1)), (None, 0)
    )(log_w, delta)
    assert np.isfinite(value).all()
    assert all(np.isfinite(g).all() for g in gradients)


def test_saturated_prototypes_that_agree_keep_their_logit():
  log_w = jnp.log(jnp.array([0.25, 0.75]))
  for z in (1000.0, -1000.0):
    logit = mixtures.mixture_logit(log_w, jnp.array([z, z]))
    assert float(logit) == pytest.approx(z)
    # The loss of a confident mistake is its logit: 1 - sigma(z) would be 0.
    assert float(logistic(logit, float(z < 0))) == pytest.approx(1000.0)


def test_a_saturated_mistake_still_has_a_gradient():
  log_w = jnp.log(jnp.array([0.25, 0.75]))

  def loss(d):
    return logistic(mixtures.mixture_logit(log_w, d), 0.0)

  gradient = jax.grad(loss)(jnp.array([1000.0, 1000.0]))
  assert float(gradient.sum()) == pytest.approx(1.0, rel=1e-5)


def test_a_weightless_prototype_changes_nothing():
  delta = jnp.array([2.0, -1000.0])
  for zero in (-jnp.inf, -1e4):
    log_w = jnp.array([0.0, zero])
    assert float(mixtures.mixture_logit(log_w, delta)) == pytest.approx(2.0)
    gradient = jax.grad(mixtures.mixture_logit, argnums=1)(log_w, delta)
    np.testing.assert_allclose(gradient, [1.0, 0.0], atol=1e-6)


def test_comparison_log_likelihoods_of_hard_and_soft_labels():
  delta = np.array([[-2.0, 0.0, 3.0]])
  for label in (0.0, 0.5, 0.8, 1.0):
    found = mixtures.comparison_log_likelihoods(
      jnp.array(delta), jnp.array([label])
    )
    expected = label * np.log(expit(delta)) + (1 - label) * np.log(
      expit(-delta)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_class_log_likelihoods_equal_brute_force(user):
  found = mixtures.class_log_likelihoods(
    user['delta'], user['label'], user['mask']
  )
  expected = brute_class_likelihoods(user['delta'], user['label'], user['mask'])
  np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5)


def test_user_level_equals_brute_force(user):
  each = brute_class_likelihoods(user['delta'], user['label'], user['mask'])
  expected = np.log((np.exp(user['log_prior']) * each).sum())
  assert float(mixtures.user_log_likelihood(**user)) == pytest.approx(
    expected, rel=1e-5
  )


def test_user_level_over_all_outcomes_sums_to_one(user):
  """It is a probability: the 2^N answers of a user exhaust it."""
  total = sum(
    np.exp(
      mixtures.user_log_likelihood(
        user['log_prior'],
        user['delta'][:4],
        np.array(answers),
        np.ones(4, bool),
      )
    )
    for answers in itertools.product((0.0, 1.0), repeat=4)
  )
  assert total == pytest.approx(1.0, rel=1e-5)


def test_levels_agree_on_one_comparison_and_differ_on_two(user):
  log_w, delta = jnp.array(user['log_prior']), jnp.array(user['delta'])
  label = jnp.array([1.0, 0.0])
  comparison = logistic(mixtures.mixture_logit(log_w, delta[:2]), label)

  def of(n):
    return float(
      mixtures.user_log_likelihood(
        log_w, delta[:n], label[:n], jnp.ones(n, bool)
      )
    )

  assert of(1) == pytest.approx(-float(comparison[0]), rel=1e-5)
  assert abs(of(2) + float(comparison.sum())) > 1e-3


def test_posterior_equals_bayes_rule(user):
  joint = np.exp(user['log_prior']) * brute_class_likelihoods(
    user['delta'], user['label'], user['mask']
  )
  found = np.exp(mixtures.class_log_posterior(**user))
  np.testing.assert_allclose(found, joint / joint.sum(), rtol=1e-5)
  assert found.sum() == pytest.approx(1.0, rel=1e-5)


def test_posterior_finds_the_class_that_answered():
  rng = np.random.default_rng(4)
  delta = rng.normal(size=(60, 3)) * 3.0
  label = (delta[:, 1] > 0).astype(float)
  found = mixtures.class_log_posterior(
    jnp.log(jnp.ones(3) / 3), delta, label, np.ones(60, bool)
  )
  assert float(jnp.exp(found[1])) > 0.999


def test_without_comparisons_the_posterior_is_the_prior(user):
  nothing = dict(user, mask=np.zeros(5, bool))
  np.testing.assert_allclose(
    mixtures.class_log_posterior(**nothing), user['log_prior'], atol=1e-6
  )
  assert float(mixtures.user_log_likelihood(**nothing)) == pytest.approx(
    0.0, abs=1e-6
  )
  empty = mixtures.class_log_posterior(
    user['log_prior'], np.zeros((0, 3)), np.zeros(0), np.zeros(0, bool)
  )
  np.testing.assert_allclose(empty, user['log_prior'], atol=1e-6)


def test_a_tie_tells_nothing_between_mirrored_classes():
  """Under y = 1/2 logits of +z and -z are equally likely."""
  found = mixtures.class_log_posterior(
    jnp.log(jnp.array([0.7, 0.3])),
    jnp.array([[4.0, -4.0]]),
    jnp.array([0.5]),
    jnp.array([True]),
  )
  np.testing.assert_allclose(jnp.exp(found), [0.7, 0.3], rtol=1e-5)


def test_padding_never_enters_the_user_level(user):
  for value in (1000.0, np.nan, np.inf):
    delta = user['delta'].copy()
    delta[4] = value
    changed = dict(user, delta=delta)
    assert float(mixtures.user_log_likelihood(**changed)) == float(
      mixtures.user_log_likelihood(**user)
    )
    np.testing.assert_array_equal(
      mixtures.class_log_posterior(**changed),
      mixtures.class_log_posterior(**user),
    )


def test_order_of_comparisons_changes_nothing(user):
  order = np.array([4, 2, 0, 3, 1])
  shuffled = dict(
    user, **{name: user[name][order] for name in ('delta', 'label', 'mask')}
  )
  np.testing.assert_allclose(
    mixtures.class_log_posterior(**shuffled),
    mixtures.class_log_posterior(**user),
    atol=1e-6,
  )


def test_user_level_batches_over_leading_axes(user):
  rng = np.random.default_rng(5)
  delta, label = rng.normal(size=(4, 5, 3)), rng.uniform(size=(4, 5))
  mask = rng.uniform(size=(4, 5)) < 0.7
  args = (user['log_prior'], delta, label, mask)
  likelihood = mixtures.user_log_likelihood(*args)
  posterior = mixtures.class_log_posterior(*args)
  assert likelihood.shape == (4,) and posterior.shape == (4, 3)
  for i in range(4):
    one = (user['log_prior'], delta[i], label[i], mask[i])
    np.testing.assert_allclose(
      likelihood[i], mixtures.user_log_likelihood(*one), rtol=1e-5
    )
    np.testing.assert_allclose(
      posterior[i], mixtures.class_log_posterior(*one), atol=1e-5
    )


@pytest.mark.parametrize('label', [0.0, 0.5, 1.0])
def test_user_level_is_finite_at_extremes(label):
  """40 comparisons at +-1000: exp of their sum underflows in any float."""
  delta = jnp.tile(jnp.array([[1000.0, -1000.0, 0.0]]), (40, 1))
  delta = delta * jnp.where(jnp.arange(40) % 3 == 0, -1.0, 1.0)[:, None]
  args = (jnp.full(40, label), jnp.ones(40, bool))
  log_prior = jnp.log(jnp.array([0.98, 0.01, 0.01]))
  value, gradients = jax.value_and_grad(
    mixtures.user_log_likelihood, argnums=(0, 1)
  )(log_prior, delta, *args)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in gradients)
  posterior = mixtures.class_log_posterior(log_prior, delta, *args)
  assert np.isfinite(posterior).all()
  # 13 to 27 answers are impossible for the first two: the third is left.
  np.testing.assert_allclose(jnp.exp(posterior), [0.0, 0.0, 1.0], atol=1e-6)


def test_gradient_in_the_prior_is_the_posterior(user):
  """Fisher's identity: what EM and gradient training share."""
  gradient = jax.grad(mixtures.user_log_likelihood)(
    jnp.array(user['log_prior']), user['delta'], user['label'], user['mask']
  )
  np.testing.assert_allclose(
    gradient, jnp.exp(mixtures.class_log_posterior(**user)), rtol=1e-5
  )


def test_harden_is_one_hot_at_the_largest():
  log_w = jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]]))
  np.testing.assert_array_equal(mixtures.harden(log_w), [[0, 1, 0], [1, 0, 0]])


def test_harden_keeps_an_unknown_user_unknown():
  """arg-max of NaN is 0: it would make them prototype 0."""
  log_w = jnp.array([[jnp.nan] * 3, [-5.0, -1.0, -2.0]])
  found = mixtures.harden(log_w)
  assert np.isnan(found[0]).all()
  np.testing.assert_array_equal(found[1], [0, 1, 0])


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('temperature', [0.1, 1.0, 5.0])
def test_gumbel_forward_is_exactly_one_hot(compiled, temperature):
  rng = np.random.default_rng(6)
  log_w = jnp.array(log_simplex(rng, 200, 5), jnp.float32)
  draw = mixtures.gumbel_straight_through
  draw = jax.jit(draw) if compiled else draw
  weights = np.asarray(draw(jax.random.key(0), log_w, temperature))
  assert set(np.unique(weights)) == {0.0, 1.0}
  np.testing.assert_array_equal(weights.sum(-1), 1.0)


def test_gumbel_draws_classes_as_often_as_their_weights():
  weights = jnp.array([0.6, 0.3, 0.1])
  log_w = jnp.broadcast_to(jnp.log(weights), (4000, 3))
  draws = mixtures.gumbel_straight_through(jax.random.key(1), log_w)
  # Three standard errors of a share of 4000 draws are below 0.024.
  np.testing.assert_allclose(draws.mean(0), weights, atol=0.024)
  again = mixtures.gumbel_straight_through(jax.random.key(2), log_w)
  assert (np.asarray(draws) != np.asarray(again)).any()


@pytest.mark.parametrize('temperature', [0.5, 1.0])
def test_gumbel_gradient_is_that_of_the_soft_sample(temperature):
  log_w = jnp.log(jnp.array([0.6, 0.3, 0.1]))
  key, value = jax.random.key(3), jnp.array([1.0, -2.0, 0.5])
  noise = jax.random.gumbel(key, log_w.shape, log_w.dtype)

  def soft(w):
    return value @ jax.nn.softmax((w + noise) / temperature)

  def hard(w):
    return value @ mixtures.gumbel_straight_through(key, w, temperature)

  gradient = jax.grad(hard)(log_w)
  np.testing.assert_allclose(gradient, jax.grad(soft)(log_w), rtol=1e-5)
  assert np.abs(gradient).max() > 1e-3


def test_gumbel_survives_vanishing_weights():
  log_w = jax.nn.log_softmax(jnp.array([0.0, -1000.0, -1000.0]))

  def total(w):
    return mixtures.gumbel_straight_through(jax.random.key(4), w) @ jnp.arange(
      3.0
    )

  value, gradient = jax.value_and_grad(total)(log_w)
  assert float(value) == 0.0
  assert np.isfinite(gradient).all()
