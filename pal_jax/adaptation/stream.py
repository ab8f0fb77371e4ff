"""Millions of users: from arrays on disk to arrays on disk, in chunks.

Memory holds two chunks and the item table, whatever the number of users. Each
chunk is split over the local devices.
"""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pal_jax import parallel
from pal_jax.adaptation.adapt import adapt, check_method
from pal_jax.adaptation.prior import Prior
from pal_jax.adaptation.statistics import (
  Placed,
  Statistics,
  reward_table,
  statistics,
)
from pal_jax.errors import InputError
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.structs import Comparisons

CHUNK = 65536
# What is written for each user; a belief only if asked for.
OUTPUTS = (
  'log_weights',
  'objective',
  'gap',
  'residual',
  'iterations',
  'converged',
)


@dataclasses.dataclass(frozen=True)
class Support:
  """Users' comparisons, arrays or memory maps with users first."""

  items: np.ndarray  # [U, N, 2] integers, rows of the item table
  label: np.ndarray  # [U, N] in [0, 1], any number type
  count: np.ndarray | None = None  # [U] comparisons of each user; None: all N
  prompt: np.ndarray | None = None  # [U, N] rows of the prompt table


@dataclasses.dataclass(frozen=True)
class StreamSummary:
  """What a person wants to know of a finished stream."""

  users: int
  not_converged: int
  largest_relative_gap: float
  largest_residual: float
  mean_iterations: float


def _check(support: Support, num_prompts: int | None, chunk: int) -> None:
  shape = support.label.shape
  if len(shape) != 2 or support.items.shape != (*shape, 2):
    raise InputError(
      f'items are {support.items.shape} and labels {shape}: expected [U, N, 2] '
      'and [U, N]'
    )
  for name, wanted in (('count', shape[:1]), ('prompt', shape)):
    value = getattr(support, name)
    if value is not None and value.shape != wanted:
      raise InputError(f'{name} is {value.shape}, expected {wanted}')
  if chunk < 1:
    raise InputError(f'chunk={chunk} must be at least 1')
  if (num_prompts or 1) > 1 and support.prompt is None:
    raise InputError('the model has prompts: give their rows, prompt [U, N]')


def _read(support: Support, rows: slice, limits) -> dict[str, np.ndarray]:
  """One chunk, checked, in the types that the device wants."""
  items = np.asarray(support.items[rows])
  label = np.asarray(support.label[rows], np.float32)
  width = label.shape[1]
  if support.count is None:
    mask = np.ones(label.shape, bool)
  else:
    count = np.asarray(support.count[rows])
    bad = ~((count >= 0) & (count <= width))
    if bad.any():
      row = int(np.argmax(bad))
      raise InputError(
        f'user {rows.start + row}: count {count[row]}, expected 0 to {width}'
      )
    mask = np.arange(width) < count[:, None]
  ids = {'items': (items, limits[0], mask[..., None])}
  prompt = np.zeros(label.shape, np.int32)
  # A model without prompts has no use for their rows.
  if support.prompt is not None and limits[1] is not None:
    prompt = np.asarray(support.prompt[rows])
    ids['prompt'] = (prompt, limits[1], mask)
  for name, (values, limit, live) in ids.items():
    bad = live & ((values < 0) | (values >= limit))
    if bad.any():
      row = int(np.argwhere(bad)[0][0])
      raise InputError(
        f'user {rows.start + row}: {name} {values[row].tolist()} has a row '
        f'outside 0 to {limit - 1}'
      )
  bad = mask & ~((label >= 0.0) & (label <= 1.0))
  if bad.any():
    row, column = np.argwhere(bad)[0]
    raise InputError(
      f'user {rows.start + row}, comparison {column}: label '
      f'{label[row, column]} is not in [0, 1]'
    )
  # Only now: a row beyond 32 bits would wrap around to another one.
  return {
    'items': items.astype(np.int32),
    'prompt': prompt.astype(np.int32),
    'label': label,
    'mask': mask,
  }


def compile_stream(
  model: IdealPointModel,
  variables,
  placed: Placed,
  prior: Prior,
  *,
  method: str = 'map',
  max_iterations: int = 500,
  tolerance: float = 1e-5,
  keep_belief: bool = False,
):
  """The compiled call of a stream: a chunk of comparisons -> UserState.

  Returns:
    A function of `{'items': [U, N, 2], 'prompt', 'label', 'mask': [U, N]}`,
    and the number that must divide U.
  """
  check_method(method)
  rule = model.adaptation_rule
  rewards = reward_table(model, variables, placed, rule)
  # With a reward table the placed items have no further use.
  common = {
    'variables': variables,
    'prior': prior,
    'rewards': rewards,
    'placed': placed if rewards is None else None,
  }

  def fit(common, users):
    if common['rewards'] is not None:
      items = users['items']
      table = common['rewards']
      delta = table[items[..., 0]] - table[items[..., 1]]
      stats = Statistics(delta, None, None)
    else:
      zeros = jnp.zeros_like(users['label'])
      comparisons = Comparisons(
        user=zeros.astype(jnp.int32),
        prompt=users['prompt'],
        items=users['items'],
        label=users['label'],
        weight=zeros,
        mask=users['mask'],
      )
      stats = statistics(
        model, common['variables'], common['placed'], comparisons, rule
      )
    state = adapt(
      model,
      common['variables'],
      stats,
      users['label'],
      users['mask'],
      common['prior'],
      method=method,
      max_iterations=max_iterations,
      tolerance=tolerance,
    )
    return state if keep_belief else state.replace(log_belief=None)

  compiled, multiple = parallel.map_users(fit)
  return lambda users: compiled(common, users), multiple


def adapt_stream(
  model: IdealPointModel,
  variables,
  placed: Placed,
  support: Support,
  prior: Prior,
  folder: str | Path,
  *,
  method: str = 'map',
  chunk: int = CHUNK,
  max_iterations: int = 500,
  tolerance: float = 1e-5,
  keep_belief: bool = False,
  progress: bool = True,
) -> StreamSummary:
  """Adapts all users of `support` and writes one .npy for each output.

  Args:
    model, variables, placed: the frozen model over the item table.
    support: arrays or memory maps (`np.load(..., mmap_mode='r')`).
    prior: the population.
    folder: new; it appears when everything in it is complete. Holds
      log_weights.npy [U, K] and objective, gap, residual, iterations and
      converged [U]; `UserState` says what they are.
    method, max_iterations, tolerance: of `adapt`. 'map' by default: K floats
      a user.
    chunk: users in one compiled call, rounded up to the number of devices.
    keep_belief: whether to write log_belief.npy [U, M] of 'posterior'.
    progress: whether to draw a bar.

  Returns:
    StreamSummary; users that did not converge are counted there and flagged
    in converged.npy.

  Raises:
    InputError: if shapes, ids or labels are wrong, naming the user, or if the
      folder exists. Nothing is left behind then.
  """
  num_prompts = placed.basis.shape[0] if placed.basis.ndim == 3 else None
  limits = placed.x.shape[0], num_prompts
  _check(support, num_prompts, chunk)
  folder = Path(folder).absolute()
  if folder.exists():
    raise InputError(f'{folder} exists: name a new folder')
  run, multiple = compile_stream(
    model,
    variables,
    placed,
    prior,
    method=method,
    max_iterations=max_iterations,
    tolerance=tolerance,
    keep_belief=keep_belief,
  )
  num_users = support.label.shape[0]
  chunk = -(-min(chunk, max(num_users, 1)) // multiple) * multiple
  temporary = folder.with_name(f'.{folder.name}.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    writer = _Writer(temporary, num_users)
    pending = None
    with tqdm(
      total=num_users, unit='user', unit_scale=True, disable=not progress
    ) as bar:
      for start in range(0, max(num_users, 1), chunk):
        rows = slice(start, min(start + chunk, num_users))
        users = _read(support, rows, limits)
        # One shape, hence one compilation: the last chunk is padded with
        # users who have no comparisons.
        missing = chunk - (rows.stop - rows.start)
        users = {
          k: np.pad(v, ((0, missing),) + ((0, 0),) * (v.ndim - 1))
          for k, v in users.items()
        }
        state = run(users)
        # The device works on this chunk while the one before is written and
        # the next is read.
        if pending is not None:
          bar.update(writer.write(*pending))
        pending = rows, state
      bar.update(writer.write(*pending))
    summary = writer.close()
    temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return summary


class _Writer:
  """Memory-mapped outputs and running totals."""

  def __init__(self, folder: Path, num_users: int):
    self._folder, self._num_users = folder, num_users
    self._maps = {}
    self._not_converged = self._iterations = 0
    self._gap = self._residual = 0.0

  def write(self, rows: slice, state) -> int:
    count = rows.stop - rows.start
    names = OUTPUTS
    if state.log_belief is not None:
      names = (*names, 'log_belief')
    values = {n: np.asarray(getattr(state, n))[:count] for n in names}
    for name, value in values.items():
      if name not in self._maps:
        self._maps[name] = np.lib.format.open_memmap(
          self._folder / f'{name}.npy',
          'w+',
          value.dtype,
          (self._num_users, *value.shape[1:]),
        )
      self._maps[name][rows] = value
    if count:
      relative = values['gap'] / np.maximum(1.0, np.abs(values['objective']))
      self._not_converged += int(np.sum(~values['converged']))
      self._iterations += int(values['iterations'].sum(dtype=np.int64))
      self._gap = max(self._gap, float(relative.max()))
      self._residual = max(self._residual, float(values['residual'].max()))
    return count

  def close(self) -> StreamSummary:
    for array in self._maps.values():
      array.flush()
    self._maps.clear()
    return StreamSummary(
      users=self._num_users,
      not_converged=self._not_converged,
      largest_relative_gap=self._gap,
      largest_residual=self._residual,
      mean_iterations=self._iterations / max(self._num_users, 1),
    )
