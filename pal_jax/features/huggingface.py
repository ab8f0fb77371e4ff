"""Any Hugging Face text model, encoder or decoder, through transformers.

Needs torch and transformers. Only safetensors are loaded, never a pickle, and
never code that comes with a model.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from pal_jax import optional
from pal_jax.errors import InputError
from pal_jax.features import checks

INSTALL = 'pip install torch transformers'
POOLINGS = ('mean', 'last', 'cls')
LAYERS = (-1, -2)

# Where neither tokenizer nor model says how long a text may be (T5).
_DEFAULT_MAX_TOKENS = 512
# Tokenizers say "no limit" by a huge number.
_NO_LIMIT = 1_000_000
# Their positions start after the padding id, so the table is longer than the
# longest text.
_POSITIONS_AFTER_PADDING = (
  'camembert',
  'longformer',
  'mpnet',
  'roberta',
  'xlm-roberta',
)
# Files of a folder that decide a vector.
_IDENTITY_SUFFIXES = ('.safetensors', '.json', '.model', '.txt')


class HuggingFace:
  """Encoder of `huggingface`; see `features.encoder.Encoder`.

  Layer -1 is the model's output, for most decoders after the final norm; -2
  is what the last layer reads, without that norm. Nothing is normalised.
  Weights are used in float32, on the first GPU if torch sees one. Padding is
  on the right, whatever the tokenizer says, so that decoders number real
  tokens from 0. A text without tokens (the empty one, for GPT-2) is its
  model's start or end token.

  Args:
    path: a local folder, or a name on the hub, for example 'gpt2'. A folder
      is read without asking the network.
    pooling: 'mean' over real tokens, the 'last' real token, or 'cls', the
      first real token.
    layer: -1, the last, or -2, the penultimate.
    batch_size: texts run at once. Changes speed and memory, not vectors.

  Raises:
    InputError: an option is wrong; later, when first used, transformers or
      torch is missing, or the model cannot be loaded.
  """

  name = 'huggingface'

  def __init__(
    self,
    path: str | os.PathLike,
    pooling: str = 'mean',
    layer: int = -1,
    batch_size: int = 64,
  ):
    if not str(path):
      raise InputError(
        'features.path is empty; the encoder huggingface needs a folder or '
        "a name on the hub, for example 'gpt2'."
      )
    if pooling not in POOLINGS:
      raise InputError(
        f'features.pooling is {pooling!r}; expected one of {POOLINGS}.'
      )
    if layer not in LAYERS:
      raise InputError(
        f'features.layer is {layer!r}; expected one of {LAYERS}.'
      )
    if batch_size < 1:
      raise InputError(
        f'features.batch_size is {batch_size}; expected at least 1.'
      )
    folder = pathlib.Path(path).expanduser()
    self._is_folder = folder.is_dir()
    self._path = str(folder) if self._is_folder else str(path)
    self._pooling = pooling
    self._layer = layer
    self._batch_size = batch_size
    if self._is_folder:
      _check_folder(folder)

  @functools.cached_property
  def version(self) -> str:
    """The weights, then layer and pooling.

    The weights of a folder are the hash of its files, of a name the commit on
    the hub that the name stands for now.
    """
    if self._is_folder:
      weights = _fingerprint(pathlib.Path(self._path))
    else:
      weights = f'{self._path}@{self._revision}'
    return f'{weights}-layer{self._layer}-{self._pooling}'

  @functools.cached_property
  def width(self) -> int:
    # What has a text and a vision tower (Gemma 3) says it in a sub-config.
    config = self._config.get_text_config()
    # OPT-350m projects its output from 1024 back to 512.
    projected = getattr(config, 'word_embed_proj_dim', None)
    return (projected if self._layer == -1 else None) or config.hidden_size

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """Vectors [N, D], float32, of N texts, in their order.

    A text longer than the model allows is cut, at the end unless its
    tokenizer says otherwise.

    Raises:
      InputError: a text is no string or has no token, or the model cannot be
        loaded.
    """
    checks.check_texts(texts)
    if not len(texts):
      return np.empty((0, self.width), np.float32)
    token_ids = self._token_ids(texts)
    # Like lengths together: little padding.
    order = np.argsort([-len(ids) for ids in token_ids], kind='stable')
    batches = [
      self._encode_batch([token_ids[row] for row in rows])
      for rows in np.split(
        order, range(self._batch_size, len(order), self._batch_size)
      )
    ]
    return np.concatenate(batches)[np.argsort(order)]

  def _token_ids(self, texts):
    tokenizer = self._tokenizer
    token_ids = tokenizer(
      list(texts),
      truncation=True,
      max_length=_max_tokens(tokenizer, self._config),
      padding=False,
    )['input_ids']
    # Not `or`: id 0 is a token.
    substitutes = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    substitute = [i for i in substitutes if i is not None][:1]
    for row, ids in enumerate(token_ids):
      if ids or substitute:
        continue
      raise InputError(
        f'texts, row {row}, {checks.excerpt(texts[row])}: the tokenizer of '
        f'{self._path} makes no token of it, and has no start or end token to '
        'use instead. Drop this text, or give it a word.'
      )
    return [ids or substitute for ids in token_ids]

  def _encode_batch(self, token_ids):
    torch = _require('torch')
    # Padded here and not by the tokenizer: many decoders' have no padding
    # token. The id does not matter where the mask is 0, but must be one.
    padding = self._tokenizer.pad_token_id or 0
    shape = (len(token_ids), max(len(ids) for ids in token_ids))
    ids_BT = torch.full(shape, padding, dtype=torch.long)
    mask_BT = torch.zeros(shape, dtype=torch.long)
    for i, ids in enumerate(token_ids):
      ids_BT[i, : len(ids)] = torch.tensor(ids)
      mask_BT[i, : len(ids)] = 1
    device = next(self._model.parameters()).device
    mask_BT = mask_BT.to(device)
    with torch.inference_mode():
      output = self._model(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT,
        output_hidden_states=self._layer != -1,
      )
    hidden_BTD = (
      output.last_hidden_state
      if self._layer == -1
      else output.hidden_states[self._layer]
    )
    return pool(hidden_BTD, mask_BT, self._pooling).float().cpu().numpy()

  @functools.cached_property
  def _revision(self) -> str:
    """The commit that a name stands for: the newest, or offline the cached.

    Where the file lies says it: <cache>/snapshots/<commit>/config.json. (The
    config's _commit_hash would: transformers 5.23 does not set it.)
    """
    hub = _require('huggingface_hub')
    try:
      path = hub.hf_hub_download(self._path, 'config.json')
    # No such name, no access, no network: each is another class.
    except Exception as error:
      raise self._load_error('config', error) from error
    return pathlib.Path(path).parent.name

  @functools.cached_property
  def _config(self):
    return self._from_pretrained('AutoConfig')

  @functools.cached_property
  def _tokenizer(self):
    return self._from_pretrained('AutoTokenizer')

  @functools.cached_property
  def _model(self):
    torch = _require('torch')
    model, info = self._from_pretrained(
      'AutoModel', use_safetensors=True, output_loading_info=True
    )
    # transformers fills what a file lacks at random, with a warning. Poolers
    # are often absent, and no hidden state depends on them.
    missing = [
      name for name in sorted(info['missing_keys']) if 'pooler' not in name
    ]
    if missing:
      raise InputError(
        f'features.path {self._path!r}: the weights lack {len(missing)} '
        f'tensors of {type(model).__name__}: {missing[:5]}. Take config.json '
        'and weights of one model.'
      )
    if model.config.is_encoder_decoder:
      model = model.get_encoder()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return model.float().eval().to(device)

  def _from_pretrained(self, auto_class, **options):
    transformers = _require('transformers')
    if not self._is_folder:
      # What `version` names, should the hub get newer weights meanwhile.
      options['revision'] = self._revision
    try:
      return getattr(transformers, auto_class).from_pretrained(
        self._path,
        local_files_only=self._is_folder,
        trust_remote_code=False,
        **options,
      )
    # A model that needs code of its own, a broken file, another shape, a
    # tokenizer that needs one more package: each is another class.
    except Exception as error:
      what = auto_class.removeprefix('Auto').lower()
      raise self._load_error(what, error) from error

  def _load_error(self, what: str, error: Exception) -> InputError:
    return InputError(
      f'features.path {self._path!r}: transformers cannot load its {what} '
      f'({error}). Expected a model that it knows, with safetensors weights, '
      'as a folder or a name on the hub that this machine can reach or has '
      'downloaded.'
    )


def pool(hidden_BTD, mask_BT, pooling: str):
  """Torch tensors: [B, T, D] -> [B, D]. Padding may be on either side."""
  torch = _require('torch')
  if pooling == 'mean':
    mask_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
  # argmax gives the first of equals.
  if pooling == 'cls':
    index_B = mask_BT.long().argmax(1)
  else:
    index_B = mask_BT.shape[1] - 1 - mask_BT.long().flip(1).argmax(1)
  return hidden_BTD[torch.arange(len(hidden_BTD)), index_B]


def _require(module: str):
  return optional.require(module, 'the encoder huggingface', INSTALL)


def _max_tokens(tokenizer, config) -> int:
  """The longest text both tokenizer and model allow, in tokens."""
  text_config = config.get_text_config()
  limits = []
  if (tokenizer.model_max_length or _NO_LIMIT) < _NO_LIMIT:
    limits.append(tokenizer.model_max_length)
  positions = getattr(text_config, 'max_position_embeddings', None)
  if positions and positions > 0:
    if text_config.model_type in _POSITIONS_AFTER_PADDING:
      positions -= text_config.pad_token_id + 1
    limits.append(positions)
  return min(limits, default=_DEFAULT_MAX_TOKENS)


def _check_folder(folder: pathlib.Path) -> None:
  """Checks that a folder has what is needed, before torch is imported."""
  if not (folder / 'config.json').exists():
    raise InputError(
      f'features.path {folder} has no config.json; expected a folder that '
      'save_pretrained wrote.'
    )
  if any(folder.glob('*.safetensors')):
    return
  pickles = sorted(path.name for path in folder.glob('*.bin'))
  raise InputError(
    f'features.path {folder} has no *.safetensors (its *.bin: '
    f'{pickles or "none"}). A .bin is a pickle, which can run code, and is '
    'never loaded: convert it where you trust it, with '
    'model.save_pretrained(folder), or download the safetensors.'
  )


def _fingerprint(folder: pathlib.Path) -> str:
  """Hash of the names and contents of a model's files."""
  digest = hashlib.sha256()
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.suffix in _IDENTITY_SUFFIXES:
      with open(path, 'rb') as file:
        content = hashlib.file_digest(file, 'sha256').hexdigest()
      digest.update(f'{path.name}\0{content}\0'.encode())
  return digest.hexdigest()[:32]
