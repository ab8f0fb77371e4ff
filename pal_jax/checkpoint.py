"""Checkpoints: the latest two and the best. The only file that imports orbax.

Saves are asynchronous and atomic. Every save carries a checksum of its
arrays, because a damaged array file can restore without an error; a checkpoint
that does not restore exactly is set aside, not deleted, and the one before it
is used.

With several processes, which share the folder, all save and restore together:
orbax waits for all of them before a checkpoint counts. Arrays are whole in each
of them, so the first one writes them, and no number of devices or processes
stands in a checkpoint. It also chooses the checkpoint that is restored.
"""

import contextlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from pal_jax.distributed import from_first, is_first
from pal_jax.errors import InputError
from pal_jax.train_step import TrainState

BEST_METRIC = 'validation_nll'


def _checksum(tree) -> int:
  crc = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    leaf = np.asarray(leaf)
    head = f'{jax.tree_util.keystr(path)}{leaf.dtype}{leaf.shape}'
    crc = zlib.crc32(head.encode(), crc)
    crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
  return crc


def _validation_nll(metrics) -> float:
  return metrics[BEST_METRIC]


def _split(state: TrainState) -> dict:
  """The items of a checkpoint, beside the prior."""
  return {
    'params': state.params,
    'opt_state': state.opt_state,
    'extra': {'step': state.step, 'model_state': state.model_state},
  }


class Checkpointer:
  """Saves and restores the `TrainState`s of a workdir.

  Args:
    folder: where checkpoints go; made absolute, because orbax refuses a
      relative path only when it saves.
    say: called with a line when a damaged checkpoint is set aside.
  """

  def __init__(self, folder: str | Path, say=print):
    self._folder = Path(folder).absolute()
    self._say = say
    from_first(lambda: self._folder.mkdir(parents=True, exist_ok=True))
    self._writer = None  # of all processes together; `save` opens it

  def _open(self, **multiprocessing):
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(2),
        checkpoint_managers.BestN(
          get_metric_fn=_validation_nll,
          reverse=True,
          n=1,
        ),
      ]
    )
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        create=False,
        preservation_policy=policy,
        # Only with a best_fn are metrics written beside the arrays, and
        # without them the best is forgotten on resuming.
        best_fn=_validation_nll,
        best_mode='min',
        enable_async_checkpointing=True,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          **multiprocessing
        ),
      ),
    )

  def _open_writer(self):
    from_first(self._set_aside_bad_scores)
    # Processes that are named wait for each other on the host. By default a
    # sum over devices does that, and would get between those of the steps.
    return self._open(
      active_processes=set(range(jax.process_count())),
      barrier_sync_key_prefix='all',
    )

  @contextlib.contextmanager
  def _reading(self):
    """A manager that waits for no other process and changes nothing."""
    here = jax.process_index()
    reader = self._open(
      primary_host=here,
      active_processes={here},
      barrier_sync_key_prefix=f'process_{here}',
    )
    try:
      yield reader
    finally:
      reader.close()

  def _set_aside_bad_scores(self) -> None:
    # Orbax reads every score when it opens, and one that is damaged would
    # stop it there.
    for path in sorted(self._folder.glob('[0-9]*')):
      if not path.name.isdigit():
        continue  # unfinished, orbax passes over it
      try:
        metrics = json.loads((path / 'metrics' / 'metrics').read_text())
        float(metrics[BEST_METRIC])
      except Exception as error:  # in whatever way it is damaged
        self._move_aside(path, error)

  def save(
    self,
    state: TrainState,
    validation_nll: float,
    prior: dict | None = None,
    summary: dict | None = None,
    window: list | None = None,
  ) -> None:
    """Starts saving; returns before it is on disk. See `wait`.

    Args:
      state: of training.
      validation_nll: the lowest is the best; infinite if it was not measured.
      prior: arrays of the population that goes with these parameters.
      summary: plain values about the prior, stored as JSON.
      window: plain values of what was summed since the last log.

    Raises:
      InputError: if this or an earlier one could not be written.
    """
    items = {**_split(state), 'prior': prior or {'none': np.zeros(())}}
    items = jax.tree.map(np.asarray, jax.device_get(items))
    step = int(items['extra']['step'])
    metrics = {BEST_METRIC: float(validation_nll)}
    check = {
      'crc32': _checksum(items),
      'summary': summary or {},
      'window': window,
    }
    with self._writing():
      self._writer = self._writer or self._open_writer()
      self._writer.save(
        step,
        args=ocp.args.Composite(
          **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
          check=ocp.args.JsonSave(check),
        ),
        metrics=metrics,
      )

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:  # whatever orbax or tensorstore raise
      reason = ' '.join(str(error).split()) or type(error).__name__
      raise InputError(
        f'{self._folder}: a checkpoint could not be written ({reason[:300]}); '
        'those before it are kept. Make room, or mend what is named, and run '
        'the same command again: it goes on from the last one'
      ) from error

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    self._set_aside_bad_scores()
    with self._reading() as reader:
      return sorted(reader.all_steps())

  def restore_latest(self, like: TrainState) -> TrainState | None:
    """The newest checkpoint that is intact, or None.

    A damaged one is moved to a `damaged` folder beside the checkpoints.

    Args:
      like: a state of the right shapes and dtypes.
    """
    return self._restore(lambda: self.steps()[::-1], like)

  def restore_best(self, like: TrainState) -> TrainState:
    """The checkpoint with the lowest validation NLL, of those that have one.

    Raises:
      InputError: if no checkpoint is intact.
    """
    state = self._restore(self._best_first, like)
    if state is None:
      raise InputError(
        f'{self._folder}: holds no intact checkpoint; train again in a new '
        'workdir'
      )
    return state

  def _best_first(self) -> list[int]:
    scores = {}
    steps = self.steps()
    with self._reading() as reader:
      for step in steps:
        try:
          metrics = reader.metrics(step)
        except Exception:  # damaged in any way: `_read` will say so
          metrics = None
        if metrics and metrics.get(BEST_METRIC) == float('inf'):
          continue  # it was not measured
        scores[step] = (metrics or {}).get(BEST_METRIC, float('inf'))
    return sorted(scores, key=lambda s: (scores[s], s))

  def _restore(
    self, candidates: Callable[[], list[int]], like: TrainState
  ) -> TrainState | None:
    """The first candidate that the first process finds intact."""
    # It knows what it wrote, and would miss what is set aside.
    self.close()
    found = {}

    def choose():
      for step in candidates():
        try:
          found[step] = self._read(step, like)
          return step
        except Exception as error:  # whatever orbax, tensorstore, json raise
          self._move_aside(self._folder / str(step), error)
      return None

    step = from_first(choose)
    if step is None or is_first():
      return found.get(step)
    try:
      return self._read(step, like)
    except Exception as error:
      reason = ' '.join(str(error).split())[:300]
      raise InputError(
        f'{self._folder}: the first process reads the checkpoint of step '
        f'{step}, but process {jax.process_index()} does not ({reason}): '
        '--workdir must be on a file system that all processes share'
      ) from error

  def read_prior(self, step: int) -> tuple[dict | None, dict]:
    """The prior's arrays and summary that were saved at a step.

    Read it after `restore_best` or `restore_latest` found the step intact.
    """
    with self._reading() as reader:
      loaded = reader.restore(
        step,
        args=ocp.args.Composite(
          prior=ocp.args.StandardRestore(), check=ocp.args.JsonRestore()
        ),
      )
    prior = jax.tree.map(np.asarray, dict(loaded['prior']))
    return None if 'none' in prior else prior, loaded['check']['summary']

  def read_window(self, step: int) -> list | None:
    """What `save` was given as the window of a step."""
    with self._reading() as reader:
      loaded = reader.restore(
        step, args=ocp.args.Composite(check=ocp.args.JsonRestore())
      )
    return loaded['check'].get('window')

  def _read(self, step: int, like: TrainState) -> TrainState:
    items = _split(like)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), items
    )
    with self._reading() as reader:
      loaded = reader.restore(
        step,
        args=ocp.args.Composite(
          **{k: ocp.args.StandardRestore(v) for k, v in abstract.items()},
          prior=ocp.args.StandardRestore(),
          check=ocp.args.JsonRestore(),
        ),
      )
    found = {name: loaded[name] for name in (*items, 'prior')}
    if _checksum(found) != loaded['check']['crc32']:
      raise ValueError('its arrays differ from those that were saved')
    return TrainState(
      step=found['extra']['step'],
      params=found['params'],
      model_state=found['extra']['model_state'],
      opt_state=found['opt_state'],
    )

  def _move_aside(self, path: Path, error: Exception) -> None:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    damaged = self._folder.parent / 'damaged_checkpoints'
    damaged.mkdir(exist_ok=True)
    target = damaged / path.name
    number = 1
    while target.exists():
      target = damaged / f'{path.name}-{number}'
      number += 1
    path.rename(target)
    self._say(
      f'the checkpoint of step {path.name} is damaged ({reason[0][:200]}); it '
      f'was moved to {target}, and the one before it is used'
    )

  def wait(self) -> None:
    """Until every save is on disk. Raises InputError if one is not."""
    if self._writer:
      with self._writing():
        self._writer.wait_until_finished()

  def close(self) -> None:
    self.wait()
    if self._writer:
      self._writer.close()
      self._writer = None
