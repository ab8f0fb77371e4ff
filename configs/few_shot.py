"""Few-shot adaptation of people the model never saw (METHOD section 3).

Paper: arXiv 2406.08469, section 5 (unseen users). The Persona data with more
unseen users and queries, so that differences of a point can be told.

  python -m experiments.few_shot

compares this adapter with the reference's recipe, no adaptation and one score
for everybody, in all three settings.
"""

from configs import base


def get_config(which: str = 'partition'):
  """'partition': a user holds one persona; 'mixture': Dirichlet(1) of them.

  'own': one persona each, who cares for one behaviour more than for the
  others; there one score for everybody does well, so that n = 0 is a test.
  """
  config = base.get_config()
  if which not in ('partition', 'mixture', 'own'):
    raise ValueError(
      f"configs/few_shot.py:{which}: expected 'partition', 'mixture' or 'own'"
    )
  if which == 'own':
    config.data.stances = 'own'
  if which == 'mixture':
    config.data.mixture = 1.0
  # A difference of one point in accuracy at n = 0 takes this many to exclude.
  config.data.num_unseen_users = 400
  config.data.unseen_support = 100
  config.data.unseen_query = 100
  config.evaluation.resamples = 20
  # n = 0 is one of the numbers here.
  config.train.population_rate = 0.05
  return config.lock()
