"""Training in a third of the steps: spectral starts, higher rates.

  python -m pal_jax.main --config=configs/fewer_steps.py --workdir=FOLDER

`:persona` (the default), `:partition` and `:mixture` are the experiments of
configs/persona.py and simulation.py; configs/polis.py trains so. The paper has
none of it. What it gains, and what each part gains, is measured by

  python -m benchmarks.fewer_steps --out=FILE.json

The functions change any other config alike.
"""

from configs import persona, simulation


def shorten(config):
  """0.3 of the steps at higher rates; validated at least ten times."""
  with config.unlocked():
    train = config.train
    train.num_steps = round(0.3 * train.num_steps)
    train.log_every = train.checkpoint_every = max(
      1, min(20, train.num_steps // 10)
    )
    optimizer = config.optimizer
    optimizer.warmup_steps = min(20, train.num_steps // 5)
    optimizer.groups.projectors.learning_rate *= 10.0
    optimizer.groups.temperatures.learning_rate *= 5.0
  return config


def raise_rates(config):
  """Three times the rates of projectors and temperatures, all of the steps."""
  with config.unlocked():
    groups = config.optimizer.groups
    groups.projectors.learning_rate *= 3.0
    groups.temperatures.learning_rate *= 3.0
  return config


def begin_in_clusters(config):
  """Users start in spectral clusters."""
  with config.unlocked():
    config.train.start = 'spectral'
  return config


def solve(config, freeze: bool = False):
  """All users' weights are solved for every ten steps.

  Args:
    config: changed.
    freeze: whether nothing else moves them.
  """
  with config.unlocked():
    config.train.user_solver = 'alternating'
    config.train.solve_every = 10
    if freeze:
      groups = config.optimizer.groups
      groups.points.pattern = '^prototypes$'
      groups.users = {
        'pattern': '^user_logits$',
        'learning_rate': 0.0,
        'weight_decay': 0.0,
        'optional': False,
      }
  return config


def get_config(which: str = 'persona'):
  known = {
    'persona': persona.get_config,
    'partition': simulation.get_config,
    'mixture': lambda: simulation.get_config('mixture'),
  }
  if which not in known:
    raise ValueError(
      f'configs/fewer_steps.py:{which}: expected one of {sorted(known)}'
    )
  return begin_in_clusters(shorten(known[which]())).lock()
