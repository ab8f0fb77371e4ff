"""What PAL-A and PAL-B share: users, membership, rewards and logits.

A model places candidates, `x = f(h)`, and gives every user an ideal point
mixed from K prototypes. A subclass says what is mixed (`basis`) and what
happens to the mixture (`finish`). No loss, no optimiser, no data.

Users are handled as `log_weights` [..., K], logarithms of points on the
simplex, because everything downstream (mixtures, adaptation) wants logarithms.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pal_jax.ideal_points import PREFERENCES, mix, prototype_logits
from pal_jax.mixtures import gumbel_straight_through, harden, mixture_logit
from pal_jax.models.projectors import Projector
from pal_jax.numerics import log_mean_weights, safe_norm

MEMBERSHIPS = ('convex', 'partition', 'mixture_likelihood')
RULES = ('convex', 'argmax', 'mixture')
MAX_SCALE = 100.0  # clamp of tau, as CLIP and the reference have it
MIN_TEMPERATURE = 1e-2


@flax.struct.dataclass
class Outputs:
  """What the model says of a batch; logits are log odds of the first."""

  logit: jax.Array  # [B]
  delta: jax.Array | None  # [B, K] logits per prototype, if likelihoods mix
  log_weights: jax.Array  # [B, K] of the users
  norm: jax.Array  # [B] ||u_i||, or its mean over a user's prototypes
  nested: tuple[jax.Array, ...]  # logits [B] of the Matryoshka prefixes


@flax.struct.dataclass
class Rows:
  """Where comparisons find their texts among rows of features."""

  items: jax.Array  # [B, 2] places in the candidates [S, D]
  item_count: jax.Array  # [S] how often each is shown, 0 for padding
  prompts: jax.Array  # [B] places in the prompts [T, D]
  prompt_count: jax.Array  # [T]


class IdealPointModel(nn.Module):
  """r_i(x) = tau * preference(f(h), u_i), logit = r_i(a) - r_i(b)."""

  num_users: int
  num_prototypes: int = 4  # K
  width: int = 64  # P
  preference: str = 'squared_distance'
  membership: str = 'convex'
  mixture_level: str = 'comparison'  # or 'user'; for mixture_likelihood
  gumbel: bool = False  # straight-through samples; for partition
  gumbel_temperature: float = 1.0
  learn_scale: bool = True
  init_user_scale: float = 0.1  # standard deviation of the users' logits
  projector: str = 'mlp2'
  activation: str = 'gelu'
  dropout: float = 0.0
  residual: bool = False
  batch_norm: bool = False
  use_bias: bool = True
  compute_dtype: str = 'float32'  # of the projectors' products, or 'bfloat16'
  matryoshka: tuple[int, ...] = ()  # widths of nested prefixes of P
  axis_name: str | None = None  # of a pmap, for batch norm
  row_multiple: int = 1  # which the rows of the user table are filled up to

  def setup(self):
    self.embedder = Projector(name='projector', **self.projector_fields())
    # The cosine starts at CLIP's tau; distances at the reward as written.
    start = np.log(1 / 0.07) if self.preference == 'cosine' else 0.0
    self.log_scale = self.param(
      'log_scale', nn.initializers.constant(start), ()
    )
    if self.user_level:
      self.class_logits = self.param(
        'class_logits', nn.initializers.zeros, (self.num_prototypes,)
      )
    else:
      self.user_logits = self.param(
        'user_logits',
        nn.initializers.normal(self.init_user_scale),
        (self.num_rows, self.num_prototypes),
      )
      self.log_temperature = self.param(
        'log_temperature', nn.initializers.zeros, ()
      )

  def projector_fields(self) -> dict[str, Any]:
    return {
      'width': self.width,
      'kind': self.projector,
      'activation': self.activation,
      'dropout': self.dropout,
      'residual': self.residual,
      'batch_norm': self.batch_norm,
      'use_bias': self.use_bias,
      'compute_dtype': self.compute_dtype,
      'axis_name': self.axis_name,
    }

  @property
  def num_rows(self) -> int:
    """Of the user table: its users', and those that fill it up."""
    return -(-self.num_users // self.row_multiple) * self.row_multiple

  @property
  def user_level(self) -> bool:
    """Whether users are latent classes, without weights of their own."""
    return (
      self.membership == 'mixture_likelihood' and self.mixture_level == 'user'
    )

  @property
  def mixes_likelihoods(self) -> bool:
    return self.membership == 'mixture_likelihood'

  @property
  def training_rule(self) -> str:
    """How weights become a logit while training (a key of RULES)."""
    return 'mixture' if self.mixes_likelihoods else 'convex'

  @property
  def evaluation_rule(self) -> str:
    """The rule for users whose weights are settled: partition is arg-max."""
    return 'argmax' if self.membership == 'partition' else self.training_rule

  @property
  def adaptation_rule(self) -> str:
    """The rule for users with few comparisons.

    Under a partition they are uncertain about their class, so likelihoods are
    mixed by its posterior (METHOD section 1).
    """
    return 'convex' if self.membership == 'convex' else 'mixture'

  # What subclasses define.

  def basis(self, prompts: jax.Array, train: bool = False, mask=None):
    """The K things that are mixed: [..., D] -> [..., K, P or D]."""
    raise NotImplementedError

  def of_prompt(self, basis: jax.Array, place: jax.Array) -> jax.Array:
    """What `basis` made of prompts [T, D], for those at places [B]."""
    raise NotImplementedError

  def finish(self, mixed: jax.Array, train: bool = False) -> jax.Array:
    """From the mixture to the ideal point, [..., P]."""
    del train
    return mixed

  # Pieces, used by training, adaptation and evaluation alike.

  def scale(self) -> jax.Array:
    """tau = exp(s), at most 100."""
    s = (
      self.log_scale
      if self.learn_scale
      else jax.lax.stop_gradient(self.log_scale)
    )
    return jnp.minimum(jnp.exp(s), MAX_SCALE)

  def temperature(self) -> jax.Array:
    """Of the softmax over a user's logits; positive by construction."""
    return jnp.maximum(jnp.exp(self.log_temperature), MIN_TEMPERATURE)

  def embed(self, h: jax.Array, train: bool = False, mask=None) -> jax.Array:
    """Places candidates: [..., D] -> [..., P]."""
    return self.embedder(h, train, mask)

  def user_log_weights(self, user: jax.Array) -> jax.Array:
    """[...] rows of the user table -> [..., K].

    A row outside the table gives NaN, never another user's weights: an
    unknown user is the population, which the caller chooses explicitly. Under
    the user-level mixture every user has the class prior.
    """
    if self.user_level:
      prior = jax.nn.log_softmax(self.class_logits)
      return jnp.broadcast_to(prior, (*user.shape, self.num_prototypes))
    # -1 wraps to the last row even with mode='fill': send it off the table.
    outside = (user < 0) | (user >= self.num_users)
    row = jnp.where(outside, self.num_rows, user)
    logits = jnp.take(
      self.user_logits, row, axis=0, mode='fill', fill_value=jnp.nan
    )
    return jax.nn.log_softmax(logits / self.temperature(), axis=-1)

  def population_log_weights(self) -> jax.Array:
    """[K] log of the mean of all users' weights; no gradient reaches them."""
    users = self.user_log_weights(jnp.arange(self.num_users))
    return jax.lax.stop_gradient(log_mean_weights(users))

  def ideal_points(
    self, weights: jax.Array, basis: jax.Array, train: bool = False
  ) -> jax.Array:
    """[..., K], [..., K, :] -> [..., P]."""
    return self.finish(mix(weights, basis), train)

  def logits(
    self,
    log_weights: jax.Array,
    x: jax.Array,
    basis: jax.Array,
    rule: str,
  ) -> jax.Array:
    """Log odds that the first candidate is preferred.

    Args:
      log_weights: [..., K] of each comparison's user.
      x: [..., 2, P] placed candidates.
      basis: [..., K, :] what `basis` returned; may lack leading axes.
      rule: 'convex', one reward at the mixed ideal point; 'argmax', at the
        nearest vertex of the simplex; 'mixture', likelihoods mixed.

    Returns:
      [...].
    """
    if rule == 'mixture':
      return mixture_logit(log_weights, self.deltas(x, basis))
    weights = harden(log_weights) if rule == 'argmax' else jnp.exp(log_weights)
    return self.convex_logits(x, self.ideal_points(weights, basis))

  def deltas(self, x: jax.Array, basis: jax.Array) -> jax.Array:
    """[..., 2, P], [..., K, :] -> [..., K] logits under each prototype."""
    points = self.finish(basis)
    return self.scale() * prototype_logits(x, points, self.preference)

  def convex_logits(self, x: jax.Array, u: jax.Array) -> jax.Array:
    """[..., 2, P], [..., P] -> [...]."""
    reward = PREFERENCES[self.preference](x, u[..., None, :])
    return self.scale() * (reward[..., 0] - reward[..., 1])

  def __call__(
    self,
    user: jax.Array,
    items: jax.Array,
    prompts: jax.Array,
    train: bool = False,
    mask: jax.Array | None = None,
    anonymous: jax.Array | None = None,
    rows: Rows | None = None,
  ) -> Outputs:
    """Scores a batch of comparisons by users of the table.

    Args:
      user: [B] rows of the user table.
      items: [B, 2, D] features of the candidates.
      prompts: [B, D] features of the prompts; PAL-A ignores them.
      train: enables dropout, Gumbel noise, batch statistics and the soft form
        of partition.
      mask: [B] False for padding; only batch norm needs it.
      anonymous: [B] True where the population stands in for the user, so that
        the model learns to serve people it knows nothing of (METHOD section
        3). It has no effect under the user-level mixture, whose users are the
        population before they answer.
      rows: where comparisons find their texts; `items` are then the distinct
        candidates [S, D] and `prompts` the distinct prompts [T, D], and `mask`
        is not read. A text that several comparisons share has one draw of
        dropout.
    """
    if rows is None:
      if mask is None:
        mask = jnp.ones(user.shape, bool)
      x = self.embed(
        items, train, jnp.broadcast_to(mask[:, None], (*user.shape, 2))
      )
      basis = self.basis(prompts, train, mask)
    else:
      x = self.embed(items, train, rows.item_count)[rows.items]
      basis = self.of_prompt(
        self.basis(prompts, train, rows.prompt_count), rows.prompts
      )
    log_w = self.user_log_weights(user)
    if anonymous is not None and not self.user_level:
      log_w = jnp.where(
        anonymous[:, None], self.population_log_weights(), log_w
      )
    if self.mixes_likelihoods:
      points = self.finish(basis, train)
      weights = jnp.exp(log_w)
      norm = jnp.sum(weights * safe_norm(points), axis=-1)
      nested = tuple(
        self.scale()
        * prototype_logits(x[..., :p], points[..., :p], self.preference)
        for p in (*self.matryoshka, self.width)
      )
      logits = tuple(mixture_logit(log_w, delta) for delta in nested)
      return Outputs(logits[-1], nested[-1], log_w, norm, logits[:-1])
    if not train:
      weights = (
        harden(log_w) if self.membership == 'partition' else jnp.exp(log_w)
      )
    elif self.gumbel and self.membership == 'partition':
      weights = gumbel_straight_through(
        self.make_rng('gumbel'), log_w, self.gumbel_temperature
      )
    else:
      weights = jnp.exp(log_w)
    u = self.ideal_points(weights, basis, train)
    nested = [
      self.convex_logits(x[..., :p], u[..., :p])
      for p in (*self.matryoshka, self.width)
    ]
    if anonymous is not None and self.membership == 'partition':
      # A new user under a partition is uncertain of the class, not between
      # classes: likelihoods are mixed, as in adaptation.
      points = self.finish(basis, train)
      for i, p in enumerate((*self.matryoshka, self.width)):
        delta = prototype_logits(x[..., :p], points[..., :p], self.preference)
        mixed = mixture_logit(log_w, self.scale() * delta)
        nested[i] = jnp.where(anonymous, mixed, nested[i])
    return Outputs(nested[-1], None, log_w, safe_norm(u), tuple(nested[:-1]))
