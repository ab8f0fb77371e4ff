"""BERT in linen, and the pooling that makes a sentence vector of it.

The post-norm transformer of Devlin et al. 2019 (arXiv 1810.04805) with
absolute positions and exact gelu, as all-MiniLM-L6-v2 uses it. A function of
parameters and tokens, with dropout, so that it can be trained further, end to
end. Axes: B texts, T tokens, D width, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from pal_jax import numerics


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes, as in a Hugging Face config.json."""

  vocab_size: int
  width: int  # D
  num_layers: int
  num_heads: int  # H, divides D
  mlp_width: int
  max_tokens: int  # rows of the position table
  num_token_types: int = 2
  layer_norm_epsilon: float = 1e-12
  hidden_dropout: float = 0.1  # applied only if not deterministic
  attention_dropout: float = 0.1  # likewise


class Embeddings(nn.Module):
  """norm(word + position + token type): [B, T] -> [B, T, D]."""

  config: BertConfig

  @nn.compact
  def __call__(self, token_ids_BT, token_type_ids_BT, deterministic=True):
    config = self.config
    num_tokens = token_ids_BT.shape[1]
    # A longer text would read past the table, which JAX fills with NaN.
    if num_tokens > config.max_tokens:
      raise ValueError(
        f'{num_tokens} tokens; this BERT has positions for '
        f'{config.max_tokens}. Truncate the texts.'
      )
    positions_1T = jnp.arange(num_tokens)[None]
    width = config.width
    x_BTD = nn.Embed(config.vocab_size, width, name='words')(token_ids_BT)
    x_BTD += nn.Embed(config.max_tokens, width, name='positions')(positions_1T)
    x_BTD += nn.Embed(config.num_token_types, width, name='token_types')(
      token_type_ids_BT
    )
    x_BTD = _layer_norm(config, 'norm')(x_BTD)
    return nn.Dropout(config.hidden_dropout)(x_BTD, deterministic)


class SelfAttention(nn.Module):
  """softmax(q k^T / sqrt(D / H)) v, over the tokens in the mask."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD, mask_BT, deterministic=True):
    config = self.config
    size = config.width // config.num_heads

    def heads(name):
      y_BTD = nn.Dense(config.width, name=name)(x_BTD)
      return y_BTD.reshape(*y_BTD.shape[:2], config.num_heads, size)

    query_BTHd, key_BTHd, value_BTHd = map(heads, ('query', 'key', 'value'))
    score_BHTS = jnp.einsum('bthd,bshd->bhts', query_BTHd, key_BTHd)
    score_BHTS /= size**0.5
    # Finite, so that a row of padding alone gives a uniform softmax, not NaN.
    score_BHTS = jnp.where(
      mask_BT[:, None, None, :] > 0,
      score_BHTS,
      jnp.finfo(score_BHTS.dtype).min,
    )
    weight_BHTS = nn.softmax(score_BHTS)
    weight_BHTS = nn.Dropout(config.attention_dropout)(
      weight_BHTS, deterministic
    )
    y_BTHd = jnp.einsum('bhts,bshd->bthd', weight_BHTS, value_BTHd)
    return nn.Dense(config.width, name='output')(y_BTHd.reshape(x_BTD.shape))


class Layer(nn.Module):
  """x = norm(x + attention(x)); x = norm(x + mlp(x))."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD, mask_BT, deterministic=True):
    config = self.config
    y_BTD = SelfAttention(config, name='attention')(
      x_BTD, mask_BT, deterministic
    )
    y_BTD = nn.Dropout(config.hidden_dropout)(y_BTD, deterministic)
    x_BTD = _layer_norm(config, 'attention_norm')(x_BTD + y_BTD)

    y_BTM = nn.Dense(config.mlp_width, name='mlp_in')(x_BTD)
    y_BTM = nn.gelu(y_BTM, approximate=False)
    y_BTD = nn.Dense(config.width, name='mlp_out')(y_BTM)
    y_BTD = nn.Dropout(config.hidden_dropout)(y_BTD, deterministic)
    return _layer_norm(config, 'mlp_norm')(x_BTD + y_BTD)


class Bert(nn.Module):
  """The encoder without its pooler.

  Attributes:
    config: sizes; `bert_checkpoint.load` reads them from a checkpoint.
  """

  config: BertConfig

  @nn.compact
  def __call__(
    self,
    token_ids_BT: jax.Array,
    mask_BT: jax.Array,
    token_type_ids_BT: jax.Array | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """The last hidden states [B, T, D].

    Args:
      token_ids_BT: int; whatever stands in padding changes no real token.
      mask_BT: 1 (or True) for a real token, 0 for padding.
      token_type_ids_BT: int; None is all 0, a single segment.
      deterministic: no dropout. Otherwise pass rngs={'dropout': key}.

    Raises:
      ValueError: more tokens than `config.max_tokens`.
    """
    if token_type_ids_BT is None:
      token_type_ids_BT = jnp.zeros_like(token_ids_BT)
    x_BTD = Embeddings(self.config, name='embeddings')(
      token_ids_BT, token_type_ids_BT, deterministic
    )
    for i in range(self.config.num_layers):
      layer = Layer(self.config, name=f'layer_{i}')
      x_BTD = layer(x_BTD, mask_BT, deterministic)
    return x_BTD


def mean_pool(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Mean over the real tokens: [B, T, D] -> [B, D]; 0 where there is none."""
  mask_BT1 = mask_BT.astype(hidden_BTD.dtype)[..., None]
  count_B1 = jnp.maximum(mask_BT1.sum(axis=1), 1.0)
  return (hidden_BTD * mask_BT1).sum(axis=1) / count_B1


def sentence_vectors(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Mean over the real tokens, then unit length: [B, T, D] -> [B, D]."""
  return numerics.normalize(mean_pool(hidden_BTD, mask_BT))


def _layer_norm(config: BertConfig, name: str) -> nn.LayerNorm:
  # The fast variance, E[x^2] - E[x]^2, cancels in float32.
  return nn.LayerNorm(
    epsilon=config.layer_norm_epsilon, use_fast_variance=False, name=name
  )
