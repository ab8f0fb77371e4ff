"""`pal`: this library's own models, trained and adapted as `train` does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pal_jax import adaptation, models, parallel
from pal_jax import train_step as steps
from pal_jax.errors import InputError
from pal_jax.evaluate import learn_prior, seen_log_weights
from pal_jax.experiment import Experiment
from pal_jax.methods.base import Method, Pairs, Task, adapt_users
from pal_jax.methods.em import Classes, Em
from pal_jax.structs import FeatureTable, make_comparisons
from pal_jax.sweep import train_runs

STARTS = ('random', 'em')


def _from_classes(model, classes: Classes, task: Task, number: int, params):
  """Parameters that give every class the reward that EM found for it.

  With x = f(h) = h of equal norms, ||x_b - p||^2 - ||x_a - p||^2 is
  2 p . (x_a - x_b): a squared distance to p is a linear reward. Users start at
  their posterior, a little less certain.
  """
  del number
  half = 2.0 if model.preference == 'squared_distance' else 1.0
  params = dict(params) | {'prototypes': classes.v / half}
  if model.user_level:
    return params | {'class_logits': classes.log_share}
  em = Em(num_classes=model.num_prototypes)
  posterior = jnp.exp(adapt_users(em, classes, task.table, task.train))
  softened = 0.9 * posterior + 0.1 / model.num_prototypes
  return params | {'user_logits': jnp.log(softened)}


def _check_start(start: str, model) -> None:
  """Refuses a start that the model cannot take. Raises InputError."""
  if start not in STARTS:
    raise InputError(f'start={start!r} is unknown: expected one of {STARTS}')
  linear = (
    getattr(model, 'point', None) == 'Pw'
    and model.projector == 'identity'
    and model.preference in ('squared_distance', 'inner_product')
  )
  if start == 'em' and not linear:
    raise InputError(
      "start='em' gives linear rewards: it needs model.name=pal_a, model.point="
      'Pw, model.projector=identity, and model.preference=inner_product (or '
      'squared_distance, for features of equal norms)'
    )


@dataclasses.dataclass(frozen=True)
class Pal(Method):
  """PAL-A or PAL-B (arXiv 2406.08469) by an experiment's config.

  Of it, `seed`, `model`, `train`, `optimizer` and `adaptation` count.
  `lore` is one of them: r_i(h) = h^T V softmax(w_i) (LoRe, Bose et al. 2025,
  arXiv 2504.14439) is PAL-A with the inner product, no projector and `Pw`. Its
  new users get the posterior instead of 500 steps of Adam.
  """

  config: ml_collections.FrozenConfigDict
  start: str = 'random'  # of STARTS; 'em': latent classes, linear rewards

  @property
  def join_prompt(self) -> bool:
    return self.config.model.name == 'pal_a'

  def fit(self, task: Task, key: jax.Array):
    width = task.table.items.shape[-1]
    model = self._model(task.num_users, width)
    config = self._config(width)
    config.seed = int(jax.random.randint(key, (), 0, 2**30))
    experiment = Experiment(
      config,
      task.dataset,
      task.table,
      model,
      steps.create_objective(config.train, config.model),
    )
    _check_start(self.start, model)
    start = None
    if self.start == 'em':
      classes = Em(num_classes=model.num_prototypes).fit(task, key)
      start = functools.partial(_from_classes, model, classes, task)
    (selected,) = train_runs([experiment], start=start)
    variables = selected.variables
    placed = adaptation.place(model, variables, task.table)
    prior, _ = learn_prior(
      model, variables, placed, task.dataset, config.adaptation
    )
    return {
      'variables': variables,
      'prior': prior,
      'seen': seen_log_weights(model, variables, placed, task.dataset),
    }

  def _config(self, width: int) -> ml_collections.ConfigDict:
    """With model.width=0 the preference space is as wide as the features."""
    config = ml_collections.ConfigDict(self.config.to_dict())
    config.model.width = config.model.width or width
    return config

  def _model(self, num_users: int, width: int):
    return models.create(
      self._config(width).model,
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
