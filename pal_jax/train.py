"""train_and_evaluate(config, workdir): the one loop.

With several processes (`distributed`) all of them run it; the first one alone
writes files, prints and evaluates.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np

from pal_jax import data, parallel, report
from pal_jax import train_step as steps
from pal_jax.adaptation import Prior, place, score
from pal_jax.checkpoint import Checkpointer
from pal_jax.distributed import from_first, is_first
from pal_jax.errors import InputError
from pal_jax.evaluate import (
  evaluate,
  group_by_user,
  learn_prior,
  seen_log_weights,
)
from pal_jax.experiment import Experiment, create_experiment
from pal_jax.metrics import evaluate_logits
from pal_jax.preemption import Preempted, Preemption
from pal_jax.saved_model import MODEL_FOLDER, from_training, save_model
from pal_jax.stepping import begin, check_training, due, variables_of
from pal_jax.user_rows import trim
from pal_jax.writer import MetricsWriter, Progress, write_json, write_text

CONFIG_FILE = 'config.json'
RESULTS_FILE = 'results.json'
TIMING_FILE = 'timing.json'
SPLITS_FILE = 'splits.csv'


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
        held = take.whole(state)
        variables = take.variables(held)
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
        checkpointer.save(held, validation['nll'], vars(learned[0]), learned[1])
      window.restart()
      if stops:
        if not saves:
          checkpointer.save(take.whole(state), float('inf'))
        _stop(checkpointer, step + 1)
    elapsed = time.perf_counter() - began
    checkpointer.wait()
    state = take.whole(state)
    if train_config.select == 'best':
      state = checkpointer.restore_best(parallel.fetch(state))
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
