"""Devices: one pure step, compiled by jit on a mesh or by pmap.

The only file that knows devices: those of all processes, where there are
several. Each has its share of a batch's comparisons, padded to equal numbers,
which masks make harmless, and the distinct texts of that share. State and
table are whole on every device. All processes draw a batch's ids, which are
few bytes and have to agree on the room; each places, and gathers the features
of, the share of its own devices alone.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pal_jax.errors import InputError
from pal_jax.shared_rows import Room, merge_shards, share_shards
from pal_jax.structs import Batch, Comparisons

MODES = ('jit', 'pmap')
AXIS = 'batch'


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


def jit_step(step: Callable, mesh: Mesh, room: Room | None = None) -> Callable:
  """step(state, batch, table, key) with the batch sharded over the mesh."""
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(AXIS))
  compiled = jax.jit(
    step,
    in_shardings=(whole, split, whole, whole),
    out_shardings=(whole, whole),
  )
  devices = mesh.devices.tolist()

  @functools.wraps(compiled)
  def run(state, batch: Comparisons, table, key):
    (shared,) = share_shards([batch], len(devices), room)
    # Ids tell the rows of all shards apart, hence first merged, then shared.
    merged = merge_shards(shared)
    if jax.process_count() > 1:  # alone jit places them, in a tenth of the time
      merged = _put(_share_of(merged, devices), split)
    return compiled(state, merged, table, key)

  return run


def pmap_step(
  step: Callable, devices=None, room: Room | None = None
) -> Callable:
  """The same by pmap: replicated state in and out, the batch split."""
  devices = _all_devices() if devices is None else devices
  compiled = jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, 0, None, None),
    out_axes=(None, None),
    devices=devices,
  )

  def run(state, batch: Comparisons, table, key):
    (shared,) = share_shards([batch], len(devices), room)
    return compiled(state, _share_of(shared, devices), table, key)

  return run


def compile_step(
  step: Callable, mode: str, devices=None, room: Room | None = None
) -> Callable:
  """`jit_step` on a mesh of the devices, or `pmap_step`.

  Args:
    step: `train_step.bind(...)`.
    mode: of `MODES`.
    devices: those of all processes by default.
    room: for the distinct texts of a device's share, of `measure_room`; by
      default all that it can have.

  Returns:
    run(state, comparisons [B], table, key) -> (state, metrics).
  """
  check_mode(mode)
  if mode == 'pmap':
    return pmap_step(step, devices, room)
  return jit_step(step, make_mesh(devices), room)


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


def place(tree, mode: str, devices=None):
  """Puts arrays, whole, on the device(s) where the compiled step expects them.

  State that enters off the mesh would cost a second compilation. Every process
  must give the same.
  """
  check_mode(mode)
  return _put(tree, NamedSharding(make_mesh(devices), PartitionSpec()))


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
