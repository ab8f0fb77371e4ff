"""Planted simulations: Gaussian prototypes, and the neural-process toy."""

import numpy as np

from pal_jax.data.dataset import Dataset, Truth, check_dataset
from pal_jax.data.sampling import (
  check_sizes,
  draw_comparisons,
  draw_memberships,
  draw_splits,
  renumber,
  split_items,
)
from pal_jax.errors import InputError


def assemble(
  config, rng, features, utility, truth, name, notes, texts=None
) -> Dataset:
  """Draws all splits of uniformly random pairs of items."""
  num_items = len(features)
  names = texts or tuple(f'item {i}' for i in range(num_items))
  split = split_items(
    rng,
    np.zeros(num_items, int),
    names,
    config.validation_fraction,
    config.test_fraction,
  )
  pools = [np.flatnonzero(split == s) for s in range(3)]
  if min(len(pool) for pool in pools) < 2:
    raise InputError(
      f'data.num_items={num_items}: training, validation and test have '
      f'{[len(pool) for pool in pools]} of them, and each needs at least 2; '
      'give more, or change data.validation_fraction and data.test_fraction'
    )

  def draw(rng, users, per_user, split, **kwargs):
    def propose(rng, owners, rows):
      del rows
      pair = rng.choice(pools[split], (owners.size, 2))
      return pair, np.zeros(owners.size, np.int64)

    return draw_comparisons(rng, users, per_user, propose, utility, **kwargs)

  sets = draw_splits(rng, config, draw)
  offset = config.num_seen_users
  return check_dataset(
    Dataset(
      name=name,
      user_ids=tuple(f'seen-{i}' for i in range(config.num_seen_users)),
      unseen_user_ids=tuple(
        f'unseen-{i}' for i in range(config.num_unseen_users)
      ),
      item_names=names,
      item_groups=('item',) * num_items,
      prompt_names=('',),
      item_split=split,
      train=sets['train'].flatten(),
      validation=sets['validation'].flatten(),
      seen={k: sets[f'seen_{k}'] for k in ('seen_items', 'unseen_items')},
      support=renumber(sets['support'], offset),
      unseen={
        k: renumber(sets[f'unseen_{k}'], offset)
        for k in ('seen_items', 'unseen_items')
      },
      truth=truth,
      item_features=features.astype(np.float32),
      prompt_features=np.ones((1, features.shape[1]), np.float32),
      notes=notes,
    )
  )


def create_simulation(config, *, join_prompt: bool = True) -> Dataset:
  """Prototypes and items ~ N(0, I_P); the nearer item wins.

  METHOD section 4. Users hold one prototype, or a Dirichlet mixture of them.

  Args:
    config: `configs.base.simulation_data`.

  Raises:
    InputError: if a size is out of range.
  """
  check_fields(config)
  rng = np.random.default_rng(config.seed)
  prototypes = rng.normal(size=(config.num_personas, config.dimension))
  items = rng.normal(size=(config.num_items, config.dimension))
  items = items.astype(np.float32)
  weights, group = _memberships(rng, config)
  points = weights @ prototypes

  def utility(user, pair, prompt):
    del prompt
    return -np.sum((items[pair] - points[user][:, None]) ** 2, axis=-1)

  truth = Truth(group, weights, prototypes, points)
  kind = (
    f'a Dirichlet({config.mixture:g}) mixture of them'
    if config.mixture
    else 'one of them'
  )
  notes = (
    f'{config.num_personas} prototypes and {config.num_items} items are '
    f'Gaussian in R^{config.dimension}; each user holds {kind}; the item '
    'nearer to the user wins.',
  )
  return assemble(config, rng, items, utility, truth, 'simulation', notes)


def check_fields(config) -> None:
  check_sizes(config)
  for field in ('num_items', 'dimension'):
    if config[field] < 1:
      raise InputError(f'data.{field}={config[field]} must be at least 1')


def _memberships(rng, config):
  """Seen and unseen users apart, so that both hold every persona evenly."""
  parts = [
    draw_memberships(rng, n, config.num_personas, config.mixture)
    for n in (config.num_seen_users, config.num_unseen_users)
  ]
  weights = np.concatenate([w for w, _ in parts])
  group = None if config.mixture else np.concatenate([g for _, g in parts])
  return weights, group


def neural_process_utility(y: np.ndarray, group: np.ndarray) -> np.ndarray:
  """Group 0 likes y if y < .5 else 2y; group 1 y if y < .5 else 1 - y."""
  upper = np.where(group == 0, 2.0 * y, 1.0 - y)
  return np.where(y < 0.5, y, upper)


def neural_process_bayes_accuracy(num_support: int) -> float:
  """Bayes-optimal accuracy after k pairs, 1 - 2^-k / 4 (METHOD section 4).

  The groups disagree on half of all pairs, so k pairs leave the group unknown
  with probability 2^-k, and then half of the disagreements are lost.
  """
  return 1.0 - 0.25 * 2.0**-num_support


def create_neural_process(config, *, join_prompt: bool = True) -> Dataset:
  """Items y ~ U[0, 1] and two groups with known utilities.

  Args:
    config: `configs.base.neural_process_data`; num_personas must be 2.

  Raises:
    InputError: if a size is out of range.
  """
  check_fields(config)
  if config.num_personas != 2 or config.dimension != 1 or config.mixture:
    raise InputError(
      'data.name=neural_process has two groups on one dimension: '
      f'data.num_personas={config.num_personas}, data.dimension='
      f'{config.dimension} and data.mixture={config.mixture} must be 2, 1 and '
      '0.0'
    )
  rng = np.random.default_rng(config.seed)
  y = rng.random((config.num_items, 1)).astype(np.float32)
  weights, group = _memberships(rng, config)

  def utility(user, pair, prompt):
    del prompt
    return neural_process_utility(y[pair, 0], group[user][:, None])

  curve = {
    n: neural_process_bayes_accuracy(n)
    for n in range(config.unseen_support + 1)
  }
  truth = Truth(group, weights, None, None, curve)
  notes = (
    'Items are numbers y in [0, 1]. Group 0 likes y if y < .5 else 2y, group '
    '1 likes y if y < .5 else 1 - y. They disagree on half of all pairs, and '
    'k support pairs reveal the group with probability 1 - 2^-k, so the '
    'Bayes-optimal accuracy is 1 - 2^-k / 4.',
  )
  return assemble(config, rng, y, utility, truth, 'neural_process', notes)
