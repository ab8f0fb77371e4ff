"""A user folded into the network: layers, and one head.

    h -> (scaled to a mean square of 1) -> layers -> f

    head            reward
    f               <v, f>                       inner product
    f,|f|^2         <v, [f, ||f||^2]>            squared distance
    f/|f|           <v, f / ||f||>               cosine
    distance        -scale sum_a m_a ||f - u_a||
    normalized_distance   the same of f / ||f|| and u_a / ||u_a||

A head without bias: rewards of one user have no origin. Under PAL-B ideal
points follow from the prompt, u_a = sum_k w_ak g_k(h_c), so that the K prompt
projectors and the weights [A, K] go with it and the head is named after the
preference. Batch norm is folded into the layers.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from pal_jax.adaptation import is_convex
from pal_jax.errors import InputError
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.models.projectors import num_hidden_layers

FORMAT = 'pal_jax reward 1'
_EPSILON = 1e-5  # of the batch norm


@dataclasses.dataclass(frozen=True)
class Folded:
  """Arrays, and how they are to be read; all JSON values."""

  tensors: dict[str, np.ndarray]
  form: dict[str, str | bool | float | int]


def fold(
  model: IdealPointModel,
  variables,
  log_atoms: np.ndarray,
  log_belief: np.ndarray,
  normalize: str,
) -> Folded:
  """One user's reward as tensors.

  Args:
    model, variables: the frozen model.
    log_atoms: [A, K] points of the simplex.
    log_belief: [A] of the user.
    normalize: of features, as in `features.normalize`.
  """
  params = jax.tree.map(np.asarray, variables['params'])
  stats = jax.tree.map(np.asarray, variables.get('batch_stats', {}))
  masses = np.exp(np.asarray(log_belief, np.float64))
  atoms = np.exp(np.asarray(log_atoms, np.float64))
  linear = model.preference in ('squared_distance', 'inner_product')
  mixes = model.adaptation_rule == 'mixture'
  if is_convex(model, model.adaptation_rule):
    # Only the mean weights count. Rewards of prototypes are mixed, or, what
    # is the same where they are affine, prototypes are.
    mean = masses @ atoms
    atoms = np.eye(len(mean)) if mixes and not linear else mean[None]
    masses = mean if mixes and not linear else np.ones(1)
  scale = float(model.apply(variables, method='scale'))
  form = {
    'format': FORMAT,
    'activation': model.activation,
    'residual': model.residual,
    'normalize': normalize,
    'hidden_layers': num_hidden_layers(model.projector),
    'scale': scale,
  }
  tensors = _layers(model, params, stats, 'projector', 'layers')
  if not hasattr(model, 'point'):  # PAL-B
    for k in range(model.num_prototypes):
      one = [
        jax.tree.map(lambda x, k=k: x[k], tree.get('prompt_projectors', {}))
        for tree in (params, stats)
      ]
      tensors |= _stack(model, *one, f'prompts.{k}')
    tensors |= {'weights': atoms, 'masses': masses}
    form |= {'head': model.preference, 'prompts': model.num_prototypes}
  else:
    points = _points(model, variables, atoms)
    tensors |= _head(model.preference, points, masses, scale, form)
  return Folded(
    {n: np.ascontiguousarray(x, np.float32) for n, x in tensors.items()}, form
  )


def _points(model, variables, atoms) -> np.ndarray:
  """[A, P] ideal points in float64."""
  # PAL-A: the prompt has no part in it.
  basis = model.apply(variables, jnp.zeros((1, 1)), method='basis')
  if model.adaptation_rule == 'mixture':
    # Prototypes are placed, then mixed: `f(Pw)` of a vertex is f(p_k).
    points = model.apply(variables, basis, method='finish')
    return atoms @ np.asarray(points, np.float64)
  points = model.apply(
    variables, jnp.asarray(atoms, jnp.float32), basis, method='ideal_points'
  )
  return np.asarray(points, np.float64)


def _head(preference, points, masses, scale, form) -> dict[str, np.ndarray]:
  if preference in ('distance', 'normalized_distance'):
    form['head'] = preference
    return {'points': points, 'masses': masses}
  if preference == 'cosine':
    norm = np.linalg.norm(points, axis=-1, keepdims=True)
    points = points / np.maximum(norm, 1e-12)
  u = scale * masses @ points
  if preference == 'squared_distance':
    form['head'] = 'f,|f|^2'
    return {'head.weight': np.append(2.0 * u, -scale)[None]}
  form['head'] = 'f' if preference == 'inner_product' else 'f/|f|'
  return {'head.weight': u[None]}


def _layers(model, params, stats, name, prefix) -> dict[str, np.ndarray]:
  if num_hidden_layers(model.projector) < 0:
    return {}
  return _stack(model, params[name], stats.get(name, {}), prefix)


def _stack(model, params, stats, prefix) -> dict[str, np.ndarray]:
  """Dense layers [out, in], with the norm behind each folded in."""
  out = {}
  for i in range(num_hidden_layers(model.projector) + 1):
    dense = params[f'Dense_{i}']
    weight = np.asarray(dense['kernel'], np.float64).T
    bias = np.asarray(dense.get('bias', np.zeros(len(weight))), np.float64)
    norm = params.get(f'MaskedBatchNorm_{i}')
    if norm is not None:
      running = stats[f'MaskedBatchNorm_{i}']
      gain = norm['scale'] / np.sqrt(running['var'] + _EPSILON)
      weight = gain[:, None] * weight
      bias = gain * (bias - running['mean']) + norm['bias']
    out[f'{prefix}.{i}.weight'], out[f'{prefix}.{i}.bias'] = weight, bias
  return out


def write_folded(folded: Folded, path: str | Path) -> None:
  """As safetensors; the form is JSON in its metadata."""
  data = safetensors.numpy.save(
    folded.tensors, metadata={'form': json.dumps(folded.form)}
  )
  Path(path).write_bytes(data)


def read_folded(path: str | Path) -> Folded:
  """What `write_folded` wrote.

  Raises:
    InputError: if the file is damaged or something else.
  """
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      form = json.loads((file.metadata() or {})['form'])
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if form['format'] != FORMAT:
      raise ValueError(f'its format is {form["format"]!r}')
  except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
    raise InputError(f'{path}: is no {FORMAT!r} ({error!r})') from error
  return Folded(tensors, form)
