"""Maps from encoder features to the preference space (METHOD section 1)."""

import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from pal_jax.errors import InputError
from pal_jax.numerics import is_known

COMPUTE_DTYPES = ('float32', 'bfloat16')
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'relu': nn.relu,
  'gelu': lambda x: nn.gelu(x, approximate=False),
  'linear': lambda x: x,
}


def num_hidden_layers(kind: str) -> int:
  """N of 'mlpN'; -1 for 'identity'.

  Raises:
    InputError: for any other name.
  """
  if kind == 'identity':
    return -1
  match = re.fullmatch(r'mlp(\d+)', kind)
  if not match:
    raise InputError(
      f"model.projector={kind!r} is unknown: expected 'identity' or 'mlpN' "
      'with N hidden layers, for example mlp0, mlp1 or mlp2'
    )
  return int(match.group(1))


class MaskedBatchNorm(nn.Module):
  """Batch normalisation that padding and the number of devices leave alone.

  `nn.BatchNorm` averages per-device means, which is wrong for uneven masks;
  here sums and counts are added up over devices and divided once.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  axis_name: str | None = None  # of a pmap, if there is one

  @nn.compact
  def __call__(self, x, mask, use_running_average: bool):
    """x: [..., P]; mask: x.shape[:-1], weights of rows, 0 for padding."""
    width = x.shape[-1]
    mean = self.variable('batch_stats', 'mean', jnp.zeros, (width,))
    var = self.variable('batch_stats', 'var', jnp.ones, (width,))
    scale = self.param('scale', nn.initializers.ones, (width,))
    bias = self.param('bias', nn.initializers.zeros, (width,))
    mu, sigma2 = mean.value, var.value
    if not use_running_average and not self.is_initializing():
      weight = mask.astype(x.dtype)[..., None]
      rows = jnp.where(weight > 0, x, 0.0)
      lead = tuple(range(x.ndim - 1))
      sums = (
        jnp.sum(weight * rows, lead),
        jnp.sum(weight * jnp.square(rows), lead),
        jnp.sum(weight),
      )
      if self.axis_name is not None:
        sums = jax.lax.psum(sums, self.axis_name)
      count = jnp.maximum(sums[2], 1.0)
      mu = sums[0] / count
      sigma2 = jnp.maximum(sums[1] / count - jnp.square(mu), 0.0)
      mean.value = self.momentum * mean.value + (1 - self.momentum) * mu
      var.value = self.momentum * var.value + (1 - self.momentum) * sigma2
    return (x - mu) * jax.lax.rsqrt(sigma2 + self.epsilon) * scale + bias


class Dropout(nn.Module):
  """`nn.Dropout`, whose rate may be traced: in a sweep each run has its own.

  It draws the same numbers, which depend on the name of the class.
  """

  rate: float  # in [0, 1)

  @nn.compact
  def __call__(self, x, deterministic: bool):
    if deterministic or (is_known(self.rate) and self.rate == 0.0):
      return x
    keep = 1.0 - self.rate
    mask = jax.random.bernoulli(self.make_rng('dropout'), keep, x.shape)
    return jnp.where(mask, x / keep, 0.0)


class Projector(nn.Module):
  """f: R^D -> R^P.

  `mlpN` is N hidden layers of width P, each dense -> (batch norm) ->
  activation -> dropout, and a dense output layer; `identity` returns its
  input and needs D = P.
  """

  width: int  # P
  kind: str = 'mlp2'
  activation: str = 'gelu'  # a key of ACTIVATIONS
  dropout: float = 0.0
  residual: bool = False  # adds the input to the output; needs D = P
  batch_norm: bool = False
  use_bias: bool = True
  # Of the products and activations (of COMPUTE_DTYPES); parameters,
  # batch norm and what is returned keep their own.
  compute_dtype: str = 'float32'
  axis_name: str | None = None

  @nn.compact
  def __call__(self, h, train: bool = False, mask=None):
    """h: [..., D] -> [..., P]; mask: h.shape[:-1], only for batch norm."""
    hidden = num_hidden_layers(self.kind)
    if (hidden < 0 or self.residual) and h.shape[-1] != self.width:
      what = 'identity projector' if hidden < 0 else 'residual projector'
      raise InputError(
        f'model.width={self.width} but the features have D={h.shape[-1]}: an '
        f'{what} needs them equal; set --config.model.width={h.shape[-1]}'
      )
    if hidden < 0:
      return h
    if self.activation not in ACTIVATIONS:
      raise InputError(
        f'model.activation={self.activation!r} is unknown: expected one of '
        f'{sorted(ACTIVATIONS)}'
      )
    if mask is None:
      mask = jnp.ones(h.shape[:-1], bool)
    # None is that of input and parameters: also float64, where tests want it.
    low = self.compute_dtype != 'float32'
    dtype = jnp.dtype(self.compute_dtype) if low else None
    x = h
    for _ in range(hidden):
      x = nn.Dense(self.width, use_bias=self.use_bias, dtype=dtype)(x)
      if self.batch_norm:
        x = x.astype(h.dtype) if low else x
        x = MaskedBatchNorm(axis_name=self.axis_name)(x, mask, not train)
      x = ACTIVATIONS[self.activation](x)
      x = Dropout(self.dropout)(x, deterministic=not train)
    x = nn.Dense(self.width, use_bias=self.use_bias, dtype=dtype)(x)
    x = x.astype(h.dtype) if low else x
    return x + h if self.residual else x
