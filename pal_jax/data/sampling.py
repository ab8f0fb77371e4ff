"""Drawing simulated users' comparisons from known utilities."""

from collections.abc import Callable

import numpy as np

from pal_jax.data.texts import normalise_text
from pal_jax.errors import InputError
from pal_jax.structs import Comparisons, make_comparisons

MAX_ROUNDS = 200

# (rng, users [n], positions [n] among all that are drawn) -> candidate items
# [n, 2] and prompts [n].
Propose = Callable[
  [np.random.Generator, np.ndarray, np.ndarray],
  tuple[np.ndarray, np.ndarray],
]
# (users [n], items [n, 2], prompts [n]) -> utilities [n, 2].
Utility = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _pair_ids(user, prompt, items) -> np.ndarray:
  """[n] void scalars that compare equal for the same unordered pair."""
  rows = np.stack([user, prompt, items.min(-1), items.max(-1)], -1)
  rows = np.ascontiguousarray(rows.astype(np.int64))
  return rows.view([('', np.int64)] * 4)[:, 0]


def draw_comparisons(
  rng: np.random.Generator,
  users: np.ndarray,
  per_user: int,
  propose: Propose,
  utility: Utility,
  *,
  noise: float = 0.0,
  exclude: tuple[Comparisons, ...] = (),
  what: str = 'comparisons',
) -> Comparisons:
  """Draws comparisons in which the candidate of larger utility wins.

  Exact ties are redrawn, and so are pairs that the same user has had, here or
  in `exclude`, in either order.

  Args:
    rng: of everything random.
    users: [U] rows of the users.
    per_user: N, comparisons of each.
    propose: draws candidates.
    utility: of candidates for users.
    noise: probability that a label is flipped.
    exclude: comparisons of the same users that must not come again.
    what: what is drawn, for the error.

  Returns:
    [U, N] comparisons with labels 0 or 1.

  Raises:
    InputError: if the pool is too small to find enough pairs.
  """
  owner = np.repeat(np.asarray(users, np.int64), per_user)
  items = np.zeros((owner.size, 2), np.int64)
  prompt = np.zeros(owner.size, np.int64)
  label = np.zeros(owner.size, np.float32)
  taken = [
    _pair_ids(c.user, c.prompt, c.items) for c in (e.flatten() for e in exclude)
  ]
  open_rows = np.arange(owner.size)
  for _ in range(MAX_ROUNDS):
    if not open_rows.size:
      break
    pair, asked = propose(rng, owner[open_rows], open_rows)
    value = utility(owner[open_rows], pair, asked)
    ids = _pair_ids(owner[open_rows], asked, pair)
    good = (value[:, 0] != value[:, 1]) & (pair[:, 0] != pair[:, 1])
    for old in taken:
      good &= ~np.isin(ids, old)
    first = np.zeros(ids.size, bool)  # of several equal ones, keep the first
    first[np.unique(ids, return_index=True)[1]] = True
    # A bad proposal must not shadow a good equal one; equal ids are equally
    # good, because goodness depends on the id alone.
    good &= first
    rows = open_rows[good]
    items[rows], prompt[rows] = pair[good], asked[good]
    label[rows] = value[good, 0] > value[good, 1]
    taken.append(ids[good])
    open_rows = open_rows[~good]
  if open_rows.size:
    raise InputError(
      f'{what}: after {MAX_ROUNDS} rounds {open_rows.size} of {owner.size} '
      f'comparisons could not be drawn ({per_user} a user): the pool of items '
      'has too few pairs that differ; ask for fewer comparisons, or give more '
      'statements to the split'
    )
  flip = rng.random(owner.size) < noise
  label = np.where(flip, 1.0 - label, label)
  flat = make_comparisons(owner, items, label, prompt=prompt)
  return Comparisons(
    user=flat.user.reshape(-1, per_user),
    prompt=flat.prompt.reshape(-1, per_user),
    items=flat.items.reshape(-1, per_user, 2),
    label=flat.label.reshape(-1, per_user),
    weight=flat.weight.reshape(-1, per_user),
    mask=flat.mask.reshape(-1, per_user),
  )


def draw_memberships(
  rng: np.random.Generator, num_users: int, num_personas: int, mixture: float
) -> tuple[np.ndarray, np.ndarray | None]:
  """Weights [U, K*] on the simplex, and groups [U] if they are a partition.

  Args:
    rng: of everything random.
    num_users: U.
    num_personas: K*.
    mixture: Dirichlet concentration; 0 gives every user one persona, with
      group sizes that differ by at most one.
  """
  if mixture > 0:
    return rng.dirichlet(np.full(num_personas, mixture), num_users), None
  group = rng.permutation(np.arange(num_users) % num_personas)
  return np.eye(num_personas)[group], group


def split_items(
  rng: np.random.Generator,
  groups: np.ndarray,
  texts: tuple[str, ...],
  validation_fraction: float,
  test_fraction: float,
) -> np.ndarray:
  """Assigns items to 0 train, 1 validation, 2 test, within each group.

  Equal texts get equal splits, whichever groups they stand in. So do texts that
  differ only in case or white space: a test must not ask for what was learnt.

  Args:
    rng: of the permutation.
    groups: [M] int.
    texts: M texts.
    validation_fraction: share of each group.
    test_fraction: share of each group.

  Returns:
    [M] int8.
  """
  if not (
    validation_fraction > 0
    and test_fraction > 0
    and validation_fraction + test_fraction < 1
  ):
    raise InputError(
      f'data.validation_fraction={validation_fraction} and data.test_fraction='
      f'{test_fraction} must be positive and leave a share for training'
    )
  split_of_text: dict[str, int] = {}
  split = np.zeros(len(texts), np.int8)
  for group in np.unique(groups):
    rows = rng.permutation(np.flatnonzero(groups == group))
    num_test = int(round(test_fraction * rows.size))
    num_validation = int(round(validation_fraction * rows.size))
    planned = np.zeros(rows.size, np.int8)
    planned[:num_test] = 2
    planned[num_test : num_test + num_validation] = 1
    for row, choice in zip(rows, planned, strict=True):
      text = normalise_text(texts[row])
      split[row] = split_of_text.setdefault(text, int(choice))
  return split


def draw_splits(
  rng: np.random.Generator, config, draw
) -> dict[str, Comparisons]:
  """The sets of comparisons every simulated dataset has.

  Args:
    rng: of everything random.
    config: the `data` part of a config, with its sizes and noises.
    draw: draw(rng, users, per_user, split, noise=, exclude=, what=) where
      `users` counts seen users from 0 and unseen ones on from there.

  Returns:
    'train', 'validation', 'seen_seen_items', 'seen_unseen_items', 'support',
    'unseen_seen_items', 'unseen_unseen_items', all [users, N].
  """
  seen = np.arange(config.num_seen_users)
  unseen = config.num_seen_users + np.arange(config.num_unseen_users)
  out = {}
  out['train'] = draw(
    rng,
    seen,
    config.comparisons_per_user,
    0,
    noise=config.label_noise,
    what='training comparisons (data.comparisons_per_user)',
  )
  out['validation'] = draw(
    rng,
    seen,
    config.validation_per_user,
    1,
    what='validation comparisons (data.validation_per_user)',
  )
  out['support'] = draw(
    rng,
    unseen,
    config.unseen_support,
    0,
    noise=config.support_noise,
    what='support comparisons of unseen users (data.unseen_support)',
  )
  for name, users, number, shown in (
    ('seen', seen, config.seen_query, out['train']),
    ('unseen', unseen, config.unseen_query, out['support']),
  ):
    for where, split in (('seen_items', 0), ('unseen_items', 2)):
      out[f'{name}_{where}'] = draw(
        rng,
        users,
        number,
        split,
        exclude=(shown,),
        what=f'test comparisons of {name} users, {where} (data.{name}_query)',
      )
  return out


def renumber(comparisons: Comparisons, offset: int) -> Comparisons:
  """Counts users from `offset`."""
  return comparisons.replace(user=comparisons.user - np.int32(offset))


def check_sizes(config) -> None:
  """Refuses counts and probabilities out of range, naming the field.

  Raises:
    InputError: as said.
  """
  for field in (
    'num_personas',
    'num_seen_users',
    'num_unseen_users',
    'comparisons_per_user',
    'validation_per_user',
    'seen_query',
    'unseen_support',
    'unseen_query',
  ):
    if config[field] < 1:
      raise InputError(f'data.{field}={config[field]} must be at least 1')
  for field in ('label_noise', 'support_noise'):
    if not 0.0 <= config[field] < 0.5:
      raise InputError(
        f'data.{field}={config[field]} must lie in [0, 0.5): at one half '
        'labels carry nothing'
      )
  if config.mixture < 0:
    raise InputError(
      f'data.mixture={config.mixture} must be 0 (one persona a user) or a '
      'positive Dirichlet concentration'
    )
  if config.num_personas > config.num_seen_users:
    raise InputError(
      f'data.num_personas={config.num_personas} is larger than '
      f'data.num_seen_users={config.num_seen_users}'
    )
