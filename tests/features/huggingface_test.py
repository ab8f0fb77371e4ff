"""features.huggingface on tiny random models that the tests write."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from pal_jax.errors import InputError
from pal_jax.features import lookup
from pal_jax.features.huggingface import HuggingFace, pool

WORDS = [f'w{i}' for i in range(20)]
TEXTS = ['w1 w2 w3', 'w4', 'w5 w6 w7 w8 w9 w10 w11', 'w3 w2']


def test_missing_packages_say_what_to_run(tmp_path, monkeypatch):
  """Without torch, too: this one always runs."""
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'model.safetensors').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'transformers', None)
  with pytest.raises(InputError, match='pip install torch transformers'):
    HuggingFace(tmp_path).encode(['a'])


def test_a_pickle_is_refused_before_torch_is_needed(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  message = r'no \*.safetensors .*pytorch_model.bin.*never loaded'
  with pytest.raises(InputError, match=message):
    HuggingFace(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
  with pytest.raises(InputError, match='no config.json'):
    HuggingFace(tmp_path)


class FakeTransformers:
  """Remembers how it was asked to load."""

  def __init__(self):
    self.calls = {}
    for name in ('AutoConfig', 'AutoTokenizer', 'AutoModel'):
      setattr(self, name, self.auto_class(name))

  def auto_class(self, name):
    class Auto:
      @staticmethod
      def from_pretrained(path, **options):
        self.calls[name] = options
        raise OSError('not here')

    return Auto


@pytest.mark.parametrize('is_folder', [True, False])
def test_neither_network_nor_foreign_code_nor_pickle(
  tmp_path, monkeypatch, is_folder
):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'model.safetensors').write_bytes(b'')
  fake = FakeTransformers()
  monkeypatch.setitem(sys.modules, 'transformers', fake)
  monkeypatch.setitem(sys.modules, 'torch', fake)
  encoder = HuggingFace(tmp_path if is_folder else 'some/name')
  encoder._revision = 'commit'
  for what in ('_config', '_tokenizer', '_model'):
    with pytest.raises(InputError, match='cannot load'):
      getattr(encoder, what)
  assert len(fake.calls) == 3
  for options in fake.calls.values():
    assert options['trust_remote_code'] is False
    assert options['local_files_only'] is is_folder
    assert options.get('revision') == (None if is_folder else 'commit')
  assert fake.calls['AutoModel']['use_safetensors'] is True


def needs_torch():
  torch = pytest.importorskip('torch', reason='needs torch')
  return torch, pytest.importorskip('transformers', reason='needs transformers')


def save_tokenizer(folder, **tokens):
  """One id per word, from 4 on; special tokens only as given."""
  _, transformers = needs_torch()
  tokenizers = pytest.importorskip('tokenizers')
  vocabulary = {'[PAD]': 0, '[UNK]': 1, '[CLS]': 2, '<|endoftext|>': 3}
  vocabulary |= {word: i + 4 for i, word in enumerate(WORDS)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='[UNK]')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  if 'cls_token' in tokens:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A', special_tokens=[('[CLS]', 2)]
    )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, **tokens
  ).save_pretrained(folder)


def save_bert(folder):
  torch, transformers = needs_torch()
  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
  )
  model = transformers.BertModel(config).eval()
  model.save_pretrained(folder)
  save_tokenizer(folder, pad_token='[PAD]', cls_token='[CLS]')
  return model, [2]


def save_gpt2(folder):
  torch, transformers = needs_torch()
  torch.manual_seed(0)
  config = transformers.GPT2Config(
    vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=12
  )
  model = transformers.GPT2Model(config).eval()
  model.save_pretrained(folder)
  # No padding token, and padding on the left, as decoders come.
  save_tokenizer(folder, eos_token='<|endoftext|>', padding_side='left')
  return model, []


def save_opt(folder):
  """Like OPT-350m: the output is narrower than the hidden states."""
  torch, transformers = needs_torch()
  torch.manual_seed(0)
  config = transformers.OPTConfig(
    vocab_size=24,
    hidden_size=16,
    word_embed_proj_dim=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=12,
    do_layer_norm_before=False,
    pad_token_id=0,
  )
  model = transformers.OPTModel(config).eval()
  model.save_pretrained(folder)
  save_tokenizer(folder, pad_token='[PAD]', eos_token='<|endoftext|>')
  return model, []


SAVE = {'bert': save_bert, 'gpt2': save_gpt2, 'opt': save_opt}


def one_by_one(model, start, texts, layer, pooling):
  """What `encode` must give, without padding or batches."""
  torch, _ = needs_torch()
  vectors = []
  for text in texts:
    ids = start + [WORDS.index(word) + 4 for word in text.split()]
    with torch.inference_mode():
      output = model(torch.tensor([ids]), output_hidden_states=True)
    hidden = output.hidden_states[layer][0]
    if layer == -1:
      hidden = output.last_hidden_state[0]
    pooled = {'mean': hidden.mean(0), 'last': hidden[-1], 'cls': hidden[0]}
    vectors.append(pooled[pooling].numpy())
  return np.stack(vectors)


@pytest.mark.parametrize('layer', [-1, -2])
@pytest.mark.parametrize('pooling', ['mean', 'last', 'cls'])
@pytest.mark.parametrize('name', list(SAVE))
def test_vectors_are_those_of_each_text_alone(tmp_path, name, pooling, layer):
  model, start = SAVE[name](tmp_path)
  expected = one_by_one(model, start, TEXTS, layer, pooling)
  encoder = HuggingFace(tmp_path, pooling, layer, batch_size=3)
  vectors = encoder.encode(TEXTS)
  assert vectors.dtype == np.float32
  np.testing.assert_allclose(vectors, expected, atol=1e-5)
  assert encoder.width == vectors.shape[1]


@pytest.mark.parametrize('pooling', ['mean', 'last', 'cls'])
def test_pooling_with_padding_on_either_side(pooling):
  torch, _ = needs_torch()
  hidden = torch.tensor(
    [[[1.0], [2.0], [6.0], [50.0]], [[50.0], [1.0], [2.0], [6.0]]]
  )
  mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
  expected = {'mean': 3.0, 'last': 6.0, 'cls': 1.0}[pooling]
  assert pool(hidden, mask, pooling).tolist() == [[expected], [expected]]


def test_long_texts_are_cut_at_what_the_model_has_positions_for(tmp_path):
  save_gpt2(tmp_path)
  encoder = HuggingFace(tmp_path, 'mean')
  long, cut = encoder.encode([' '.join(WORDS), ' '.join(WORDS[:12])])
  np.testing.assert_allclose(long, cut, atol=1e-6)


def test_roberta_has_two_positions_fewer_than_its_table(tmp_path):
  torch, transformers = needs_torch()
  config = transformers.RobertaConfig(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    pad_token_id=1,
  )
  transformers.RobertaModel(config).save_pretrained(tmp_path)
  save_tokenizer(tmp_path, pad_token='[UNK]')
  vectors = HuggingFace(tmp_path).encode([' '.join(WORDS), 'w1'])
  assert np.isfinite(vectors).all()


def test_the_encoder_half_of_t5(tmp_path):
  torch, transformers = needs_torch()
  config = transformers.T5Config(
    vocab_size=24, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
  )
  transformers.T5Model(config).save_pretrained(tmp_path)
  save_tokenizer(tmp_path, pad_token='[PAD]', eos_token='<|endoftext|>')
  assert HuggingFace(tmp_path).encode(TEXTS).shape == (4, 16)


def test_the_empty_text_is_the_end_token_or_an_error(tmp_path):
  model, _ = save_gpt2(tmp_path)
  torch, _ = needs_torch()
  with torch.inference_mode():
    expected = model(torch.tensor([[3]])).last_hidden_state[0, 0].numpy()
  vectors = HuggingFace(tmp_path, 'last').encode(['w1', ''])
  np.testing.assert_allclose(vectors[1], expected, atol=1e-5)
  save_tokenizer(tmp_path)
  with pytest.raises(InputError, match='row 1.*no token'):
    HuggingFace(tmp_path, 'last').encode(['w1', ''])


def test_no_texts(tmp_path):
  save_bert(tmp_path)
  assert HuggingFace(tmp_path).encode([]).shape == (0, 16)


def test_the_version_follows_all_that_changes_a_vector(tmp_path):
  save_bert(tmp_path)
  versions = [
    HuggingFace(tmp_path).version,
    HuggingFace(tmp_path, 'cls').version,
    HuggingFace(tmp_path, layer=-2).version,
  ]
  save_gpt2(tmp_path)
  versions.append(HuggingFace(tmp_path).version)
  assert len(set(versions)) == 4
  assert HuggingFace(tmp_path, batch_size=3).version == versions[-1]


def test_it_works_through_the_cache(tmp_path):
  save_bert(tmp_path / 'model')
  encoder = HuggingFace(tmp_path / 'model')
  first = lookup.lookup_or_encode(TEXTS, encoder, cache_dir=tmp_path)
  encoder = HuggingFace(tmp_path / 'model')
  again = lookup.lookup_or_encode(TEXTS, encoder, cache_dir=tmp_path)
  np.testing.assert_array_equal(again, first)
  assert '_model' not in vars(encoder)


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
  """And the code is not run."""
  save_bert(tmp_path)
  path = tmp_path / 'config.json'
  config = json.loads(path.read_text())
  config['model_type'] = 'unheard-of'
  config['auto_map'] = {'AutoConfig': 'own.Config', 'AutoModel': 'own.Model'}
  path.write_text(json.dumps(config))
  (tmp_path / 'own.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
  with pytest.raises(InputError, match='transformers cannot load its config'):
    HuggingFace(tmp_path).encode(['w1'])
  assert not (tmp_path / 'ran').exists()


def test_a_broken_weights_file_is_named(tmp_path):
  save_bert(tmp_path)
  (tmp_path / 'model.safetensors').write_bytes(b'no')
  with pytest.raises(InputError, match='transformers cannot load its model'):
    HuggingFace(tmp_path).encode(['w1'])


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'num_hidden_layers': 3}, 'lack 16 tensors of BertModel: .*layer.2'),
    ({'hidden_size': 32}, 'cannot load its model'),
  ],
)
def test_a_config_that_does_not_fit_the_weights(tmp_path, changes, message):
  """Else the rest of the model would be random numbers."""
  save_bert(tmp_path)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(InputError, match=message):
    HuggingFace(tmp_path).encode(['w1'])


def test_weights_without_a_pooler_will_do(tmp_path):
  torch, transformers = needs_torch()
  model, start = save_bert(tmp_path)
  transformers.BertModel(model.config, add_pooling_layer=False).save_pretrained(
    tmp_path
  )
  assert HuggingFace(tmp_path).encode(TEXTS).shape == (4, 16)


def test_a_downloaded_name_has_the_version_of_its_commit(tmp_path):
  """Offline, from a cache of the hub; in a process of its own for HF_HOME."""
  commit = 'c0ffee' + '0' * 34
  cached = tmp_path / 'hub' / 'models--some--name'
  model, start = save_bert(cached / 'snapshots' / commit)
  (cached / 'refs').mkdir()
  (cached / 'refs' / 'main').write_text(commit)
  code = f"""
import json, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parents[2])!r})
from pal_jax.features.huggingface import HuggingFace
encoder = HuggingFace('some/name', 'last')
print(json.dumps([encoder.version, encoder.encode({TEXTS}).tolist()]))
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'},
    check=True,
    capture_output=True,
    text=True,
  )
  version, vectors = json.loads(done.stdout)
  assert version == f'some/name@{commit}-layer-1-last'
  expected = one_by_one(model, start, TEXTS, -1, 'last')
  np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_name_that_the_hub_cannot_give(monkeypatch):
  needs_torch()
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  encoder = HuggingFace('nobody/nothing-of-this-name')
  with pytest.raises(InputError, match='nobody/nothing.*cannot load'):
    encoder.encode(['a'])
