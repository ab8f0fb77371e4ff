"""`per_user`: a linear reward of one's own, shrunk to the population's."""

import dataclasses

import flax.struct
import jax

from pal_jax.methods.base import Method, Pairs, Task, gather
from pal_jax.methods.homogeneous import fit_linear
from pal_jax.methods.newton import choose_scale, fit_gaussian

SCALES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


@flax.struct.dataclass
class Population:
  v: jax.Array  # [D]
  scale: jax.Array  # () standard deviation of a user's v_i from v


@dataclasses.dataclass(frozen=True)
class PerUser(Method):
  """r_i(h) = v_i . h with v_i ~ N(v, s^2 I).

  v is the linear Bradley-Terry model's; s maximises the marginal likelihood of
  the seen users' comparisons (Laplace). A hierarchical Bayesian conjoint model
  (Allenby and Rossi 1999) with an isotropic covariance.
  """

  def fit(self, task: Task, key: jax.Array) -> Population:
    del key
    v = fit_linear(task)
    pairs = gather(task.table, task.train)
    scale, _ = choose_scale(
      pairs.difference, pairs.difference @ v, pairs.label, pairs.mask, SCALES
    )
    return Population(v, jax.numpy.float32(scale))

  def adapt(self, parameters: Population, support: Pairs) -> jax.Array:
    x = support.difference
    fit = fit_gaussian(
      x, x @ parameters.v, support.label, support.mask, parameters.scale
    )
    return parameters.v + fit.v

  def logit(self, parameters, state, prompt, a, b):
    del parameters, prompt
    return (a - b) @ state
