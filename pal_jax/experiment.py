"""Everything a run needs, made of its config: data, features and model."""

import dataclasses

import ml_collections

from pal_jax import data, features, models, parallel, starts, user_solves
from pal_jax import train_step as steps
from pal_jax.adaptation import check_method
from pal_jax.distributed import from_first
from pal_jax.errors import InputError
from pal_jax.structs import FeatureTable


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything a run needs, made from its config alone."""

  config: ml_collections.ConfigDict
  dataset: data.Dataset
  table: FeatureTable
  model: models.IdealPointModel
  objective: steps.Objective
  on_host: bool = False  # whether the table stays there, perhaps on disk


def check_config(config) -> None:
  """Refuses what could only fail later. Raises InputError."""
  parallel.check_mode(config.parallel)
  parallel.check_placement(config.features.placement)
  models.check_config(config.model)
  for field in ('num_steps', 'batch_size', 'log_every', 'checkpoint_every'):
    if config.train[field] < 1:
      raise InputError(
        f'train.{field}={config.train[field]} must be at least 1'
      )
  if config.train.checkpoint_every % config.train.log_every:
    raise InputError(
      f'train.checkpoint_every={config.train.checkpoint_every} must be a '
      f'multiple of train.log_every={config.train.log_every}, so that a '
      'resumed run logs the same means'
    )
  for field, known in (
    ('batching', ('comparisons', 'users')),
    ('select', ('best', 'last')),
  ):
    if config.train[field] not in known:
      raise InputError(
        f'train.{field}={config.train[field]!r} is unknown: expected one of '
        f'{known}'
      )
  if config.train.shard_users and (
    config.parallel != 'jit' or not config.train.sparse_users
  ):
    raise InputError(
      f'train.shard_users=True with parallel={config.parallel!r} and '
      f'train.sparse_users={config.train.sparse_users}: a split user table '
      'needs parallel=jit and train.sparse_users=True'
    )
  if config.train.shard_users and config.train.user_solver != 'adam':
    raise InputError(
      f'train.user_solver={config.train.user_solver!r} solves for all users on '
      'one device: with train.shard_users=True it must be adam'
    )
  starts.check_config(config)
  user_solves.check_config(config)
  check_method(config.adaptation.method)
  if config.adaptation.strength < 0 or config.evaluation.resamples < 1:
    raise InputError(
      f'adaptation.strength={config.adaptation.strength} must be 0 (chosen on '
      'seen users) or positive, and evaluation.resamples='
      f'{config.evaluation.resamples} at least 1'
    )


def create_experiment(config, like: Experiment | None = None) -> Experiment:
  """Data, features and model of a config.

  Args:
    config: from `configs/*.py`.
    like: one with equal data and features, which are then not made again.

  Raises:
    InputError: for everything that can be told without training.
  """
  check_config(config)
  objective = steps.create_objective(config.train, config.model)
  if like is None:
    features.create(config.features)  # a missing path, before data are read
    dataset = data.create(config.data, join_prompt=config.model.name == 'pal_a')
    placement = config.features.placement

    def stays(nbytes: int) -> bool:
      return from_first(lambda: parallel.stays_on_host(placement, nbytes))

    table = features.feature_table(dataset, config.features, stays)
    on_host = stays(table.nbytes)
  else:
    dataset, table, on_host = like.dataset, like.table, like.on_host
  model = models.create(
    config.model,
    num_users=dataset.num_users,
    feature_width=table.items.shape[-1],
    axis_name=parallel.axis_name(config.parallel),
  )
  if config.train.user_solver != 'adam':
    user_solves.check_model(model)
  return Experiment(config, dataset, table, model, objective, on_host)
