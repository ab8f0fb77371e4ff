"""Persona: people with contradicting stances on real or embedded statements.

Paper: arXiv 2406.08469, section 5 (Persona), as METHOD section 4 states it.
"""

from configs import base


def get_config():
  config = base.get_config()
  return config.lock()
