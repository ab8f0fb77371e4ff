"""PAL-B: ideal points that depend on the prompt."""

import flax.linen as nn
import jax

from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.models.projectors import Projector


class PalB(IdealPointModel):
  """r_i(x, c) = tau * preference(f(h), u_i(c)), u_i(c) = sum_k w_ik g_k(h_c).

  Responses and prompts are encoded apart. With K = 1 it is an ordinary
  homogeneous reward model. METHOD section 1; arXiv 2406.08469 section 3.
  """

  def setup(self):
    super().setup()
    stacked = nn.vmap(
      Projector,
      in_axes=(None, None, None),
      out_axes=-2,
      axis_size=self.num_prototypes,
      variable_axes={'params': 0, 'batch_stats': 0},
      split_rngs={'params': True, 'dropout': True},
    )
    self.maps = stacked(name='prompt_projectors', **self.projector_fields())

  def basis(self, prompts: jax.Array, train: bool = False, mask=None):
    """g_k(h_c): [..., D] -> [..., K, P]."""
    return self.maps(prompts, train, mask)

  def of_prompt(self, basis: jax.Array, place: jax.Array) -> jax.Array:
    return basis[place]
