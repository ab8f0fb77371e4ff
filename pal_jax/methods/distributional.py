"""`dpl`: one distribution of rewards for everybody (hidden context)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pal_jax.methods.base import Method, Pairs, Task, flat_rows, gather
from pal_jax.methods.training import minimise

KINDS = ('mean_and_variance', 'categorical')


@dataclasses.dataclass(frozen=True)
class Distributional(Method):
  """Siththaranjan, Laidlaw and Hadfield-Menell 2024 (arXiv 2312.08358).

  'mean_and_variance': r(h) ~ N(mu, s^2) and p(a > b) = Phi((mu_a - mu_b) /
  sqrt(s_a^2 + s_b^2)). 'categorical': a distribution over `num_atoms` equally
  spaced rewards, ties split. Nobody has a state: what people differ in is
  spread.
  """

  kind: str = 'mean_and_variance'
  hidden: int = 64
  num_atoms: int = 10
  learning_rate: float = 1e-3
  weight_decay: float = 1e-2
  batch_size: int = 256
  num_steps: int = 1000

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

  def fit(self, task: Task, key: jax.Array):
    init_key, key = jax.random.split(key)
    rows, check = flat_rows(task.train), flat_rows(task.validation)

    def mean_loss(params, comparisons):
      pairs = gather(task.table, comparisons)
      z = self._log_odds(params, pairs.items)
      # A label's log-likelihood from log odds, as everywhere else.
      return jnp.mean(jax.nn.softplus(z) - pairs.label * z)

    def sample(key):
      return rows[
        jax.random.randint(key, (self.batch_size,), 0, rows.label.shape[0])
      ]

    return minimise(
      lambda params, batch, key, progress: mean_loss(params, batch),
      self._net().init(init_key, task.table.items[:1]),
      sample,
      lambda params: mean_loss(params, check),
      optimizer=optax.adamw(self.learning_rate, weight_decay=self.weight_decay),
      num_steps=self.num_steps,
      check_every=50,
      key=key,
    )[0]

  def adapt(self, parameters, support: Pairs):
    del parameters, support
    return jnp.zeros(())

  def logit(self, parameters, state, prompt, a, b):
    del state, prompt
    return self._log_odds(parameters, jnp.stack([a, b]))
