"""The tensors of a reference checkpoint, by what they are.

Names are dotted, `prefLearner.item_learner.projector.mlp.layers.0.weight`, and
the same tensor stands there several times: the reference registers a module
wherever it uses it. Wrappers add prefixes of their own.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from pal_jax import optional
from pal_jax.errors import InputError

_ROOTS = (
  'item_learner',
  'logit_scale',
  'llm',
  'projector',
  'projector_f',
  'projectors',
  'softmax_w',
  'user_learner',
)
_LAYER = r'mlp\.layers\.(?P<layer>\d+)\.(?P<kind>\w+)'
# Patterns of a name without its prefixes, and what it becomes.
_PATTERNS = (
  (rf'(?:item_learner\.|user_learner\.)?projector(?:_f)?\.{_LAYER}', 'item'),
  (rf'(?:user_learner\.)?projectors\.(?P<k>\d+)\.{_LAYER}', 'prompt'),
  (r'user_learner\.P', 'prototypes'),
  (r'user_learner\.W\.(?P<user>.+)', 'user'),
  (r'logit_scale', 'logit_scale'),
  (r'(?:user_learner\.)?softmax_w\.temperature', 'temperature'),
)


@dataclasses.dataclass(frozen=True)
class Matched:
  """Tensors by what they are, and what became of every name."""

  scalars: dict[str, np.ndarray]  # logit_scale, temperature
  prototypes: np.ndarray | None  # [K, :]
  users: dict[str, np.ndarray]  # [K] logits
  item: dict[int, dict[str, np.ndarray]]  # by position of the layer
  prompt: dict[int, dict[int, dict[str, np.ndarray]]]  # by prototype
  copies: tuple[str, ...]  # names of tensors that stood there already
  encoder: int  # tensors of the language model, ignored
  unknown: tuple[str, ...]  # names that mean nothing here

  def listing(self) -> str:
    """What was matched, ignored and not understood, for a person."""
    lines = [
      f'matched: {len(self.users)} users, {len(self.item)} layers of the item '
      f'projector, {len(self.prompt)} prompt projectors, '
      f'{"prototypes" if self.prototypes is not None else "no prototypes"}, '
      f'{", ".join(sorted(self.scalars)) or "no scalars"}',
      f'ignored: {len(self.copies)} equal copies, {self.encoder} tensors of '
      'the encoder',
    ]
    if self.unknown:
      shown = ', '.join(self.unknown[:10])
      more = f' and {len(self.unknown) - 10} more' * (len(self.unknown) > 10)
      lines.append(f'not understood: {shown}{more}')
    return '\n'.join(lines)


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
  """Tensors by name, from safetensors or a PyTorch checkpoint.

  PyTorch files are pickles: torch reads them with `weights_only=True`, which
  runs no code. A Lightning checkpoint has its tensors under 'state_dict'.

  Raises:
    InputError: if the file is missing, is neither, or needs torch, which is
      not installed.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise InputError(f'{path}: no such file')
  if path.suffix == '.safetensors':
    try:
      return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
      raise InputError(
        f'{path} cannot be read as float safetensors: {error!r}'
      ) from error
  torch = optional.require(
    'torch', f'reading {path}', 'pip install torch (or convert to safetensors)'
  )
  try:
    found = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # whatever pickle, zip or torch make of it
    raise InputError(
      f'{path} cannot be read without running code of it ({error}): save its '
      'state_dict alone, torch.save(model.state_dict(), ...), or safetensors'
    ) from error
  found = found.get('state_dict', found) if isinstance(found, Mapping) else {}
  tensors = {
    str(name): value.detach().to(torch.float32).numpy()
    for name, value in found.items()
    if isinstance(value, torch.Tensor)
  }
  if not tensors:
    raise InputError(f'{path}: holds no tensors by name')
  return tensors


def _plain(name: str) -> str | None:
  """The name from its first known part on."""
  parts = name.split('.')
  for start, part in enumerate(parts):
    if part in _ROOTS:
      return '.'.join(parts[start:])
  return None


def match(tensors: Mapping[str, np.ndarray]) -> Matched:
  """Sorts tensors by what they are.

  Raises:
    InputError: if two that should be one differ, with both names.
  """
  found: dict[tuple, np.ndarray] = {}
  first: dict[tuple, str] = {}
  copies, unknown, encoder = [], [], 0
  for name, value in tensors.items():
    key = _key(_plain(name))
    if key is None and 'llm' in name.split('.'):
      encoder += 1
      continue
    if key is None:
      unknown.append(name)
      continue
    value = np.asarray(value, np.float32)
    if not np.isfinite(value).all():
      raise InputError(
        f'{name} holds NaN or infinity: the checkpoint is damaged'
      )
    if key in found:
      if not np.array_equal(found[key], value, equal_nan=True):
        raise InputError(
          f'{first[key]} and {name} should be one tensor and differ '
          f'({found[key].shape} and {value.shape}): the checkpoint is damaged, '
          'or of another model'
        )
      copies.append(name)
      continue
    found[key], first[key] = value, name
  item: dict = {}
  prompt: dict = {}
  for key, value in found.items():
    if key[0] == 'item':
      item.setdefault(key[1], {})[key[2]] = value
    elif key[0] == 'prompt':
      layers = prompt.setdefault(key[1], {})
      layers.setdefault(key[2], {})[key[3]] = value
  return Matched(
    scalars={
      name: found[name,]
      for name in ('logit_scale', 'temperature')
      if (name,) in found
    },
    prototypes=found.get(('prototypes',)),
    users={key[1]: v for key, v in found.items() if key[0] == 'user'},
    item=item,
    prompt=prompt,
    copies=tuple(copies),
    encoder=encoder,
    unknown=tuple(unknown),
  )


def _key(name: str | None) -> tuple | None:
  """What a name means, a tuple that starts with the kind; None: nothing."""
  for pattern, what in _PATTERNS:
    hit = re.fullmatch(pattern, name or '')
    if hit is None:
      continue
    groups = hit.groupdict()
    if what == 'user':
      return what, groups['user']
    if what == 'item':
      return what, int(groups['layer']), groups['kind']
    if what == 'prompt':
      return what, int(groups['k']), int(groups['layer']), groups['kind']
    return (what,)
  return None
