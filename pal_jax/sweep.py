"""Many runs as one compiled program: seeds and numbers are vmapped axes.

The steps, batches, validation and selection of `train.train`, without
checkpoints: for models of seconds.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from pal_jax import grid, parallel
from pal_jax.data.batching import Batcher, weight_by_user
from pal_jax.errors import InputError
from pal_jax.evaluate import evaluate, group_by_user
from pal_jax.experiment import Experiment, create_experiment
from pal_jax.shared_rows import measure_room, merge_shards, share_shards
from pal_jax.stepping import start_users
from pal_jax.structs import Batch, Comparisons, FeatureTable
from pal_jax.sweep_program import (
  Common,
  Program,
  Runs,
  Selected,
  Structure,
  compile_program,
)

# Numbers in memory that the runs of a call have: a quarter of a gigabyte.
_AT_ONCE = 2**26
_MOST_RUNS = 32  # on a CPU more in a call are slower: they leave its caches

Start = Callable[[int, dict], dict]


def _stack(trees: Sequence):
  return jax.tree.map(lambda *x: np.stack(x), *trees)


def _number(keys: Sequence, distinct: list) -> np.ndarray:
  """The place of each key in `distinct`, which they are added to."""
  places: dict = {}
  for key in keys:
    if key not in places:
      places[key] = len(places)
      distinct.append(key)
  return np.array([places[key] for key in keys], np.int32)


def _check_alike(experiments: Sequence[Experiment]) -> None:
  first = experiments[0]
  for experiment in experiments:
    if experiment.on_host:
      raise InputError(
        f'features.placement={experiment.config.features.placement!r} leaves '
        f'{experiment.table.nbytes / 1e9:.3g} GB of features on the host: a '
        'sweep needs them on the device, with features.placement=device; runs '
        'by themselves (pal_jax.main) do not'
      )
  for other in experiments[1:]:
    if (
      other.model.num_users != first.model.num_users
      or other.table.items.shape != first.table.items.shape
      or other.table.prompts.shape != first.table.prompts.shape
    ):
      raise InputError(
        'the runs of one sweep must have the same numbers of users, items, '
        'prompts and features: '
        f'{other.model.num_users} users, items {other.table.items.shape} and '
        f'prompts {other.table.prompts.shape} differ from '
        f'{first.model.num_users}, {first.table.items.shape} and '
        f'{first.table.prompts.shape}; make a sweep for each'
      )


def _distinct_tables(experiments: Sequence[Experiment]):
  """(the tables, which one each experiment has); equal ones are one."""
  found: list[FeatureTable] = []
  place_of_id: dict[int, int] = {}
  for experiment in experiments:
    table = experiment.table
    if id(table) in place_of_id:
      continue
    for i, other in enumerate(found):
      if np.array_equal(table.items, other.items) and np.array_equal(
        table.prompts, other.prompts
      ):
        place_of_id[id(table)] = i
        break
    else:
      place_of_id[id(table)] = len(found)
      found.append(table)
  places = [place_of_id[id(e.table)] for e in experiments]
  return found, np.array(places, np.int32)


def _stack_by_user(comparisons: list[Comparisons], num_users: int):
  """[V, U, N] of V datasets, padded to the longest user of all."""
  grouped = [group_by_user(each, num_users) for each in comparisons]
  longest = max(each.shape[1] for each in grouped)

  def pad(x):
    room = [(0, 0), (0, longest - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, room)

  return _stack([jax.tree.map(pad, each) for each in grouped])


class _Streams:
  """Batches of the runs that have the same data and seed, made once."""

  def __init__(self, experiments: Sequence[Experiment], tables: np.ndarray):
    config = experiments[0].config.train
    distinct: list = []
    self.places = _number(
      [
        (id(e.dataset), e.config.seed, table)
        for e, table in zip(experiments, tables.tolist(), strict=True)
      ],
      distinct,
    )
    first = np.unique(self.places, return_index=True)[1]
    items, prompts = (
      getattr(experiments[0].table, part).shape[0]
      for part in ('items', 'prompts')
    )
    self._offsets = [(table * items, table * prompts) for *_, table in distinct]
    self._batchers = [
      Batcher(
        weight_by_user(experiments[i].dataset.train, config.user_weighting),
        config.batch_size,
        experiments[i].config.seed,
        by_user=config.batching == 'users',
      )
      for i in first
    ]
    self._room = measure_room(self._batchers)

  def __call__(self, start: int, stop: int) -> Batch:
    """[stop - start, G, ...], with rows of all tables one after another."""
    shared = share_shards(
      [batcher(i) for i in range(start, stop) for batcher in self._batchers],
      room=self._room,
    )
    offsets = itertools.cycle(self._offsets)
    batches = [
      batch.replace(items=batch.items + items, prompts=batch.prompts + prompts)
      for batch, (items, prompts) in zip(
        map(merge_shards, shared), offsets, strict=False
      )
    ]
    lead = stop - start, len(self._batchers)
    return jax.tree.map(
      lambda x: x.reshape((*lead, *x.shape[1:])), _stack(batches)
    )


def _runs_at_once(experiment: Experiment) -> int:
  """How many runs a call may have, by the size of what one works on."""
  rows = 2 * experiment.config.train.batch_size + len(experiment.table.items)
  size = 8 * rows * max(experiment.model.width, experiment.table.items.shape[1])
  return max(1, min(_MOST_RUNS, _AT_ONCE // size))


def _groups(count: int, at_once: int, divisor: int) -> np.ndarray:
  """Numbers of runs [groups, size]; the last run fills what is left."""
  groups = -(-count // at_once)
  size = -(-count // (groups * divisor)) * divisor
  return np.minimum(np.arange(groups * size), count - 1).reshape(groups, size)


def _replace_params(state, group, start: Start):
  """The states of a group with what `start` makes of their parameters."""
  params = [
    start(int(i), jax.tree.map(lambda x, j=j: x[j], state.params))
    for j, i in enumerate(group)
  ]
  return state.replace(params=jax.tree.map(lambda *x: jnp.stack(x), *params))


def _initial_states(
  program: Program, common, runs, rows, own: Start | None, start: Start | None
):
  """[(Runs, TrainState, Selected)] of the groups.

  Args:
    program, common, runs: of the sweep.
    rows: numbers of runs [groups, size].
    own: how the runs' configs begin; never selected, as in `train.train`.
    start: of `train_runs`.
  """
  out = []
  for group in rows:
    mine = jax.tree.map(lambda x, group=group: x[group], runs)
    state, selected = program.init(common, mine)
    if own is not None:
      state = _replace_params(state, group, own)
    if start is not None:
      state = _replace_params(state, group, start)
      selected = program.validate(common, (mine, state))
    out.append((mine, state, selected))
  return out


def _check_finite(losses, nll, start: int, stop: int, names) -> None:
  """Refuses losses [R, steps] and validations [R] that are not finite."""
  for what, found in (('loss', losses), ('validation loss', nll[:, None])):
    if not np.isfinite(found).all():
      run, step = np.argwhere(~np.isfinite(found))[0]
      at = start + step + 1 if what == 'loss' else stop
      raise InputError(
        f'the {what} is not finite at step {at} of the run with '
        f'{names(int(run))}: leave it out, lower optimizer.groups.*.'
        'learning_rate, or set optimizer.clip_norm'
      )


def train_runs(
  experiments: Sequence[Experiment],
  on_chunk: Callable[[int, int, dict[str, float]], None] | None = None,
  start: Start | None = None,
  at_once: int = 0,
) -> list[Selected]:
  """Trains experiments that differ in seeds, data and numbers, all at once.

  Args:
    experiments: R of them, whose configs differ in `seed`, `data` and the
      numbers of `grid.FIELDS`.
    on_chunk: called with (step, last, mean metrics) after each validation.
    start: (number of the experiment, random parameters) -> parameters to
      begin with, which then stand for selection too.
    at_once: runs of one call of the compiled program; 0: by their size.

  Returns:
    What stands for each (`train.select`), in numpy, in their order.

  Raises:
    InputError: if they are not alike, solve for users' weights, or a loss is
      no longer finite, naming the run.
  """
  _check_alike(experiments)
  first = experiments[0]
  configs = [e.config for e in experiments]
  numbers = grid.find_numbers(configs)
  config, model = first.config.train, first.model
  if config.user_solver != 'adam':
    raise InputError(
      f'train.user_solver={config.user_solver!r} has no form in a sweep: train '
      "the runs one by one (pal_jax.main), or set train.user_solver='adam'"
    )
  structure = Structure(
    model.clone(axis_name=None),
    first.objective,
    FrozenConfigDict(first.config.optimizer.to_dict()),
    config.num_steps,
    config.select == 'last',
  )
  count = len(experiments)
  program = compile_program(structure, 1 < parallel.num_devices() <= count)
  tables, table_of = _distinct_tables(experiments)
  streams = _Streams(experiments, table_of)
  datasets: list = []
  dataset_of = _number([id(e.dataset) for e in experiments], datasets)
  by_id = {id(e.dataset): e.dataset for e in experiments}
  datasets = [by_id[i] for i in datasets]
  common = program.share(
    Common(
      _stack(tables),
      _stack_by_user([d.validation for d in datasets], model.num_users),
      _stack_by_user([d.train for d in datasets], model.num_users)
      if model.user_level
      else None,
    )
  )
  keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(
    np.array([c.seed for c in configs])
  )
  runs = Runs(
    keys[:, 0], keys[:, 1], streams.places, table_of, dataset_of, numbers
  )
  rows = _groups(count, at_once or _runs_at_once(first), program.divisor)
  own = None
  if config.start != 'random':

    def own(i, params):
      return start_users(experiments[i], params)

  groups = _initial_states(program, common, runs, rows, own, start)
  last = config.num_steps
  for begin in range(0, last, config.checkpoint_every):
    stop = min(begin + config.checkpoint_every, last)
    batches = program.share(streams(begin, stop))
    found = []
    for i, (mine, state, selected) in enumerate(groups):
      state, selected, *each = program.advance(
        (common, batches), (mine, state, selected)
      )
      groups[i] = mine, state, selected
      found.append(each)
    (nll, accuracy), losses = jax.tree.map(
      lambda *x: np.concatenate(x)[:count], *found
    )
    _check_finite(
      losses, nll, begin, stop, lambda i: grid.describe(configs[i], numbers)
    )
    if on_chunk is not None:
      mean = {'nll': float(nll.mean()), 'accuracy': float(accuracy.mean())}
      on_chunk(stop, last, mean)
  chosen = jax.tree.map(
    lambda *x: np.concatenate(x), *(selected for *_, selected in groups)
  )
  return [jax.tree.map(lambda x, i=i: x[i], chosen) for i in range(count)]


def create_experiments(configs: Sequence) -> list[Experiment]:
  """Experiments of configs; equal data and features are made once."""
  made: dict[tuple, Experiment] = {}
  out = []
  for config in configs:
    key = (
      config.data.to_json(),
      config.features.to_json(),
      config.model.name == 'pal_a',  # whose texts have the prompt in them
    )
    experiment = create_experiment(config, made.get(key))
    made.setdefault(key, experiment)
    out.append(experiment)
  return out


def _train_shown(experiments, title: str, progress: bool, at_once: int = 0):
  """(what stands for each, seconds a run)."""
  num_steps = experiments[0].config.train.num_steps
  with tqdm(total=num_steps, desc=title, disable=not progress) as bar:

    def show(step, last, mean):
      del last
      bar.update(step - bar.n)
      bar.set_postfix_str(
        f'validation nll {mean["nll"]:.3f}, accuracy {mean["accuracy"]:.3f}'
      )

    begin = time.perf_counter()
    selected = train_runs(experiments, show, at_once=at_once)
    seconds = (time.perf_counter() - begin) / len(experiments)
  return selected, seconds


def run_grid(
  config,
  axes: Mapping[grid.Name, Sequence],
  *,
  progress: bool = True,
  at_once: int = 0,
) -> list[dict]:
  """Trains every combination of some values of a config's fields.

  Args:
    config: an experiment's config.
    axes: values of each field, as in `grid.make_configs`: numbers of
      `grid.FIELDS`, `seed` and `data.*`.
    progress: whether to draw a progress bar.
    at_once: as in `train_runs`.

  Returns:
    A row for each combination, the last axis fastest: its values by field,
    `step`, `nll` and `accuracy` of what stands for it on the seen users'
    validation comparisons (nothing of the test sets is used), and `seconds`,
    the time of all over their number.

  Raises:
    InputError: if a field may not be swept or a loss is not finite.
  """
  configs = grid.make_configs(config, axes)
  selected, seconds = _train_shown(
    create_experiments(configs), f'{len(configs)} runs', progress, at_once
  )
  return [
    {
      **grid.values_of(each, axes),
      'step': int(found.step),
      'nll': float(found.nll),
      'accuracy': float(found.accuracy),
      'seconds': seconds,
    }
    for each, found in zip(configs, selected, strict=True)
  ]


def with_seed(config, seed: int):
  """A copy of a config for one seed of a sweep: data and training alike."""
  return grid.make_configs(config, {('seed', 'data.seed'): [seed]})[0]


def run_seeds(
  config, num_seeds: int, title: str, progress: bool = True
) -> list[dict]:
  """Trains and evaluates one config over seeds 0 .. num_seeds - 1.

  Args:
    config: an experiment's config; its seeds are replaced.
    num_seeds: S.
    title: of the progress bar.
    progress: whether to draw it.

  Returns:
    S rows, each the form of `results.json` with `seed` beside it; `seconds`
    is the wall-clock time of training all of them, divided by S.
  """
  experiments = create_experiments(
    [with_seed(config, seed) for seed in range(num_seeds)]
  )
  selected, seconds = _train_shown(experiments, title, progress)
  train = config.train
  rows = []
  for experiment, found in zip(experiments, selected, strict=True):
    results, _ = evaluate(
      experiment.model,
      found.variables,
      experiment.table,
      experiment.dataset,
      experiment.config,
    )
    results['train'] = {'steps': train.num_steps}
    results['timing'] = {
      'seconds': seconds,
      'comparisons_per_second': train.num_steps * train.batch_size / seconds,
    }
    rows.append({'seed': experiment.config.seed, **results})
  return rows
