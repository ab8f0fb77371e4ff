"""RewardModel: a trained model in a user's hands."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pal_jax import adaptation, features
from pal_jax.adaptation.queries import choose_questions
from pal_jax.adaptation.solver import UserState
from pal_jax.adaptation.users import power_of_two
from pal_jax.data.texts import together
from pal_jax.errors import InputError
from pal_jax.features.checks import first_bad_row
from pal_jax.features.table import SHIPPED, normalize_rows
from pal_jax.rewards import expected_rewards
from pal_jax.saved_model import (
  CARD,
  MODEL_FOLDER,
  SavedModel,
  load_model,
  save_model,
)
from pal_jax.structs import FeatureTable, make_comparisons

_BATCH = 4096  # candidates scored at a time; bounds memory
_BELIEF = ('bald', 'd_optimality')  # strategies that need one
_REMEMBERED = 10_000  # texts whose vectors stay in memory


@dataclasses.dataclass(frozen=True, eq=False)  # a key of mixtures
class User:
  """What is known of somebody: a belief over points of the simplex."""

  log_atoms: np.ndarray  # [A, K]
  log_belief: np.ndarray  # [A]

  @property
  def weights(self) -> np.ndarray:
    """[K] the posterior mean, on the simplex."""
    return np.exp(self.log_belief) @ np.exp(self.log_atoms)


@dataclasses.dataclass(frozen=True)
class Preference:
  """Of `a` over `b`; floats, or arrays where several pairs were given."""

  probability: Any
  low: Any  # of a credible interval of the probability
  high: Any


@dataclasses.dataclass(frozen=True)
class Ranking:
  order: np.ndarray  # [N] rows of the responses, best first
  rewards: np.ndarray  # [N] of the responses as given


# An id, a User, K weights, or {id or User: share}; None is the population.
AnyUser = str | User | Sequence[float] | np.ndarray | Mapping | None


class RewardModel:
  """Scores, compares and ranks responses for a user, and learns new users.

  Prompts and responses are strings, or feature vectors [D] as the model's
  encoder gives them; one, or N of them. Features of PAL-A are of prompt and
  response together, so no prompt goes with them.

  Users are ids, which are strings (people of the training set and those
  adapted since), `User`s, K weights in any positive scale, a mixture {user:
  share}, or None, the population. A list, tuple or array of numbers is K
  weights; of anything else, several users.

  Args:
    saved: from `saved_model.load_model`.
  """

  def __init__(self, saved: SavedModel):
    self._saved = saved
    self.model, self.variables = saved.model, saved.variables
    self._prior = jax.tree.map(jnp.asarray, saved.prior)
    # People whose weights came without the answers behind them.
    self._trained = {
      name: row
      for row, name in enumerate(saved.card.get('trained_users', ()))
      if name is not None
    }
    # One array for all who were adapted: `_together` knows them by it.
    self._log_atoms = _frozen(saved.prior.log_atoms)
    self._encoder = None
    self._vectors: dict[str, np.ndarray] = {}  # of the latest texts

  @classmethod
  def load(cls, path: str | Path) -> 'RewardModel':
    """Of a finished workdir, or of a folder that `save` wrote.

    Raises:
      InputError: if it is neither, or damaged.
    """
    path = Path(path).expanduser()
    inside = path / MODEL_FOLDER
    return cls(load_model(inside if (inside / CARD).exists() else path))

  def save(self, folder: str | Path) -> Path:
    """Writes the model and its users, whole or not at all.

    Raises:
      InputError: if something that is no saved model stands there.
    """
    return save_model(self._saved, folder)

  @property
  def card(self) -> dict[str, Any]:
    """What the model is; a copy."""
    return copy.deepcopy(self._saved.card)

  @property
  def users(self) -> tuple[str, ...]:
    """Ids, in the order in which they came."""
    return (*self._trained, *self._saved.users.ids)

  def features(self, texts: Sequence[str]) -> np.ndarray:
    """[N, D] of N texts, by the encoder that the model was trained with.

    The latest ten thousand are remembered; nothing is written to disk.

    Raises:
      InputError: if it was trained on vectors of unknown origin, or the
        encoder at hand is another one.
    """
    known = self._saved.card['encoder']
    if known is None:
      raise InputError(
        'this model was trained on feature vectors that came with the data: '
        'give features [N, D] instead of strings'
      )
    config = ml_collections.ConfigDict(self._saved.card['features'])
    config.cache_dir, config.batch_size = '', 64
    if self._encoder is None:
      encoder = features.create(config)
      if encoder.version != known['version']:
        raise InputError(
          f'the encoder at hand is {encoder.name} {encoder.version}, the model '
          f'was trained with {known["name"]} {known["version"]}: scores would '
          'mean nothing; install that one, or give features'
        )
      self._encoder = encoder
    texts = list(texts)
    new = [t for t in dict.fromkeys(texts) if t not in self._vectors]
    if new:
      vectors = features.lookup_or_encode(
        new, self._encoder, stores=[SHIPPED], dtype=config.dtype, keep=False
      )
      vectors = normalize_rows(vectors, config.normalize)
      if len(self._vectors) + len(new) > _REMEMBERED:
        known = {t: self._vectors[t] for t in texts if t in self._vectors}
        self._vectors = known
      self._vectors |= dict(zip(new, vectors, strict=True))
    return np.stack([self._vectors[text] for text in texts])

  def reward(self, prompt, response, user: AnyUser | list = None):
    """The posterior mean of the reward, in log odds.

    Rewards are compared within one user and, for PAL-B, one prompt; their
    origin means nothing (`pal_jax.rewards`). A difference is the mean logit of
    a preference; `prefer` gives its probability, the mean of probabilities,
    and where little is known of a user the two may disagree.

    Args:
      prompt: None, a string, N strings, or features.
      response: a string, N strings, or features [D] or [N, D].
      user: one, or several, U.

    Returns:
      A float; [N] for N responses; [U] or [U, N] for several users.

    Raises:
      InputError: if a user is unknown or shapes do not fit.
    """
    single = _is_single(response)
    table = self._feature_table(prompt, _as_rows(response))
    several = _are_several(user)
    people = [self.user(u) for u in (user if several else [user])]
    if not people:
      raise InputError('the list of users is empty')
    found = self._rewards(table, people)
    found = found[:, 0] if single else found
    found = found if several else found[0]
    return float(found) if np.ndim(found) == 0 else found

  def prefer(
    self, prompt, a, b, user: AnyUser = None, level: float = 0.9
  ) -> Preference:
    """The probability that a user prefers `a` to `b`, one pair or N.

    The interval is as narrow as a point where no more than a point is known of
    the user (K weights, converted checkpoints, adaptation.method='map').

    Args:
      prompt, a, b: as `reward` takes them; `a` and `b` alike.
      user: one.
      level: probability in the credible interval, in (0, 1).

    Raises:
      InputError: as `reward`.
    """
    if not 0.0 < level < 1.0:
      raise InputError(f'level={level} must lie in (0, 1), for example 0.9')
    single = _is_single(a)
    person = self.user(user)
    z = self._pair_logits(prompt, _as_rows(a), _as_rows(b), person)
    belief = jnp.asarray(person.log_belief)
    log_odds = adaptation.predict(self._prior, belief, z)
    low, high = adaptation.credible_interval(belief, z, level)
    values = [np.asarray(jax.nn.sigmoid(v)) for v in (log_odds, low, high)]
    return Preference(*(float(v[0]) if single else v for v in values))

  def rank(
    self, prompt, responses, user: AnyUser = None, *, seed: int | None = None
  ) -> Ranking:
    """Best of n, or with a seed Thompson sampling from the posterior.

    A user of whom a point is known (K weights, converted checkpoints,
    adaptation.method='map') is always drawn the same.

    Args:
      prompt: one for all.
      responses: N strings, or features [N, D].
      user: one.
      seed: of the draw; None ranks by the posterior mean.

    Raises:
      InputError: as `reward`.
    """
    person = self.user(user)
    if seed is not None:
      rng = np.random.default_rng(seed)
      mass = np.exp(person.log_belief.astype(np.float64))
      drawn = rng.choice(len(mass), p=mass / mass.sum())
      person = User(person.log_atoms[drawn][None], np.zeros(1, np.float32))
    found = self._rewards(
      self._feature_table(prompt, _as_rows(responses)), [person]
    )[0]
    return Ranking(np.argsort(-found, kind='stable'), found)

  def adapt(self, comparisons: Iterable, user: str | None = None) -> User:
    """Learns a user from comparisons; nobody else changes.

    Args:
      comparisons: mappings with 'response_a', 'response_b' and 'label' (1, 0
        or between), or with 'chosen' and 'rejected'; with 'prompt' if there is
        one. Or tuples (prompt, a, b, label).
      user: an id. The user joins `users`; one that is there has these
        comparisons added to those before. None keeps nothing. Without any
        comparison nothing changes and nobody joins.

    Raises:
      InputError: naming the comparison that is not as expected.
    """
    if user is not None and not isinstance(user, str):
      raise InputError(
        f'user={user!r} is a {type(user).__name__}: an id is a string'
      )
    if user in self._trained:
      raise InputError(
        f'user {user!r} came with trained weights and without the answers they '
        'were trained on, so that answers cannot be added: use another id'
      )
    rows = [_parse(i, c) for i, c in enumerate(comparisons)]
    if not rows:
      return self.user(user if user in self._saved.users else None)
    prompts, first, second, label = zip(*rows, strict=True)
    prompts = None if all(p is None for p in prompts) else list(prompts)
    stats = self._statistics(prompts, list(first), list(second))
    stats = stats.map(lambda x: x[None])
    label = np.array([label], np.float32)
    if user is not None:
      self._saved.users.update([user], stats, label)
      return self.user(user)
    padded = power_of_two(len(rows))
    extra = padded - len(rows)
    stats = stats.map(
      lambda x: jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))
    )
    state = adaptation.adapt(
      self.model,
      self.variables,
      stats,
      np.pad(label, ((0, 0), (0, extra))),
      np.arange(padded)[None] < len(rows),
      self._prior,
      method=self._saved.card['adaptation']['method'],
    )
    return self._from_state(jax.tree.map(lambda x: x[0], state))

  def forget(self, user: str) -> None:
    """Deletes a user's answers, or trained weights, and what followed.

    The network and the population, which everybody shaped, stay as they are.

    Raises:
      InputError: if the user is not there.
    """
    if user not in self._trained:
      self._saved.users.forget(user)
      return
    row = self._trained.pop(user)
    params = self.variables['params']
    params['user_logits'] = np.array(params['user_logits'])
    params['user_logits'][row] = 0.0
    self._saved.card['trained_users'][row] = None

  def next_question(
    self,
    user: AnyUser,
    pool: Sequence,
    *,
    size: int = 1,
    strategy: str = 'bald',
    seed: int = 0,
  ) -> list[int]:
    """The pairs of a pool whose answers tell most about the user.

    Args:
      user: one.
      pool: pairs as `adapt` takes comparisons, without labels; a tuple is
        (prompt, a, b).
      size: pairs to ask together.
      strategy: as in `adaptation.queries`.
      seed: of 'random'.

    Returns:
      [size] positions in the pool, best first.

    Raises:
      InputError: as `adapt`, or if the pool is too small.
    """
    rows = [_parse(i, c, labelled=False) for i, c in enumerate(pool)]
    if not rows:
      raise InputError('the pool is empty: give pairs to choose from')
    prompts, first, second, _ = zip(*rows, strict=True)
    prompts = None if all(p is None for p in prompts) else list(prompts)
    person = self.user(user)
    number = len(person.log_belief)
    if number == 1 and self.model.num_prototypes > 1 and strategy in _BELIEF:
      raise InputError(
        f'strategy={strategy!r} asks what is not known of a user, but here a '
        "point is known and no belief: use 'uncertainty' or 'random'"
      )
    if not 1 <= size <= len(rows):
      raise InputError(f'size={size} of a pool of {len(rows)} pairs')
    z = self._pair_logits(prompts, list(first), list(second), person)
    # One shape for pools that shrink as they are asked.
    available = np.arange(power_of_two(len(rows))) < len(rows)
    chosen = choose_questions(
      strategy,
      jnp.asarray(person.log_belief),
      jnp.asarray(_pad_rows(z)),
      size,
      jax.random.key(seed),
      jnp.asarray(available),
    )
    return np.asarray(chosen).tolist()

  def user(self, user: AnyUser = None) -> User:
    """What the other methods make of their `user`.

    Raises:
      InputError: if an id is unknown, or weights are not K numbers of which
        one is positive and none negative.
    """
    if isinstance(user, User):
      return user
    if user is None:
      return self._from_state(self._saved.users.population)
    if isinstance(user, str) and user in self._trained:
      log_w = self.model.apply(
        self.variables,
        jnp.array([self._trained[user]]),
        method='user_log_weights',
      )
      return User(_frozen(log_w), _frozen(np.zeros(1, np.float32)))
    if isinstance(user, str):
      if user not in self._saved.users:
        raise InputError(
          f'user {user!r} is unknown: users=None is the population, '
          'adapt(comparisons, user=...) learns somebody new'
        )
      found = self._saved.users.lookup([user]).users
      return self._from_state(jax.tree.map(lambda x: x[0], found))
    if isinstance(user, Mapping):
      shares = _shares(list(user.values()), len(user), 'shares of users')
      atoms, belief = _together([self.user(u) for u in user])
      mixed = np.logaddexp.reduce(belief[: len(user)] + shares[:, None])
      return User(_frozen(atoms), _frozen(mixed))
    weights = _shares(user, self.model.num_prototypes, 'weights')
    return User(_frozen(weights[None]), _frozen(np.zeros(1, np.float32)))

  def _from_state(self, state: UserState) -> User:
    if state.log_belief is None:  # a point estimate
      point = np.asarray(state.log_weights)[None]
      return User(_frozen(point), _frozen(np.zeros(1, np.float32)))
    return User(self._log_atoms, _frozen(state.log_belief))

  def _rewards(self, table: FeatureTable, people: list[User]) -> np.ndarray:
    """[U, N]."""
    atoms, belief = _together(people)
    out = []
    for start in range(0, len(table.items), _BATCH):
      piece = FeatureTable(
        table.items[start : start + _BATCH],
        table.prompts
        if len(table.prompts) == 1
        else table.prompts[start : start + _BATCH],
      )
      found = expected_rewards(
        self.model, self.variables, self._place(piece), atoms, belief
      )
      out.append(np.asarray(found)[: len(piece.items), : len(people)].T)
    return np.concatenate(out, axis=1)

  def _pair_logits(self, prompt, a: list, b: list, person: User) -> jax.Array:
    """[N, A] logits at the atoms of a user."""
    return adaptation.atom_logits(
      self.model,
      self.variables,
      self.model.adaptation_rule,
      jnp.asarray(person.log_atoms),
      self._statistics(prompt, a, b),
    )

  def _statistics(self, prompt, a, b) -> adaptation.Statistics:
    """Of N pairs, leading axis [N]."""
    count = len(a)
    if len(b) != count:
      raise InputError(
        f'{count} responses a and {len(b)} responses b: a pair needs both'
      )
    prompts = None if prompt is None else _as_rows(prompt)
    if prompts is not None and len(prompts) not in (1, count):
      raise InputError(
        f'{len(prompts)} prompts for {count} pairs: give one, or one each'
      )
    if prompts is not None and len(prompts) > 1:
      prompts = [*prompts, *prompts]
    table = self._feature_table(prompts, [*a, *b])
    rows = np.arange(count)
    comparisons = make_comparisons(
      0,
      np.stack([rows, count + rows], -1),
      np.full(count, 0.5),
      prompt=rows if len(table.prompts) > 1 else np.zeros(count, int),
    )
    stats = adaptation.statistics(
      self.model,
      self.variables,
      self._place(table),
      jax.tree.map(_pad_rows, comparisons),
      self.model.adaptation_rule,
    )
    return stats.map(lambda x: x[:count])

  def _place(self, table: FeatureTable) -> adaptation.Placed:
    """Padded to powers of two, so that few shapes are ever compiled."""
    return adaptation.place(
      self.model,
      self.variables,
      FeatureTable(_pad_rows(table.items), _pad_rows(table.prompts)),
    )

  def _feature_table(self, prompt, responses) -> FeatureTable:
    """Features of N responses, and of their N prompts or the one prompt."""
    count = len(responses)
    if not count:
      raise InputError('there is no response to score')
    prompts = _as_rows(prompt) if prompt is not None else [None]
    if len(prompts) not in (1, count):
      raise InputError(
        f'{len(prompts)} prompts for {count} responses: give one, or one each'
      )
    if isinstance(responses[0], str):
      return self._text_table(prompts, responses)
    items = self._given(responses, 'responses')
    joined = self._saved.card['join_prompt']
    if joined and any(p is not None for p in prompts):
      raise InputError(
        'features of this model are of prompt and response together: encode '
        'them so, and give prompt=None'
      )
    if joined:
      return FeatureTable(items, np.zeros((1, items.shape[1]), np.float32))
    if any(p is None for p in prompts):
      raise InputError(
        'this model (PAL-B) needs the features of the prompt beside those of '
        'the responses'
      )
    return FeatureTable(items, self._given(prompts, 'prompts'))

  def _text_table(self, prompts, responses) -> FeatureTable:
    count = len(responses)
    if any(p is not None and not isinstance(p, str) for p in prompts):
      raise InputError('responses are strings, so prompts must be, too')
    if self._saved.card['join_prompt']:
      every = prompts if len(prompts) == count else prompts * count
      texts = [together(p, r) for p, r in zip(every, responses, strict=True)]
      items = self.features(texts)
      return FeatureTable(items, np.zeros((1, items.shape[1]), np.float32))
    if any(p is None for p in prompts):
      raise InputError('this model (PAL-B) needs the prompt of a response')
    found = self.features([*responses, *prompts])
    return FeatureTable(found[:count], found[count:])

  def _given(self, vectors, what: str) -> np.ndarray:
    """[N, D] features of a caller, normalised as in training."""
    width = self._saved.card['feature_width']
    try:
      array = np.asarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
      raise InputError(
        f'{what} are neither strings nor vectors of one length: {error}'
      ) from error
    if array.ndim != 2 or array.shape[1] != width:
      raise InputError(
        f'{what} have the shape {array.shape}; expected feature vectors of '
        f'width {width}, one as an array [{width}], N as [N, {width}]'
      )
    bad = first_bad_row(array)
    if bad is not None:
      raise InputError(f'{what}: row {bad} holds NaN or infinity')
    if self._saved.card['encoder'] is None:
      return array
    return normalize_rows(array, self._saved.card['features']['normalize'])


def _is_single(response) -> bool:
  if isinstance(response, str):
    return True
  if isinstance(response, list | tuple):
    return False
  array = np.asarray(response)
  return array.ndim == 1 and array.dtype.kind not in 'UO'


def _as_rows(values):
  """One string or vector, or several, as several."""
  if isinstance(values, list | tuple):
    return values
  if isinstance(values, str):
    return [values]
  array = np.asarray(values)
  if array.dtype.kind in 'UO':  # texts
    return array.ravel().tolist()
  if array.ndim not in (1, 2):
    raise InputError(
      f'{values!r} is neither a string, a list of strings, nor features [D] or '
      '[N, D]'
    )
  return np.atleast_2d(array)


def _are_several(user) -> bool:
  """Whether it is a sequence of users and not of K weights."""
  if not isinstance(user, list | tuple | np.ndarray):
    return False
  return not len(user) or not all(
    isinstance(x, int | float | np.number) for x in user
  )


def _frozen(array) -> np.ndarray:
  """A copy that nobody can change: users share it."""
  array = np.array(array)
  array.flags.writeable = False
  return array


def _shares(values, count: int, what: str) -> np.ndarray:
  """Logarithms [count] of positive shares, normalised."""
  try:
    array = np.asarray(values, np.float64)
  except (TypeError, ValueError) as error:
    raise InputError(f'{what}={values!r} are no numbers') from error
  if (
    array.shape != (count,)
    or not np.isfinite(array).all()
    or (array < 0).any()
    or not array.sum() > 0
  ):
    raise InputError(
      f'{what}={values!r}: expected {count} numbers of which none is negative '
      'and one is positive; they need not sum to 1'
    )
  with np.errstate(divide='ignore'):
    return np.log(array / array.sum()).astype(np.float32)


def _together(people: list[User]) -> tuple[np.ndarray, np.ndarray]:
  """(atoms [A, K], beliefs [U, A]), padded to powers of two.

  Users who share their atoms, as all do who were adapted, share them here.
  """
  atoms, place = [], {}
  total = 0
  for person in people:
    if id(person.log_atoms) not in place:
      place[id(person.log_atoms)] = total
      atoms.append(person.log_atoms)
      total += len(person.log_atoms)
  width = power_of_two(total) if len(atoms) > 1 else total
  atoms.append(np.repeat(atoms[0][:1], width - total, axis=0))
  belief = np.full((power_of_two(len(people)), width), -np.inf, np.float32)
  for row, person in enumerate(people):
    start = place[id(person.log_atoms)]
    belief[row, start : start + len(person.log_atoms)] = person.log_belief
  return np.concatenate(atoms), belief


def _pad_rows(array) -> np.ndarray:
  array = np.asarray(array)
  extra = power_of_two(len(array)) - len(array)
  return np.pad(array, ((0, extra),) + ((0, 0),) * (array.ndim - 1))


def _parse(number: int, comparison, labelled: bool = True):
  """(prompt, a, b, label) of a mapping or a tuple."""
  where = f'comparison {number}'
  if isinstance(comparison, Mapping):
    prompt = comparison.get('prompt')
    if 'chosen' in comparison and 'rejected' in comparison:
      if 'label' in comparison:
        raise InputError(
          f'{where} has chosen and rejected, and a label: give one of both'
        )
      return prompt, comparison['chosen'], comparison['rejected'], 1.0
    names = ('response_a', 'response_b', *(('label',) if labelled else ()))
    missing = [name for name in names if name not in comparison]
    if missing:
      raise InputError(
        f'{where} has no {missing[0]!r}: expected response_a, response_b'
        f'{" and label" if labelled else ""}, or chosen and rejected; it has '
        f'{sorted(comparison)}'
      )
    values = [comparison[name] for name in names]
  else:
    size = 4 if labelled else 3
    if not isinstance(comparison, list | tuple) or len(comparison) != size:
      raise InputError(
        f'{where}: expected a mapping or a tuple (prompt, a, b'
        f'{", label" if labelled else ""}), got {comparison!r}'
      )
    prompt, *values = comparison
  if not labelled:
    return prompt, *values[:2], 0.5
  a, b, label = values
  number = np.asarray(label)
  if number.ndim or number.dtype.kind not in 'biuf' or not 0 <= number <= 1:
    raise InputError(
      f'{where}: label {label!r} must be 1 (the first is better), 0, or a '
      'number between'
    )
  return prompt, a, b, float(number)
