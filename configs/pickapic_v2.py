"""Pick-a-Pic v2, and the part of its test that PickScore did not train on.

Paper: arXiv 2406.08469, section 5: as `configs/pickapic_v1.py`, on 959
thousand training rows of 6,083 users; 12,025 of the 20.7 thousand test rows
stand in PickScore's training data (that of v1), 8,691 do not, and about 70.5%
of the latter are reported.

  python -m pal_jax.main --config=configs/pickapic_v2.py --workdir=FOLDER \\
    --config.data.path=TABLES --config.features.path=EMBEDDINGS

TABLES also has v1_train*, the training table of v1: a test row overlaps if its
pair of images stands there, in either order; or overlap_ranking_ids.txt, the
ranking ids of the test rows that do, one a line. For the other rows
--config.data.test_rows=overlap or all. Run on files of this format that tests
write; whether this rule gives exactly 12,025 rows was not seen.
"""

from configs import pickapic_v1


def get_config():
  config = pickapic_v1.get_config().unlock()
  config.data.version = 'v2'
  config.data.test_rows = 'no_overlap'
  config.train.num_steps = 2925  # 50 epochs of 959 thousand
  config.train.log_every = 25
  return config.lock()
