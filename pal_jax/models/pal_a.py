"""PAL-A: fixed ideal points mixed from K prototypes."""

import jax
import jax.numpy as jnp

from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.numerics import normalize

POINTS = ('Pw', 'f(P)w', 'f(Pw)', '|f(P)|w')


def unit_rows(key, shape, dtype=jnp.float32):
  """Gaussian rows scaled to norm 1, the reference's initialisation."""
  return normalize(jax.random.normal(key, shape, dtype))


class PalA(IdealPointModel):
  """r_i(x) = tau * preference(f(h), u_i), u_i from w_i and prototypes p_k.

  | point     | u_i                             | p_k in |
  |-----------|---------------------------------|--------|
  | `Pw`      | sum_k w_ik p_k                  | R^P    |
  | `f(P)w`   | sum_k w_ik f(p_k)               | R^D    |
  | `f(Pw)`   | f(sum_k w_ik p_k)               | R^D    |
  | `|f(P)|w` | sum_k w_ik f(p_k) / ||f(p_k)||  | R^D    |

  METHOD section 1; arXiv 2406.08469 section 3.
  """

  point: str = 'f(Pw)'
  feature_width: int = 384  # D, where the prototypes of the last three live

  def setup(self):
    super().setup()
    width = self.width if self.point == 'Pw' else self.feature_width
    self.prototypes = self.param(
      'prototypes', unit_rows, (self.num_prototypes, width)
    )

  def _place(self, p, train):
    # The prototypes are no sample of the data: batch norm places them with
    # its running statistics, and dropout applies to candidates only.
    del train
    return self.embedder(p, False)

  def basis(self, prompts=None, train: bool = False, mask=None):
    """[K, P], or [K, D] for `f(Pw)`; the prompt has no part in it."""
    del prompts, mask
    if self.point in ('f(P)w', '|f(P)|w'):
      placed = self._place(self.prototypes, train)
      return normalize(placed) if self.point == '|f(P)|w' else placed
    return self.prototypes

  def of_prompt(self, basis, place):
    del place
    return basis

  def finish(self, mixed, train: bool = False):
    return self._place(mixed, train) if self.point == 'f(Pw)' else mixed
