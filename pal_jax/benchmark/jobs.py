"""What has to be run: cells and tunings, done once and found again."""

import dataclasses
import functools
import json
from pathlib import Path

import ml_collections
import numpy as np

from pal_jax import data, features
from pal_jax.benchmark.cell import Protocol, run_cell
from pal_jax.benchmark.selection import select
from pal_jax.benchmark.store import (
  cell_path,
  describe,
  digest,
  load_cell,
  save_cell,
)
from pal_jax.benchmark.summary import Finished
from pal_jax.data.dataset import Dataset, fingerprint
from pal_jax.data.item_ids import with_item_ids
from pal_jax.errors import InputError
from pal_jax.methods import Method
from pal_jax.methods.catalogue import candidates, catalogue
from pal_jax.structs import FeatureTable
from pal_jax.writer import write_json

TUNING_SEED = 0  # whose validation users choose hyper-parameters
REAL_PEOPLE = ('polis', 'convarg')  # the same people in every seed
ITEM_FEATURES = ('text', 'ids')
IDS_VALIDATION = 0.15  # of the training comparisons, where items are ids


@dataclasses.dataclass(frozen=True)
class Plan:
  """A benchmark's config with its names resolved."""

  config: ml_collections.ConfigDict
  methods: tuple[str, ...]
  datasets: tuple[str, ...]
  seeds: tuple[int, ...]

  def protocol(self, dataset: str) -> Protocol:
    entry = self.config.sets[dataset]
    return Protocol(tuple(entry.num_support), self.config.resamples)

  @functools.cached_property
  def _settings(self) -> dict[str, tuple[Method, ...]]:
    config = self.config
    return {
      method: candidates(
        config.pal, method, config.max_candidates, config.max_steps
      )
      for method in self.methods
    }

  def candidates(self, method: str) -> tuple[Method, ...]:
    """The settings that a method may try."""
    return self._settings[method]

  def data_config(self, dataset: str, seed: int) -> ml_collections.ConfigDict:
    found = ml_collections.ConfigDict(self.config.sets[dataset].data.to_dict())
    found.seed = seed
    if found.name in self.config.paths:
      found.path = self.config.paths[found.name]
    return found

  def data_key(self, dataset: str, seed: int) -> dict:
    """What the data of a cell depend on; where they lie is no part of it."""
    found = self.data_config(dataset, seed).to_dict()
    path = found.pop('path', None)
    features = self.config.features.to_dict()
    return found | {
      'shipped': not path,
      'item_features': self.config.sets[dataset].features,
      'features': {
        k: v
        for k, v in features.items()
        if k not in ('cache_dir', 'batch_size', 'placement')
      },
    }


def _names(text: str, field: str, known) -> tuple[str, ...]:
  names = tuple(dict.fromkeys(n.strip() for n in text.split(',') if n.strip()))
  unknown = [n for n in names if n not in known]
  if unknown or not names:
    raise InputError(
      f'config.{field}={text!r}: '
      + (f'{unknown[0]!r} is unknown' if unknown else 'names nothing')
      + f'; expected some of {", ".join(known)}, with commas between'
    )
  return names


def parse_seeds(text: str) -> tuple[int, ...]:
  """'5' -> 0 to 4; '0,3' -> 0 and 3; '3,' -> 3.

  Raises:
    InputError: if it is neither.
  """
  try:
    numbers = [int(part) for part in text.split(',') if part.strip()]
  except ValueError:
    numbers = []
  if ',' not in text and numbers:
    numbers = list(range(numbers[0]))
  if not numbers or min(numbers) < 0:
    raise InputError(
      f'config.seeds={text!r}: expected a number of seeds, or seeds with '
      "commas between ('3,' is seed 3 alone)"
    )
  return tuple(dict.fromkeys(numbers))


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Reads names and numbers. Raises InputError."""
  known = tuple(catalogue(config.pal))
  for field, low in (
    ('resamples', 1),
    ('max_candidates', 0),
    ('max_steps', 0),
  ):
    if config[field] < low:
      raise InputError(f'config.{field}={config[field]} must be at least {low}')
  datasets = _names(config.datasets, 'datasets', tuple(config.sets))
  for name in datasets:
    if config.sets[name].features not in ITEM_FEATURES:
      raise InputError(
        f'config.sets.{name}.features={config.sets[name].features!r} is '
        f'unknown: expected one of {ITEM_FEATURES}'
      )
  return Plan(
    config,
    known
    if config.methods == 'all'
    else _names(config.methods, 'methods', known),
    datasets,
    parse_seeds(str(config.seeds)),
  )


# A worker's jobs follow each other dataset by dataset.
@functools.lru_cache(maxsize=12)
def _load(key: str, item_features: str, feature_config: str, join_prompt: bool):
  """(dataset, table); the arguments are JSON, so that they can be hashed."""
  config = ml_collections.ConfigDict(json.loads(key))
  for name, value in config.items():  # JSON has no tuples
    if isinstance(value, list):
      config[name] = tuple(value)
  dataset = data.create(config, join_prompt=join_prompt)
  if item_features == 'ids':
    dataset = with_item_ids(dataset, IDS_VALIDATION, config.seed)
  return dataset, features.feature_table(
    dataset, ml_collections.ConfigDict(json.loads(feature_config))
  )


def load_data(
  plan: Plan, dataset: str, seed: int, join_prompt: bool
) -> tuple[Dataset, FeatureTable]:
  """A dataset of the plan and its features, the latest few kept in memory.

  Args:
    plan: names the datasets and their folders.
    dataset, seed: which.
    join_prompt: as in `data.create`.

  Raises:
    InputError: if it cannot be made, with the option that names its folder.
  """
  config = plan.data_config(dataset, seed)
  try:
    return _load(
      json.dumps(config.to_dict()),
      plan.config.sets[dataset].features,
      json.dumps(plan.config.features.to_dict()),
      join_prompt,
    )
  except InputError as error:
    if config.name not in plan.config.paths:
      raise
    raise InputError(
      f'{dataset}: {error} (here the option is --config.paths.{config.name}='
      'FOLDER)'
    ) from error


def _tuning_path(plan: Plan, folder: Path, dataset: str, method: str) -> Path:
  key = digest(
    [describe(m) for m in plan.candidates(method)],
    plan.data_key(dataset, TUNING_SEED),
    dataclasses.asdict(plan.protocol(dataset)),
    plan.config.validation_share,
  )
  return folder / dataset / method / f'tuning-{key}.json'


def read_tuning(plan: Plan, folder: Path, dataset: str, method: str):
  """The choice among a method's settings, or None if it is still to make."""
  options = plan.candidates(method)
  if len(options) == 1:
    return {'index': 0, 'nll': [None], 'error': [None]}
  try:
    text = _tuning_path(plan, folder, dataset, method).read_text('utf-8')
    return json.loads(text)
  except (OSError, ValueError):  # not there, no UTF-8 or no JSON
    return None


def tune(plan: Plan, folder: Path, dataset: str, method: str) -> dict:
  """Chooses a method's settings on one seed's validation users, once."""
  found = read_tuning(plan, folder, dataset, method)
  if found is not None:
    return found
  options = plan.candidates(method)
  chosen = select(
    options,
    *load_data(plan, dataset, TUNING_SEED, options[0].join_prompt),
    plan.protocol(dataset),
    share=plan.config.validation_share,
    seed=TUNING_SEED,
  )
  found = {
    'index': chosen.index,
    'nll': chosen.nll.tolist(),
    'error': chosen.error.tolist(),
    'chosen': describe(options[chosen.index]),
    'validation_users': chosen.losses.shape[1],
    'validation_comparisons': int(np.isfinite(chosen.losses[0]).sum()),
  }
  path = _tuning_path(plan, folder, dataset, method)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, found)
  return found


def _paths(
  plan: Plan, folder: Path, dataset: str, method: str
) -> dict[int, Path]:
  """{seed: where its cell is or will be}; none before the method is tuned."""
  tuned = read_tuning(plan, folder, dataset, method)
  if tuned is None:
    return {}
  chosen = describe(plan.candidates(method)[tuned['index']])
  protocol = dataclasses.asdict(plan.protocol(dataset))
  return {
    seed: cell_path(
      folder,
      dataset,
      method,
      seed,
      digest(chosen, plan.data_key(dataset, seed), protocol),
    )
    for seed in plan.seeds
  }


def finished_cell(
  plan: Plan, folder: Path, dataset: str, method: str, seed: int
) -> Finished | None:
  """The cell, if it has been run with these settings and can be read."""
  path = _paths(plan, folder, dataset, method).get(seed)
  return path and load_cell(path, dataset, method, seed)


def count_finished(plan: Plan, folder: Path, dataset: str, method: str) -> int:
  """How many of a method's cells on a dataset are there, by name alone."""
  paths = _paths(plan, folder, dataset, method)
  return sum(path.exists() for path in paths.values())


def run_job(plan: Plan, folder: Path, dataset: str, method: str) -> None:
  """Tunes a method on a dataset and runs the seeds that are still to run.

  Raises:
    InputError: with the dataset and the method, for what a person can mend.
  """
  try:
    tuned = tune(plan, folder, dataset, method)
    chosen = plan.candidates(method)[tuned['index']]
    for seed, path in _paths(plan, folder, dataset, method).items():
      if load_cell(path, dataset, method, seed) is not None:
        continue
      loaded, table = load_data(plan, dataset, seed, chosen.join_prompt)
      arrays = run_cell(chosen, loaded, table, plan.protocol(dataset), seed)
      save_cell(path, arrays, _meta(plan, dataset, seed, loaded, chosen))
  except InputError as error:
    raise InputError(f'{method} on {dataset}: {error}') from error


def _meta(
  plan: Plan, name: str, seed: int, dataset: Dataset, chosen: Method
) -> dict:
  group = dataset.truth.group
  return {
    'method': describe(chosen),
    'data': plan.data_key(name, seed),
    'fingerprint': fingerprint(dataset),
    'seen_users': dataset.user_ids,
    'unseen_users': dataset.unseen_user_ids,
    'train_comparisons': int(np.sum(dataset.train.mask)),
    'group': None if group is None else group[dataset.num_users :],
    'repeated_people': plan.config.sets[name].data.name in REAL_PEOPLE,
    'bayes_accuracy': dataset.truth.bayes_accuracy,
    'notes': dataset.notes,
  }
