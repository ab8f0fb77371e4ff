"""What the models and their objective say, written again in numpy float64.

Shared by the tests beside it. One set of shapes, so that little is compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import erf, expit, log_softmax, logsumexp

from pal_jax.adaptation import Prior, adapt, place, statistics
from pal_jax.models.pal_a import PalA
from pal_jax.models.pal_b import PalB
from pal_jax.structs import Comparisons, FeatureTable

K, P, M, Q, U, N = 3, 4, 30, 5, 6, 12
ATOMS = 7
TAU = 0.7


# Models and comparisons.


def pal_a(point='Pw', projector='identity', **fields):
  fields = {'num_users': U, 'num_prototypes': K, 'width': P, **fields}
  return PalA(point=point, feature_width=P, projector=projector, **fields)


def pal_b(**fields):
  fields = {'num_users': U, 'num_prototypes': K, 'width': P, **fields}
  return PalB(projector='mlp0', **fields)


@functools.cache
def _shapes(model):
  width = model.width if model.projector == 'identity' else P
  return jax.eval_shape(
    model.init,
    jax.random.key(0),
    np.zeros(2, np.int32),
    np.zeros((2, 2, width), np.float32),
    np.zeros((2, width), np.float32),
  )['params']


def variables_of(model, seed=0):
  """Random parameters, prototypes far enough apart to matter."""
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: np.float32(rng.normal(size=x.shape)), _shapes(model)
  )
  params['log_scale'] = np.float32(np.log(TAU))
  return {'params': params}


def make_table(seed=0, width=P):
  rng = np.random.default_rng([seed, 1])
  return FeatureTable(
    items=np.float32(rng.normal(size=(M, width))),
    prompts=np.float32(rng.normal(size=(Q, P))),
  )


def make_comparisons(seed=0, users=U, n=N):
  """[U, N] with soft labels among hard ones, and from 0 to N that count."""
  rng = np.random.default_rng([seed, 2])
  items = np.argsort(rng.random((users, n, M)), -1)[..., :2]
  label = rng.integers(0, 2, (users, n)).astype(np.float32)
  label[:, ::5] = rng.random(label[:, ::5].shape)
  count = np.linspace(0, n, users).astype(int)
  return Comparisons(
    user=np.broadcast_to(np.arange(users, dtype=np.int32)[:, None], (users, n)),
    prompt=rng.integers(0, Q, (users, n)).astype(np.int32),
    items=items.astype(np.int32),
    label=label,
    weight=np.ones((users, n), np.float32),
    mask=np.arange(n) < count[:, None],
  )


def make_prior(
  strength=0.5, seed=0, num=K, atoms=ATOMS, evidence=1.0, pooling=0.0
):
  """A centre with its strength, and atoms with masses, all at random."""
  rng = np.random.default_rng([seed, 3])
  log_prior = log_softmax(rng.normal(size=num))
  return Prior(
    log_weights=jnp.float32(log_prior),
    strength=jnp.float32(strength),
    log_atoms=jnp.float32(
      log_softmax(3 * rng.normal(size=(atoms, num)), axis=-1)
    ),
    log_masses=jnp.float32(log_softmax(rng.normal(size=atoms))),
    evidence=jnp.float32(evidence),
    pooling=jnp.float32(pooling),
  )


def reduce(model, variables, c, table=None, rule=None):
  placed = place(model, variables, table or make_table())
  return statistics(model, variables, placed, c, rule or model.adaptation_rule)


def fit(model, variables, c, prior, table=None, method='map', **kwargs):
  stats = reduce(model, variables, c, table)
  return adapt(
    model,
    variables,
    stats,
    jnp.asarray(c.label),
    jnp.asarray(c.mask),
    prior,
    method=method,
    **kwargs,
  )


# What the models say, written again in numpy.


def numpy_reward(preference, x, u):
  if preference == 'squared_distance':
    return -np.sum((x - u) ** 2, -1)
  if preference == 'distance':
    return -np.linalg.norm(x - u, axis=-1)
  if preference == 'inner_product':
    return np.sum(x * u, -1)
  x = x / np.linalg.norm(x, axis=-1, keepdims=True)
  u = u / np.linalg.norm(u, axis=-1, keepdims=True)
  if preference == 'cosine':
    return np.sum(x * u, -1)
  return -np.linalg.norm(x - u, axis=-1)


def numpy_mlp(params, h):
  for layer in range(len(params)):
    if layer:
      h = 0.5 * h * (1 + erf(h / np.sqrt(2)))
    dense = params[f'Dense_{layer}']
    h = h @ dense['kernel'] + dense['bias']
  return h


def numpy_convex_logits(model, variables, table, items, prompt):
  """w [K] -> logits [n] of comparisons of these items and prompts."""
  params = jax.tree.map(lambda x: np.asarray(x, float), variables['params'])

  def f(h):
    if model.projector == 'identity':
      return h
    return numpy_mlp(params['projector'], h)

  x = f(np.asarray(table.items, float))[items]
  tau = np.exp(params['log_scale'])

  def logits(w):
    if isinstance(model, PalB):
      maps = params['prompt_projectors']
      kernel, bias = maps['Dense_0']['kernel'], maps['Dense_0']['bias']
      h = np.asarray(table.prompts, float)[prompt]
      g = np.einsum('nd,kdp->nkp', h, kernel) + bias
      u = np.einsum('k,nkp->np', w, g)
    else:
      p = params['prototypes']
      if model.point == 'f(Pw)':
        u = f(w @ p)
      elif model.point == 'f(P)w':
        u = w @ f(p)
      elif model.point == '|f(P)|w':
        placed = f(p)
        u = w @ (placed / np.linalg.norm(placed, axis=-1, keepdims=True))
      else:
        u = w @ p
      u = np.broadcast_to(u, (len(x), x.shape[-1]))
    r = numpy_reward(model.preference, x, u[:, None])
    return tau * (r[:, 0] - r[:, 1])

  return logits


def numpy_logits(model, variables, table, c, user, rule='convex'):
  """w [K] -> logits [n] of one user's unmasked comparisons, in float64."""
  live = c.mask[user]
  convex = numpy_convex_logits(
    model, variables, table, c.items[user][live], c.prompt[user][live]
  )
  if rule == 'convex':
    return convex
  each = np.stack([convex(v) for v in np.eye(model.num_prototypes)], -1)
  first, second = expit(each), expit(-each)
  return lambda w: np.log(first @ w) - np.log(second @ w)


# F and what certifies its minimum.


def negative_log_likelihood(z, label):
  return label * np.logaddexp(0, -z) + (1 - label) * np.logaddexp(0, z)


class Problem:
  """One user's F(w), by any logits, with differences for derivatives."""

  def __init__(self, logits, label, log_prior, strength):
    self.logits, self.label = logits, np.asarray(label, float)
    log_prior = np.asarray(log_prior, float)
    self.log_prior = log_prior - logsumexp(log_prior)
    self.strength = float(strength)

  def value(self, theta):
    log_w = log_softmax(theta)
    loss = negative_log_likelihood(self.logits(np.exp(log_w)), self.label)
    kl = np.sum(np.exp(log_w) * (log_w - self.log_prior))
    return loss.sum() + self.strength * kl

  def slope(self, theta):
    """Derivatives of F towards each vertex, e_k - w, in w: all 0 at a
    stationary point inside the simplex."""
    log_w = log_softmax(theta)
    w = np.exp(log_w)

    def loss(w):
      return negative_log_likelihood(self.logits(w), self.label).sum()

    h = 1e-5
    towards = np.eye(len(w)) - w
    f = np.array(
      [(loss(w + h * d) - loss(w - h * d)) / (2 * h) for d in towards]
    )
    pull = self.strength * (log_w - self.log_prior)
    return f + pull - w @ pull

  def residual(self, theta):
    """What the solver calls so: a weight at its floor may want to shrink."""
    slope = self.slope(theta)
    return np.where(theta < -59, np.maximum(-slope, 0), np.abs(slope)).max()

  def gradient_size(self, theta):
    """Largest |d f / d w_k|, of the likelihood alone."""
    w, h = np.exp(log_softmax(theta)), 1e-5

    def loss(w):
      return negative_log_likelihood(self.logits(w), self.label).sum()

    return max(
      abs(loss(w + h * d) - loss(w - h * d)) / (2 * h) for d in np.eye(len(w))
    )

  def minimum(self, starts):
    return min(
      minimize(self.value, start, method='BFGS', options={'gtol': 1e-7}).fun
      for start in starts
    )


def problem_of(model, variables, table, c, prior, user, rule='convex'):
  return Problem(
    numpy_logits(model, variables, table, c, user, rule),
    c.label[user][c.mask[user]],
    prior.log_weights,
    prior.strength,
  )


class DeltaProblem:
  """F of logits under each prototype, its gradient and minimum; float64."""

  def __init__(self, delta, label, log_prior, strength, rule):
    self.delta, self.label = np.asarray(delta, float), np.asarray(label, float)
    log_prior = np.asarray(log_prior, float)
    self.log_prior = log_prior - logsumexp(log_prior)
    self.strength, self.rule = float(strength), rule

  def logits(self, log_w):
    if self.rule == 'convex':
      return self.delta @ np.exp(log_w)
    positive = log_w - np.logaddexp(0, -self.delta)
    negative = log_w - np.logaddexp(0, self.delta)
    return logsumexp(positive, -1) - logsumexp(negative, -1)

  def jacobian(self, log_w):
    """d logits / d w, [N, K]."""
    if self.rule == 'convex':
      return self.delta
    # d log(p / (1 - p)) = dp / p - d(1 - p) / (1 - p).
    p = -np.logaddexp(0, -self.delta)
    q = -np.logaddexp(0, self.delta)
    log_p = logsumexp(log_w + p, -1, keepdims=True)
    log_q = logsumexp(log_w + q, -1, keepdims=True)
    return np.exp(p - log_p) - np.exp(q - log_q)

  def value(self, log_w):
    loss = negative_log_likelihood(self.logits(log_w), self.label)
    kl = np.sum(np.exp(log_w) * (log_w - self.log_prior))
    return loss.sum() + self.strength * kl

  def gradient(self, log_w):
    """Of the likelihood alone, [K]."""
    return (expit(self.logits(log_w)) - self.label) @ self.jacobian(log_w)

  def gap(self, log_w):
    """A bound on value - minimum, whatever the optimiser did."""
    target = self.log_prior - self.gradient(log_w) / self.strength
    target = target - logsumexp(target)
    return self.strength * np.sum(np.exp(log_w) * (log_w - target))

  def minimum(self):
    """The lower of two runs of SLSQP over weights on the simplex."""

    def both(w):
      log_w = np.log(w)
      slope = self.strength * (log_w - self.log_prior + 1)
      return self.value(log_w), self.gradient(log_w) + slope

    size = self.log_prior.size
    starts = np.exp(self.log_prior), np.full(size, 1 / size)
    found = [
      minimize(
        both,
        start,
        jac=True,
        method='SLSQP',
        bounds=[(1e-12, 1.0)] * size,
        constraints={
          'type': 'eq',
          'fun': lambda w: np.sum(w) - 1,
          'jac': np.ones_like,
        },
        options={'ftol': 1e-12, 'maxiter': 200},
      ).x
      for start in starts
    ]
    return min(self.value(np.log(w / w.sum())) for w in found)


def log_weights_64(users, i):
  log_w = np.asarray(users.log_weights[i], float)
  return log_w - logsumexp(log_w)
