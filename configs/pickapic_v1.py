"""Pick-a-Pic v1: which of two generated images a user likes better.

Paper: arXiv 2406.08469, section 5 (Pick-a-Pic): PAL-B on CLIP ViT-H/14
embeddings, cosine, cross-entropy, K = 1, 6.298 million parameters; the paper
reports about 71% on the 14.1 thousand test rows (584 thousand of training,
17.4 of validation, 4,725 users).

  python -m pal_jax.main --config=configs/pickapic_v1.py --workdir=FOLDER \\
    --config.data.path=TABLES --config.features.path=EMBEDDINGS

TABLES: train*, validation* and test* in Parquet or CSV, of
yuvalkirstain/pickapic_v1. EMBEDDINGS: one file, or a folder of files, of
float vectors whose ids are the images' uids and the captions. Two in a hundred
of the users who have 20 training rows and a test row are held out as unseen,
and their test rows are not among those of the seen ones; the report counts
them. Run on files of this format that tests write: the published tables and
CLIP were not at hand.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.data = base.pickapic_data()
  config.features.encoder = 'precomputed'
  config.features.normalize = 'none'
  config.model.name = 'pal_b'
  config.model.preference = 'cosine'
  config.model.num_prototypes = 1
  config.model.width = 1024
  config.model.activation = 'relu'
  config.model.residual = True
  config.model.init_user_scale = 1.0
  config.train.loss = 'cross_entropy'
  config.train.batch_size = 16384
  config.train.num_steps = 1780  # 50 epochs of 584 thousand
  config.train.log_every = 20
  config.optimizer = base.reference_optimizer()
  config.evaluation.num_support = (0, 1, 2, 5, 10, 20)
  return config.lock()
