"""Planted people for whom it is known which family of methods fits them."""

import numpy as np

from pal_jax.data.dataset import Dataset, Truth
from pal_jax.data.simulation import assemble, check_fields
from pal_jax.errors import InputError


def create_low_rank(config, *, join_prompt: bool = True) -> Dataset:
  """Linear rewards u_i(x) = (m + s A z_i) . x, z_i ~ N(0, I_r).

  A has r orthonormal columns: what people differ in is r-dimensional and
  unbounded, as reward features assume. With s = 0 all people are one. Gumbel
  noise of scale 1 on each utility makes answers Bradley-Terry's: a is chosen
  with probability sigma(u(a) - u(b)) (Luce and Suppes 1965).

  Args:
    config: `configs.base.low_rank_data`.

  Raises:
    InputError: if a size is out of range.
  """
  check_fields(config)
  if not 1 <= config.rank <= config.dimension or config.spread < 0:
    raise InputError(
      f'data.rank={config.rank} must lie between 1 and data.dimension='
      f'{config.dimension}, and data.spread={config.spread} must not be '
      'negative'
    )
  if config.choice_noise < 0:
    raise InputError(
      f'data.choice_noise={config.choice_noise} must be 0 (the better one '
      'always wins) or a positive scale'
    )
  rng = np.random.default_rng(config.seed)
  size = (config.num_items, config.dimension)
  items = rng.normal(size=size).astype(np.float32)
  mean = rng.normal(size=config.dimension)
  mean /= np.linalg.norm(mean)
  axes, _ = np.linalg.qr(rng.normal(size=(config.dimension, config.rank)))
  people = config.num_seen_users + config.num_unseen_users
  z = rng.normal(size=(people, config.rank))
  directions = mean + config.spread * z @ axes.T

  def utility(user, pair, prompt):
    del prompt
    value = np.einsum('ncd,nd->nc', items[pair], directions[user])
    if config.choice_noise:
      value += rng.gumbel(scale=config.choice_noise, size=value.shape)
    return value

  own = (
    f' and, with a standard deviation of {config.spread:g}, {config.rank} '
    'directions of their own'
    if config.spread
    else ''
  )
  notes = (f'Rewards are linear: one direction for everybody{own}.',)
  if config.choice_noise:
    notes += (
      'All answers, those of the tests too, are drawn with Gumbel noise of '
      f'scale {config.choice_noise:g} on each reward.',
    )
  return assemble(config, rng, items, utility, Truth(), 'low_rank', notes)


def create_length(config, *, join_prompt: bool = True) -> Dataset:
  """Texts of which most people want the longer one and some the shorter.

  The labels of the Reddit TL;DR variant of arXiv 2406.08469 without its texts
  (METHOD section 4): the first feature is the logarithm of the length, the
  others are noise. One score for everybody gets at most the majority's share.

  Args:
    config: `configs.base.length_data`.

  Raises:
    InputError: if a size is out of range.
  """
  check_fields(config)
  if not 0.0 <= config.short_share <= 0.5 or config.dimension < 2:
    raise InputError(
      f'data.short_share={config.short_share} must lie in [0, 0.5] and '
      f'data.dimension={config.dimension} be at least 2'
    )
  rng = np.random.default_rng(config.seed)
  words = np.exp(rng.normal(3.0, 0.5, config.num_items)).astype(int) + 1
  texts = tuple(
    f'{i} ' + ' '.join(['word'] * n) for i, n in enumerate(words.tolist())
  )
  length = np.array([len(text) for text in texts])
  items = rng.normal(size=(config.num_items, config.dimension))
  log = np.log(length)
  items[:, 0] = (log - log.mean()) / log.std()
  sizes = (config.num_seen_users, config.num_unseen_users)
  group = np.concatenate([_shares(rng, n, config.short_share) for n in sizes])

  def utility(user, pair, prompt):
    del prompt
    return length[pair] * np.where(group[user] == 1, -1, 1)[:, None]

  weights = np.eye(2)[group]
  notes = (
    f'{np.mean(group == 1):.3f} of the people want the shorter text, the '
    'others the longer one.',
  )
  return assemble(
    config,
    rng,
    items.astype(np.float32),
    utility,
    Truth(group, weights),
    'length',
    notes,
    texts,
  )


def _shares(rng, size: int, share: float) -> np.ndarray:
  """[size] int, 1 for a share of them, in random order."""
  return rng.permutation((np.arange(size) < round(share * size)).astype(int))
