"""Persona: people with contradicting stances on statements.

Paper: arXiv 2406.08469, section 5 (Persona), with personas as stance vectors
(METHOD section 4: four signed personas, 200 seen and 100 unseen users, 40
comparisons each, half of them across behaviours).

  python -m pal_jax.main --config=configs/persona.py --workdir=FOLDER

Under two minutes on two CPU cores. Expected over five seeds
(results/persona_k_sweep): 0.971 +- 0.006 for seen users on unseen statements,
0.972 +- 0.007 for unseen users with ten comparisons, 0.50 for one score for
everybody.

--config=configs/persona.py:download fetches the published statements (Perez et
al. 2022, CC BY 4.0) through TFDS, with checksums; --config.data.path=FOLDER
reads them where they are.
"""

from configs import base


def get_config(which: str = ''):
  if which not in ('', 'download'):
    raise ValueError(f"configs/persona.py:{which}: expected 'download'")
  config = base.get_config()
  if which:
    config.data = base.downloaded_persona_data()
  return config.lock()
