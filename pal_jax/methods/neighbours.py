"""`neighbours`: a new user is an average of the seen users most like it."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from pal_jax.losses import logistic
from pal_jax.methods.base import Method, Pairs, Parameters, State, Task
from pal_jax.methods.reward_features import RewardFeatures


@flax.struct.dataclass
class Neighbourhood:
  base: Parameters
  states: State  # [U, ...]


@dataclasses.dataclass(frozen=True)
class Neighbours(Method):
  """The mean of seen users' states, weighted by how well they explain a user.

  CoPL (Choi et al. 2025, arXiv 2503.01658) adapts a new user without training
  from the users who answer alike; weights are the softmax over seen users of
  the mean log-likelihood of the support, divided by `temperature`. Of no
  comparisons all are alike.
  """

  base: Method = RewardFeatures()
  temperature: float = 0.07

  def fit(self, task: Task, key: jax.Array) -> Neighbourhood:
    parameters = self.base.fit(task, key)
    return Neighbourhood(parameters, self.base.seen_states(parameters, task))

  def adapt(self, parameters: Neighbourhood, support: Pairs) -> State:
    def explained(state):
      z = jax.vmap(
        lambda prompt, items: self.base.logit(
          parameters.base, state, prompt, items[0], items[1]
        )
      )(support.prompt, support.items)
      each = jnp.where(support.mask, logistic(z, support.label), 0.0)
      return -jnp.sum(each) / jnp.maximum(jnp.sum(support.mask), 1)

    weight = jax.nn.softmax(
      jax.lax.map(explained, parameters.states, batch_size=64)
      / self.temperature
    )
    return jax.tree.map(
      lambda x: jnp.tensordot(weight, x, axes=1), parameters.states
    )

  def logit(self, parameters: Neighbourhood, state, prompt, a, b):
    return self.base.logit(parameters.base, state, prompt, a, b)

  def seen_states(self, parameters: Neighbourhood, task: Task) -> State:
    del task
    return parameters.states
