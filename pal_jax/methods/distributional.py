"""`dpl`: one distribution of rewards for everybody (hidden context)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from pal_jax.methods.base import Pairs
from pal_jax.methods.training import TaskArrays, Trained

KINDS = ('mean_and_variance', 'categorical')


@dataclasses.dataclass(frozen=True)
class Distributional(Trained):
  """Siththaranjan, Laidlaw and Hadfield-Menell 2024 (arXiv 2312.08358).

  'mean_and_variance': r(h) ~ N(mu, s^2) and p(a > b) = Phi((mu_a - mu_b) /
  sqrt(s_a^2 + s_b^2)). 'categorical': a distribution over `num_atoms` equally
  spaced rewards, ties split. Nobody has a state: what people differ in is
  spread.
  """

  kind: str = 'mean_and_variance'
  hidden: int = 64
  num_atoms: int = 10

  def _net(self):
    width = 2 if self.kind == 'mean_and_variance' else self.num_atoms
    return nn.Sequential([nn.Dense(self.hidden), nn.gelu, nn.Dense(width)])

  def _log_odds(self, params, items):
    """[..., 2, D] -> [...]."""
    out = self._net().apply(params, items)
    if self.kind == 'mean_and_variance':
      variance = jnp.square(jax.nn.softplus(out[..., 1])) + 1e-4
      gap = out[..., 0, 0] - out[..., 1, 0]
      x = gap / jnp.sqrt(jnp.sum(variance, -1))
      norm = jax.scipy.stats.norm
      return norm.logcdf(x) - norm.logcdf(-x)
    p = jax.nn.softmax(out)
    first, second = p[..., 0, :], p[..., 1, :]
    tie = jnp.sum(first * second, -1)
    below = jnp.cumsum(second, -1) - second
    win = jnp.clip(jnp.sum(first * below, -1) + 0.5 * tie, 1e-6, 1 - 1e-6)
    return jnp.log(win) - jnp.log1p(-win)

  def init(self, data: TaskArrays, key):
    return self._net().init(key, data.table.items[:1])

  def logit_of_rows(self, parameters, pairs: Pairs, user):
    del user
    return self._log_odds(parameters, pairs.items)

  def logit(self, parameters, state, prompt, a, b):
    del state, prompt
    return self._log_odds(parameters, jnp.stack([a, b]))
