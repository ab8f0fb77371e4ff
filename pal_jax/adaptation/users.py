"""A table of adapted users: add, update, forget, look up, save and load.

A user is a string id, the statistics of its comparisons under one frozen
model, and the state fitted to them. Updating refits on all of a user's
comparisons, so that the order in which they came does not matter; nobody else
is touched.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pal_jax.adaptation.adapt import adapt, check_method
from pal_jax.adaptation.posterior import believe
from pal_jax.adaptation.prior import Prior, has_classes
from pal_jax.adaptation.solver import UserState
from pal_jax.adaptation.statistics import Statistics
from pal_jax.errors import InputError
from pal_jax.models.ideal_point_model import IdealPointModel

FORMAT = 'pal_jax users 1'


@flax.struct.dataclass
class Lookup:
  """States of the users asked for; strangers are the population."""

  users: UserState  # [U]
  known: np.ndarray  # [U] bool, False for ids that are not in the table


def power_of_two(size: int) -> int:
  """The smallest that is not less than `size`, at least 1."""
  return 1 << max(size - 1, 0).bit_length()


def _leaves(tree) -> dict[str, np.ndarray]:
  """Arrays of a struct by field name, None left out."""
  return {
    name: np.asarray(value)
    for name, value in vars(tree).items()
    if value is not None
  }


def _form(stats: Statistics, lead: int) -> dict[str, tuple[int, ...]]:
  """Shapes of the statistics of one comparison, below `lead` axes."""
  return {
    f'shared {name}' if name == 'basis' and stats.shared_basis else name: (
      value.shape
      if name == 'basis' and stats.shared_basis
      else value.shape[lead:]
    )
    for name, value in _leaves(stats).items()
  }


def _unpack(arrays, ids, counts) -> tuple[UserState, Statistics]:
  """What a file says of its users; an error of some kind if it does not fit."""

  def named(prefix):
    return {
      name.removeprefix(prefix): value
      for name, value in arrays.items()
      if name.startswith(prefix)
    }

  states = UserState(**named('state_'))
  stats = Statistics(
    **{'delta': None, 'x': None, 'basis': None, **named('stats_')}
  )
  rows = [counts, *_leaves(states).values()]
  pieces = [arrays['label'], stats.x if stats.delta is None else stats.delta]
  if stats.basis is not None and not stats.shared_basis:
    pieces.append(stats.basis)
  if len(set(ids)) < len(ids):
    raise ValueError('an id comes twice')
  if any(len(x) != len(ids) for x in rows) or any(
    len(x) != sum(counts) for x in pieces
  ):
    raise ValueError('its arrays have different lengths')
  return states, stats


class UserTable:
  """Adapted users by id.

  Comparisons are padded to powers of two, and so are the users fitted in one
  call, so that few shapes are ever compiled.

  Args:
    model, variables: the frozen model.
    prior: the population; strangers get it.
    method: of `adapt`.
  """

  def __init__(
    self,
    model: IdealPointModel,
    variables,
    prior: Prior,
    *,
    method: str = 'posterior',
  ):
    check_method(method)
    self._model, self._variables = model, variables
    self._prior, self._method = prior, method
    self._stats: dict[str, Statistics] = {}  # [n, ...] numpy
    self._labels: dict[str, np.ndarray] = {}  # [n]
    self._states: dict[str, UserState] = {}  # without a leading axis, numpy
    self._stranger = self._population()

  def __len__(self) -> int:
    return len(self._states)

  def __contains__(self, user_id: str) -> bool:
    return user_id in self._states

  @property
  def population(self) -> UserState:
    """The state of somebody of whom nothing is known; no leading axis."""
    return self._stranger

  @property
  def ids(self) -> tuple[str, ...]:
    """In the order in which they were added."""
    return tuple(self._states)

  def num_comparisons(self, user_id: str) -> int:
    """Of a user; 0 for a stranger."""
    return len(self._labels.get(user_id, ()))

  def add(
    self,
    user_ids: Iterable[str],
    stats: Statistics,
    label: np.ndarray,
    mask: np.ndarray | None = None,
  ) -> UserState:
    """Adds new users, fitted together.

    Args:
      user_ids: U ids, any strings, none of them in the table.
      stats: [U, N] of their comparisons.
      label: [U, N] in [0, 1].
      mask: [U, N] False for padding; all True by default.

    Returns:
      Their states, [U].

    Raises:
      InputError: if an id is there already or comes twice, a label is out of
        range, or shapes differ. The table is then as it was.
    """
    user_ids = self._check_ids(user_ids)
    there = [i for i in user_ids if i in self._states]
    if there:
      raise InputError(
        f'users {there[:3]!r} are in the table already: use update'
      )
    return self._merge(user_ids, stats, label, mask)

  def update(
    self,
    user_ids: Iterable[str],
    stats: Statistics,
    label: np.ndarray,
    mask: np.ndarray | None = None,
  ) -> UserState:
    """Gives users more comparisons; those not yet there are added.

    The result is that of adding them with all their comparisons at once.
    Arguments, result and errors are those of `add`.
    """
    return self._merge(self._check_ids(user_ids), stats, label, mask)

  def forget(self, user_id: str) -> None:
    """Deletes a user's comparisons and state.

    Raises:
      InputError: if the user is not there.
    """
    if user_id not in self._states:
      raise InputError(f'user {user_id!r} is not in the table')
    for table in (self._stats, self._labels, self._states):
      del table[user_id]

  def lookup(self, user_ids: Iterable[str]) -> Lookup:
    """States by id. A stranger is the population, and `known` says so.

    Raises:
      InputError: if `user_ids` is one string.
    """
    user_ids = self._list_ids(user_ids)
    known = np.array([i in self._states for i in user_ids], bool)
    if not user_ids:
      empty = jax.tree.map(lambda x: x[None][:0], self._stranger)
      return Lookup(empty, known)
    states = [self._states.get(i, self._stranger) for i in user_ids]
    return Lookup(jax.tree.map(lambda *x: np.stack(x), *states), known)

  def _population(self) -> UserState:
    if self._method == 'posterior' or has_classes(self._model):
      users = believe(
        self._prior, jnp.zeros((1, self._prior.log_masses.shape[0]))
      )
      return jax.tree.map(lambda x: np.asarray(x[0]), users)
    zero = np.float32(0.0)
    return UserState(
      log_weights=np.asarray(jax.nn.log_softmax(self._prior.log_weights)),
      objective=zero,
      gap=zero,
      residual=zero,
      iterations=np.int32(0),
      converged=np.bool_(True),
    )

  def _list_ids(self, user_ids) -> list[str]:
    if isinstance(user_ids, str):
      raise InputError(
        f'user_ids={user_ids!r} is one string: give a list of ids'
      )
    return list(user_ids)

  def _check_ids(self, user_ids) -> list[str]:
    user_ids = self._list_ids(user_ids)
    bad = [i for i in user_ids if not isinstance(i, str)]
    if bad:
      raise InputError(
        f'user ids must be strings; {bad[0]!r} is a {type(bad[0]).__name__}'
      )
    twice = sorted(i for i, count in Counter(user_ids).items() if count > 1)
    if twice:
      raise InputError(f'users {twice[:3]!r} come twice in one call')
    return user_ids

  def _merge(self, user_ids, stats, label, mask) -> UserState:
    label = np.asarray(label, np.float32)
    # Numbers would index rows.
    mask = np.ones(label.shape) if mask is None else mask
    mask = np.asarray(mask, bool)
    self._check_arrays(user_ids, stats, label, mask)
    if not user_ids:
      return self.lookup(()).users
    stats = stats.map(np.asarray)
    if stats.shared_basis:
      stats = stats.replace(basis=np.array(stats.basis))  # not the caller's
    all_stats, all_labels = [], []
    for row, user_id in enumerate(user_ids):
      live = mask[row]
      new = stats.map(lambda x, row=row, live=live: x[row][live])
      old = self._stats.get(user_id)
      if old is not None:
        new = jax.tree.map(lambda *x: np.concatenate(x), old, new)
        if stats.shared_basis:
          new = new.replace(basis=old.basis)
      all_stats.append(new)
      before = self._labels.get(user_id, np.zeros(0, np.float32))
      all_labels.append(np.concatenate([before, label[row][live]]))
    users = self._fit(all_stats, all_labels)
    for row, user_id in enumerate(user_ids):
      self._stats[user_id] = all_stats[row]
      self._labels[user_id] = all_labels[row]
      self._states[user_id] = jax.tree.map(lambda x, row=row: x[row], users)
    return users

  def _check_arrays(self, user_ids, stats, label, mask) -> None:
    shape = (len(user_ids), *label.shape[1:])
    if label.ndim != 2 or label.shape != shape or mask.shape != shape:
      raise InputError(
        f'{len(user_ids)} users need label and mask [U, N] with U = '
        f'{len(user_ids)}: they are {label.shape} and {mask.shape}'
      )
    for name, value in _leaves(stats).items():
      if name == 'basis' and stats.shared_basis:
        continue
      if value.shape[:2] != shape:
        raise InputError(
          f'statistics.{name} is {value.shape}; its leading axes must be those '
          f'of the labels, {shape}'
        )
    found, num = _form(stats, 2), self._model.num_prototypes
    if stats.delta is not None and found['delta'] != (num,):
      raise InputError(
        f'statistics.delta is {stats.delta.shape}, but the model has {num} '
        'prototypes'
      )
    first = next(iter(self._stats.values()), None)
    if first is not None and found != _form(first, 1):
      raise InputError(
        f'statistics of a comparison are {found}, but those in the table are '
        f'{_form(first, 1)}: use one model for both'
      )
    bad = mask & ~((label >= 0.0) & (label <= 1.0))
    if bad.any():
      row, column = np.argwhere(bad)[0]
      raise InputError(
        f'user {user_ids[row]!r}, comparison {column}: label '
        f'{label[row, column]} is not in [0, 1]; {bad.sum()} labels are not'
      )

  def _fit(self, all_stats, all_labels) -> UserState:
    """States [U] of users with any numbers of comparisons."""
    count = len(all_labels)
    width = power_of_two(max(1, *(len(label) for label in all_labels)))
    rows = power_of_two(count)

    def pack(arrays):
      first = arrays[0]
      out = np.zeros((rows, width, *first.shape[1:]), first.dtype)
      for row, x in enumerate(arrays):
        out[row, : len(x)] = x
      return out

    first = all_stats[0]
    columns = {
      name: pack([getattr(s, name) for s in all_stats])
      for name in _leaves(first)
      if not (name == 'basis' and first.shared_basis)
    }
    stats = first.replace(**columns)
    mask = np.zeros((rows, width), bool)
    for row, label in enumerate(all_labels):
      mask[row, : len(label)] = True
    users = adapt(
      self._model,
      self._variables,
      stats,
      pack(all_labels),
      mask,
      self._prior,
      method=self._method,
    )
    return jax.tree.map(lambda x: np.asarray(x)[:count], users)

  def save(self, path: str | Path) -> None:
    """Writes an .npz, whole or not at all. Ids are JSON inside it."""
    path = Path(path)
    # Escapes would make one character of two lone surrogates.
    ids = json.dumps(list(self._states), ensure_ascii=False)
    arrays = {
      'format': np.frombuffer(FORMAT.encode(), np.uint8),
      'ids': np.frombuffer(ids.encode('utf-8', 'surrogatepass'), np.uint8),
      'method': np.frombuffer(self._method.encode(), np.uint8),
      'num_comparisons': np.array(
        [len(self._labels[i]) for i in self._states], np.int64
      ),
    }
    if self._states:
      arrays['label'] = np.concatenate(list(self._labels.values()))
      first = next(iter(self._stats.values()))
      for name, value in _leaves(first).items():
        shared = name == 'basis' and first.shared_basis
        arrays[f'stats_{name}'] = (
          value
          if shared
          else np.concatenate([getattr(s, name) for s in self._stats.values()])
        )
      for name in _leaves(next(iter(self._states.values()))):
        arrays[f'state_{name}'] = np.stack(
          [getattr(s, name) for s in self._states.values()]
        )
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
      with temporary.open('wb') as file:
        np.savez(file, **arrays)
      temporary.replace(path)
    finally:
      temporary.unlink(missing_ok=True)

  @classmethod
  def load(
    cls, path: str | Path, model: IdealPointModel, variables, prior: Prior
  ) -> 'UserTable':
    """Reads what `save` wrote, for the same model and prior.

    Raises:
      InputError: if the file is missing, damaged, no table of users, or of a
        model of another shape.
    """
    path = Path(path)
    try:
      with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
      if bytes(arrays['format']).decode() != FORMAT:
        raise ValueError(f'its format is not {FORMAT!r}')
      ids = json.loads(bytes(arrays['ids']).decode('utf-8', 'surrogatepass'))
      method = bytes(arrays['method']).decode()
      counts = arrays['num_comparisons'].tolist()
      if ids:
        states, stats = _unpack(arrays, ids, counts)
    except FileNotFoundError as error:
      raise InputError(f'{path}: no such table of users') from error
    except Exception as error:  # whatever numpy, zip or json make of it
      raise InputError(
        f'{path}: is no intact table of users ({error}); make it again with '
        'UserTable.save'
      ) from error
    table = cls(model, variables, prior, method=method)
    if not ids:
      return table
    stranger = table._stranger
    for name, value in _leaves(stranger).items():
      found = getattr(states, name, None)
      if found is None or found.shape[1:] != value.shape:
        raise InputError(
          f'{path}: {name} has shape {np.shape(found)[1:]} for a user, but '
          f'this model and prior have {value.shape}: load it with the model '
          'and prior it was saved with'
        )
    start = 0
    for row, (user_id, count) in enumerate(zip(ids, counts, strict=True)):
      piece = slice(start, start + count)
      table._stats[user_id] = stats.map(lambda x, piece=piece: x[piece])
      table._labels[user_id] = arrays['label'][piece]
      table._states[user_id] = jax.tree.map(lambda x, row=row: x[row], states)
      start = piece.stop
    return table
