"""What is exported gives the same rewards, whoever reads it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from scipy.special import erf

from pal_jax.errors import InputError
from pal_jax.export import (
  fold,
  read_folded,
  read_program,
  write_folded,
  write_program,
)
from pal_jax.export.fold import FORMAT
from tests.adaptation import oracle
from tests.reward_model_test import MODELS, features, make

ROOT = Path(__file__).resolve().parents[2]
ROWS = np.arange(9)
# Networks with all there is to fold; PAL-B's prompts have them, too.
NETWORKS = {
  'norm': {'batch_norm': True, 'projector': 'mlp2'},
  'residual': {'residual': True, 'activation': 'relu', 'use_bias': False},
  'linear': {
    'activation': 'linear',
    'batch_norm': True,
    'projector': 'mlp1',
    'use_bias': False,
  },
}


def built(name, network=None):
  if network is None:
    return make(name)
  return make(name, **NETWORKS[network])


CASES = [
  *((name, None) for name in MODELS),
  *(
    (name, network)
    for name in (
      'squared_distance f(Pw) convex',
      'cosine pal_b convex',
    )
    for network in NETWORKS
  ),
]


def exported(found, user, normalize='none'):
  person = found.user(user)
  return (
    found.model,
    found.variables,
    person.log_atoms,
    person.log_belief,
    normalize,
  )


def numpy_reward_of(folded, h, prompts=None):
  """What `fold` documents, in float64."""
  form = folded.form
  t = {k: v.astype(float) for k, v in folded.tensors.items()}

  def layers(prefix, h):
    if form['hidden_layers'] < 0:
      return h
    x = h
    for i in range(form['hidden_layers'] + 1):
      if i and form['activation'] == 'gelu':
        x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
      elif i and form['activation'] == 'relu':
        x = np.maximum(x, 0)
      x = x @ t[f'{prefix}.{i}.weight'].T + t[f'{prefix}.{i}.bias']
    return x + h if form['residual'] else x

  def scaled(h):
    if form['normalize'] == 'none':
      return h
    return h / np.sqrt(np.mean(h * h, -1, keepdims=True))

  f, head = layers('layers', scaled(h)), form['head']
  if head == 'f':
    return f @ t['head.weight'][0]
  if head == 'f,|f|^2':
    return np.c_[f, np.sum(f * f, -1)] @ t['head.weight'][0]
  if head == 'f/|f|':
    unit = f / np.linalg.norm(f, axis=-1, keepdims=True)
    return unit @ t['head.weight'][0]
  if 'prompts' in form:
    g = np.stack(
      [layers(f'prompts.{k}', scaled(prompts)) for k in range(form['prompts'])],
      -2,
    )
    points = t['weights'] @ g
  else:
    points = t['points']
  reward = oracle.numpy_reward(head, f[:, None], points)
  return form['scale'] * reward @ t['masses']


def differences(x):
  return x - x[0]


@pytest.mark.parametrize(('name', 'network'), CASES)
@pytest.mark.parametrize('user', ['user 1', None])
def test_the_tensors_give_the_same_rewards(name, network, user, tmp_path):
  found = built(name, network)
  path = tmp_path / 'reward.safetensors'
  write_folded(fold(*exported(found, user)), path)
  prompts, h = features(found, ROWS, np.full(len(ROWS), 1))
  mine = numpy_reward_of(read_folded(path), h, prompts)
  expected = found.reward(prompts, h, user)
  scale = np.abs(expected).max() + 1
  np.testing.assert_allclose(
    differences(mine), differences(expected), atol=1e-5 * scale
  )
  if not (MODELS[name][0] == 'squared_distance' and 'pal_b' in name):
    np.testing.assert_allclose(mine, expected, atol=1e-5 * scale)


# Compiling takes a second each; what differs between models is tested above.
@pytest.mark.parametrize(
  ('name', 'network'),
  [
    ('squared_distance f(Pw) convex', 'norm'),
    ('inner_product |f(P)|w mixture_likelihood', None),
    ('cosine pal_b convex', 'residual'),
  ],
)
def test_the_program_gives_the_same_rewards_for_any_batch(
  name, network, tmp_path
):
  found = built(name, network)
  path = tmp_path / 'reward.stablehlo'
  write_program(*exported(found, 'user 2'), oracle.P, path)
  program = read_program(path)
  for rows in (ROWS[:1], ROWS, np.arange(oracle.M)):
    prompts, h = features(found, rows, np.arange(len(rows)) % oracle.Q)
    mine = program(h) if prompts is None else program(h, prompts)
    expected = found.reward(prompts, h, 'user 2')
    np.testing.assert_allclose(
      mine, expected, rtol=1e-5, atol=1e-5 * (np.abs(expected).max() + 1)
    )


def test_a_squared_distance_is_one_head_without_bias():
  folded = fold(*exported(make('squared_distance f(Pw) convex'), None))
  assert folded.form['head'] == 'f,|f|^2'
  assert folded.tensors['head.weight'].shape == (1, oracle.P + 1)
  assert folded.tensors['head.weight'][0, -1] == pytest.approx(-oracle.TAU)
  folded = fold(*exported(make('inner_product Pw convex'), None))
  assert folded.form['head'] == 'f'
  assert folded.tensors['head.weight'].shape == (1, oracle.P)


def test_features_are_scaled_as_in_training(tmp_path):
  found = make('squared_distance Pw convex')
  h = oracle.make_table().items[:5]
  rms = np.sqrt(np.mean(h * h, -1, keepdims=True))
  expected = found.reward(None, h / rms)
  folded = fold(*exported(found, None, 'rms'))
  np.testing.assert_allclose(numpy_reward_of(folded, h), expected, atol=1e-4)
  path = tmp_path / 'program'
  write_program(*exported(found, None, 'rms'), oracle.P, path)
  np.testing.assert_allclose(read_program(path)(3 * h), expected, atol=1e-4)


@pytest.mark.parametrize(('name', 'network'), CASES)
def test_the_torch_module_gives_the_same_rewards(name, network, tmp_path):
  torch = pytest.importorskip('torch')
  from pal_jax.export.torch_reward import PalReward

  found = built(name, network)
  path = tmp_path / 'reward.safetensors'
  write_folded(fold(*exported(found, 'user 1')), path)
  reward = PalReward.from_file(path)
  prompts, h = features(found, ROWS, np.full(len(ROWS), 1))
  arguments = [
    torch.from_numpy(np.array(x)) for x in (h, prompts) if x is not None
  ]
  expected = found.reward(prompts, h, 'user 1')
  mine = reward(*arguments).numpy()
  np.testing.assert_allclose(
    mine, expected, rtol=1e-5, atol=1e-5 * (np.abs(expected).max() + 1)
  )
  half = reward(*[x.bfloat16() for x in arguments])
  assert half.shape == mine.shape and half.isfinite().all()
  safetensors.numpy.save_file({'a': np.ones(2)}, path)
  with pytest.raises(ValueError, match='is not what pal_jax.export wrote'):
    PalReward.from_file(path)


def test_trl_calls_it_with_prompts_and_completions(tmp_path):
  torch = pytest.importorskip('torch')
  from pal_jax.export.torch_reward import PalReward, trl_reward

  found = make('inner_product Pw convex')
  path = tmp_path / 'reward.safetensors'
  write_folded(fold(*exported(found, None)), path)
  asked = []

  def encode(texts):
    asked.extend(texts)
    return torch.ones((len(texts), oracle.P))

  function = trl_reward(PalReward.from_file(path), encode)
  assert function.__name__ == 'pal_reward'
  values = function(
    prompts=['p', [{'role': 'user', 'content': 'q'}]],
    completions=['c', [{'role': 'assistant', 'content': 'd'}]],
    trainer_state=None,
  )
  assert asked == ['p\nc', 'q\nd']
  assert all(isinstance(v, float) for v in values) and len(values) == 2


@pytest.mark.parametrize('content', [b'', b'no tensors', b'PK\x03\x04'])
def test_other_files_are_refused(content, tmp_path):
  path = tmp_path / 'file'
  path.write_bytes(content)
  with pytest.raises(InputError, match='is no'):
    read_folded(path)
  with pytest.raises(InputError, match='is no serialised program'):
    read_program(path)
  with pytest.raises(InputError, match='cannot be read|is no'):
    read_program(tmp_path / 'nothing')
  with pytest.raises(InputError, match='is no'):
    read_folded(tmp_path / 'nothing')
  safetensors.numpy.save_file({'a': np.ones(2)}, path)
  with pytest.raises(InputError, match=FORMAT):
    read_folded(path)


def run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'pal_jax.export', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_the_command(tmp_path):
  found = make('squared_distance f(Pw) convex')
  model = found.save(tmp_path / 'model')
  out = tmp_path / 'reward'
  done = run(f'--model={model}', '--user=user 2', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert sorted(p.name for p in out.iterdir()) == [
    'card.json',
    'reward.safetensors',
    'reward.stablehlo',
    'torch_reward.py',
  ]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['model', 'reward']
  card = json.loads((out / 'card.json').read_text())
  assert card['user'] == 'user 2' and card['feature_width'] == oracle.P
  assert card['format'] == FORMAT and 'sha256' not in card
  h = oracle.make_table().items[:7]
  expected = found.reward(None, h, 'user 2')
  tolerance = {'rtol': 1e-5, 'atol': 1e-5 * (np.abs(expected).max() + 1)}
  mine = numpy_reward_of(read_folded(out / 'reward.safetensors'), h)
  np.testing.assert_allclose(mine, expected, **tolerance)
  program = read_program(out / 'reward.stablehlo')
  np.testing.assert_allclose(program(h), expected, **tolerance)
  again = run(f'--model={model}', f'--out={out}')
  assert again.returncode == 2 and 'exists' in again.stderr
