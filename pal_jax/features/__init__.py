"""Frozen encoders: texts -> arrays, once, kept on disk.

`create(config)` makes the encoder, `lookup_or_encode` gives the vectors [N, D]
of texts, and `feature_table` those of a dataset.
"""

from pal_jax.features.encoder import Encoder
from pal_jax.features.factory import create
from pal_jax.features.lookup import lookup_or_encode
from pal_jax.features.store import FeatureStore
from pal_jax.features.table import feature_table

__all__ = [
  'Encoder',
  'FeatureStore',
  'create',
  'feature_table',
  'lookup_or_encode',
]
