"""Leaks and shortcuts of a dataset, found before anybody trains on it.

  python -m pal_jax.audit --config=configs/persona.py

prints the findings. It exits with status 3 if there is a leak, with 2 if the
dataset cannot be made, else with 0.
"""

import numpy as np

from pal_jax.audit.finding import SEVERITIES, Finding, has_leak, render
from pal_jax.audit.order_probes import order_findings
from pal_jax.audit.sets import named_sets
from pal_jax.audit.structure import (
  item_findings,
  known_findings,
  label_finding,
  pair_findings,
  user_finding,
)
from pal_jax.audit.text import text_ids
from pal_jax.audit.text_probes import text_findings
from pal_jax.data import Dataset

__all__ = ['SEVERITIES', 'Finding', 'audit', 'has_leak', 'render']


def audit(dataset: Dataset, seed: int = 0) -> list[Finding]:
  """What predicts the labels that should not, and what stands twice.

  Args:
    dataset: any; where it has features in the place of texts, the checks of
      texts are skipped and a finding says so.
    seed: of the bootstrap, and of the subset a probe sees of very many
      comparisons. The same seed gives the same findings.
  """
  sets = named_sets(dataset)
  has_text = dataset.item_features is None
  findings = [label_finding(sets)]
  if has_text:
    text, prompt = text_ids(dataset.item_names), text_ids(dataset.prompt_names)
    findings += text_findings(dataset, sets, seed)
    findings += item_findings(dataset, text)
  else:
    # Names were made up: an item equals only itself.
    text = np.arange(len(dataset.item_names))
    prompt = np.arange(len(dataset.prompt_names))
    findings.append(
      Finding(
        'text',
        'ok',
        'The items have features and no text: formatting, length, empty and '
        'duplicate texts were not checked.',
      )
    )
  findings += order_findings(dataset, sets, seed)
  findings += pair_findings(sets, text, prompt)
  findings.append(user_finding(dataset))
  findings += known_findings(sets, text)
  return findings
