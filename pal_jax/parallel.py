"""Devices: one pure step, compiled by jit on a mesh or by pmap.

The only file that knows devices: those of all processes, where there are
several. Each has its share of a batch's comparisons, padded to equal numbers,
which masks make harmless, and the distinct texts of that share. State and
table are whole on every device. All processes draw a batch's ids, which are
few bytes and have to agree on the room; each places, and gathers the features
of, the share of its own devices alone.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pal_jax.errors import InputError
from pal_jax.shared_rows import Room, merge_shards, share_shards
from pal_jax.structs import Batch, Comparisons, FeatureTable
from pal_jax.user_rows import ROW_MULTIPLE, is_table

MODES = ('jit', 'pmap')
PLACEMENTS = ('auto', 'device', 'host')
AXIS = 'batch'
# Of the memory that is free, what features may take: models want the rest.
_FEATURES_SHARE = 0.5


def check_mode(mode: str) -> None:
  if mode not in MODES:
    raise InputError(
      f'config.parallel={mode!r} is unknown: expected one of {MODES}'
    )


def axis_name(mode: str) -> str | None:
  """The axis that the step must sum over itself; None under jit."""
  check_mode(mode)
  return AXIS if mode == 'pmap' else None


def num_devices() -> int:
  """Of those that a batch is split over, in all processes."""
  return jax.device_count()


def _all_devices() -> list:
  """Those of a process side by side, so that its share is one piece."""
  return sorted(jax.devices(), key=lambda d: (d.process_index, d.id))


def make_mesh(devices=None) -> Mesh:
  """A one-dimensional mesh, of the devices of all processes by default."""
  devices = _all_devices() if devices is None else devices
  return Mesh(
    np.array(devices),
    (AXIS,),
    # With Explicit axes linen's Embed and Dropout break.
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def _share_of(batch: Batch, devices) -> Batch:
  """The rows of this process's devices, of arrays split over all of them."""
  here = jax.process_index()
  mine = [i for i, device in enumerate(devices) if device.process_index == here]

  def part(x):
    rows = len(x) // len(devices)
    return x[mine[0] * rows : (mine[-1] + 1) * rows]

  return jax.tree.map(part, batch)


def _put(tree, sharding: NamedSharding):
  """This process's part of arrays, numpy, as arrays of all processes."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    tree,
  )


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """run(state, comparisons [B], table, key) -> (state, metrics), in halves."""

  prepare: Callable[[Comparisons], Batch]  # on the host; in any one thread
  step: Callable  # of what was prepared, in the place of the comparisons

  def __call__(self, state, comparisons: Comparisons, table, key):
    return self.step(state, self.prepare(comparisons), table, key)


def _take_features(batch: Batch, source: FeatureTable | None) -> Batch:
  """The features of the batch's rows, if the table is on the host."""
  if source is None:
    return batch
  return batch.replace(
    features=FeatureTable(
      source.items[batch.items], source.prompts[batch.prompts]
    )
  )


def _send(batch: Batch, sharding: NamedSharding) -> Batch:
  """Puts a batch on the devices now, if that is worth more than it costs."""
  if jax.process_count() > 1:
    return _put(batch, sharding)
  if batch.features is None and jax.default_backend() == 'cpu':
    return batch  # the step places its few ids in a tenth of the time
  return jax.device_put(batch, sharding)


def jit_step(
  step: Callable,
  mesh: Mesh,
  room: Room | None = None,
  source: FeatureTable | None = None,
  by_user_row: bool = False,
  split_table_of=None,
) -> CompiledStep:
  """step(state, batch, table, key) with the batch sharded over the mesh.

  The state is given away: its arrays are used for the next one, so that rows
  of a long table are changed where they lie.
  """
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(AXIS))
  held = whole
  if split_table_of is not None:
    held = _split_table(split_table_of, mesh)
  compiled = jax.jit(
    step,
    in_shardings=(held, split, whole, whole),
    out_shardings=(held, whole),
    donate_argnums=0,
  )
  devices = mesh.devices.tolist()

  def prepare(comparisons: Comparisons) -> Batch:
    (shared,) = share_shards([comparisons], len(devices), room, by_user_row)
    # Ids tell the rows of all shards apart, hence first merged, then shared.
    merged = _take_features(_share_of(merge_shards(shared), devices), source)
    return _send(merged, split)

  return CompiledStep(prepare, compiled)


def pmap_step(
  step: Callable,
  devices=None,
  room: Room | None = None,
  source: FeatureTable | None = None,
  by_user_row: bool = False,
) -> CompiledStep:
  """The same by pmap: replicated state in and out, the batch split."""
  devices = _all_devices() if devices is None else devices
  compiled = jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, 0, None, None),
    out_axes=(None, None),
    devices=devices,
  )
  split = NamedSharding(make_mesh(devices), PartitionSpec(AXIS))

  def prepare(comparisons: Comparisons) -> Batch:
    (shared,) = share_shards([comparisons], len(devices), room, by_user_row)
    mine = _take_features(_share_of(shared, devices), source)
    return mine if jax.process_count() > 1 else _send(mine, split)

  return CompiledStep(prepare, compiled)


def compile_step(
  step: Callable,
  mode: str,
  devices=None,
  room: Room | None = None,
  source: FeatureTable | None = None,
  by_user_row: bool = False,
  split_table_of=None,
) -> CompiledStep:
  """`jit_step` on a mesh of the devices, or `pmap_step`.

  Args:
    step: `train_step.bind(...)`.
    mode: of `MODES`.
    devices: those of all processes by default.
    room: for the distinct texts of a device's share, of `measure_room`; by
      default all that it can have.
    source: the table, if it is to stay on the host: batches then bring their
      features along, and the step's table is None.
    by_user_row: whether the step works on the rows of a batch's users alone.
    split_table_of: a state like those that the step will be given, if its user
      table is to be split over the devices; only under jit.

  Returns:
    A step that is given its state, under jit: the arrays of the state before
    cannot be used again.
  """
  check_mode(mode)
  if mode == 'pmap':
    return pmap_step(step, devices, room, source, by_user_row)
  return jit_step(
    step, make_mesh(devices), room, source, by_user_row, split_table_of
  )


def map_users(function: Callable, devices=None) -> tuple[Callable, int]:
  """function(common, users) with the users split over the local devices.

  Users do not meet, so each device runs the whole function on its own; there
  is nothing to combine, nor for other processes to do.

  Args:
    function: of `common`, which every device gets, and `users`, arrays whose
      leading axis is users; it returns arrays with that leading axis.
    devices: the local ones by default.

  Returns:
    The compiled function, and the number that must divide the users.
  """
  mesh = make_mesh(jax.local_devices() if devices is None else devices)
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
    out_specs=PartitionSpec(AXIS),
    # The solver's loop starts from constants, which are not marked as varying
    # over devices.
    check_vma=False,
  )
  return jax.jit(mapped), mesh.devices.size


def _split_table(tree, mesh: Mesh):
  """A tree of shardings: the user table by rows, everything else whole."""
  number = mesh.devices.size
  if ROW_MULTIPLE % number:
    raise InputError(
      f'train.shard_users=True splits {ROW_MULTIPLE} rows evenly, which '
      f'{number} devices cannot have: take a power of two, or set it to False'
    )
  whole = NamedSharding(mesh, PartitionSpec())
  rows = NamedSharding(mesh, PartitionSpec(AXIS))
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rows if is_table(path) else whole, tree
  )


def place_split(tree, devices=None):
  """`place`, with the rows of the user table split over the devices."""
  mesh = make_mesh(devices)
  return jax.tree.map(_put_whole, tree, _split_table(tree, mesh))


def _put_whole(x, sharding: NamedSharding):
  """An array that all processes have, as one of all of them."""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def gather_table(tree, devices=None):
  """What `place_split` split, whole on every device again."""
  whole = NamedSharding(make_mesh(devices), PartitionSpec())
  return jax.jit(_same, out_shardings=whole)(tree)


def _same(tree):  # named, so that it is compiled once
  return tree


def place(tree, mode: str, devices=None):
  """Puts arrays, whole, on the device(s) where the compiled step expects them.

  State that enters off the mesh would cost a second compilation. Every process
  must give the same.
  """
  check_mode(mode)
  return _put(tree, NamedSharding(make_mesh(devices), PartitionSpec()))


def check_placement(placement: str) -> None:
  """Raises InputError if the name is unknown."""
  if placement not in PLACEMENTS:
    raise InputError(
      f'features.placement={placement!r} is unknown: expected one of '
      f'{PLACEMENTS}'
    )


def stays_on_host(placement: str, nbytes: int) -> bool:
  """Whether features are not to be put on the devices, whole on each.

  Args:
    placement: of `PLACEMENTS`; 'auto' puts them there if they take at most
      half of the memory that is free on each.
    nbytes: of the table.
  """
  check_placement(placement)
  if placement != 'auto':
    return placement == 'host'
  return nbytes > _FEATURES_SHARE * min(map(_free_bytes, jax.local_devices()))


def _free_bytes(device) -> float:
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  # A CPU's: devices share the host's, with the array that they get copies of.
  return _free_host_bytes() / (1 + jax.local_device_count())


def _free_host_bytes() -> float:
  try:
    with open('/proc/meminfo', encoding='ascii') as file:
      found = dict(line.split(':', 1) for line in file)
    return 1024.0 * int(found['MemAvailable'].split()[0])
  except (OSError, KeyError):  # not Linux: all of it
    return float(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))


def batches_ahead(on_host: bool) -> int:
  """How many batches a thread had better make ahead, 0 without one.

  Where the CPU takes the steps and has the features, a thread has nothing to
  copy, and takes from the steps the time that it saves.
  """
  return 2 if on_host or jax.default_backend() != 'cpu' else 0


def localize(tree):
  """What `place` put everywhere, as arrays of one device of this process.

  What is then computed concerns no other process.
  """
  return jax.tree.map(lambda x: x.addressable_data(0), tree)


class Vote:
  """Whether any process asks for something, to all of them alike.

  With several processes the answer is that of the call before: by then it is
  there, and nobody waits. Every process must call it at the same steps.
  """

  def __init__(self):
    mesh = make_mesh()
    self._split = NamedSharding(mesh, PartitionSpec(AXIS))
    self._any = jax.jit(
      jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    self._before = False

  def __call__(self, asked: bool) -> bool:
    if jax.process_count() == 1:
      return asked
    before = bool(self._before)
    mine = np.full(jax.local_device_count(), asked)
    self._before = self._any(_put(mine, self._split))
    return before


def fetch(tree):
  """Arrays of a tree as numpy, on the host."""
  return jax.tree.map(np.asarray, jax.device_get(tree))
