"""train_and_evaluate(config, workdir): the one loop.

With several processes (`distributed`) all of them run it; the first one alone
writes files, prints and evaluates.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pal_jax import (
  data,
  features,
  models,
  optimizer,
  parallel,
  report,
  starts,
  user_solves,
)
from pal_jax import train_step as steps
from pal_jax.adaptation import Prior, check_method, place, score
from pal_jax.checkpoint import Checkpointer
from pal_jax.data.batching import Batcher, weight_by_user
from pal_jax.distributed import from_first, is_first
from pal_jax.errors import InputError
from pal_jax.evaluate import (
  evaluate,
  group_by_user,
  learn_prior,
  seen_log_weights,
)
from pal_jax.metrics import evaluate_logits
from pal_jax.preemption import Preempted, Preemption
from pal_jax.prefetch import Prefetch
from pal_jax.saved_model import MODEL_FOLDER, from_training, save_model
from pal_jax.shared_rows import measure_room
from pal_jax.structs import FeatureTable
from pal_jax.user_rows import ROW_MULTIPLE, trim
from pal_jax.writer import MetricsWriter, Progress, write_json, write_text

CONFIG_FILE = 'config.json'
RESULTS_FILE = 'results.json'
TIMING_FILE = 'timing.json'
SPLITS_FILE = 'splits.csv'


def due(step: int, every: int, last: int) -> bool:
  """Whether something that happens every `every` steps is due after `step`.

  Steps count from 1; the last step is always due, step 0 never.
  """
  return step > 0 and (step % every == 0 or step == last)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything a run needs, made from its config alone."""

  config: ml_collections.ConfigDict
  dataset: data.Dataset
  table: FeatureTable
  model: models.IdealPointModel
  objective: steps.Objective
  on_host: bool = False  # whether the table stays there, perhaps on disk


def check_config(config) -> None:
  """Refuses what could only fail later. Raises InputError."""
  parallel.check_mode(config.parallel)
  parallel.check_placement(config.features.placement)
  models.check_config(config.model)
  for field in ('num_steps', 'batch_size', 'log_every', 'checkpoint_every'):
    if config.train[field] < 1:
      raise InputError(
        f'train.{field}={config.train[field]} must be at least 1'
      )
  if config.train.checkpoint_every % config.train.log_every:
    raise InputError(
      f'train.checkpoint_every={config.train.checkpoint_every} must be a '
      f'multiple of train.log_every={config.train.log_every}, so that a '
      'resumed run logs the same means'
    )
  for field, known in (
    ('batching', ('comparisons', 'users')),
    ('select', ('best', 'last')),
  ):
    if config.train[field] not in known:
      raise InputError(
        f'train.{field}={config.train[field]!r} is unknown: expected one of '
        f'{known}'
      )
  if config.train.shard_users and (
    config.parallel != 'jit' or not config.train.sparse_users
  ):
    raise InputError(
      f'train.shard_users=True with parallel={config.parallel!r} and '
      f'train.sparse_users={config.train.sparse_users}: a split user table '
      'needs parallel=jit and train.sparse_users=True'
    )
  if config.train.shard_users and config.train.user_solver != 'adam':
    raise InputError(
      f'train.user_solver={config.train.user_solver!r} solves for all users on '
      'one device: with train.shard_users=True it must be adam'
    )
  starts.check_config(config)
  user_solves.check_config(config)
  check_method(config.adaptation.method)
  if config.adaptation.strength < 0 or config.evaluation.resamples < 1:
    raise InputError(
      f'adaptation.strength={config.adaptation.strength} must be 0 (chosen on '
      'seen users) or positive, and evaluation.resamples='
      f'{config.evaluation.resamples} at least 1'
    )


def create_experiment(config, like: Experiment | None = None) -> Experiment:
  """Data, features and model of a config.

  Args:
    config: from `configs/*.py`.
    like: one with equal data and features, which are then not made again.

  Raises:
    InputError: for everything that can be told without training.
  """
  check_config(config)
  objective = steps.create_objective(config.train, config.model)
  if like is None:
    features.create(config.features)  # a missing path, before data are read
    dataset = data.create(config.data, join_prompt=config.model.name == 'pal_a')
    placement = config.features.placement

    def stays(nbytes: int) -> bool:
      return from_first(lambda: parallel.stays_on_host(placement, nbytes))

    table = features.feature_table(dataset, config.features, stays)
    on_host = stays(table.nbytes)
  else:
    dataset, table, on_host = like.dataset, like.table, like.on_host
  model = models.create(
    config.model,
    num_users=dataset.num_users,
    feature_width=table.items.shape[-1],
    axis_name=parallel.axis_name(config.parallel),
  )
  if config.train.user_solver != 'adam':
    user_solves.check_model(model)
  return Experiment(config, dataset, table, model, objective, on_host)


def prepare_workdir(config, workdir: Path) -> bool:
  """Makes the workdir and saves the config; whether results stand there.

  Raises:
    InputError: if it belongs to another config, naming the fields.
  """
  wanted = json.loads(config.to_json())
  path = workdir / CONFIG_FILE
  if path.exists():
    try:
      found = json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
      raise InputError(
        f'{path}: malformed JSON ({error}); use another workdir'
      ) from error
    different = _differences(found, wanted)
    if different:
      raise InputError(
        f'{workdir} holds a run with another config; these fields differ: '
        + '; '.join(different)
        + '. Use another --workdir, or the same config to resume it'
      )
    return (workdir / RESULTS_FILE).exists()
  if workdir.exists() and not workdir.is_dir():
    raise InputError(f'{workdir} is a file; --workdir must name a folder')
  # Hidden files may be left over from a kill before the config was written.
  if workdir.exists() and any(
    not p.name.startswith('.') for p in workdir.iterdir()
  ):
    raise InputError(
      f'{workdir} is not empty and holds no {CONFIG_FILE}: it is not a '
      'workdir of this program; name a new folder'
    )
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(path, wanted)
  return False


def _sweep_up(workdir: Path) -> None:
  """Removes what a kill left half-written."""
  for path in (*workdir.glob('.*.tmp'), *workdir.glob('.*.old')):
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink()


def save_splits(dataset: data.Dataset, workdir: Path) -> None:
  """Writes the split of every row, if the data are the rows of a file.

  As a column of the file these splits are taken again as they are.

  Raises:
    InputError: if a run that is resumed began with other splits.
  """
  if dataset.row_split is None:
    return
  rows = (f'{i},{name}\n' for i, name in enumerate(dataset.row_split, 1))
  text = 'row,split\n' + ''.join(rows)
  path = workdir / SPLITS_FILE
  if not path.exists():
    write_text(path, text)
  elif path.read_bytes() != text.encode():
    raise InputError(
      f'{path} has other splits than this run would have: the data have '
      'changed since it began, or the file has. Use another --workdir'
    )


def _differences(found, wanted, prefix='') -> list[str]:
  if not (isinstance(found, dict) and isinstance(wanted, dict)):
    same = found == wanted
    return [] if same else [f'{prefix[1:]} was {found!r}, now {wanted!r}']
  out = []
  for key in sorted({*found, *wanted}):
    name = f'{prefix}.{key}'
    if key not in found or key not in wanted:
      out.append(f'{name[1:]} stands in one of the two only')
    else:
      out += _differences(found[key], wanted[key], name)
  return out


def validate(experiment: Experiment, variables) -> dict[str, float]:
  """Metrics of the seen users on validation statements."""
  model, dataset = experiment.model, experiment.dataset
  placed = place(model, variables, experiment.table)
  log_w = seen_log_weights(model, variables, placed, dataset)
  queries = group_by_user(dataset.validation, dataset.num_users)
  logit = score(model, variables, placed, log_w, queries, model.evaluation_rule)
  live = np.asarray(queries.mask)
  return evaluate_logits(
    np.asarray(logit)[live][None], queries.label[live][None]
  )


def population(experiment: Experiment, variables) -> tuple[Prior, dict]:
  """The prior of new users that goes with these parameters."""
  model = experiment.model
  placed = place(model, variables, experiment.table)
  return learn_prior(
    model, variables, placed, experiment.dataset, experiment.config.adaptation
  )


def variables_of(state: steps.TrainState) -> dict:
  """What `model.apply` takes."""
  return {'params': state.params, **state.model_state}


def _trained_model(experiment: Experiment) -> models.IdealPointModel:
  """The model, with rows for every device where the user table is split."""
  if not experiment.config.train.shard_users:
    return experiment.model
  return experiment.model.clone(row_multiple=ROW_MULTIPLE)


def _initial_state(experiment: Experiment, key):
  config = experiment.config
  return steps.create_state(
    _trained_model(experiment),
    lambda params: optimizer.create(
      config.optimizer, params, config.train.num_steps
    ),
    key,
    experiment.table,
  )


def _batcher(experiment: Experiment) -> Batcher:
  config = experiment.config
  return Batcher(
    weight_by_user(experiment.dataset.train, config.train.user_weighting),
    config.train.batch_size,
    config.seed,
    by_user=config.train.batching == 'users',
  )


def start_users(experiment: Experiment, params) -> dict:
  """Parameters whose users begin as `train.start` says."""
  config = experiment.config
  if config.train.start == 'random':
    return params
  num_users = experiment.model.num_users
  found = starts.spectral_log_weights(
    experiment.dataset.train,
    experiment.table,
    num_users,
    experiment.model.num_prototypes,
    config.seed,
  )
  users = jnp.asarray(params['user_logits'])
  return params | {'user_logits': users.at[:num_users].set(found)}


class Steps:
  """state, metrics = steps(state, step): what training does in one step.

  The compiled step on its batch and then, when it is due, the users' weights
  solved for: a function of state and step, so that a resumed run does the
  same. The optimiser's moments stay: a solve changes where the users are, not
  how steep the loss is, and resetting them would forget the scale of a step.

  States are those of `place`, and each is given away to the next.
  """

  def __init__(self, experiment: Experiment, optimizer, key, like):
    config = experiment.config
    model = _trained_model(experiment)
    self._experiment, self._key = experiment, key
    self._mode, self._splits = config.parallel, config.train.shard_users
    on_host = experiment.on_host
    self._table = (
      None if on_host else parallel.place(experiment.table, self._mode)
    )
    self._batcher = _batcher(experiment)
    self._run = parallel.compile_step(
      steps.bind(model, optimizer, experiment.objective, model.axis_name),
      self._mode,
      room=measure_room([self._batcher], parallel.num_devices()),
      source=experiment.table if on_host else None,
      by_user_row=config.train.sparse_users,
      split_table_of=like if self._splits else None,
    )
    self._support = _solve_support(experiment)

  def batches(self, start: int, last: int) -> Prefetch:
    """Those of steps start .. last, made ahead where that pays; close it."""
    return Prefetch(
      self._prepare,
      range(start, last),
      parallel.batches_ahead(self._experiment.on_host),
    )

  def _prepare(self, step: int):
    return self._run.prepare(self._batcher(step))

  def __call__(self, state, step: int, batch=None):
    """Takes step number `step`, on its batch if it was made ahead."""
    if batch is None:
      batch = self._prepare(step)
    state, metrics = self._run.step(state, batch, self._table, self._key)
    train = self._experiment.config.train
    if self._support is not None and due(
      step + 1, train.solve_every, train.num_steps
    ):
      state = self.solve(state)
    return state, metrics

  def place(self, state):
    """A state on the devices, as the compiled step expects it."""
    if self._splits:
      return parallel.place_split(state)
    return parallel.place(state, self._mode)

  def whole(self, state):
    """A state, each of whose arrays every process has."""
    return parallel.gather_table(state) if self._splits else state

  def variables(self, state) -> dict:
    """What `experiment.model` takes, on one device of this process."""
    found = parallel.localize(variables_of(self.whole(state)))
    return trim(found, self._experiment.model.num_users)

  def solve(self, state):
    """The state with all users' weights solved for.

    Every process solves for itself, on one device, as it validates.
    """
    table = self._table
    found = user_solves.solve_users(
      self._experiment.model,
      parallel.localize(variables_of(state)),
      self._experiment.table if table is None else parallel.localize(table),
      self._support,
      self._experiment.config.train.solve_strength,
    )
    placed = parallel.place(found, self._mode)
    return state.replace(params={**state.params, 'user_logits': placed})


def _solve_support(experiment: Experiment):
  """[U, N] what users are solved from; None without solves."""
  if experiment.config.train.user_solver == 'adam':
    return None
  dataset = experiment.dataset
  return user_solves.group_training(dataset.train, dataset.num_users)


def begin(experiment: Experiment) -> tuple[steps.TrainState, Steps]:
  """The state before the first step, not placed yet, and the steps."""
  init_key, step_key = jax.random.split(jax.random.key(experiment.config.seed))
  state, tx = _initial_state(experiment, init_key)
  state = state.replace(params=start_users(experiment, state.params))
  return state, Steps(experiment, tx, step_key, state)


def check_training(experiment: Experiment) -> None:
  """Refuses what `train` would refuse, by shapes alone.

  Raises:
    InputError: from the optimiser, the model's shapes, the batches or the
      weights of comparisons.
  """
  _batcher(experiment)
  _solve_support(experiment)
  jax.eval_shape(
    lambda key: _initial_state(experiment, key)[0], jax.random.key(0)
  )


def train(
  experiment: Experiment,
  workdir: Path,
  *,
  progress: bool = True,
  say=print,
  preemption: Preemption | None = None,
) -> tuple[steps.TrainState, tuple[Prior, dict], dict[str, float]]:
  """Trains to the end, from the latest intact checkpoint if there is one.

  Order of operations, for each step: batch, step, when due the users' solve
  (`train.user_solver`), read the metrics of the step before (one late, so that
  the device is never idle), and when due: log, validate, save. When SIGTERM
  came, to whichever process: save, with the sums since the last log, and stop.

  Several processes take the same steps and learn the same from them, down to
  validation, which each computes for itself.

  Returns:
    The selected state, the population learned with it, and the timing of this
    process: `seconds` and `comparisons_per_second`.

  Raises:
    InputError: if the loss is no longer finite, naming the step, or a
      checkpoint cannot be written.
    Preempted: if `preemption` was requested; a checkpoint has the last step.
  """
  preemption = preemption or Preemption()
  config = experiment.config
  train_config = config.train
  last = train_config.num_steps
  state, take = begin(experiment)
  checkpointer = Checkpointer(workdir / 'checkpoints', say)
  restored = checkpointer.restore_latest(state)
  if restored is not None:
    state = restored
    say(f'resuming from step {int(state.step)} of {last}')
  start = int(state.step)
  state = take.place(state)
  batches = take.batches(start, last)
  writer = (
    MetricsWriter(workdir / 'metrics.jsonl', start) if is_first() else None
  )
  bar = Progress(last, start, progress and is_first())
  vote = parallel.Vote()
  window = _Window(
    None if restored is None else checkpointer.read_window(start)
  )
  began = time.perf_counter()
  trained, trained_seconds, number = 0.0, 0.0, 0
  try:
    pending = None
    for step, batch in enumerate(batches, start):
      state, metrics = take(state, step, batch)
      if pending is not None:
        window.add(*pending)
      pending = (step + 1, metrics)
      bar.advance()
      stops = vote(preemption.requested)
      if not due(step + 1, train_config.log_every, last):
        if stops:
          window.add(*pending)
          # Never the best: it is not one that an undisturbed run would have.
          checkpointer.save(
            take.whole(state), float('inf'), window=window.dump()
          )
          _stop(checkpointer, step + 1)
        continue
      window.add(*pending)
      pending = None
      summary, count, seconds = window.flush()
      if number:  # the first window holds the compilation
        trained += count
        trained_seconds += seconds
      number += 1
      bar.update(
        summary['loss'], summary['accuracy'], count / max(seconds, 1e-9)
      )
      saves = due(step + 1, train_config.checkpoint_every, last)
      if saves:
        variables = take.variables(state)
        validation = validate(experiment, variables)
        # The loss of a step is that before its update.
        _check_finite('validation loss', validation['nll'], step + 1)
        summary |= {f'validation_{k}': v for k, v in validation.items()}
      # Before saving: a kill in between redoes the step and drops the line,
      # the other way round the line would be lost.
      if writer:
        writer.write(
          step + 1,
          **summary,
          comparisons_per_second=count / max(seconds, 1e-9),
        )
      if saves:
        learned = population(experiment, variables)
        checkpointer.save(
          take.whole(state), validation['nll'], vars(learned[0]), learned[1]
        )
      window.restart()
      if stops:
        if not saves:
          checkpointer.save(take.whole(state), float('inf'))
        _stop(checkpointer, step + 1)
    elapsed = time.perf_counter() - began
    checkpointer.wait()
    if train_config.select == 'best':
      state = checkpointer.restore_best(parallel.fetch(take.whole(state)))
    else:
      state = take.whole(state)
    state = state.replace(params=trim(state.params, experiment.model.num_users))
    arrays, summary = checkpointer.read_prior(int(state.step))
  finally:
    batches.close()
    bar.close()
    checkpointer.close()
  timing = {
    'seconds': elapsed,
    'comparisons_per_second': trained / max(trained_seconds, 1e-9),
  }
  return state, (Prior(**arrays), summary), timing


def _stop(checkpointer: Checkpointer, step: int) -> None:
  checkpointer.wait()
  raise Preempted(
    f'stopped by SIGTERM and saved after step {step}; the same command goes on '
    'from there'
  )


def _check_finite(what: str, value, step: int) -> None:
  if not np.isfinite(value):
    raise InputError(
      f'the {what} is {float(value)} at step {step}: training stopped; the '
      'checkpoints before it are kept. Lower optimizer.groups.*.'
      'learning_rate, set optimizer.clip_norm, or look for bad features'
    )


class _Window:
  """Sums of the steps since the last log, checked as they come."""

  def __init__(self, dumped: list | None = None):
    self.restart()
    if dumped:
      *sums, self._steps = dumped
      self._total = steps.StepMetrics(*map(np.float32, sums))

  def dump(self) -> list:
    """Plain numbers, from which the next process goes on."""
    return [*(float(x) for x in jax.tree.leaves(self._total)), self._steps]

  def restart(self) -> None:
    self._total, self._steps = None, 0
    self._begin = time.perf_counter()

  def add(self, step: int, metrics: steps.StepMetrics) -> None:
    metrics = parallel.fetch(metrics)
    _check_finite('loss', metrics.loss + metrics.bound, step)
    self._total = metrics if self._total is None else self._total + metrics
    self._steps += 1

  def flush(self):
    summary = self._total.summary(self._steps)
    count = float(self._total.count)
    seconds = time.perf_counter() - self._begin
    return summary, count, seconds


@contextlib.contextmanager
def _writing(workdir: Path):
  """A disk that is full or may not be written, as a message."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'{workdir}: cannot be written ({error}); what stood there is kept. Make '
      'room, or mend what is named, and run the same command again: it goes on '
      'from the last checkpoint'
    ) from error


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | Path,
  *,
  progress: bool = True,
  say: Callable[[str], None] = print,
) -> dict:
  """Trains, adapts to unseen users, evaluates, writes results and a report.

  A finished workdir returns its results; an unfinished one resumes.

  Args:
    config: from `configs/*.py`.
    workdir: a folder of its own for this run.
    progress: whether to draw a progress bar.
    say: what prints messages to a person.

  Returns:
    What stands in `results.json`.

  Raises:
    InputError: for everything a person can mend.
    Preempted: if SIGTERM came, after a checkpoint was saved if training had
      begun.
  """
  with Preemption().listening() as preemption:
    return _train_and_evaluate(
      config, Path(workdir).expanduser().absolute(), preemption, progress, say
    )


def _train_and_evaluate(config, workdir, preemption, progress, say) -> dict:
  if not is_first():
    say = _say_nothing
  path = workdir / RESULTS_FILE

  def finished():
    return path.exists()

  def prepare():
    with _writing(workdir):
      if prepare_workdir(config, workdir):
        say(f'{workdir} is finished; these are its results')
        return json.loads(path.read_text(encoding='utf-8'))
      _sweep_up(workdir)
      save_splits(experiment.dataset, workdir)
      return None

  # Data, features and model come first: bad input leaves no workdir behind.
  if not from_first(finished):
    experiment = create_experiment(config)
    check_training(experiment)
  results = from_first(prepare)
  if results is not None:
    return results
  with _writing(workdir), preemption.held():
    state, learned, timing = train(
      experiment,
      workdir,
      progress=progress,
      say=say,
      preemption=preemption,
    )
  variables = variables_of(parallel.fetch(state))

  def finish():
    with _writing(workdir):
      say('adapting to unseen users and evaluating')
      return _finish(experiment, workdir, variables, learned, timing)

  return from_first(finish)


def _say_nothing(line: str) -> None:
  del line


def _finish(experiment: Experiment, workdir, variables, learned, timing):
  """Evaluates what was trained, and writes everything that is kept of it."""
  config = experiment.config
  results, arrays = evaluate(
    experiment.model,
    variables,
    experiment.table,
    experiment.dataset,
    config,
    learned,
  )
  results['train'] = {'steps': config.train.num_steps}
  # Apart: results are the same whatever machine, or how many, they took.
  write_json(workdir / TIMING_FILE, timing)
  with (workdir / 'analysis.npz').open('wb') as file:
    np.savez(file, **arrays)
  report.write_report(workdir, results, timing)
  save_model(
    from_training(
      config,
      experiment.dataset,
      experiment.table,
      experiment.model,
      variables,
      learned[0],
      {part: results[part] for part in ('seen', 'unseen')},
    ),
    workdir / MODEL_FOLDER,
  )
  # Last, because its presence means that the run is finished.
  path = workdir / RESULTS_FILE
  write_json(path, results)
  return json.loads(path.read_text(encoding='utf-8'))
