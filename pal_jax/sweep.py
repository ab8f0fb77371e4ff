"""Several runs as one compiled program: seeds are a vmapped axis."""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pal_jax import optimizer
from pal_jax import train_step as steps
from pal_jax.data.batching import Batcher, weight_by_user
from pal_jax.errors import InputError
from pal_jax.evaluate import evaluate
from pal_jax.shared_rows import measure_room, merge_shards, share_shards
from pal_jax.train import (
  Experiment,
  create_experiment,
  validate,
  variables_of,
)


def _stack(trees: Sequence):
  return jax.tree.map(lambda *x: np.stack(x), *trees)


def _check_alike(experiments: Sequence[Experiment]) -> None:
  first = experiments[0]
  for other in experiments[1:]:
    same = (
      other.model == first.model
      and other.config.train.to_dict() == first.config.train.to_dict()
      and other.config.optimizer.to_dict() == first.config.optimizer.to_dict()
      and other.table.items.shape == first.table.items.shape
    )
    if not same:
      raise InputError(
        'runs of one sweep must differ in their seeds only: model, train, '
        'optimizer and the number of items have to be equal'
      )


def train_seeds(
  experiments: Sequence[Experiment],
  on_chunk: Callable[[int, int, dict[str, float]], None] | None = None,
  start: Callable[[int, dict], dict] | None = None,
) -> list[steps.TrainState]:
  """Trains experiments that differ in seeds and data, all at once.

  The same steps, batches, validation and selection as `train.train`, without
  checkpoints: for models of seconds.

  Args:
    experiments: S of them, equal but for `seed`, `data.seed` and what follows
      from these.
    on_chunk: called with (step, last, mean metrics) after each validation.
    start: (number of the experiment, random parameters) -> parameters to
      begin with, which then stand for selection too.

  Returns:
    The selected state of each (`train.select`), in their order.

  Raises:
    InputError: if they are not alike, or a loss is no longer finite.
  """
  _check_alike(experiments)
  first = experiments[0]
  config = first.config.train
  last = config.num_steps
  keys = [jax.random.split(jax.random.key(e.config.seed)) for e in experiments]
  states = []
  for i, (experiment, (init_key, _)) in enumerate(
    zip(experiments, keys, strict=True)
  ):
    state, tx = steps.create_state(
      experiment.model,
      lambda params: optimizer.create(first.config.optimizer, params, last),
      init_key,
      experiment.table,
    )
    if start is not None:
      state = state.replace(params=start(i, state.params))
    states.append(state)
  state = jax.tree.map(lambda *x: jnp.stack(x), *states)
  step_keys = jnp.stack([step_key for _, step_key in keys])
  batchers = [
    Batcher(
      weight_by_user(e.dataset.train, config.user_weighting),
      config.batch_size,
      e.config.seed,
      by_user=config.batching == 'users',
    )
    for e in experiments
  ]
  # Equal tables are given once, not once a seed.
  shared = all(
    np.array_equal(e.table.items, first.table.items)
    and np.array_equal(e.table.prompts, first.table.prompts)
    for e in experiments
  )
  table = first.table if shared else _stack([e.table for e in experiments])
  table = jax.tree.map(jnp.asarray, table)
  step = jax.vmap(
    steps.bind(first.model, tx, first.objective),
    in_axes=(0, 0, None if shared else 0, 0),
  )

  @jax.jit
  def run_chunk(state, batches, table, step_keys):
    return jax.lax.scan(
      lambda state, batch: step(state, batch, table, step_keys),
      state,
      batches,
    )

  room = measure_room(batchers)
  best = [(np.inf, None)] * len(experiments)
  if start is not None:
    best = [
      (validate(experiment, variables_of(mine))['nll'], mine)
      for experiment, mine in zip(experiments, states, strict=True)
    ]
  for start in range(0, last, config.checkpoint_every):
    stop = min(start + config.checkpoint_every, last)
    batches = share_shards(
      [b(i) for i in range(start, stop) for b in batchers], room=room
    )
    batches = _stack([merge_shards(batch) for batch in batches])
    size = stop - start, len(batchers)
    batches = jax.tree.map(
      lambda x, size=size: x.reshape((*size, *x.shape[1:])), batches
    )
    state, metrics = run_chunk(state, batches, table, step_keys)
    losses = np.asarray(metrics.loss + metrics.bound)  # [steps, S]
    if not np.isfinite(losses).all():
      bad, seed = np.argwhere(~np.isfinite(losses))[0]
      raise InputError(
        f'the loss is not finite at step {start + bad + 1} of the run with '
        f'seed {experiments[seed].config.seed}'
      )
    reports = []
    for i, experiment in enumerate(experiments):
      mine = jax.tree.map(lambda x, i=i: x[i], state)
      report = validate(experiment, variables_of(mine))
      reports.append(report)
      if config.select == 'last' or report['nll'] < best[i][0]:
        best[i] = (report['nll'], mine)
    if on_chunk is not None:
      mean = {
        key: float(np.mean([r[key] for r in reports])) for key in reports[0]
      }
      on_chunk(stop, last, mean)
  return [selected for _, selected in best]


def with_seed(config, seed: int):
  """A copy of a config for one seed of a sweep: data and training alike."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.seed = seed
    config.data.seed = seed
  return config.lock()


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
  experiments = [
    create_experiment(with_seed(config, seed)) for seed in range(num_seeds)
  ]
  train = config.train
  with tqdm(total=train.num_steps, desc=title, disable=not progress) as bar:

    def show(step, last, mean):
      del last
      bar.update(step - bar.n)
      bar.set_postfix_str(
        f'validation nll {mean["nll"]:.3f}, accuracy {mean["accuracy"]:.3f}'
      )

    begin = time.perf_counter()
    states = train_seeds(experiments, show)
    seconds = (time.perf_counter() - begin) / num_seeds
  rows = []
  for experiment, state in zip(experiments, states, strict=True):
    results, _ = evaluate(
      experiment.model,
      variables_of(state),
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
