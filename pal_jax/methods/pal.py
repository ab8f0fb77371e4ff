"""`pal`: this library's own models, trained and adapted as `train` does."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pal_jax import adaptation, models, parallel
from pal_jax import train_step as steps
from pal_jax.evaluate import learn_prior, seen_log_weights
from pal_jax.methods.base import Method, Pairs, Task
from pal_jax.structs import FeatureTable, make_comparisons
from pal_jax.sweep import train_seeds, with_seed
from pal_jax.train import Experiment, variables_of


@dataclasses.dataclass(frozen=True)
class Pal(Method):
  """PAL-A or PAL-B (arXiv 2406.08469) by an experiment's config.

  `lore` is one of them: r_i(h) = h^T V softmax(w_i) (LoRe, Bose et al. 2025,
  arXiv 2504.14439) is PAL-A with the inner product, no projector and `Pw`. Its
  new users are fitted by the certified solver instead of 500 steps of Adam.
  """

  config: ml_collections.FrozenConfigDict

  def fit(self, task: Task, key: jax.Array):
    seed = int(jax.random.randint(key, (), 0, 2**30))
    config = with_seed(ml_collections.ConfigDict(self.config), seed)
    width = task.table.items.shape[-1]
    model = self._model(task.num_users, width)
    experiment = Experiment(
      config,
      task.dataset,
      task.table,
      model,
      steps.create_objective(config.train, config.model),
    )
    (state,) = train_seeds([experiment])
    variables = variables_of(state)
    placed = adaptation.place(model, variables, task.table)
    prior, _ = learn_prior(
      model, variables, placed, task.dataset, config.adaptation
    )
    return {
      'variables': variables,
      'prior': prior,
      'seen': seen_log_weights(model, variables, placed, task.dataset),
    }

  def _model(self, num_users: int, width: int):
    return models.create(
      ml_collections.ConfigDict(self.config).model,
      num_users=num_users,
      feature_width=width,
      axis_name=parallel.axis_name('jit'),
    )

  def _statistics(self, parameters, model, prompt, items):
    """Statistics [1, N] of prompts [N, D] and candidates [N, 2, D]."""
    count = items.shape[0]
    placed = adaptation.place(
      model,
      parameters['variables'],
      FeatureTable(items.reshape(2 * count, -1), prompt),
    )
    rows = np.arange(count)
    comparisons = make_comparisons(
      0, 2 * rows[:, None] + np.arange(2), np.full(count, 0.5), prompt=rows
    )
    return adaptation.statistics(
      model,
      parameters['variables'],
      placed,
      jax.tree.map(lambda x: jnp.asarray(x)[None], comparisons),
      model.adaptation_rule,
    )

  def adapt(self, parameters, support: Pairs) -> adaptation.UserState:
    model = self._model(len(parameters['seen']), support.items.shape[-1])
    stats = self._statistics(parameters, model, support.prompt, support.items)
    users = adaptation.adapt(
      model,
      parameters['variables'],
      stats,
      support.label[None],
      support.mask[None],
      parameters['prior'],
      method=self.config.adaptation.method,
      max_iterations=self.config.adaptation.max_iterations,
      tolerance=self.config.adaptation.tolerance,
    )
    return jax.tree.map(lambda x: x[0], users)

  def logit(self, parameters, state, prompt, a, b):
    model = self._model(len(parameters['seen']), a.shape[-1])
    stats = self._statistics(
      parameters, model, prompt[None], jnp.stack([a, b])[None]
    )
    return adaptation.predict_users(
      model,
      parameters['variables'],
      jax.tree.map(lambda x: x[None], state),
      stats,
      parameters['prior'],
    )[0, 0]
