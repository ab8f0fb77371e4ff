"""One interface for every family of personal reward models.

A method is a frozen dataclass of hyper-parameters, hence a static argument of
jit. It learns parameters from seen users, a state from a user's few
comparisons, and gives log odds. `adapt` and `logit` are of one user and one
comparison, pure and masked, so that they can be vmapped.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pal_jax.data import Dataset, Truth
from pal_jax.evaluate import group_by_user
from pal_jax.structs import Comparisons, FeatureTable

Parameters = Any  # a tree of arrays
State = Any  # a tree of arrays, of one user
CHUNK = 64  # users whose features are gathered at a time


@flax.struct.dataclass
class Pairs:
  """Comparisons as features; leading axes [...], [N] for one user."""

  prompt: jax.Array  # [..., D]
  items: jax.Array  # [..., 2, D]
  label: jax.Array  # [...] in [0, 1]
  mask: jax.Array  # [...] bool

  @property
  def difference(self) -> jax.Array:
    """h_a - h_b, [..., D]; 0 where masked."""
    each = self.items[..., 0, :] - self.items[..., 1, :]
    return jnp.where(self.mask[..., None], each, 0.0)


@dataclasses.dataclass(frozen=True)
class Task:
  """What a method may learn from: seen users, split by item.

  `validation` is for early stopping and for the choice of what has no other
  rule; hyper-parameters are chosen outside, on validation users.
  """

  dataset: Dataset  # without its unseen users, its test sets and its truth
  table: FeatureTable  # items [M, D] and prompts [Q, D], float32
  train: Comparisons  # [U, N]
  validation: Comparisons  # [U, N']

  @property
  def num_users(self) -> int:
    return self.train.label.shape[0]


def make_task(dataset: Dataset, table: FeatureTable) -> Task:
  """Groups a dataset's comparisons by user; nothing unseen is in it."""
  dataset = dataclasses.replace(
    dataset,
    unseen_user_ids=(),
    seen={},
    support=dataset.train[:0],
    unseen={},
    truth=Truth(),
  )
  train, validation = (
    jax.tree.map(jnp.asarray, group_by_user(c, dataset.num_users))
    for c in (dataset.train, dataset.validation)
  )
  table = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), table)
  return Task(dataset, table, train, validation)


def gather(table: FeatureTable, comparisons: Comparisons) -> Pairs:
  """Features of comparisons [...]; padding may point anywhere."""
  return Pairs(
    table.prompts[comparisons.prompt],
    table.items[comparisons.items],
    jnp.where(comparisons.mask, comparisons.label, 0.5),
    comparisons.mask,
  )


def over_users(function, users):
  """`function` of one user, over trees [U, ...], some users at a time."""
  return jax.lax.map(function, users, batch_size=CHUNK)


@dataclasses.dataclass(frozen=True)
class Method:
  """Base of all methods."""

  @property
  def join_prompt(self) -> bool:
    """Whether a candidate is encoded together with its prompt."""
    return True

  def view(self, dataset: Dataset, table: FeatureTable) -> FeatureTable:
    """What the method sees of items and prompts, in the place of `table`."""
    del dataset
    return table

  def fit(self, task: Task, key: jax.Array) -> Parameters:
    """Learns from seen users; deterministic in the key."""
    raise NotImplementedError

  def adapt(self, parameters: Parameters, support: Pairs) -> State:
    """The state of one user with comparisons [N], any number of them masked.

    A method that does not override this has one score for everybody.
    """
    del parameters, support
    return jnp.zeros(())

  def logit(
    self,
    parameters: Parameters,
    state: State,
    prompt: jax.Array,
    a: jax.Array,
    b: jax.Array,
  ) -> jax.Array:
    """Log odds () that the user prefers a to b; features [D] each."""
    raise NotImplementedError

  def seen_states(self, parameters: Parameters, task: Task) -> State:
    """[U] states of the users trained on: adapted to all they answered."""
    return adapt_users(self, parameters, task.table, task.train)


@functools.partial(jax.jit, static_argnums=0)
def adapt_users(
  method: Method,
  parameters: Parameters,
  table: FeatureTable,
  support: Comparisons,
) -> State:
  """States [U] from comparisons [U, N]."""
  return over_users(
    lambda c: method.adapt(parameters, gather(table, c)),
    jax.tree.map(jnp.asarray, support),
  )


@functools.partial(jax.jit, static_argnums=0)
def predict_users(
  method: Method,
  parameters: Parameters,
  states: State,
  table: FeatureTable,
  queries: Comparisons,
) -> jax.Array:
  """Log odds [U, N] of each user's own comparisons."""

  def one(args):
    state, comparisons = args
    pairs = gather(table, comparisons)
    return jax.vmap(
      lambda prompt, items: method.logit(
        parameters, state, prompt, items[0], items[1]
      )
    )(pairs.prompt, pairs.items)

  return over_users(one, (states, jax.tree.map(jnp.asarray, queries)))


def flat_rows(comparisons: Comparisons) -> Comparisons:
  """[U, N] -> [R], padding left out; not inside jit."""
  flat = jax.tree.map(np.asarray, comparisons).flatten()
  return jax.tree.map(jnp.asarray, flat[np.flatnonzero(flat.mask)])
