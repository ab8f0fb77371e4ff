"""Texts of many lengths -> batches of few shapes."""

from collections.abc import Iterator, Sequence

import numpy as np


def batches(
  token_ids: Sequence[Sequence[int]],
  lengths: Sequence[int],
  sizes: Sequence[int],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Pads texts of like length together; every text comes exactly once.

  Longest first: only the last batch can have empty rows, and there they are
  the shortest.

  Args:
    token_ids: of N texts, each at least 1 and at most max(lengths) long.
    lengths: the T that a batch may have.
    sizes: the B that a batch may have.

  Yields:
    rows: [n], n <= B, which texts these are.
    token_ids_BT: int32, padded with 0, as rows of padding alone are.
    mask_BT: bool, True for a real token.
  """
  counts = np.asarray([len(ids) for ids in token_ids], np.int64)
  lengths, sizes = np.sort(lengths), np.sort(sizes)
  order = np.argsort(-counts, kind='stable')
  start = 0
  while start < len(order):
    left = len(order) - start
    size = sizes[min(np.searchsorted(sizes, left), len(sizes) - 1)]
    rows = order[start : start + size]
    length = lengths[np.searchsorted(lengths, counts[rows[0]])]
    token_ids_BT = np.zeros((size, length), np.int32)
    mask_BT = np.zeros((size, length), bool)
    for i, row in enumerate(rows):
      token_ids_BT[i, : counts[row]] = token_ids[row]
      mask_BT[i, : counts[row]] = True
    yield rows, token_ids_BT, mask_BT
    start += size
