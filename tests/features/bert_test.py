"""features.bert against numpy, and the reading of checkpoints."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from pal_jax.errors import InputError
from pal_jax.features import bert_checkpoint
from pal_jax.features.bert import (
  Bert,
  BertConfig,
  mean_pool,
  sentence_vectors,
)

CONFIG = BertConfig(
  vocab_size=11,
  width=8,
  num_layers=2,
  num_heads=2,
  mlp_width=12,
  max_tokens=7,
)
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def tensors(config=CONFIG, seed=0):
  """Random tensors under the names that Hugging Face gives them."""
  rng = np.random.default_rng(seed)
  width, mlp = config.width, config.mlp_width
  shapes = {
    'embeddings.word_embeddings.weight': (config.vocab_size, width),
    'embeddings.position_embeddings.weight': (config.max_tokens, width),
    'embeddings.token_type_embeddings.weight': (2, width),
    'embeddings.LayerNorm.weight': (width,),
    'embeddings.LayerNorm.bias': (width,),
  }
  for i in range(config.num_layers):
    for name, shape in {
      'attention.self.query': (width, width),
      'attention.self.key': (width, width),
      'attention.self.value': (width, width),
      'attention.output.dense': (width, width),
      'attention.output.LayerNorm': (width,),
      'intermediate.dense': (mlp, width),
      'output.dense': (width, mlp),
      'output.LayerNorm': (width,),
    }.items():
      shapes[f'encoder.layer.{i}.{name}.weight'] = shape
      shapes[f'encoder.layer.{i}.{name}.bias'] = shape[:1]
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def params(config=CONFIG, seed=0):
  return bert_checkpoint.params_from_tensors(
    tensors(config, seed), config, 'test'
  )[0]


def oracle(t, ids, config=CONFIG):
  """BERT for one text without padding, in float64: [T] -> [T, D]."""
  t = {name: value.astype(np.float64) for name, value in t.items()}

  def norm(x, name):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return centred / deviation * t[f'{name}.weight'] + t[f'{name}.bias']

  def dense(x, name):
    return x @ t[f'{name}.weight'].T + t[f'{name}.bias']

  x = t['embeddings.word_embeddings.weight'][ids]
  x = x + t['embeddings.position_embeddings.weight'][: len(ids)]
  x = x + t['embeddings.token_type_embeddings.weight'][0]
  x = norm(x, 'embeddings.LayerNorm')
  size = config.width // config.num_heads
  for i in range(config.num_layers):
    layer = f'encoder.layer.{i}'
    query, key, value = (
      dense(x, f'{layer}.attention.self.{name}')
      for name in ('query', 'key', 'value')
    )
    mixed = []
    for head in range(config.num_heads):
      part = slice(head * size, (head + 1) * size)
      score = query[:, part] @ key[:, part].T / math.sqrt(size)
      weight = np.exp(score - score.max(-1, keepdims=True))
      weight /= weight.sum(-1, keepdims=True)
      mixed.append(weight @ value[:, part])
    y = dense(np.concatenate(mixed, -1), f'{layer}.attention.output.dense')
    x = norm(x + y, f'{layer}.attention.output.LayerNorm')
    y = dense(x, f'{layer}.intermediate.dense')
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    y = dense(y, f'{layer}.output.dense')
    x = norm(x + y, f'{layer}.output.LayerNorm')
  return x


@functools.partial(jax.jit, static_argnames='deterministic')
def jitted(parameters, ids, mask, types, rngs=None, deterministic=True):
  return Bert(CONFIG).apply(
    {'params': parameters}, ids, mask, types, deterministic, rngs=rngs
  )


def apply(ids, mask, parameters=None, types=None, **options):
  parameters = params() if parameters is None else parameters
  return jitted(parameters, ids, mask, types, **options)


def test_it_is_the_function_that_numpy_computes():
  hidden = apply(IDS, MASK)
  np.testing.assert_allclose(hidden[0], oracle(tensors(), IDS[0]), atol=1e-5)
  np.testing.assert_allclose(
    hidden[1, :3], oracle(tensors(), IDS[1, :3]), atol=1e-5
  )


def test_a_checkpoint_has_the_parameters_that_init_makes():
  made = jax.eval_shape(Bert(CONFIG).init, jax.random.key(0), IDS, MASK)
  made = made['params']
  shapes = jax.tree.map(jnp.shape, made)
  assert jax.tree.map(jnp.shape, params()) == shapes


def test_what_stands_in_padding_changes_nothing():
  other = np.where(MASK == 1, IDS, 7)
  vectors = sentence_vectors(apply(IDS, MASK), MASK)
  np.testing.assert_allclose(
    sentence_vectors(apply(other, MASK), MASK), vectors, atol=1e-6
  )
  wider = np.pad(IDS, ((0, 0), (0, 2)))
  mask = np.pad(MASK, ((0, 0), (0, 2)))
  np.testing.assert_allclose(
    sentence_vectors(apply(wider, mask), mask), vectors, atol=1e-6
  )


def test_the_order_of_tokens_and_their_type_matter():
  hidden = apply(IDS, MASK)
  swapped = IDS[:, [1, 0, 2, 3, 4]]
  assert np.abs(apply(swapped, MASK) - hidden).max() > 0.1
  types = np.ones_like(IDS)
  typed = apply(IDS, MASK, types=types)
  assert np.abs(typed - hidden).max() > 0.1


def test_pooling_by_hand():
  hidden = jnp.array([[[3.0, 0.0], [3.0, 8.0], [99.0, 99.0]]])
  mask = jnp.array([[1, 1, 0]])
  np.testing.assert_allclose(mean_pool(hidden, mask), [[3.0, 4.0]])
  np.testing.assert_allclose(
    sentence_vectors(hidden, mask), [[0.6, 0.8]], rtol=1e-6
  )


def test_a_row_of_padding_alone_is_zero_and_has_a_finite_gradient():
  def loss(parameters):
    vectors = sentence_vectors(apply(IDS, 0 * MASK, parameters), 0 * MASK)
    return vectors.sum(), vectors

  gradient, vectors = jax.jit(jax.grad(loss, has_aux=True))(params())
  np.testing.assert_array_equal(vectors, 0.0)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_it_can_be_trained_end_to_end():
  """Every parameter gets a gradient, and steps along it lower the loss."""
  target = jax.random.normal(jax.random.key(1), (2, CONFIG.width))

  def loss(parameters):
    vectors = sentence_vectors(apply(IDS, MASK, parameters), MASK)
    return -(vectors * target).sum()

  parameters = params()
  gradient_of = jax.jit(jax.grad(loss))
  gradient = gradient_of(parameters)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    # A constant on all keys shifts all scores of a query alike: softmax is
    # blind to it.
    if 'key' in jax.tree_util.keystr(path) and leaf.ndim == 1:
      continue
    assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)
  before = loss(parameters)
  for _ in range(20):
    parameters = jax.tree.map(
      lambda x, g: x - 0.01 * g, parameters, gradient_of(parameters)
    )
  assert loss(parameters) < before - 0.1


def test_dropout_is_off_unless_asked_for():
  hidden = apply(IDS, MASK)
  np.testing.assert_array_equal(apply(IDS, MASK), hidden)

  def dropped(seed):
    rngs = {'dropout': jax.random.key(seed)}
    return apply(IDS, MASK, deterministic=False, rngs=rngs)

  assert np.abs(dropped(0) - hidden).max() > 0.01
  assert np.abs(dropped(0) - dropped(1)).max() > 0.01


def test_no_silent_broadcasting():
  with jax.numpy_rank_promotion('raise'):
    sentence_vectors(apply(IDS, MASK), MASK)


def test_too_many_tokens_are_refused():
  with pytest.raises(ValueError, match='8 tokens.*7'):
    apply(np.zeros((1, 8), int), np.ones((1, 8), int))


def read(t, config=CONFIG):
  return bert_checkpoint.params_from_tensors(t, config, 'x.safetensors')


def test_every_tensor_is_used_or_listed():
  t = tensors()
  spare = {
    'embeddings.position_ids': np.zeros((1, 7), np.int64),
    'pooler.dense.weight': np.zeros((8, 8), np.float32),
    'pooler.dense.bias': np.zeros(8, np.float32),
  }
  parameters, unused = read(t | spare)
  assert unused == tuple(sorted(spare))
  total = sum(leaf.size for leaf in jax.tree.leaves(parameters))
  assert total == sum(value.size for value in t.values())


def test_a_missing_tensor_is_named():
  t = tensors()
  del t['encoder.layer.1.output.dense.bias']
  message = r'x.safetensors: .*encoder.layer.1.output.dense.bias.*\(8,\)'
  with pytest.raises(InputError, match=message):
    read(t)


def test_a_misshaped_tensor_is_named():
  t = tensors()
  name = 'encoder.layer.0.intermediate.dense.weight'
  t[name] = t[name].T
  with pytest.raises(InputError, match=rf'{name}.*\(8, 12\).*\(12, 8\)'):
    read(t)


def test_a_layer_that_the_config_does_not_know_is_named():
  """Else a model of twelve layers would run with its first six."""
  shallow = dataclasses.replace(CONFIG, num_layers=1)
  with pytest.raises(InputError, match='16 tensors: .*encoder.layer.1'):
    read(tensors(), shallow)


def test_names_with_a_prefix_and_half_precision():
  t = {
    f'bert.{name}': value.astype(np.float16)
    for name, value in tensors().items()
  }
  parameters, unused = read(t | {'cls.predictions.bias': np.zeros(11)})
  assert unused == ('cls.predictions.bias',)
  assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {
    np.dtype('float32')
  }


CONFIG_JSON = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'vocab_size': 11,
  'hidden_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 12,
  'max_position_embeddings': 7,
  'type_vocab_size': 2,
}


def write_config(folder, **changes):
  values = CONFIG_JSON | changes
  (folder / 'config.json').write_text(json.dumps(values))
  return folder


def test_the_config_is_read(tmp_path):
  assert bert_checkpoint.read_config(write_config(tmp_path)) == CONFIG


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model_type': 'roberta'}, "model_type is 'roberta'"),
    ({'hidden_act': 'relu'}, "hidden_act is 'relu'"),
    ({'position_embedding_type': 'relative_key'}, 'position_embedding_type'),
    ({'hidden_size': None}, 'hidden_size is None'),
    ({'num_attention_heads': 3}, 'no multiple'),
  ],
)
def test_a_config_of_another_model_is_refused(tmp_path, changes, message):
  with pytest.raises(InputError, match=message):
    bert_checkpoint.read_config(write_config(tmp_path, **changes))


def test_a_folder_without_a_model_is_refused(tmp_path):
  with pytest.raises(InputError, match='config.json cannot be read'):
    bert_checkpoint.load(tmp_path)
  write_config(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(InputError, match='model.safetensors is missing'):
    bert_checkpoint.load(tmp_path)


def test_a_file_is_read_as_its_tensors(tmp_path):
  path = write_config(tmp_path) / 'model.safetensors'
  safetensors.numpy.save_file(tensors(), path)
  checkpoint = bert_checkpoint.load(tmp_path)
  assert checkpoint.config == CONFIG and checkpoint.unused == ()
  jax.tree.map(np.testing.assert_array_equal, checkpoint.params, params())
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(InputError, match='model.safetensors cannot be read'):
    bert_checkpoint.load(tmp_path)
