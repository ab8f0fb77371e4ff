"""One user's reward as a StableHLO program, for any batch size."""

from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from pal_jax.adaptation import place
from pal_jax.errors import InputError
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.rewards import expected_rewards
from pal_jax.structs import FeatureTable

PLATFORMS = ('cpu', 'cuda', 'tpu')


def write_program(
  model: IdealPointModel,
  variables,
  log_atoms: np.ndarray,
  log_belief: np.ndarray,
  normalize: str,
  feature_width: int,
  path: str | Path,
) -> None:
  """Serialises features [b, D] -> rewards [b]; PAL-B takes prompts [b, D], too.

  Parameters are constants of the program; b is symbolic.

  Args:
    model, variables, log_atoms, log_belief, normalize: as in `fold`.
    feature_width: D.
    path: of the file.
  """

  def scaled(h):
    if normalize == 'none':
      return h
    rms = jnp.sqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True))
    return h / jnp.maximum(rms, 1e-12)

  def reward(h, prompt=None):
    prompt = jnp.zeros((1, h.shape[-1])) if prompt is None else scaled(prompt)
    placed = place(model, variables, FeatureTable(scaled(h), prompt))
    belief = jnp.asarray(log_belief)[None]
    return expected_rewards(
      model, variables, placed, jnp.asarray(log_atoms), belief
    )[:, 0]

  (batch,) = jax.export.symbolic_shape('b')
  shape = jax.ShapeDtypeStruct((batch, feature_width), jnp.float32)
  number = 1 if hasattr(model, 'point') else 2
  exported = jax.export.export(jax.jit(reward), platforms=PLATFORMS)(
    *[shape] * number
  )
  Path(path).write_bytes(exported.serialize())


def read_program(path: str | Path):
  """The function that was written: features [b, D] (, prompts) -> [b].

  Raises:
    InputError: if the file is no such program.
  """
  try:
    exported = jax.export.deserialize(bytearray(Path(path).read_bytes()))
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error})') from error
  except Exception as error:  # flatbuffers raises what it likes
    raise InputError(
      f'{path}: is no serialised program of jax.export ({error!r})'
    ) from error
  return jax.jit(exported.call)
