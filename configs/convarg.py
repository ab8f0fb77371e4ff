"""UKPConvArg1: crowd workers on which of two arguments is more convincing.

Paper: Habernal and Gurevych, ACL 2016 (data CC BY 4.0,
github.com/UKPLab/acl2016-convincing-arguments). People differ little here, so
that personalisation hardly helps and must not hurt; workers and arguments are
both split (METHOD sections 4, 5).

  python -m pal_jax.main --config=configs/convarg.py --workdir=FOLDER \\
    --config.data.path=DOWNLOAD

where DOWNLOAD/comparisons.parquet lies.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.data = base.convarg_data()
  # Up to the support that every unseen user has: one cohort for all n.
  config.evaluation.num_support = (0, 1, 2, 5)
  return config.lock()
