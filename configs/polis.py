"""Polis: people who vote on each other's statements in a public consultation.

Data: github.com/compdemocracy/openData (CC BY 4.0, The Computational Democracy
Project). A statement that a person agreed with against one the person
disagreed with; people and statements are both split (METHOD sections 4, 5).

  python -m pal_jax.main --config=configs/polis.py --workdir=FOLDER \\
    --config.data.path=DOWNLOAD

where DOWNLOAD/american-assembly.bowling-green/comments.csv lies; another
conversation: --config=configs/polis.py:brexit-consensus. A minute on two CPU
cores; Bowling Green, seed 0: 0.598 for seen users on unseen statements, NLL
0.675.
"""

from configs import base, fewer_steps


def get_config(conversation: str = 'american-assembly.bowling-green'):
  config = base.get_config()
  config.data = base.polis_data()
  config.data.conversation = conversation
  # Up to the support that every unseen user has: one cohort for all n.
  config.evaluation.num_support = (0, 1, 2, 5, 10)
  # A few hundred texts are soon learnt by heart: 0.3 of the steps, from
  # spectral clusters, end at a lower likelihood loss on validation statements
  # (`python -m benchmarks.fewer_steps`).
  return fewer_steps.begin_in_clusters(fewer_steps.shorten(config)).lock()
