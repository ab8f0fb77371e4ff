"""Devices: one pure step, compiled by jit on a mesh or by pmap.

The only file that knows devices. Each has its share of a batch's comparisons,
padded to equal numbers, which masks make harmless, and the distinct texts of
that share.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pal_jax.errors import InputError
from pal_jax.shared_rows import Room, merge_shards, share_shards
from pal_jax.structs import Comparisons

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
  """Of those that a batch is split over."""
  return jax.local_device_count()


def make_mesh(devices=None) -> Mesh:
  """A one-dimensional mesh of the local devices."""
  devices = jax.local_devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),),
    (AXIS,),
    # The default, Explicit, breaks linen's Embed and Dropout.
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
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
  size = mesh.devices.size

  @functools.wraps(compiled)
  def run(state, batch: Comparisons, table, key):
    (shared,) = share_shards([batch], size, room)
    return compiled(state, merge_shards(shared), table, key)

  return run


def pmap_step(
  step: Callable, devices=None, room: Room | None = None
) -> Callable:
  """The same by pmap: replicated state in and out, the batch split."""
  devices = jax.local_devices() if devices is None else devices
  compiled = jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, 0, None, None),
    out_axes=(None, None),
    devices=devices,
  )
  size = len(devices)

  def run(state, batch: Comparisons, table, key):
    (shared,) = share_shards([batch], size, room)
    return compiled(state, shared, table, key)

  return run


def compile_step(
  step: Callable, mode: str, devices=None, room: Room | None = None
) -> Callable:
  """`jit_step` on a mesh of the local devices, or `pmap_step`.

  Args:
    step: `train_step.bind(...)`.
    mode: of `MODES`.
    devices: the local ones by default.
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
  is nothing to combine.

  Args:
    function: of `common`, which every device gets, and `users`, arrays whose
      leading axis is users; it returns arrays with that leading axis.
    devices: the local ones by default.

  Returns:
    The compiled function, and the number that must divide the users.
  """
  mesh = make_mesh(devices)
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
  """Puts arrays on the device(s) where the compiled step expects them.

  State that enters off the mesh would cost a second compilation.
  """
  check_mode(mode)
  return jax.device_put(
    tree, NamedSharding(make_mesh(devices), PartitionSpec())
  )


def fetch(tree):
  """Arrays of a tree as numpy, on the host."""
  return jax.tree.map(np.asarray, jax.device_get(tree))
