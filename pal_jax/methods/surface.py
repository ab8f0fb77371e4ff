"""`length` and `formatting`: how texts look, not what they say."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pal_jax.audit.text import LENGTHS, features
from pal_jax.data import Dataset
from pal_jax.errors import InputError
from pal_jax.methods.homogeneous import BradleyTerry
from pal_jax.structs import FeatureTable

KINDS = ('length', 'formatting')


@dataclasses.dataclass(frozen=True)
class Surface(BradleyTerry):
  """A linear Bradley-Terry model of the log length, or of formatting.

  A control: what it gets right needs no understanding and no person. The
  features are those of `pal_jax.audit`.
  """

  kind: str = 'length'  # or 'formatting'

  def view(self, dataset: Dataset, table: FeatureTable) -> FeatureTable:
    if self.kind not in KINDS:
      raise InputError(
        f'kind={self.kind!r} is unknown: expected one of {KINDS}'
      )
    marks, shares, lengths = features(dataset.item_names)
    if self.kind == 'length':
      x = lengths[:, [LENGTHS.index('log characters')]]
    else:
      x = np.concatenate([marks, shares], axis=-1)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    return FeatureTable(jnp.asarray(x), table.prompts)
