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
    if which == 'mixture':
      config.data.mixture = 1.0
  elif which == 'toy':
    config.data = base.neural_process_data()
    config.model.num_prototypes = 2
    config.evaluation.num_support = (0, 1, 3, 5, 10)
  else:
    raise ValueError(
      f"configs/simulation.py:{which}: expected 'partition', 'mixture' or 'toy'"
    )
  return config.lock()
