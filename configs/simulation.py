"""Simulations: planted prototypes, and the neural-process toy.

Paper: arXiv 2406.08469, section 5 (simulations), as METHOD section 4 has it.
"""

from configs import base


def get_config(which: str = 'partition'):
  config = base.get_config()
  if which in ('partition', 'mixture'):
    config.data = base.simulation_data()
    config.model.projector = 'identity'
    config.model.width = config.data.dimension
    config.optimizer.groups.projectors.optional = True
    config.train.num_steps = 2000
    if which == 'mixture':
      config.data.mixture = 1.0
  elif which == 'toy':
    config.data = base.neural_process_data()
    config.model.num_prototypes = 2
    # The toy has no noise and one input: nothing to regularise.
    config.model.dropout = 0.0
    config.optimizer.groups.projectors.learning_rate = 3e-3
    config.evaluation.num_support = (0, 1, 3, 5, 10)
  else:
    raise ValueError(
      f"configs/simulation.py:{which}: expected 'partition', 'mixture' or 'toy'"
    )
  return config.lock()
