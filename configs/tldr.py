"""Reddit TL;DR: ten workers, some of whom want it short.

Paper: arXiv 2406.08469, section 5 (Summary), after Li et al. 2024 (arXiv
2402.05133): labels are the length in characters, three of ten seen workers
prefer the shorter summary (METHOD section 4 has the counts: 20,969 training,
2,330 validation and 4,921 test comparisons; one score for everybody reaches at
most 68.5% of the test).

  python -m pal_jax.main --config=configs/tldr.py --workdir=FOLDER \\
    --config.data.path=DOWNLOAD

where the comparisons of openai/summarize_from_feedback lie (JSON lines or
Parquet), or --config.data.download=True. --config.data.labels=human takes the
workers' own labels. The report has a row of a length-only scorer: these labels
are nothing but length. Run on files of this format that tests write, not on the
published ones, which were not at hand: no expected number.

The paper trains on OPT-350m, with posts: --config=configs/tldr.py:paper has
its template, projector and prototypes (PAL-A, K = 2, `f(Pw)`, distance, hinge)
and needs torch, transformers and --config.features.path=facebook/opt-350m.
"""

from configs import base


def get_config(which: str = ''):
  if which not in ('', 'paper'):
    raise ValueError(f"configs/tldr.py:{which}: expected 'paper'")
  config = base.get_config()
  config.data = base.tldr_data()
  config.model.num_prototypes = 2
  config.evaluation.num_support = (0, 1, 2, 5, 10, 20)
  if which == 'paper':
    config.data.template = 'paper'
    config.features.encoder = 'huggingface'
    config.features.path = 'facebook/opt-350m'
    config.features.pooling = 'last'
    config.features.normalize = 'none'
    config.model.point = 'f(Pw)'
    config.model.preference = 'distance'
    config.model.width = 512
    config.model.activation = 'relu'
    config.model.dropout = 0.0
    config.model.residual = True
    config.model.init_user_scale = 1.0
    config.train.loss = 'hinge'
    config.train.batch_size = 4
    config.train.num_steps = 5242  # one epoch of 20,969
    config.train.log_every = 100
    config.train.checkpoint_every = 500
    config.optimizer = base.reference_optimizer()
  return config.lock()
