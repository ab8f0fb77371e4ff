"""What a user's weights see of comparisons, computed once.

Fitting K weights need not touch the encoder's features or the preference
space again (METHOD section 1, "An identity worth using"):

| form                                          | statistic of a comparison  |
|-----------------------------------------------|----------------------------|
| linear logits; mixed likelihoods              | `delta`, K logits          |
| cosine, distances with `Pw`, `f(P)w`,         | `x`, two points in R^(K+1),|
| `|f(P)|w`, PAL-B                              | and `basis`, K points there|
| `f(Pw)`                                       | `x` in R^P; the network on |
|                                               | one vector a user          |

Every reward is a function of distances and inner products of a candidate x
and the prototypes' mixture u, and u never leaves the prototypes' span. So x is
written in an orthonormal basis of that span, and what sticks out of it becomes
one more coordinate, its length: an isometry from R^P to R^(K+1), which holds
the same information as <x, p_k>, ||x||^2 and the Gram matrix, but computes
||x - u||^2 without cancellation.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pal_jax.ideal_points import PREFERENCES
from pal_jax.mixtures import mixture_logit
from pal_jax.models.ideal_point_model import IdealPointModel
from pal_jax.numerics import safe_norm
from pal_jax.structs import Comparisons, FeatureTable

# Numbers of the preference space that are gathered at once; more comparisons
# are reduced in blocks. (A gigabyte, with the copies that XLA makes of it.)
_AT_ONCE = 2**26
_BLOCK = 2**14  # comparisons, or rows of a table on the host
LINEAR_PREFERENCES = ('squared_distance', 'inner_product')
TINY = 1e-37  # keeps logarithms of likelihoods finite in float32


@flax.struct.dataclass
class Placed:
  """Every item and prompt of a table, through the frozen network once."""

  x: jax.Array  # [M, P] placed items
  basis: jax.Array  # [K, :], or [Q, K, P] if it depends on the prompt


@flax.struct.dataclass
class Statistics:
  """Comparisons as a function of the user's weights; leading axes [...].

  Either `delta`, or `x` and `basis`. R is K + 1, or P if that is not more, or
  for `f(Pw)`.
  """

  delta: jax.Array | None  # [..., K]
  x: jax.Array | None  # [..., 2, R]
  basis: jax.Array | None  # [K, R] of all, or [..., K, R] with the prompt

  @property
  def shared_basis(self) -> bool:
    """Whether `basis` lacks the leading axes."""
    return self.basis is not None and self.basis.ndim == 2

  def map(self, function) -> 'Statistics':
    """Applies a function to the arrays that have the leading axes."""
    keep = self.shared_basis
    return Statistics(
      *(
        x if x is None or (keep and i == 2) else function(x)
        for i, x in enumerate((self.delta, self.x, self.basis))
      )
    )

  @property
  def axes(self) -> 'Statistics':
    """For `vmap` over the first leading axis."""
    return Statistics(0, 0, None if self.shared_basis else 0)


def place(model: IdealPointModel, variables, table: FeatureTable) -> Placed:
  """Runs the frozen network over a feature table, in evaluation mode.

  Of a long table on the host the features of a block at a time are on the
  device.
  """
  return Placed(
    _in_blocks(functools.partial(_embed, model, variables), table.items, 2),
    _in_blocks(functools.partial(_basis, model, variables), table.prompts, 3),
  )


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: IdealPointModel, variables, items):
  return model.apply(variables, items.astype(jnp.float32), method='embed')


@functools.partial(jax.jit, static_argnums=0)
def _basis(model: IdealPointModel, variables, prompts):
  prompts = prompts.astype(jnp.float32)
  return model.apply(variables, prompts, method='basis')


def _in_blocks(function, rows, axes: int):
  """function(rows [N, D]), which is [N, ...] if it has so many axes.

  With fewer it does not depend on the rows.
  """
  if isinstance(rows, jax.Array):
    return function(rows)
  number = rows.shape[0]
  if number <= _BLOCK:
    return function(rows[:])
  whole = None
  for start in range(0, number, _BLOCK):
    start = min(start, number - _BLOCK)  # whole blocks: one compilation
    found = function(rows[start : start + _BLOCK])
    if found.ndim < axes:
      return found
    if whole is None:
      whole = np.empty((number, *found.shape[1:]), found.dtype)
    whole[start : start + _BLOCK] = found
  return jnp.asarray(whole)


def _gather(placed: Placed, comparisons: Comparisons):
  x = placed.x[comparisons.items]  # [..., 2, P]
  basis = placed.basis
  if basis.ndim == 3:
    basis = basis[comparisons.prompt]  # [..., K, P]
  return x, basis


def uses_network(model: IdealPointModel) -> bool:
  """Whether the ideal point is f of the mixture, not a mixture."""
  return getattr(model, 'point', '') == 'f(Pw)'


def is_linear(model: IdealPointModel, rule: str) -> bool:
  """Whether logit = weights @ delta."""
  return (
    rule == 'convex'
    and model.preference in LINEAR_PREFERENCES
    and not uses_network(model)
  )


def is_convex(model: IdealPointModel, rule: str) -> bool:
  """Whether the negative log-likelihood is convex in the weights.

  It is for linear logits and for mixed likelihoods, because the logistic loss
  is convex and a mixture is linear in the weights under the logarithm.
  """
  return rule == 'mixture' or is_linear(model, rule)


def _axes(basis: jax.Array) -> jax.Array:
  """[..., K, P] -> orthonormal rows [..., K, P] of the same span.

  Gram-Schmidt, twice for each row ("twice is enough", Giraud et al. 2005); a
  row in the span of those before it gets 0. Not `jnp.linalg.qr`, a LAPACK call
  a comparison: predictions of PAL-B with it once stood still on the CPU with
  every thread of XLA idle, for which these calls are the suspect, not proven.
  """
  found: list[jax.Array] = []
  for k in range(basis.shape[-2]):
    row = basis[..., k, :]
    left = row
    for _ in range(2):
      if found:
        axes = jnp.stack(found, -2)
        along = jnp.einsum('...jp,...p->...j', axes, left)
        left = left - jnp.einsum('...j,...jp->...p', along, axes)
    size = safe_norm(left, keepdims=True)
    new = size > 1e-6 * safe_norm(row, keepdims=True)
    found.append(jnp.where(new, left / jnp.where(new, size, 1.0), 0.0))
  return jnp.stack(found, -2)


def _isometry(x: jax.Array, basis: jax.Array):
  """[..., 2, P], [..., K, P] -> [..., 2, R], [..., K, R], same geometry."""
  if basis.shape[-1] <= basis.shape[-2]:
    return x, basis
  axes = _axes(basis)
  inside = jnp.einsum('...np,...kp->...nk', x, axes)
  outside = x - jnp.einsum('...nk,...kp->...np', inside, axes)
  points = jnp.einsum('...mp,...kp->...mk', basis, axes)
  points = jnp.concatenate([points, jnp.zeros_like(points[..., :1])], -1)
  rest = safe_norm(outside, keepdims=True)
  return jnp.concatenate([inside, rest], -1), points


@functools.partial(jax.jit, static_argnames=('model', 'rule'))
def statistics(
  model: IdealPointModel,
  variables,
  placed: Placed,
  comparisons: Comparisons,
  rule: str,
) -> Statistics:
  """Reduces comparisons [...] to what the weights need.

  Args:
    model, variables: the frozen model.
    placed: from `place`, over the table the comparisons' ids point to.
    comparisons: [...].
    rule: how weights become a logit, `IdealPointModel.logits`; 'argmax' has
      no use here and is treated as 'convex'.
  """

  def reduce(some: Comparisons) -> Statistics:
    x, basis = _gather(placed, some)
    if is_convex(model, rule):
      delta = model.apply(variables, x, basis, method='deltas')
      return Statistics(delta, None, None)
    if uses_network(model):
      return Statistics(None, x, basis)
    points = model.apply(variables, basis, method='finish')
    return Statistics(None, *_isometry(x, points))

  if not _is_large(placed, comparisons):
    return reduce(comparisons)
  shared = placed.basis.ndim == 2

  def one(some: Comparisons):
    found = reduce(some)
    return found.delta, found.x, None if shared else found.basis

  flat = comparisons.flatten()
  delta, x, basis = jax.tree.map(
    lambda a: a.reshape(*comparisons.shape, *a.shape[1:]),
    jax.lax.map(one, flat, batch_size=_BLOCK),
  )
  return Statistics(delta, x, reduce(flat[:1]).basis if shared else basis)


def _is_large(placed: Placed, comparisons: Comparisons) -> bool:
  """Whether what is gathered would not fit beside everything else."""
  points = 2 + (placed.basis.shape[1] if placed.basis.ndim == 3 else 0)
  return comparisons.label.size * points * placed.x.shape[-1] > _AT_ONCE


def reward_table(
  model: IdealPointModel, variables, placed: Placed, rule: str
) -> jax.Array | None:
  """[M, K] reward of every item under every prototype.

  delta = table[first] - table[second]: a user's statistics are then gathered
  from ids alone. None where that is not so: rewards that depend on the
  prompt, or logits that are not made of `delta`.
  """
  if not is_convex(model, rule) or placed.basis.ndim == 3:
    return None
  points = model.apply(variables, placed.basis, method='finish')
  reward = PREFERENCES[model.preference](placed.x[:, None], points)
  return model.apply(variables, method='scale') * reward


def weight_logits(
  model: IdealPointModel,
  variables,
  rule: str,
  log_weights: jax.Array,
  stats: Statistics,
) -> jax.Array:
  """Logits [N] of one user's comparisons at log-weights [K]."""
  return atom_logits(model, variables, rule, log_weights[None], stats)[..., 0]


def atom_logits(
  model: IdealPointModel,
  variables,
  rule: str,
  log_weights: jax.Array,
  stats: Statistics,
) -> jax.Array:
  """Logits [..., A] of comparisons at each of A points of the simplex.

  Args:
    model, variables: the frozen model; its scale, and the network of `f(Pw)`.
    rule: as in `statistics`.
    log_weights: [A, K].
    stats: [...].
  """
  weights = jnp.exp(log_weights)
  if stats.delta is not None and rule != 'mixture':
    return stats.delta @ weights.T
  if stats.delta is not None:
    return _mixture_atoms(log_weights, stats.delta)
  if uses_network(model):
    points = model.apply(variables, weights, stats.basis, method='ideal_points')
  else:
    points = weights @ stats.basis  # [A, R] or [..., A, R]
  x = stats.x[..., :, None, :]  # [..., 2, 1, R]
  reward = PREFERENCES[model.preference](x, points[..., None, :, :])
  scale = model.apply(variables, method='scale')
  return scale * (reward[..., 0, :] - reward[..., 1, :])


def _mixture_atoms(log_weights, delta):
  if log_weights.shape[0] == 1:
    return mixture_logit(log_weights[0], delta)[..., None]
  weights = jnp.exp(log_weights).T

  def log_likelihood(z):
    # Sums of likelihoods as a matrix product, which underflows where every
    # prototype that the atom has is 1e-37 times less likely than the one that
    # explains the answer best. There the largest term stands for the sum; at
    # a vertex it is the sum.
    each = jax.nn.log_sigmoid(z)
    best = jnp.max(each, axis=-1, keepdims=True)
    total = jnp.exp(each - best) @ weights
    terms = [
      each[..., k, None] + log_weights[:, k] for k in range(each.shape[-1])
    ]
    largest = functools.reduce(jnp.maximum, terms)
    return jnp.where(
      total > TINY, best + jnp.log(jnp.maximum(total, TINY)), largest
    )

  return log_likelihood(delta) - log_likelihood(-delta)


@functools.partial(jax.jit, static_argnames=('model', 'rule'))
def score(
  model: IdealPointModel,
  variables,
  placed: Placed,
  log_weights: jax.Array,
  comparisons: Comparisons,
  rule: str,
) -> jax.Array:
  """Log odds of users' comparisons, each user by its own weights.

  Args:
    model, variables, placed: as in `statistics`.
    log_weights: [U, K], row i for `comparisons[i]`.
    comparisons: [U, N].
    rule: 'convex', 'argmax' or 'mixture'.

  Returns:
    [U, N].
  """
  users = jnp.arange(len(log_weights))[:, None]
  users = jnp.broadcast_to(users, comparisons.shape)

  def logits(user: jax.Array, some: Comparisons) -> jax.Array:
    x, basis = _gather(placed, some)
    rows = log_weights[user]
    return model.apply(variables, rows, x, basis, rule, method='logits')

  if not _is_large(placed, comparisons):
    return logits(users, comparisons)
  found = jax.lax.map(
    lambda row: logits(*row),
    (users.reshape(-1), comparisons.flatten()),
    batch_size=_BLOCK,
  )
  return found.reshape(comparisons.shape)
