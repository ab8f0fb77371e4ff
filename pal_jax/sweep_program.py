"""Training of several runs, compiled once: steps, validation and selection.

Runs are an axis that is vmapped, and split over the local devices where there
are as many. Equal structures share a compiled program, from call to call.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from pal_jax import grid, losses, optimizer, parallel
from pal_jax import train_step as steps
from pal_jax.adaptation import place, score
from pal_jax.evaluate import table_log_weights
from pal_jax.models import IdealPointModel
from pal_jax.structs import Comparisons, FeatureTable


@dataclasses.dataclass(frozen=True)
class Structure:
  """What all runs have in common, whatever their numbers and data."""

  model: IdealPointModel
  objective: steps.Objective
  optimizer: FrozenConfigDict
  num_steps: int
  keep_last: bool  # or the best by validation


@flax.struct.dataclass
class Common:
  """Data that runs share, by number."""

  table: FeatureTable  # [T, M, D] and [T, Q, D], T distinct tables
  queries: Comparisons  # [V, U, N] validation comparisons of V datasets
  support: Comparisons | None  # [V, U, N'] training comparisons, if needed


@flax.struct.dataclass
class Runs:
  """What a run has of its own; arrays have a leading axis of runs."""

  init_key: jax.Array
  step_key: jax.Array
  batches: jax.Array  # () int32, which of the G streams of batches
  table: jax.Array  # () int32, which of the T tables
  dataset: jax.Array  # () int32, which of the V datasets
  numbers: dict[str, jax.Array]  # what is swept, () each


@flax.struct.dataclass
class Selected:
  """The parameters that stand for a run so far."""

  step: jax.Array  # () int32, steps taken
  variables: dict
  nll: jax.Array  # () nats a validation comparison
  accuracy: jax.Array  # () on validation comparisons


def _pick(tree, index):
  """One of a leading axis; of a single one without an axis of runs."""
  single = jax.tree.leaves(tree)[0].shape[0] == 1
  return jax.tree.map(lambda x: x[0] if single else x[index], tree)


def _variables(state: steps.TrainState) -> dict:
  return {'params': state.params, **state.model_state}


def _create(structure: Structure, run: Runs):
  """(model, objective, optimiser of parameters) with the run's numbers."""
  model = structure.model.clone(**grid.part(run.numbers, 'model'))
  objective = dataclasses.replace(
    structure.objective, **grid.part(run.numbers, 'train')
  )
  config = grid.fill(structure.optimizer, grid.part(run.numbers, 'optimizer'))
  return (
    model,
    objective,
    lambda params: optimizer.create(config, params, structure.num_steps),
  )


def _validate(structure, common: Common, run: Runs, state) -> Selected:
  """`train.validate` in the program."""
  model, variables = structure.model, _variables(state)
  placed = place(model, variables, _pick(common.table, run.table))
  support = None
  if common.support is not None:
    support = _pick(common.support, run.dataset)
  log_w = table_log_weights(model, variables, placed, support)
  queries = _pick(common.queries, run.dataset)
  logit = score(model, variables, placed, log_w, queries, model.evaluation_rule)
  right = jnp.where(queries.label > 0.5, logit > 0, logit < 0)
  right = jnp.where(logit == 0.0, 0.5, right.astype(jnp.float32))

  def mean(x, live):
    live = live & jnp.isfinite(x)
    return jnp.sum(jnp.where(live, x, 0.0)) / jnp.sum(live)

  return Selected(
    state.step,
    variables,
    mean(losses.logistic(logit, queries.label), queries.mask),
    mean(right, queries.mask & (queries.label != 0.5)),
  )


def _init(structure: Structure, common: Common, run: Runs):
  """The state before the first step, and that nothing is selected yet."""
  table = jax.tree.map(lambda x: x[0], common.table)
  model, _, optimizer_of = _create(structure, run)
  state, _ = steps.create_state(model, optimizer_of, run.init_key, table)
  nothing = jnp.asarray(jnp.inf), jnp.asarray(jnp.nan)
  return state, Selected(state.step, _variables(state), *nothing)


def _advance(structure: Structure, common, run_state):
  """Some steps of a run, its validation, and what stands for it then.

  Args:
    common: (Common, batches with leading axes [steps, G]).
    run_state: (Runs, TrainState, Selected) of one run.

  Returns:
    (TrainState, Selected, this validation, losses [steps]).
  """
  (common, batches), (run, state, selected) = common, run_state
  model, objective, optimizer_of = _create(structure, run)
  step = steps.bind(model, optimizer_of(state.params), objective)
  # One table of all: `Batch` has ids of its rows.
  table = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), common.table)

  def body(state, batch):
    state, metrics = step(state, _pick(batch, run.batches), table, run.step_key)
    return state, metrics.loss + metrics.bound

  state, loss = jax.lax.scan(body, state, batches)
  found = _validate(structure, common, run, state)
  better = structure.keep_last | (found.nll < selected.nll)
  selected = jax.tree.map(
    lambda new, old: jnp.where(better, new, old), found, selected
  )
  return state, selected, (found.nll, found.accuracy), loss


@dataclasses.dataclass(frozen=True)
class Program:
  """Compiled functions of (common data, arrays of runs)."""

  init: jax.stages.Wrapped
  validate: jax.stages.Wrapped
  advance: jax.stages.Wrapped
  share: Callable  # puts what runs share where they are
  divisor: int  # of the number of runs in a call


@functools.lru_cache(maxsize=8)
def compile_program(structure: Structure, split: bool) -> Program:
  """The program of a structure.

  Args:
    structure: of the runs.
    split: whether runs are divided among the local devices.
  """

  def compile_runs(function):
    runs = jax.vmap(function, in_axes=(None, 0))
    return parallel.map_users(runs)[0] if split else jax.jit(runs)

  return Program(
    compile_runs(functools.partial(_init, structure)),
    compile_runs(
      lambda common, run_state: _validate(structure, common, *run_state)
    ),
    compile_runs(functools.partial(_advance, structure)),
    functools.partial(parallel.place, mode='jit')
    if split
    else functools.partial(jax.tree.map, jnp.asarray),
    parallel.num_devices() if split else 1,
  )
