"""optimizer: groups, schedules, clipping and the two decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import base
from pal_jax import optimizer
from pal_jax.errors import InputError
from pal_jax.models import PalA, PalB

PARAMS = {
  'projector': {'Dense_0': {'kernel': jnp.full((2, 2), 2.0)}},
  'prototypes': jnp.full((3,), 2.0),
  'log_scale': jnp.array(2.0),
}
GRADS = jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), PARAMS)


def group(pattern, learning_rate=0.1, weight_decay=0.0, optional=False):
  return {
    'pattern': pattern,
    'learning_rate': learning_rate,
    'weight_decay': weight_decay,
    'optional': optional,
  }


def configure(groups=None, **fields):
  """A config without warm-up, decay or clipping unless asked for."""
  config = base.optimizer()
  config.update({'schedule': 'constant', 'warmup_steps': 0, 'clip_norm': 0.0})
  config.update(fields)
  config.groups = ConfigDict(groups or {'all': group('.')})
  return config


def run(config, num_steps=3, params=PARAMS, grads=GRADS, total=100):
  """Parameters after `num_steps` with the same gradient."""
  tx = optimizer.create(config, params, total)
  state = tx.init(params)
  for _ in range(num_steps):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def numpy_adam(p, grad, rate, decay, decoupled, num_steps):
  """Adam as in Kingma and Ba, decay as in torch's Adam or AdamW."""
  m = v = 0.0
  for t in range(1, num_steps + 1):
    g = grad if decoupled else grad + decay * p
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    p = p - rate * (step + (decay * p if decoupled else 0.0))
  return p


# Groups.


def test_path_names_are_what_patterns_are_searched_in():
  names = [
    optimizer.path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS)
  ]
  assert names == ['log_scale', 'projector/Dense_0/kernel', 'prototypes']


def test_labels_follow_the_patterns():
  labels = optimizer.label_parameters(
    PARAMS,
    ConfigDict({'net': group('^projector/'), 'rest': group('^(proto|log)')}),
  )
  assert labels == {
    'projector': {'Dense_0': {'kernel': 'net'}},
    'prototypes': 'rest',
    'log_scale': 'rest',
  }


def test_each_group_has_its_own_rate_and_zero_freezes():
  """The first step of Adam is the rate itself, whatever the gradient."""
  found = run(
    configure(
      {
        'net': group('^projector/', 0.01),
        'points': group('^prototypes$', 0.3),
        'scale': group('^log_scale$', 0.0, weight_decay=0.5),
      }
    ),
    num_steps=1,
  )
  kernel = found['projector']['Dense_0']['kernel']
  np.testing.assert_allclose(kernel, 2.0 - 0.01, rtol=1e-5)
  np.testing.assert_allclose(found['prototypes'], 2.0 - 0.3, rtol=1e-5)
  assert float(found['log_scale']) == 2.0


@pytest.mark.parametrize('name', optimizer.OPTIMIZERS)
def test_a_frozen_group_never_moves(name):
  found = run(
    configure(
      {
        'net': group('^projector/', 0.0, weight_decay=1.0),
        'rest': group('^(prototypes|log_scale)$'),
      },
      name=name,
      schedule='cosine',
      warmup_steps=2,
      clip_norm=1.0,
    ),
    num_steps=5,
  )
  np.testing.assert_array_equal(found['projector']['Dense_0']['kernel'], 2.0)
  assert (np.asarray(found['prototypes']) < 2.0).all()


def test_each_group_has_its_own_decay():
  zero = jax.tree.map(jnp.zeros_like, GRADS)
  found = run(
    configure(
      {
        'net': group('^projector/', 0.1, weight_decay=0.5),
        'rest': group('^(prototypes|log_scale)$', 0.1, weight_decay=0.0),
      }
    ),
    num_steps=1,
    grads=zero,
  )
  kernel = found['projector']['Dense_0']['kernel']
  np.testing.assert_allclose(kernel, 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)
  np.testing.assert_array_equal(found['prototypes'], 2.0)


def test_a_group_that_matches_nothing_is_an_error():
  groups = {'net': group('^projectors/'), 'all': group('.')}
  with pytest.raises(InputError) as error:
    optimizer.create(configure(groups), PARAMS, 100)
  message = str(error.value)
  assert 'optimizer.groups.net' in message and "'^projectors/'" in message
  assert 'projector/Dense_0/kernel' in message  # what it could have matched


def test_an_optional_group_may_match_nothing():
  groups = {'net': group('^missing/', optional=True), 'all': group('.')}
  found = run(configure(groups), num_steps=1)
  assert float(found['log_scale']) == pytest.approx(1.9)


def test_a_parameter_in_two_groups_is_an_error():
  """It would take two steps."""
  groups = {'net': group('kernel'), 'all': group('.')}
  with pytest.raises(InputError) as error:
    optimizer.create(configure(groups), PARAMS, 100)
  message = str(error.value)
  assert "'projector/Dense_0/kernel'" in message
  assert "['all', 'net']" in message


def test_a_parameter_in_no_group_is_an_error():
  with pytest.raises(InputError) as error:
    optimizer.create(configure({'net': group('^p')}), PARAMS, 100)
  assert "['log_scale']" in str(error.value)


@pytest.mark.parametrize(
  'model',
  [
    PalA(num_users=3, num_prototypes=2, width=2, feature_width=384),
    PalA(num_users=3, num_prototypes=2, width=2, point='Pw', batch_norm=True),
    PalB(num_users=3, num_prototypes=2, width=2, batch_norm=True),
    PalA(
      num_users=3,
      num_prototypes=2,
      width=2,
      membership='mixture_likelihood',
      mixture_level='user',
    ),
  ],
  ids=['pal_a', 'batch norm', 'pal_b', 'user level'],
)
def test_the_groups_of_the_base_config_cover_every_model(model):
  params = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 2, 384)),
    jnp.zeros((1, 384)),
  )['params']
  labels = optimizer.label_parameters(params, base.optimizer().groups)
  assert labels['log_scale'] == 'temperatures'
  assert set(jax.tree.leaves(labels['projector'])) == {'projectors'}
  for name in ('prototypes', 'user_logits', 'class_logits'):
    assert labels.get(name, 'points') == 'points'
  if 'prompt_projectors' in labels:
    assert set(jax.tree.leaves(labels['prompt_projectors'])) == {'projectors'}


# Schedules.


def schedule(name, warmup_steps, num_steps=20, peak=0.4):
  config = configure(schedule=name, warmup_steps=warmup_steps)
  made = optimizer.make_schedule(config, num_steps, peak)
  return np.array([float(made(step)) for step in range(num_steps + 1)])


@pytest.mark.parametrize('name', optimizer.SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak_once(name):
  rate = schedule(name, 4)
  np.testing.assert_allclose(rate[:5], [0.0, 0.1, 0.2, 0.3, 0.4], rtol=1e-5)
  assert rate.max() == pytest.approx(0.4)
  assert (np.diff(rate[4:]) <= 1e-7).all()


def test_schedules_without_warm_up_start_at_the_peak():
  for name in optimizer.SCHEDULES:
    assert schedule(name, 0)[0] == pytest.approx(0.4), name


@pytest.mark.parametrize('warmup', [0, 4])
def test_decay_values_half_way_and_at_the_end(warmup):
  half = warmup + (20 - warmup) // 2
  np.testing.assert_allclose(schedule('constant', warmup)[warmup:], 0.4)
  for name in ('linear', 'cosine'):
    rate = schedule(name, warmup)
    assert rate[half] == pytest.approx(0.2), name
    assert rate[20] == pytest.approx(0.0, abs=1e-7), name
    assert rate[19] > 0.0, name  # the last step still learns


def test_linear_and_cosine_equal_their_formulas():
  part = np.arange(17) / 16
  np.testing.assert_allclose(
    schedule('linear', 4)[4:], 0.4 * (1 - part), atol=1e-7
  )
  np.testing.assert_allclose(
    schedule('cosine', 4)[4:], 0.2 * (1 + np.cos(np.pi * part)), atol=1e-7
  )


def test_the_schedule_reaches_the_parameters():
  """A warm-up of 2: the first step has rate 0, the second half the peak."""
  config = configure(warmup_steps=2)
  np.testing.assert_array_equal(run(config, 1)['prototypes'], 2.0)
  np.testing.assert_allclose(run(config, 2)['prototypes'], 1.95, rtol=1e-5)
  np.testing.assert_allclose(run(config, 3)['prototypes'], 1.85, rtol=1e-5)


@pytest.mark.parametrize('warmup', [-1, 20, 21])
def test_a_warm_up_that_does_not_fit_is_an_error(warmup):
  config = configure(warmup_steps=warmup)
  with pytest.raises(InputError, match=f'warmup_steps={warmup}.*19'):
    optimizer.make_schedule(config, 20, 0.1)


def test_an_unknown_schedule_lists_the_known_ones():
  with pytest.raises(InputError, match="'step'.*constant.*linear.*cosine"):
    optimizer.create(configure(schedule='step'), PARAMS, 100)


# Adam and AdamW.


@pytest.mark.parametrize('name', ['adam', 'adamw'])
@pytest.mark.parametrize('decay', [0.0, 0.3])
def test_adam_is_torchs_and_adamw_is_decoupled(name, decay):
  found = run(
    configure({'all': group('.', 0.1, decay)}, name=name), num_steps=4
  )
  expected = numpy_adam(2.0, 0.5, 0.1, decay, name == 'adamw', 4)
  for leaf in jax.tree.leaves(found):
    np.testing.assert_allclose(leaf, expected, rtol=1e-5)


def test_the_two_decays_differ():
  """Where the decay is in the gradient Adam divides it away again."""
  zero = jax.tree.map(jnp.zeros_like, GRADS)
  groups = {'all': group('.', 0.1, 0.01)}
  coupled = run(configure(groups, name='adam'), 1, grads=zero)
  decoupled = run(configure(groups, name='adamw'), 1, grads=zero)
  assert float(coupled['log_scale']) == pytest.approx(1.9)
  assert float(decoupled['log_scale']) == pytest.approx(1.998)


def test_moments_of_the_config_are_used():
  found = run(configure(name='adam', b1=0.0, b2=0.0, eps=0.5), num_steps=1)
  # The step is g / (|g| + eps).
  assert float(found['log_scale']) == pytest.approx(2.0 - 0.1 * 0.5)


def test_an_unknown_optimizer_lists_the_known_ones():
  with pytest.raises(InputError, match="'sgd'.*adamw.*adam"):
    optimizer.create(configure(name='sgd'), PARAMS, 100)


# Clipping.


def test_clipping_scales_the_gradient_of_all_groups_together():
  """Seen through eps: with b1 = b2 = 0 the step is g / (|g| + eps)."""
  groups = {'net': group('^projector/'), 'rest': group('^(proto|log)')}
  grads = {
    'projector': {'Dense_0': {'kernel': jnp.array([[3.0, 0], [0, 0]])}},
    'prototypes': jnp.array([0.0, 4.0, 0.0]),
    'log_scale': jnp.array(0.0),
  }
  found = run(
    configure(groups, b1=0.0, b2=0.0, eps=1.0, clip_norm=1.0),
    num_steps=1,
    grads=grads,
  )
  # The global norm is 5: the gradients become 0.6 and 0.8.
  kernel = found['projector']['Dense_0']['kernel']
  assert float(kernel[0, 0]) == pytest.approx(2.0 - 0.1 * 0.6 / 1.6)
  assert float(found['prototypes'][1]) == pytest.approx(2 - 0.1 * 0.8 / 1.8)


def test_small_gradients_are_not_clipped():
  fields = {'b1': 0.0, 'b2': 0.0, 'eps': 1.0}
  clipped = run(configure(clip_norm=100.0, **fields), num_steps=1)
  free = run(configure(clip_norm=0.0, **fields), num_steps=1)
  jax.tree.map(np.testing.assert_array_equal, clipped, free)


def test_a_negative_clip_norm_is_an_error():
  with pytest.raises(InputError, match='clip_norm=-1'):
    optimizer.create(configure(clip_norm=-1.0), PARAMS, 100)


def test_shapes_suffice_to_create():
  shapes = jax.eval_shape(lambda: PARAMS)
  tx = optimizer.create(configure(), shapes, 100)
  updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  assert float(updates['log_scale']) == pytest.approx(-0.1, rel=1e-4)
