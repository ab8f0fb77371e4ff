"""What importing pal_jax.features pulls in, and what a default install does."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from pal_jax import features
from pal_jax.errors import InputError
from pal_jax.features.store import FeatureStore, Spec

ROOT = pathlib.Path(__file__).parents[2]
OPTIONAL = ('torch', 'transformers', 'tokenizers')


def config(**changes):
  values = {
    'encoder': 'minilm',
    'path': '',
    'pooling': 'mean',
    'layer': -1,
    'batch_size': 64,
    'cache_dir': '',
    'dtype': 'float16',
  }
  return ConfigDict(values | changes)


def run(code, *args):
  """Runs `code` in a fresh Python and returns what it printed as JSON."""
  done = subprocess.run(
    [sys.executable, '-c', code, *args],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  return json.loads(done.stdout)


def test_the_import_pulls_in_nothing_optional():
  code = f"""
import json, sys
import pal_jax.features
print(json.dumps([name for name in {OPTIONAL} if name in sys.modules]))
"""
  assert run(code) == []


# Makes an import fail as it does where the package is not installed.
BLOCK = """
import importlib.util, sys
class Block:
  names = ('torch', 'transformers', 'tokenizers')
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in self.names:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Block())
"""

OFFICIAL = """
import json
from pal_jax.errors import InputError
from pal_jax.features import lookup_or_encode, minilm
encoder = minilm.MiniLM()
found = lookup_or_encode(['a'], encoder, [sys.argv[1]], sys.argv[1] + '/no')
try:
  lookup_or_encode(['a', 'b'], encoder, [sys.argv[1]], sys.argv[1] + '/cache')
  message = ''
except InputError as error:
  message = str(error)
print(json.dumps([found.tolist(), message]))
"""


def test_shipped_features_read_without_the_encoders_packages(tmp_path):
  from pal_jax.features.minilm import MiniLM

  encoder = MiniLM()
  spec = Spec(encoder.name, encoder.version, 384, 'float16')
  store = FeatureStore.open_or_create(tmp_path, spec)
  store.append(['a'], np.full((1, 384), 0.5))
  found, message = run(BLOCK + OFFICIAL, str(tmp_path))
  assert found == [[0.5] * 384]
  # It says what to install, whichever is missing first.
  assert 'pip install' in message and '1 of 2 texts' in message


def test_an_unknown_encoder_lists_the_known_ones():
  with pytest.raises(InputError, match='huggingface.*minilm.*precomputed'):
    features.create(config(encoder='bert'))


@pytest.mark.parametrize('change', [{'pooling': 'last'}, {'layer': -2}])
def test_minilm_refuses_what_it_would_not_do(change):
  with pytest.raises(InputError, match='huggingface'):
    features.create(config(**change))


@pytest.mark.parametrize(
  'change',
  [
    {'encoder': 'minilm', 'batch_size': 0},
    {'encoder': 'huggingface', 'path': ''},
    {'encoder': 'huggingface', 'path': 'gpt2', 'pooling': 'max'},
    {'encoder': 'huggingface', 'path': 'gpt2', 'layer': 3},
    {'encoder': 'huggingface', 'path': 'gpt2', 'batch_size': 0},
    {'encoder': 'precomputed', 'path': ''},
  ],
)
def test_a_wrong_option_is_named_before_anything_loads(change):
  (field,) = {'path', 'pooling', 'layer', 'batch_size'} & {
    key for key in change if change[key] not in ('gpt2',)
  }
  with pytest.raises(InputError, match=f'features.{field}'):
    features.create(config(**change))


@pytest.mark.parametrize(
  'change',
  [
    {},
    {'encoder': 'huggingface', 'path': 'gpt2'},
    {'encoder': 'precomputed', 'path': 'x.npz'},
  ],
)
def test_create_makes_encoders(change):
  encoder = features.create(config(**change))
  assert encoder.name == config(**change).encoder
  assert callable(encoder.encode)


def test_the_base_config_makes_an_encoder():
  base = pytest.importorskip('configs.base')
  assert features.create(base.features()).name == 'minilm'
