"""A trained model as a folder of files that need neither this run nor its data.

    model.safetensors   parameters ('params/...'), other variables, 'prior/...'
    card.json           what the numbers mean; see `make_card`
    users.npz           the users and their answers as statistics

No pickle: safetensors, JSON, and numpy without objects.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import flax.traverse_util
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy

from pal_jax import models
from pal_jax.adaptation import Prior, place, statistics
from pal_jax.adaptation.users import UserTable
from pal_jax.data.dataset import Dataset, fingerprint
from pal_jax.errors import InputError
from pal_jax.evaluate import MOST_OF_A_USER, group_by_user
from pal_jax.features.factory import create as create_encoder
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.structs import FeatureTable
from pal_jax.writer import write_json

FORMAT = 'pal_jax model 1'
MODEL_FOLDER = 'model'  # where a finished workdir has it
CARD, TENSORS, USERS = 'card.json', 'model.safetensors', 'users.npz'
_PRIOR = 'prior/'
_REQUIRED = {
  'adaptation',
  'encoder',
  'feature_width',
  'features',
  'join_prompt',
  'model',
  'num_users',
}
EQUATIONS = {
  'squared_distance': 'r_i(x) = -scale * ||f(h) - u_i||^2',
  'distance': 'r_i(x) = -scale * ||f(h) - u_i||',
  'normalized_distance': (
    'r_i(x) = -scale * ||f(h) / ||f(h)|| - u_i / ||u_i|| ||'
  ),
  'cosine': 'r_i(x) = scale * <f(h), u_i> / (||f(h)|| ||u_i||)',
  'inner_product': 'r_i(x) = scale * <f(h), u_i>',
}


@dataclasses.dataclass(frozen=True)
class SavedModel:
  """A model, the population, its users, and the card."""

  model: IdealPointModel
  variables: dict[str, Any]  # what `model.apply` takes
  prior: Prior
  users: UserTable
  card: dict[str, Any]


def from_training(
  config,
  dataset: Dataset,
  table: FeatureTable,
  model: IdealPointModel,
  variables,
  prior: Prior,
  metrics: dict[str, Any],
) -> SavedModel:
  """What is kept of a run.

  Seen users become like all others: adapted to the comparisons they were
  trained on, so that their probabilities have intervals and they can answer
  more. Forgetting one deletes these answers; the network and the atoms of the
  population, which everybody shaped, stay.

  Args:
    config: of the experiment.
    dataset, table: it was trained on.
    model, variables, prior: what came of it.
    metrics: for the card, as in results.json.
  """
  # Nothing is scored with the trained weights any more, and who asks to be
  # forgotten must not be found in them.
  if not model.user_level:
    model = model.clone(num_users=model.num_prototypes)
    blank = np.zeros((model.num_users, model.num_prototypes), np.float32)
    params = dict(variables['params']) | {'user_logits': blank}
    variables = dict(variables) | {'params': params}
  users = UserTable(model, variables, prior, method=config.adaptation.method)
  answers = group_by_user(dataset.train, dataset.num_users, MOST_OF_A_USER)
  stats = statistics(
    model,
    variables,
    place(model, variables, table),
    answers,
    model.adaptation_rule,
  )
  users.add(dataset.user_ids, stats, answers.label, answers.mask)
  encoder = None
  if dataset.item_features is None:
    made = create_encoder(config.features)
    encoder = {'name': made.name, 'version': made.version}
  card = make_card(
    config,
    num_users=model.num_users,
    feature_width=table.items.shape[-1],
    encoder=encoder,
    data={'name': dataset.name, 'hashes': fingerprint(dataset)},
    metrics=metrics,
  )
  return SavedModel(model, variables, prior, users, card)


def make_card(
  config,
  *,
  num_users: int,
  feature_width: int,
  encoder: dict[str, Any] | None,
  data: dict[str, Any],
  metrics: dict[str, Any],
) -> dict[str, Any]:
  """What a person or another program has to know of the arrays.

  Args:
    config: `model`, `features` and `adaptation` of it count.
    num_users: rows of the table of trained weights.
    feature_width: D.
    encoder: name and version of what made the features; None where vectors of
      unknown origin were given.
    data: where the parameters come from.
    metrics: as in results.json.
  """
  features = config.features.to_dict()
  del features['cache_dir'], features['batch_size'], features['placement']
  joined = config.model.name == 'pal_a'
  return {
    'format': FORMAT,
    'equation': EQUATIONS[config.model.preference],
    'input': (
      'h is the feature vector of prompt and response together, with a line '
      'break between them'
      if joined
      else 'h is the feature vector of the response; the ideal points follow '
      "from the prompt's"
    ),
    'join_prompt': joined,
    'model': config.model.to_dict(),
    'num_users': num_users,
    'feature_width': feature_width,
    'features': features,
    'encoder': encoder,
    'adaptation': config.adaptation.to_dict(),
    'data': data,
    'metrics': metrics,
  }


def save_model(saved: SavedModel, folder: str | Path) -> Path:
  """Writes the folder, whole or not at all; one of ours is replaced.

  Raises:
    InputError: if something else stands there.
  """
  folder = Path(folder).expanduser().resolve()
  if folder.exists() and not _is_ours(folder):
    raise InputError(
      f'{folder} exists and is not a saved model, or holds other files, '
      'too: it is left alone; name a new folder'
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir()
    tensors = _flatten(saved)
    # Not save_file, whose files only their owner may read.
    (temporary / TENSORS).write_bytes(
      safetensors.numpy.save(tensors, metadata={'format': FORMAT})
    )
    saved.users.save(temporary / USERS)
    shapes = {
      name: [list(x.shape), str(x.dtype)] for name, x in sorted(tensors.items())
    }
    hashes = {name: _hash(temporary / name) for name in (TENSORS, USERS)}
    write_json(
      temporary / CARD, saved.card | {'tensors': shapes, 'sha256': hashes}
    )
    if folder.exists():
      old = folder.with_name(f'.{folder.name}.{os.getpid()}.old')
      folder.rename(old)
      try:
        temporary.rename(folder)
      except OSError:
        old.rename(folder)
        raise
      shutil.rmtree(old)
    else:
      temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def load_model(folder: str | Path) -> SavedModel:
  """Reads what `save_model` wrote.

  Raises:
    InputError: if the folder is no saved model, or a file of it is damaged.
  """
  folder = Path(folder).expanduser()
  card = _read_card(folder)
  for name in (TENSORS, USERS):
    try:
      intact = _hash(folder / name) == card['sha256'].get(name)
    except OSError as error:
      raise InputError(f'{folder / name} cannot be read: {error}') from error
    if not intact:
      raise InputError(
        f'{folder / name} is not what {CARD} says: copy the whole folder '
        'again, or save the model again'
      )
  missing = sorted(_REQUIRED - set(card))
  if missing or 'method' not in card['adaptation']:
    raise InputError(
      f'{folder / CARD}: lacks {missing or "adaptation.method"}; save the '
      'model again'
    )
  try:
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    model = models.create(
      ml_collections.ConfigDict(card['model']),
      num_users=card['num_users'],
      feature_width=card['feature_width'],
    )
    prior = Prior(
      **{
        name.removeprefix(_PRIOR): x
        for name, x in tensors.items()
        if name.startswith(_PRIOR)
      }
    )
  except (
    AttributeError,
    KeyError,
    TypeError,
    safetensors.SafetensorError,
  ) as error:
    raise InputError(
      f'{folder}: what it holds is not a model of this version ({error!r}); '
      'save it again'
    ) from error
  variables = flax.traverse_util.unflatten_dict(
    {n: x for n, x in tensors.items() if not n.startswith(_PRIOR)}, sep='/'
  )
  users = UserTable.load(folder / USERS, model, variables, prior)
  return SavedModel(model, variables, prior, users, card)


def _is_ours(folder: Path) -> bool:
  try:
    _read_card(folder)
    return {p.name for p in folder.iterdir()} <= {CARD, TENSORS, USERS}
  except (InputError, OSError):
    return False


def _flatten(saved: SavedModel) -> dict[str, np.ndarray]:
  tensors = flax.traverse_util.flatten_dict(saved.variables, sep='/')
  tensors |= {_PRIOR + name: x for name, x in vars(saved.prior).items()}
  return {name: np.asarray(x, order='C') for name, x in tensors.items()}


def _read_card(folder: Path) -> dict[str, Any]:
  path = folder / CARD
  try:
    card = json.loads(path.read_text('utf-8'))
  except FileNotFoundError as error:
    raise InputError(
      f'{folder} holds no {CARD}: it is not a saved model. Give a finished '
      'workdir (an early version left no model in it: train again in a new '
      'one), or a folder that RewardModel.save wrote'
    ) from error
  except (OSError, ValueError) as error:
    raise InputError(f'{path} cannot be read as JSON: {error}') from error
  if not isinstance(card, dict) or card.get('format') != FORMAT:
    raise InputError(f'{path}: expected "format": {FORMAT!r}')
  if not isinstance(card.get('sha256'), dict):
    raise InputError(f'{path}: has no "sha256" of the files beside it')
  return card


def _hash(path: Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
