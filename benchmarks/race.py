"""Training by this library and by the reference's recipe, against the clock.

Two sets of the people of configs/persona.py. 'signed', the default run: they
contradict each other, and whoever learns no person has half of the choices
right. 'own': each persona cares for one behaviour, and one score for everybody
does well, which the reference learns too.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import reference_torch
from configs import persona
from pal_jax import optimizer, parallel
from pal_jax import train as training
from pal_jax import train_step as steps
from pal_jax.data.batching import Batcher
from pal_jax.shared_rows import measure_room

SIZES = (4, 256, 2048)  # the first is the reference's
NUM_COMPARISONS = 512_000  # of the default run: the length of our schedule


@dataclasses.dataclass(frozen=True)
class People:
  """One of the two sets, and when to stop."""

  stances: str
  validation_per_user: int
  check_every: int  # comparisons between two looks at the accuracy
  target: float  # validation accuracy that ends a run
  longest: float  # seconds after which it is given up


class Stopwatch:
  """Accuracy over seconds of training, until the target or out of time."""

  def __init__(self, target: float, longest: float):
    self._target, self._longest = target, longest
    self.curve: list[tuple[int, float, float]] = []  # steps, seconds, accuracy
    self.compiling = 0.0  # seconds of the first step, where it is compiled

  def stop(self, number: int, seconds: float, accuracy: float) -> bool:
    self.curve.append((number, seconds, accuracy))
    return accuracy >= self._target or seconds > self._longest

  def seconds_to(self, accuracy: float) -> float | None:
    """Of training, when a check first found this accuracy; None if none."""
    return next((s for _, s, found in self.curve if found >= accuracy), None)

  @property
  def best(self) -> float:
    """The highest mean of three checks: one alone is lucky now and then."""
    found = [accuracy for *_, accuracy in self.curve]
    size = min(3, len(found))
    return max(np.convolve(found, np.ones(size) / size, 'valid'))

  def rate(self, batch_size: int) -> float:
    """Comparisons a second after the first check, which has the compiling."""
    (first, begin, _), (last, end, _) = self.curve[0], self.curve[-1]
    if last == first:
      return first * batch_size / begin
    return (last - first) * batch_size / (end - begin)


def check_every(people: People, batch_size: int) -> int:
  """Steps between two looks at the accuracy."""
  return max(1, people.check_every // batch_size)


def num_steps(batch_size: int) -> int:
  """Of our schedule: the default run's comparisons, at least 500 updates."""
  return max(NUM_COMPARISONS // batch_size, 500)


def make_experiment(people: People, mode: str):
  config = persona.get_config().copy_and_resolve_references()
  with config.unlocked():
    config.parallel = mode
    config.data.stances = people.stances
    config.data.validation_per_user = people.validation_per_user
  return training.create_experiment(config)


def train_ours(
  experiment,
  mode: str,
  batch_size: int,
  seed: int,
  every: int,
  watch: Stopwatch,
):
  """The default recipe at a batch size, looked at `every` so many steps."""
  config = experiment.config
  last = num_steps(batch_size)
  state, tx = steps.create_state(
    experiment.model,
    lambda params: optimizer.create(config.optimizer, params, last),
    jax.random.key(seed),
    experiment.table,
  )
  key = jax.random.key(seed)
  spent, begin = 0.0, time.perf_counter()
  batcher = Batcher(experiment.dataset.train, batch_size, seed)
  table = parallel.place(experiment.table, mode)
  state = parallel.place(state, mode)
  run = parallel.compile_step(  # of its own: it is compiled again
    steps.bind(
      experiment.model, tx, experiment.objective, parallel.axis_name(mode)
    ),
    mode,
    room=measure_room([batcher], parallel.num_devices()),
  )
  pending = None
  for step in range(last):
    state, metrics = run(state, batcher(step), table, key)
    if pending is not None:
      float(pending.loss)  # a step late, as the loop of training does
    pending = metrics
    if step == 0:
      jax.block_until_ready(state)
      watch.compiling = time.perf_counter() - begin
    if (step + 1) % every == 0 or step + 1 == last:
      jax.block_until_ready(state)
      spent += time.perf_counter() - begin
      variables = training.variables_of(parallel.fetch(state))
      accuracy = training.validate(experiment, variables)['accuracy']
      if watch.stop(step + 1, spent, accuracy):
        break
      begin = time.perf_counter()
  return state


def run_ours(
  people: People, mode: str, batch_size: int, seeds: int
) -> list[Stopwatch]:
  """One for each seed."""
  experiment = make_experiment(people, mode)
  every = check_every(people, batch_size)
  watches = [Stopwatch(people.target, people.longest) for _ in range(seeds)]
  for seed, watch in enumerate(watches):
    train_ours(experiment, mode, batch_size, seed, every, watch)
  return watches


def run_theirs(people: People, batch_size: int, seeds: int) -> list[Stopwatch]:
  """One for each seed."""
  experiment = make_experiment(people, 'jit')
  watches = [Stopwatch(people.target, people.longest) for _ in range(seeds)]
  for seed, watch in enumerate(watches):
    train_theirs(experiment, people, batch_size, seed, watch.stop)
  return watches


def train_theirs(
  experiment,
  people: People,
  batch_size: int,
  seed: int,
  stop: Callable[[int, float, float], bool],
) -> reference_torch.Reference:
  """The reference's recipe, until `stop` says so of a check."""
  model = reference_torch.Reference(
    np.asarray(experiment.table.items, np.float32),
    experiment.dataset.num_users,
    experiment.config.model.num_prototypes,
    seed,
  )
  validation = experiment.dataset.validation
  model.train(
    experiment.dataset.train,
    batch_size,
    lambda number, seconds: stop(number, seconds, model.accuracy(validation)),
    check_every(people, batch_size),
  )
  return model
