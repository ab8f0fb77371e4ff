"""Few-shot adaptation: statistics, solver, prior."""

from pal_jax.adaptation.adapt import (
  Prior,
  adapt,
  choose_strength,
  has_closed_form,
)
from pal_jax.adaptation.solver import UserState, fit_weights
from pal_jax.adaptation.statistics import (
  Placed,
  Statistics,
  is_linear,
  place,
  score,
  statistics,
)

__all__ = [
  'Placed',
  'Prior',
  'Statistics',
  'UserState',
  'adapt',
  'choose_strength',
  'fit_weights',
  'has_closed_form',
  'is_linear',
  'place',
  'score',
  'statistics',
]
