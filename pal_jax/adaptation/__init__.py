"""Few-shot adaptation: statistics, prior, posterior, point estimate."""

from pal_jax.adaptation.adapt import (
  METHODS,
  adapt,
  check_method,
  predict_users,
)
from pal_jax.adaptation.point import fit_users
from pal_jax.adaptation.posterior import believe, credible_interval, predict
from pal_jax.adaptation.prior import (
  Prior,
  atom_log_likelihoods,
  choose_strength,
  fit_masses,
  fit_prior,
  has_classes,
)
from pal_jax.adaptation.solver import UserState, fit_weights
from pal_jax.adaptation.statistics import (
  Placed,
  Statistics,
  atom_logits,
  is_convex,
  is_linear,
  place,
  reward_table,
  score,
  statistics,
)

__all__ = [
  'METHODS',
  'Placed',
  'Prior',
  'Statistics',
  'UserState',
  'adapt',
  'atom_log_likelihoods',
  'atom_logits',
  'believe',
  'check_method',
  'choose_strength',
  'credible_interval',
  'fit_masses',
  'fit_prior',
  'fit_users',
  'fit_weights',
  'has_classes',
  'is_convex',
  'is_linear',
  'place',
  'predict',
  'predict_users',
  'reward_table',
  'score',
  'statistics',
]
