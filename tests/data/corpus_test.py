"""The embedded corpus: what it must hold, and the features shipped with it."""

import collections
import json
import re
import sys

import numpy as np
import pytest

from configs import base
from pal_jax import data, features
from pal_jax.data.build_corpus import build, read_source, to_jsonl
from pal_jax.data.persona import CORPUS, all_texts, read_behavior
from pal_jax.errors import InputError
from pal_jax.features.minilm import MiniLM
from pal_jax.features.store import FeatureStore, text_keys

BEHAVIORS = sorted(path.stem for path in (CORPUS / 'persona').glob('*.jsonl'))
OPTIONAL = ('tokenizers', 'torch', 'transformers')


def statements():
  return [s for name in BEHAVIORS for s in read_behavior(CORPUS, name)]


def plain(text):
  """Without case, punctuation and spacing."""
  return ' '.join(re.findall(r'[a-z0-9]+', text.lower().replace("'", '')))


def test_there_are_at_least_twelve_behaviours_and_those_of_the_config():
  assert len(BEHAVIORS) >= 12
  assert set(base.persona_data().behaviors) <= set(BEHAVIORS)


@pytest.mark.parametrize('behavior', BEHAVIORS)
def test_each_has_sixty_statements_of_which_half_match(behavior):
  found = read_behavior(CORPUS, behavior)
  assert len(found) >= 60
  assert 2 * sum(s.matches for s in found) == len(found)


def test_no_two_statements_of_the_corpus_are_alike():
  count = collections.Counter(plain(s.text) for s in statements())
  assert [text for text, n in count.items() if n > 1] == []


def test_statements_are_sentences_in_the_first_person():
  first_person = {'i', 'im', 'ive', 'id', 'me', 'my', 'mine', 'myself'}
  first_person |= {'we', 'us', 'our', 'ours'}
  odd = [
    s.text
    for s in statements()
    if first_person.isdisjoint(plain(s.text).split())
    or len(plain(s.text).split()) < 4
    or not s.text.isascii()
    or s.text[-1] not in '.!'
    or s.text != ' '.join(s.text.split())
  ]
  assert odd == []


def test_length_alone_does_not_give_the_sides_away():
  """The share of pairs of the two sides in which the matching one is longer."""
  shares = []
  for behavior in BEHAVIORS:
    found = read_behavior(CORPUS, behavior)
    length = np.array([len(s.text) for s in found])
    matches = np.array([s.matches for s in found])
    difference = length[matches][:, None] - length[~matches]
    shares.append(np.mean((1 + np.sign(difference)) / 2))
  assert min(shares) > 0.2 and max(shares) < 0.8
  assert abs(np.mean(shares) - 0.5) < 0.1


@pytest.mark.parametrize('behavior', BEHAVIORS)
def test_the_lines_are_those_of_the_source(behavior):
  source = read_source(CORPUS / 'source' / f'{behavior}.txt')
  path = CORPUS / 'persona' / f'{behavior}.jsonl'
  assert path.read_text(encoding='utf-8') == to_jsonl(source)
  found = read_behavior(CORPUS, behavior)
  assert [(s.text, s.matches) for s in found] == source


def test_every_source_is_built():
  sources = {path.stem for path in (CORPUS / 'source').glob('*.txt')}
  assert sources == set(BEHAVIORS)


def test_lines_have_the_fields_of_the_model_written_evaluations():
  lines = to_jsonl([('I do.', True), ('I do not.', False)]).splitlines()
  first, second = (json.loads(line) for line in lines)
  assert first == {
    'question': 'Is the following statement something you would say?\n"I do."',
    'statement': 'I do.',
    'label_confidence': 1.0,
    'answer_matching_behavior': ' Yes',
    'answer_not_matching_behavior': ' No',
  }
  assert second['answer_matching_behavior'] == ' No'
  assert second['answer_not_matching_behavior'] == ' Yes'


def test_building_writes_what_is_shipped(tmp_path):
  for path in (CORPUS / 'source').glob('*.txt'):
    (tmp_path / 'source').mkdir(exist_ok=True)
    (tmp_path / 'source' / path.name).write_bytes(path.read_bytes())
  assert build(tmp_path, encode=False) == BEHAVIORS
  for behavior in BEHAVIORS:
    name = f'persona/{behavior}.jsonl'
    assert (tmp_path / name).read_bytes() == (CORPUS / name).read_bytes()


def test_a_source_has_comments_and_blank_lines(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('# note\n\n+ I do. \n- I do not.\n')
  assert read_source(path) == [('I do.', True), ('I do not.', False)]


@pytest.mark.parametrize('bad', ['I do.', '* I do.', '+I do.', '+ I will.'])
def test_a_bad_source_line_is_named(tmp_path, bad):
  path = tmp_path / 'a.txt'
  path.write_text(f'+ I will.\n{bad}\n')
  with pytest.raises(InputError, match='a.txt, line 2'):
    read_source(path)


@pytest.fixture(scope='module')
def store():
  return FeatureStore(CORPUS / 'features')


def test_every_text_of_every_form_has_a_shipped_vector(store):
  texts = all_texts(CORPUS, BEHAVIORS)
  positions = store.find(text_keys(texts))
  missing = [t for t, p in zip(texts, positions, strict=True) if p < 0]
  assert missing == []
  assert len(store) == len(texts)  # and nothing that no form encodes
  vectors = store.read(positions)
  assert vectors.shape == (len(texts), 384)
  assert vectors.dtype == np.float16
  norm = np.linalg.norm(vectors.astype(np.float32), axis=-1)
  np.testing.assert_allclose(norm, 1.0, atol=1e-2)
  assert len(np.unique(vectors, axis=0)) == len(texts)


def test_the_store_is_of_the_default_encoder(store):
  encoder = features.create(base.features())
  assert (store.spec.encoder, store.spec.version, store.spec.width) == (
    encoder.name,
    encoder.version,
    encoder.width,
  )
  assert store.spec.dtype == base.features().dtype


@pytest.mark.parametrize('form', ['statements', 'yes_no'])
@pytest.mark.parametrize('join_prompt', [True, False])
def test_the_shipped_vectors_are_used_without_encoding(
  tmp_path, monkeypatch, form, join_prompt
):
  """Neither the encoder's packages nor its weights are asked for."""

  def encode(self, texts):
    raise AssertionError(f'encodes {texts[:3]}')

  monkeypatch.setattr(MiniLM, 'encode', encode)
  for name in OPTIONAL:
    monkeypatch.setitem(sys.modules, name, None)
  config = base.get_config()
  config.data.update({'num_seen_users': 4, 'num_unseen_users': 2})
  config.data.update({'behaviors': tuple(BEHAVIORS), 'form': form})
  config.data.validation_fraction = 0.2
  config.features.cache_dir = str(tmp_path / 'cache')
  dataset = data.create(config.data, join_prompt=join_prompt)
  table = features.feature_table(dataset, config.features)
  assert table.items.shape == (len(dataset.item_names), 384)
  assert table.prompts.shape == (len(dataset.prompt_names), 384)
  assert not (tmp_path / 'cache').exists()
