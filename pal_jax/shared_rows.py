"""Each distinct text of a batch once, however many comparisons show it.

Finding them takes the host well under a millisecond; the projector then works
on the distinct rows alone. Arrays have fixed room for them, so that the step
is compiled once: `measure_room` looks at some batches, and a batch that has
more gets room for all that it can have, which is one more compilation. Room is
a function of the data alone, hence the same when a run is resumed.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from pal_jax.data.batching import pad
from pal_jax.structs import Batch, Comparisons

_ROUND = 64  # rows that room is rounded up to
_LOOK = 8  # batches that room is measured on

Room = tuple[int, int]  # distinct candidates and prompts of a shard


def split(comparisons: Comparisons, shards: int) -> Comparisons:
  """[B] -> [shards, B / shards], padded with masked comparisons."""
  count = len(comparisons.label)
  padded = pad(comparisons, -(-count // shards) * shards)
  return jax.tree.map(lambda x: x.reshape((shards, -1, *x.shape[1:])), padded)


def measure_room(
  batchers: Sequence[Callable[[int], Comparisons]], shards: int = 1
) -> Room:
  """What nearly all batches need, from the first ones of each batcher."""
  most = [0, 0]
  for batcher in batchers:
    for step in range(_LOOK):
      parts = split(batcher(step), shards)
      for i in range(shards):
        most[0] = max(most[0], np.unique(parts.items[i]).size)
        most[1] = max(most[1], np.unique(parts.prompt[i]).size)
      size = parts.label.shape[1]
  return tuple(
    min(limit, -(-int(1.1 * number) // _ROUND) * _ROUND)
    for number, limit in zip(most, _limits(size), strict=True)
  )


def _limits(size: int) -> Room:
  """The distinct candidates and prompts that `size` comparisons can have."""
  return 2 * size, size


def _distinct(rows: np.ndarray, mask: np.ndarray):
  """(distinct rows, the place of each, how often it stands unmasked)."""
  found, place = np.unique(rows, return_inverse=True)
  place = place.reshape(rows.shape)
  live = np.broadcast_to(
    mask.reshape(mask.shape + (1,) * (rows.ndim - 1)), rows.shape
  )
  count = np.bincount(place.ravel(), live.ravel(), minlength=found.size)
  return found, place.astype(np.int32), count.astype(np.float32)


def _padded(array: np.ndarray, room: int, dtype) -> np.ndarray:
  out = np.zeros(room, dtype)
  out[: array.size] = array
  return out


def _stack(batches: list[Batch]) -> Batch:
  if len(batches) == 1:  # a view, in a fifth of the time
    return jax.tree.map(lambda x: x[None], batches[0])
  return jax.tree.map(lambda *x: np.stack(x), *batches)


_NOBODY = np.iinfo(np.int32).max  # past every user table


def _share_users(comparisons: Comparisons):
  """[...] with places for users, and the distinct users [...], filled up.

  Of the whole batch: a user on two devices is one row, which both change.
  """
  shape = comparisons.user.shape
  found, place = np.unique(comparisons.user, return_inverse=True)
  users = np.full(comparisons.user.size, _NOBODY, np.int32)
  users[: found.size] = found
  place = place.astype(np.int32).reshape(shape)
  return comparisons.replace(user=place), users.reshape(shape)


def share_shards(
  batches: Sequence[Comparisons],
  shards: int = 1,
  room: Room | None = None,
  by_user_row: bool = False,
) -> list[Batch]:
  """Comparisons [B] -> `Batch`es [shards, ...], all of the same shapes.

  Args:
    batches: of equal numbers of comparisons.
    shards: parts of equal size, each of which has rows of its own.
    room: of `measure_room`; by default all that a shard can have.
    by_user_row: whether a step works on the rows of the batch's users alone.
      The shards of a batch have them all between them.
  """
  parts = [split(batch, shards) for batch in batches]
  users = [None] * (len(parts) * shards)
  if by_user_row:
    shared = [_share_users(part) for part in parts]
    parts = [part for part, _ in shared]
    users = [row for _, rows in shared for row in rows]
  parts = [part[i] for part in parts for i in range(shards)]
  found = [
    (_distinct(part.items, part.mask), _distinct(part.prompt, part.mask))
    for part in parts
  ]
  limits = _limits(parts[0].label.size)
  room = tuple(
    given if all(each[i][0].size <= given for each in found) else limit
    for i, (given, limit) in enumerate(zip(room or limits, limits, strict=True))
  )
  shared = [
    Batch(
      part.replace(items=items[1], prompt=prompts[1]),
      _padded(items[0], room[0], np.int32),
      _padded(items[2], room[0], np.float32),
      _padded(prompts[0], room[1], np.int32),
      _padded(prompts[2], room[1], np.float32),
      mine,
    )
    for part, (items, prompts), mine in zip(parts, found, users, strict=True)
  ]
  return [_stack(shared[i : i + shards]) for i in range(0, len(shared), shards)]


def merge_shards(batch: Batch) -> Batch:
  """[shards, ...] -> one batch, whose ids tell the shards' rows apart."""
  shards = batch.items.shape[0]
  first = np.arange(shards, dtype=np.int32)[:, None]
  comparisons = batch.comparisons
  comparisons = comparisons.replace(
    items=comparisons.items + (first * batch.items.shape[1])[..., None],
    prompt=comparisons.prompt + first * batch.prompts.shape[1],
  )
  return jax.tree.map(
    lambda x: x.reshape((-1, *x.shape[2:])),
    batch.replace(comparisons=comparisons),
  )


def share_rows(comparisons: Comparisons) -> Batch:
  """One batch on one device, with room for all that it can have."""
  return merge_shards(share_shards([comparisons])[0])
