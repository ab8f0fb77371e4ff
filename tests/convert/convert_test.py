"""Checkpoints of the reference: the same scores, and clear refusals.

What the reference computes is written here once more, in float64, from the
equations of METHOD section 1.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from scipy.special import erf, softmax

from configs import base
from pal_jax.convert import Options, convert, match, read_state_dict
from pal_jax.errors import InputError
from pal_jax.reward_model import RewardModel
from pal_jax.saved_model import save_model
from tests.adaptation import oracle

ROOT = Path(__file__).resolve().parents[2]
D, P, K, N = 6, 5, 3, 7
USERS = ('7', 'A1B2', 'worker.with.dots')  # as safetensors sorts them
PREFIX = 'prefLearner.'

CASES = {
  'a': {},
  'a Pw': {'point': 'Pw'},
  'a f(P)w': {'point': 'f(P)w', 'hidden': 1},
  'a |f(P)|w': {'point': '|f(P)|w', 'preference': 'cosine'},
  'a squared': {'preference': 'squared_distance'},
  'a norm': {'batch_norm': True, 'preference': 'cosine'},
  'a residual relu': {'residual': True, 'activation': 'relu', 'width': D},
  'a no bias': {'bias': False, 'preference': 'inner_product'},
  'b': {'kind': 'b'},
  'b norm': {'kind': 'b', 'batch_norm': True},
  'b distance': {'kind': 'b', 'preference': 'distance', 'hidden': 0},
  'b one': {'kind': 'b', 'number': 1},
}
DEFAULTS = {
  'kind': 'a',
  'point': 'f(Pw)',
  'preference': '',
  'activation': 'gelu',
  'residual': False,
  'batch_norm': False,
  'bias': True,
  'hidden': 2,
  'width': P,
  'number': K,
}


def layers(rng, case, prefix):
  """State dict of one projector."""
  out = {}
  step, inputs = (4 if case['batch_norm'] else 3), D
  for i in range(case['hidden'] + 1):
    name = f'{prefix}.mlp.layers.{i * step}'
    out[f'{name}.weight'] = rng.normal(size=(case['width'], inputs)) / 2
    if case['bias']:
      out[f'{name}.bias'] = rng.normal(size=case['width'])
    if case['batch_norm'] and i < case['hidden']:
      name = f'{prefix}.mlp.layers.{i * step + 1}'
      for field in ('weight', 'bias', 'running_mean'):
        out[f'{name}.{field}'] = rng.normal(size=case['width'])
      out[f'{name}.running_var'] = rng.uniform(0.5, 2, case['width'])
      out[f'{name}.num_batches_tracked'] = np.array(3)
    inputs = case['width']
  return out


def checkpoint(name, seed=0):
  case = DEFAULTS | CASES[name]
  rng = np.random.default_rng(seed)
  out = {
    'logit_scale': np.array(np.log(1 / 0.07)),
    'softmax_w.temperature': np.array([0.7]),
  }
  item = layers(rng, case, 'item_learner.projector')
  out |= item
  copies = (
    ['projector_f.']
    if case['kind'] == 'b'
    else [
      'user_learner.projector.',
      'projector.',
    ]
  )
  for other in copies:
    out |= {
      k.replace('item_learner.projector.', other): v for k, v in item.items()
    }
  if case['kind'] == 'b':
    for k in range(case['number']):
      out |= layers(rng, case, f'user_learner.projectors.{k}')
  else:
    size = case['width'] if case['point'] == 'Pw' else D
    out['user_learner.P'] = rng.normal(size=(case['number'], size))
  for user in USERS:
    out[f'user_learner.W.{user}'] = rng.normal(size=case['number'])
  for where in ('llm.', 'item_learner.llm.', 'user_learner.llm.'):
    out[f'{where}embed.weight'] = rng.normal(size=(4, 4))
  return case, {PREFIX + k: np.asarray(v, np.float32) for k, v in out.items()}


def project(state, case, prefix, h):
  """The projector in float64, in evaluation mode."""
  step, x = (4 if case['batch_norm'] else 3), h
  for i in range(case['hidden'] + 1):
    name = f'{PREFIX}{prefix}.mlp.layers.{i * step}'
    x = x @ state[f'{name}.weight'].astype(float).T
    if case['bias']:
      x = x + state[f'{name}.bias'].astype(float)
    if i == case['hidden']:
      break
    if case['batch_norm']:
      name = f'{PREFIX}{prefix}.mlp.layers.{i * step + 1}'
      norm = {
        f: state[f'{name}.{f}'].astype(float)
        for f in ('weight', 'bias', 'running_mean', 'running_var')
      }
      x = (x - norm['running_mean']) / np.sqrt(norm['running_var'] + 1e-5)
      x = x * norm['weight'] + norm['bias']
    if case['activation'] == 'gelu':
      x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    else:
      x = np.maximum(x, 0)
  return x + h if case['residual'] else x


def reference_rewards(state, case, user, prompts, h):
  """[N] for one user: METHOD section 1, in float64."""

  def f(v):
    return project(state, case, 'item_learner.projector', v)

  logits = state[f'{PREFIX}user_learner.W.{user}'].astype(float)
  w = softmax(logits / state[f'{PREFIX}softmax_w.temperature'].astype(float))
  if case['kind'] == 'b':
    u = sum(
      w[k] * project(state, case, f'user_learner.projectors.{k}', prompts)
      for k in range(case['number'])
    )
  else:
    p = state[f'{PREFIX}user_learner.P'].astype(float)
    u = {
      'Pw': lambda: w @ p,
      'f(Pw)': lambda: f(w @ p),
      'f(P)w': lambda: w @ f(p),
      '|f(P)|w': lambda: (
        w @ (f(p) / np.linalg.norm(f(p), axis=-1, keepdims=True))
      ),
    }[case['point']]()
  preference = case['preference'] or (
    'cosine' if case['kind'] == 'b' else 'distance'
  )
  reward = oracle.numpy_reward(preference, f(h), u)
  if preference == 'cosine':
    tau = np.exp(float(state[f'{PREFIX}logit_scale']))
    reward = min(tau, 100.0) * reward
  return reward


def options_of(case):
  return Options(
    case['preference'], case['point'], case['activation'], case['residual']
  )


def features():
  rng = np.random.default_rng(9)
  return rng.normal(size=(2, N, D)).astype(np.float32)


@pytest.mark.parametrize('name', CASES)
def test_a_converted_checkpoint_scores_as_the_reference(name, tmp_path):
  case, state = checkpoint(name)
  path = tmp_path / 'reference.safetensors'
  safetensors.numpy.save_file(state, path)
  saved = convert(
    match(read_state_dict(path)), base.get_config(), options_of(case)
  )
  found = RewardModel.load(save_model(saved, tmp_path / 'model'))
  assert found.users == USERS
  prompts, h = features()
  prompt = prompts if case['kind'] == 'b' else None
  every = found.reward(prompt, h, list(USERS))
  for user, mine in zip(USERS, every, strict=True):
    expected = reference_rewards(
      state, case, user, prompts.astype(float), h.astype(float)
    )
    # Only differences mean something.
    np.testing.assert_allclose(
      mine - mine[0], expected - expected[0], rtol=1e-5, atol=1e-5
    )
    answer = found.prefer(
      prompt if prompt is None else prompt[1:], h[1:], h[:-1], user
    )
    np.testing.assert_allclose(
      np.log(answer.probability) - np.log1p(-answer.probability.astype(float)),
      reference_rewards(
        state, case, user, prompts[1:].astype(float), h[1:].astype(float)
      )
      - reference_rewards(
        state, case, user, prompts[1:].astype(float), h[:-1].astype(float)
      ),
      rtol=1e-3,
      atol=1e-4,
    )


def test_the_people_are_where_somebody_new_starts():
  case, state = checkpoint('a')
  found = RewardModel(
    convert(match(state), base.get_config(), options_of(case))
  )
  trained = np.stack([found.user(u).weights for u in USERS])
  temperature = float(state[f'{PREFIX}softmax_w.temperature'][0])
  expected = [
    softmax(state[f'{PREFIX}user_learner.W.{u}'] / temperature) for u in USERS
  ]
  np.testing.assert_allclose(trained, expected, atol=1e-6)
  nobody = found.user(None)
  assert np.exp(nobody.log_belief).sum() == pytest.approx(1, abs=1e-5)
  np.testing.assert_allclose(
    nobody.weights,
    0.9 * trained.mean(0)
    + 0.1 * (3 * trained.mean(0) + 1 + trained.mean(0)) / (len(USERS) + K + 1),
    atol=1e-4,
  )
  h = features()[1]
  ann = found.adapt([(None, h[0], h[1], 1.0)] * 3, user='ann')
  assert found.users == (*USERS, 'ann')
  assert (
    found.prefer(None, h[0], h[1], ann).probability
    > found.prefer(None, h[0], h[1]).probability
  )
  with pytest.raises(InputError, match="user '7' came with trained weights"):
    found.adapt([(None, h[0], h[1], 1.0)], user='7')


def test_the_listing_says_what_became_of_every_name():
  case, state = checkpoint('b')
  state['optimizer.something'] = np.zeros(3, np.float32)
  found = match(state)
  assert found.listing().splitlines() == [
    'matched: 3 users, 3 layers of the item projector, 3 prompt projectors, no '
    'prototypes, logit_scale, temperature',
    'ignored: 6 equal copies, 3 tensors of the encoder',
    'not understood: optimizer.something',
  ]


@pytest.mark.parametrize('prefix', ['', 'module.', 'model.prefLearner.'])
def test_other_prefixes_are_tolerated(prefix):
  _, state = checkpoint('a')
  renamed = {k.replace(PREFIX, prefix): v for k, v in state.items()}
  assert match(renamed).listing() == match(state).listing()
  assert not match(renamed).unknown


def without(*parts):
  def change(state):
    return {
      k: v for k, v in state.items() if not any(part in k for part in parts)
    }

  return change


def replaced(part, value):
  def change(state):
    return {
      k: np.asarray(value, np.float32) if part in k else v
      for k, v in state.items()
    }

  return change


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('a', without('user_learner.W'), r'lacks user_learner.W'),
    ('a', without('learner.P'), r'lacks user_learner.P \(PAL-A\) or'),
    ('a', without('projector'), 'lacks item_learner.projector'),
    ('a', without('.'), 'lacks'),
    (
      'a',
      replaced('W.7', np.zeros(5)),
      r'W.7 has the shape \(5,\); with 3 prototypes',
    ),
    (
      'a',
      replaced('user_learner.projector.mlp.layers.0.bias', np.ones(P)),
      'should be one tensor and differ',
    ),
    ('a', replaced('temperature', [-1.0]), 'must be positive'),
    ('a', without('layers.3.bias'), 'some have none'),
    ('a', without('layers.3.weight'), 'layer 3: has no weight'),
    ('a norm', without('running_var'), 'the norm lacks running_var'),
    ('b', without('projectors.1.'), r'prompt projectors \[0, 2\] are there'),
    ('a', replaced('learner.P', np.ones(3)), r'P has the shape \(3,\)'),
    ('a Pw', lambda s: s | {PREFIX + 'user_learner.P': np.ones((K, D))}, 'Pw'),
    ('a', replaced('temperature', np.ones(2)), 'expected one number'),
    ('a', replaced('W.7', np.full(K, np.nan)), 'W.7 holds NaN or infinity'),
    ('a', replaced('weight', np.ones(P)), 'none of its layers has a matrix'),
    (
      'a',
      replaced('layers.3.weight', np.ones((2, P))),
      'expected hidden layers as wide',
    ),
  ],
)
def test_what_does_not_fit_is_named(name, change, message):
  case, state = checkpoint(name)
  with pytest.raises(InputError, match=message):
    convert(match(change(state)), base.get_config(), options_of(case))


def test_a_wrong_point_is_told_from_the_shapes():
  for name, point in (('a', 'Pw'), ('a Pw', 'f(Pw)')):
    _, state = checkpoint(name)
    with pytest.raises(InputError, match='prototypes are . wide'):
      convert(match(state), base.get_config(), Options(point=point))
  _, state = checkpoint('a')
  with pytest.raises(InputError, match='a residual one needs them equal'):
    convert(match(state), base.get_config(), Options(residual=True))


def test_fewer_people_than_prototypes():
  case, state = checkpoint('a')
  some = without('W.A1B2', 'W.worker')(state)
  found = RewardModel(convert(match(some), base.get_config(), options_of(case)))
  assert found.users == ('7',)
  h = features()[1]
  every = found.reward(None, h, '7')
  expected = reference_rewards(state, case, '7', None, h.astype(float))
  np.testing.assert_allclose(
    every - every[0], expected - expected[0], rtol=1e-5, atol=1e-5
  )


def test_somebody_converted_can_be_forgotten():
  case, state = checkpoint('a')
  found = RewardModel(
    convert(match(state), base.get_config(), options_of(case))
  )
  found.forget('A1B2')
  assert found.users == ('7', 'worker.with.dots')
  assert not found.variables['params']['user_logits'][1].any()
  back = RewardModel(found._saved)
  assert back.users == found.users
  np.testing.assert_array_equal(
    back.user('worker.with.dots').weights,
    found.user('worker.with.dots').weights,
  )


def test_a_user_called_llm_is_a_user():
  _, state = checkpoint('a')
  state[f'{PREFIX}user_learner.W.llm'] = np.zeros(K, np.float32)
  assert 'llm' in match(state).users


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'preference': 'l2'}, "preference='l2' is unknown"),
    ({'point': 'wP'}, "point='wP' is unknown"),
    ({'activation': 'tanh'}, "activation='tanh' is unknown"),
  ],
)
def test_unknown_options_are_refused(changes, message):
  _, state = checkpoint('a')
  with pytest.raises(InputError, match=message):
    convert(match(state), base.get_config(), Options(**changes))


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
  with pytest.raises(InputError, match='no such file'):
    read_state_dict(tmp_path / 'none.ckpt')
  path = tmp_path / 'broken.safetensors'
  path.write_bytes(b'PK\x03\x04 no tensors')
  with pytest.raises(InputError, match='cannot be read as float safetensors'):
    read_state_dict(path)


def test_torch_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
  path = tmp_path / 'reference.ckpt'
  path.write_bytes(b'anything')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(InputError, match='pip install torch'):
    read_state_dict(path)


class _Evil:
  def __reduce__(self):
    return (exit, ())


def test_lightning_checkpoints_are_read_and_code_in_them_is_not_run(tmp_path):
  torch = pytest.importorskip('torch')
  case, state = checkpoint('a')
  path = tmp_path / 'reference.ckpt'
  tensors = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
  torch.save({'state_dict': tensors, 'epoch': 3}, path)
  found = read_state_dict(path)
  assert match(found).listing() == match(state).listing()
  torch.save({'state_dict': tensors, 'callbacks': _Evil()}, path)
  with pytest.raises(InputError, match='without running code of it'):
    read_state_dict(path)


def test_the_command(tmp_path):
  _, state = checkpoint('b')
  path = tmp_path / 'reference.safetensors'
  safetensors.numpy.save_file(state, path)
  command = [sys.executable, '-m', 'pal_jax.convert', f'--checkpoint={path}']
  done = subprocess.run(
    [*command, f'--out={tmp_path / "model"}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'matched: 3 users' in done.stdout
  assert RewardModel.load(tmp_path / 'model').users == USERS
  done = subprocess.run(
    [*command, f'--out={tmp_path / "x"}', '--preference=l2'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: preference='l2' is unknown")
  assert not (tmp_path / 'x').exists()
