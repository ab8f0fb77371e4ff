"""models.projectors: layers against numpy, dropout, batch norm with masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from pal_jax.errors import InputError
from pal_jax.models.projectors import (
  ACTIVATIONS,
  MaskedBatchNorm,
  Projector,
  num_hidden_layers,
)

ORACLES = {
  'relu': lambda x: np.maximum(x, 0.0),
  'gelu': lambda x: 0.5 * x * (1.0 + erf(x / np.sqrt(2.0))),
  'linear': lambda x: x,
}
H = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def random_variables(module, *args, seed=1):
  """Variables of the right shapes, drawn by numpy, biases included."""
  shapes = jax.eval_shape(
    lambda key: module.init(key, *args), jax.random.key(0)
  )
  rng = np.random.default_rng(seed)
  variables = jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(np.float32), shapes
  )
  if 'batch_stats' in variables:  # a variance is positive
    variables['batch_stats'] = jax.tree.map(
      lambda x: np.abs(x) + 0.5, variables['batch_stats']
    )
  return variables


def oracle(params, h, activation, residual=False):
  """The projector in float64, layer by layer."""
  layers = [params[f'Dense_{i}'] for i in range(len(params))]
  x = h.astype(float)
  for i, layer in enumerate(layers):
    x = x @ layer['kernel'] + layer.get('bias', 0.0)
    if i < len(layers) - 1:
      x = ORACLES[activation](x)
  return x + h if residual else x


# Layers.


def test_every_activation_has_an_oracle():
  assert set(ACTIVATIONS) == set(ORACLES)
  x = np.linspace(-4.0, 4.0, 33)
  for name, activation in ACTIVATIONS.items():
    np.testing.assert_allclose(
      activation(jnp.array(x)), ORACLES[name](x), atol=1e-6, err_msg=name
    )


@pytest.mark.parametrize('hidden', [0, 1, 2, 3])
@pytest.mark.parametrize('activation', sorted(ACTIVATIONS))
@pytest.mark.parametrize('use_bias', [True, False])
def test_mlp_equals_numpy(hidden, activation, use_bias):
  module = Projector(
    2, kind=f'mlp{hidden}', activation=activation, use_bias=use_bias
  )
  variables = random_variables(module, H)
  assert len(variables['params']) == hidden + 1
  found = module.apply(variables, H)
  assert found.shape == (5, 2)
  np.testing.assert_allclose(
    found, oracle(variables['params'], H, activation), rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('use_bias', [True, False])
def test_no_bias_has_no_bias_anywhere(use_bias):
  module = Projector(3, use_bias=use_bias)
  variables = random_variables(module, H)
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(variables)
  ]
  assert any('bias' in name for name in names) == use_bias
  at_zero = module.apply(variables, jnp.zeros((1, 3)))
  assert bool((np.asarray(at_zero) == 0).all()) != use_bias


def test_residual_adds_the_input():
  plain, residual = Projector(3), Projector(3, residual=True)
  variables = random_variables(plain, H)
  np.testing.assert_allclose(
    residual.apply(variables, H), plain.apply(variables, H) + H, rtol=1e-6
  )


def test_identity_returns_its_input_and_has_no_parameters():
  module = Projector(3, kind='identity', dropout=0.5, batch_norm=True)
  assert module.init(jax.random.key(0), H) == {}
  np.testing.assert_array_equal(module.apply({}, H, train=True), H)


def test_leading_axes_are_free():
  module = Projector(2)
  variables = random_variables(module, H)
  found = module.apply(variables, H.reshape(5, 1, 1, 3))
  np.testing.assert_allclose(
    found.reshape(5, 2), module.apply(variables, H), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(
  ('width', 'expected'),
  [(512, 787_968), (768, 1_771_776), (1024, 3_148_800), (1536, 7_082_496)],
)
def test_mlp2_has_the_references_number_of_parameters(width, expected):
  """METHOD section 1; shapes only, nothing is allocated."""
  shapes = jax.eval_shape(
    Projector(width).init, jax.random.key(0), jnp.zeros((1, width))
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


# Errors.


def test_hidden_layers_of_every_kind():
  assert [
    num_hidden_layers(kind) for kind in ('identity', 'mlp0', 'mlp2', 'mlp12')
  ] == [-1, 0, 2, 12]


@pytest.mark.parametrize(
  'kind', ['mlp', 'mlp-1', 'mlp2 ', 'linear', '', 'MLP2']
)
def test_an_unknown_projector_lists_the_known_ones(kind):
  with pytest.raises(InputError, match="'identity'.*mlpN.*mlp2"):
    num_hidden_layers(kind)
  with pytest.raises(InputError, match='model.projector'):
    Projector(3, kind=kind).init(jax.random.key(0), H)


@pytest.mark.parametrize(
  'fields', [{'kind': 'identity'}, {'residual': True}], ids=str
)
def test_identity_and_residual_need_equal_widths(fields):
  with pytest.raises(InputError, match='width=2.*D=3.*model.width=3'):
    Projector(2, **fields).init(jax.random.key(0), H)


def test_an_unknown_activation_lists_the_known_ones():
  with pytest.raises(InputError, match="'tanh'.*gelu.*linear.*relu"):
    Projector(2, activation='tanh').init(jax.random.key(0), H)


# Dropout.


def test_dropout_only_in_training():
  module = Projector(3, dropout=0.5)
  variables = random_variables(module, H)
  expected = Projector(3).apply(variables, H)
  # No rng is needed, so none can be used.
  np.testing.assert_array_equal(module.apply(variables, H), expected)
  draws = [
    module.apply(variables, H, train=True, rngs={'dropout': jax.random.key(i)})
    for i in (0, 0, 1)
  ]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert np.abs(draws[0] - draws[2]).max() > 1e-3
  assert np.abs(draws[0] - expected).max() > 1e-3


def test_no_dropout_makes_training_deterministic():
  module = Projector(3, dropout=0.0)
  variables = random_variables(module, H)
  np.testing.assert_array_equal(
    module.apply(variables, H, train=True), module.apply(variables, H)
  )


def test_dropout_keeps_the_mean():
  """A linear network: its mean over dropout is itself."""
  module = Projector(3, kind='mlp1', activation='linear', dropout=0.5)
  variables = random_variables(module, H)
  many = jnp.broadcast_to(H[0], (20000, 3))
  draws = module.apply(
    variables, many, train=True, rngs={'dropout': jax.random.key(0)}
  )
  error = np.std(draws, axis=0) / np.sqrt(20000)
  gap = np.abs(np.mean(draws, axis=0) - module.apply(variables, H[0]))
  assert (gap < 4 * error).all()


# Batch norm.

X = (np.random.default_rng(2).normal(size=(7, 3)) * 3 + 5).astype(np.float32)
MASK = np.array([1, 1, 0, 1, 1, 0, 1], bool)


NORM = {
  'params': {
    'scale': np.array([0.5, -1.0, 2.0], np.float32),
    'bias': np.array([0.1, 0.0, -3.0], np.float32),
  },
  'batch_stats': {
    'mean': np.array([1.0, -2.0, 4.0], np.float32),
    'var': np.array([0.5, 1.0, 2.0], np.float32),
  },
}


def normalise(x, mask, train=True, **fields):
  """(output, running statistics after)."""
  return MaskedBatchNorm(**fields).apply(
    NORM, x, mask, not train, mutable=['batch_stats']
  )


def norm_oracle(x, mean, var):
  params = NORM['params']
  return (x.astype(float) - mean) / np.sqrt(var + 1e-5) * params[
    'scale'
  ] + params['bias']


def test_batch_norm_equals_numpy_over_the_real_rows():
  found, _ = normalise(X, MASK)
  real = X[MASK].astype(float)
  expected = norm_oracle(X, real.mean(0), real.var(0))
  np.testing.assert_allclose(found[MASK], expected[MASK], rtol=1e-4, atol=1e-4)


def test_batch_norm_with_padding_equals_without():
  found, statistics = normalise(X, MASK)
  expected, bare_statistics = normalise(X[MASK], np.ones(5, bool))
  np.testing.assert_allclose(found[MASK], expected, rtol=1e-5, atol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5),
    statistics,
    bare_statistics,
  )


@pytest.mark.parametrize('padding', [0.0, 1e6, np.nan, np.inf])
def test_batch_norm_never_reads_padding(padding):
  changed = np.where(MASK[:, None], X, np.float32(padding))
  found, statistics = normalise(changed, MASK)
  expected, expected_statistics = normalise(X, MASK)
  np.testing.assert_array_equal(found[MASK], expected[MASK])
  jax.tree.map(np.testing.assert_array_equal, statistics, expected_statistics)


def test_gradients_of_batch_norm_with_padding_equal_those_without():
  value = np.random.default_rng(3).normal(size=(7, 3)).astype(np.float32)

  def total(x, mask, value):
    return jnp.sum(jnp.where(mask[:, None], normalise(x, mask)[0] * value, 0))

  found = jax.grad(total)(X, MASK, value)
  expected = jax.grad(total)(X[MASK], np.ones(5, bool), value[MASK])
  np.testing.assert_allclose(found[MASK], expected, atol=1e-5)
  np.testing.assert_array_equal(found[~MASK], 0.0)
  # Through the statistics: adding a constant to a column changes nothing.
  np.testing.assert_allclose(expected.sum(0), 0.0, atol=1e-5)


def test_running_statistics_move_by_the_momentum():
  _, after = normalise(X, MASK, momentum=0.9)
  real, mean = X[MASK].astype(float), NORM['batch_stats']['mean']
  stats = after['batch_stats']
  np.testing.assert_allclose(
    stats['mean'], 0.9 * mean + 0.1 * real.mean(0), rtol=1e-5
  )
  np.testing.assert_allclose(
    stats['var'],
    0.9 * NORM['batch_stats']['var'] + 0.1 * real.var(0),
    rtol=1e-4,
  )


def test_evaluation_uses_running_statistics_and_keeps_them():
  found, after = normalise(X, MASK, train=False)
  mean = NORM['batch_stats']['mean']
  expected = norm_oracle(X, mean, NORM['batch_stats']['var'])
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(after['batch_stats']['mean'], mean)
  # A row's output does not depend on the other rows.
  alone, _ = normalise(X[:1], MASK[:1], train=False)
  np.testing.assert_allclose(alone, found[:1], rtol=1e-6)


def test_statistics_start_at_zero_and_one_whatever_the_first_batch():
  variables = MaskedBatchNorm().init(jax.random.key(0), X, MASK, False)
  np.testing.assert_array_equal(variables['batch_stats']['mean'], 0.0)
  np.testing.assert_array_equal(variables['batch_stats']['var'], 1.0)


def test_a_batch_of_padding_or_of_equal_rows_stays_finite():
  for x, mask in ((X, np.zeros(7, bool)), (np.full_like(X, 5.0), MASK)):
    found, statistics = normalise(x, mask)
    assert np.isfinite(found).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(statistics))


def test_shards_with_uneven_masks_equal_the_whole_batch():
  """As under pmap: sums and counts are added, not per-device means."""
  x = np.random.default_rng(4).normal(size=(8, 3)).astype(np.float32)
  mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], bool)
  expected, whole = normalise(x, mask)
  sharded = jax.vmap(
    functools.partial(normalise, axis_name='devices'), axis_name='devices'
  )
  found, shards = sharded(x.reshape(2, 4, 3), mask.reshape(2, 4))
  np.testing.assert_allclose(
    found.reshape(8, 3)[mask], expected[mask], rtol=1e-4, atol=1e-5
  )
  for shard in range(2):
    jax.tree.map(
      lambda a, b, i=shard: np.testing.assert_allclose(a[i], b, rtol=1e-5),
      shards,
      whole,
    )


def test_the_projector_hands_mask_and_mode_to_batch_norm():
  module = Projector(3, kind='mlp1', batch_norm=True)
  variables = random_variables(module, H)
  mask = np.array([1, 1, 0, 1, 0], bool)
  run = functools.partial(module.apply, mutable=['batch_stats'])
  found, after = run(variables, H, True, mask)
  expected, bare = run(variables, H[mask], True)
  np.testing.assert_allclose(found[mask], expected, rtol=1e-4, atol=1e-4)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4), after, bare
  )
  evaluated, kept = run(variables, H, False, mask)
  assert np.abs(evaluated - found).max() > 1e-2
  jax.tree.map(
    np.testing.assert_array_equal,
    dict(kept['batch_stats']),
    variables['batch_stats'],
  )


@pytest.mark.parametrize('batch_norm', [False, True])
def test_bfloat16_rounds_the_products_and_nothing_that_goes_in_or_out(
  batch_norm,
):
  wide = np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32)
  exact = Projector(width=16, batch_norm=batch_norm)
  rounded = Projector(width=16, batch_norm=batch_norm, compute_dtype='bfloat16')
  variables = random_variables(exact, wide)
  wanted, found = exact.apply(variables, wide), rounded.apply(variables, wide)
  assert found.dtype == jnp.float32
  error = np.abs(found - wanted).max() / np.abs(wanted).max()
  assert 1e-5 < error < 2e-2
  initial = rounded.init(jax.random.key(0), wide)
  assert {x.dtype for x in jax.tree.leaves(initial)} == {jnp.dtype('float32')}
