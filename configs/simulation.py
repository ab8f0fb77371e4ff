"""Simulations: planted prototypes, and the neural-process toy.

Paper: arXiv 2406.08469, section 5 (simulations), as METHOD section 4 has it.

  python -m pal_jax.main --config=configs/simulation.py:partition --workdir=...

and :mixture, :toy. Expected over five seeds (results/simulations): accuracy of
seen users on unseen items 0.989 +- 0.001 for the partition with K = K* = 4,
0.985 +- 0.003 for the mixture; the toy's few-shot curve is within a
point of Bayes-optimal. Under a minute on two CPU cores.
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
    # Users are one of two kinds: a posterior over kinds is right at every n,
    # a point estimate of convex weights is up to eight points below it.
    config.model.membership = 'partition'
    # The toy has no noise and one input: nothing to regularise.
    config.model.dropout = 0.0
    config.optimizer.groups.projectors.learning_rate = 3e-3
    config.evaluation.num_support = (0, 1, 3, 5, 10)
  else:
    raise ValueError(
      f"configs/simulation.py:{which}: expected 'partition', 'mixture' or 'toy'"
    )
  return config.lock()
