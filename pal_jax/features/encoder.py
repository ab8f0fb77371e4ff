"""What an encoder is: a name, a version, a width, and encode."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Encoder(Protocol):
  """Turns texts into vectors of a fixed width, without training.

  `name` and `version` key the cache on disk, so they must be cheap: reading
  cached features may not need the weights, nor what loads them. Whatever is
  heavy loads at the first `encode`.

  An encoder whose vectors lie on disk already sets `cacheable = False`, and
  `lookup_or_encode` then asks it every time and writes nothing. If it has
  `reader(texts)`, which returns a `rows.Read`, they may stay on disk.

  Attributes:
    name: the kind of encoder, for example 'minilm'.
    version: everything else that changes a vector: weights, tokenizer, layer,
      pooling, normalisation. Two encoders with equal name and version give
      equal vectors, up to rounding.
    width: D, the length of a vector.
  """

  @property
  def name(self) -> str: ...

  @property
  def version(self) -> str: ...

  @property
  def width(self) -> int: ...

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """The vectors [N, D], float32, of N texts, in their order."""
    ...
