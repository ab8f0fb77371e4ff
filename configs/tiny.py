"""Runs of a few seconds, for tests and first tries; the numbers mean little.

  python -m pal_jax.main --config=configs/tiny.py --workdir=/tmp/tiny
  python -m pal_jax.main --config=configs/tiny.py:simulation --workdir=...

About 15 s on two CPU cores, of which nearly all is compilation.
"""

from configs import base


def get_config(which: str = 'persona'):
  """'persona' has embedded statements, 'simulation' planted prototypes."""
  config = base.get_config()
  if which == 'persona':
    config.data.behaviors = ('politically-liberal', 'extraversion')
    config.model.projector = 'mlp1'
  elif which == 'simulation':
    config.data = base.simulation_data()
    config.data.dimension = 4
    config.data.num_items = 200
    config.model.projector = 'identity'
    config.optimizer.groups.projectors.optional = True
  else:
    raise ValueError(
      f"configs/tiny.py:{which}: expected 'persona' or 'simulation'"
    )
  config.data.num_personas = 2
  config.data.num_seen_users = 20
  config.data.num_unseen_users = 10
  config.data.comparisons_per_user = 10
  config.data.validation_per_user = 5
  config.data.seen_query = 10
  config.data.unseen_support = 10
  config.data.unseen_query = 10
  config.model.num_prototypes = 2
  config.model.width = 4 if which == 'simulation' else 8
  config.train.num_steps = 40
  config.train.batch_size = 32
  config.train.log_every = 10
  config.train.checkpoint_every = 20
  config.optimizer.warmup_steps = 2
  config.optimizer.groups.points.learning_rate = 0.1
  config.evaluation.num_support = (0, 2, 5, 10)
  config.evaluation.resamples = 2
  return config.lock()
