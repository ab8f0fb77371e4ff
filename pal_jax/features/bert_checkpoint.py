"""A Hugging Face BERT folder -> sizes and linen parameters.

Reads `config.json` and `model.safetensors`. Torch's linear layers store
[out, in], linen's [in, out]: kernels are transposed.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from pal_jax.errors import InputError
from pal_jax.features.bert import BertConfig

INSTALL = 'pip install -r requirements-text.txt'

# BertConfig field: key in config.json.
_CONFIG_KEYS = {
  'vocab_size': 'vocab_size',
  'width': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'mlp_width': 'intermediate_size',
  'max_tokens': 'max_position_embeddings',
  'num_token_types': 'type_vocab_size',
  'layer_norm_epsilon': 'layer_norm_eps',
  'hidden_dropout': 'hidden_dropout_prob',
  'attention_dropout': 'attention_probs_dropout_prob',
}

# What bert.py implements; a folder that says otherwise would load and be wrong.
_REQUIRED = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
}

_EMBEDDING_TENSORS = {
  'embeddings.word_embeddings.weight': 'embeddings/words/embedding',
  'embeddings.position_embeddings.weight': 'embeddings/positions/embedding',
  'embeddings.token_type_embeddings.weight': 'embeddings/token_types/embedding',
  'embeddings.LayerNorm.weight': 'embeddings/norm/scale',
  'embeddings.LayerNorm.bias': 'embeddings/norm/bias',
}

# Of one layer: torch's module: linen's.
_LAYER_DENSE = {
  'attention.self.query': 'attention/query',
  'attention.self.key': 'attention/key',
  'attention.self.value': 'attention/value',
  'attention.output.dense': 'attention/output',
  'intermediate.dense': 'mlp_in',
  'output.dense': 'mlp_out',
}
_LAYER_NORMS = {
  'attention.output.LayerNorm': 'attention_norm',
  'output.LayerNorm': 'mlp_norm',
}

# Tensors that a checkpoint may have and sentence vectors do without: a buffer,
# the pooler, and heads of pre-training. Any other is a sign of a wrong config.
_SPARE_PREFIXES = ('embeddings.position_ids', 'pooler.', 'cls.')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A BERT from a folder."""

  config: BertConfig
  params: dict  # of bert.Bert, float32 numpy
  unused: tuple[str, ...]  # tensors of the file that Bert has no place for


def read_config(folder: pathlib.Path) -> BertConfig:
  """The sizes in `folder`/config.json.

  Raises:
    InputError: no such file, a missing field, or a BERT of another kind.
  """
  path = folder / 'config.json'
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise InputError(
      f'{path} cannot be read ({error}); expected the config.json of a '
      'Hugging Face BERT. Name the folder that holds it.'
    ) from error
  for key, expected in _REQUIRED.items():
    # Folders of before 2021 have no position_embedding_type.
    if values.get(key, expected) != expected:
      raise InputError(
        f'{path}: {key} is {values[key]!r}; expected {expected!r}. Use '
        "features.encoder='huggingface' for other models."
      )
  defaults = {
    field.name: field.default
    for field in dataclasses.fields(BertConfig)
    if field.default is not dataclasses.MISSING
  }
  fields = {}
  for field, key in _CONFIG_KEYS.items():
    value = values.get(key, defaults.get(field))
    if not isinstance(value, int | float):
      raise InputError(
        f'{path}: {key} is {value!r}; expected a number. Take the '
        'config.json that came with the weights.'
      )
    fields[field] = value
  if fields['width'] % fields['num_heads']:
    raise InputError(
      f'{path}: hidden_size {fields["width"]} is no multiple of '
      f'num_attention_heads {fields["num_heads"]}.'
    )
  return BertConfig(**fields)


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a safetensors file.

  Raises:
    InputError: if the file cannot be read.
  """
  try:
    return safetensors.numpy.load_file(path)
  # safetensors raises its own exception, KeyError or TypeError for a type
  # that numpy lacks, and OSError.
  except Exception as error:
    raise InputError(
      f'{path} cannot be read as float safetensors ({error!r}). Download it '
      'again, or save the model in float32.'
    ) from error


def params_from_tensors(
  tensors: Mapping[str, np.ndarray], config: BertConfig, source: str
) -> tuple[dict, tuple[str, ...]]:
  """Linen parameters of `bert.Bert(config)`, float32.

  Args:
    tensors: by their Hugging Face names, with or without a leading 'bert.'.
    config: sizes that the tensors must have.
    source: where they come from, for messages.

  Returns:
    The parameters, and the names of tensors without a place in them.

  Raises:
    InputError: a tensor is missing, has another shape, or is left over though
      it belongs to the encoder. Names it.
  """
  prefix = 'bert.' if any(name.startswith('bert.') for name in tensors) else ''
  params = {}
  places = _places(config)
  for name, (path, shape, transpose) in places.items():
    if prefix + name not in tensors:
      raise InputError(
        f'{source}: tensor {prefix + name} is missing; expected shape {shape}. '
        'Take config.json and weights of one BERT model.'
      )
    tensor = np.asarray(tensors[prefix + name])
    if tensor.shape != shape:
      raise InputError(
        f'{source}: tensor {prefix + name} has shape {tensor.shape}; '
        f'config.json says {shape}. Take both files of one model.'
      )
    tensor = tensor.astype(np.float32, copy=False)
    _put(params, path, tensor.T if transpose else tensor)
  unused = sorted(set(tensors) - {prefix + name for name in places})
  unknown = [
    name
    for name in unused
    if not name.removeprefix(prefix).startswith(_SPARE_PREFIXES)
  ]
  if unknown:
    raise InputError(
      f'{source}: config.json has no place for {len(unknown)} tensors: '
      f'{unknown[:5]}. Take both files of one model.'
    )
  return params, tuple(unused)


def load(folder: pathlib.Path) -> Checkpoint:
  """Reads config.json and model.safetensors.

  Raises:
    InputError: as `read_config`, `read_tensors` and `params_from_tensors`.
  """
  config = read_config(folder)
  path = folder / 'model.safetensors'
  if not path.exists():
    raise InputError(
      f'{path} is missing. Name the folder of a model saved as safetensors '
      '(a .bin is a pickle, which is never loaded).'
    )
  params, unused = params_from_tensors(read_tensors(path), config, str(path))
  return Checkpoint(config, params, unused)


def _places(config: BertConfig) -> dict[str, tuple[str, tuple[int, ...], bool]]:
  """Tensor name -> (path in the parameters, torch shape, transposed)."""
  width, mlp = config.width, config.mlp_width
  rows = {
    'words': config.vocab_size,
    'positions': config.max_tokens,
    'token_types': config.num_token_types,
  }
  places = {}
  for name, path in _EMBEDDING_TENSORS.items():
    num_rows = rows.get(path.split('/')[1])
    shape = (num_rows, width) if num_rows is not None else (width,)
    places[name] = (path, shape, False)
  for i in range(config.num_layers):
    torch_layer, layer = f'encoder.layer.{i}', f'layer_{i}'
    for torch_name, path in _LAYER_DENSE.items():
      out = mlp if path == 'mlp_in' else width
      into = mlp if path == 'mlp_out' else width
      name, path = f'{torch_layer}.{torch_name}', f'{layer}/{path}'
      places[f'{name}.weight'] = (f'{path}/kernel', (out, into), True)
      places[f'{name}.bias'] = (f'{path}/bias', (out,), False)
    for torch_name, path in _LAYER_NORMS.items():
      name, path = f'{torch_layer}.{torch_name}', f'{layer}/{path}'
      places[f'{name}.weight'] = (f'{path}/scale', (width,), False)
      places[f'{name}.bias'] = (f'{path}/bias', (width,), False)
  return places


def _put(tree: dict, path: str, value: np.ndarray) -> None:
  *parents, last = path.split('/')
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = value
