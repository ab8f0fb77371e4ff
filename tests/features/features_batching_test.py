"""features.batching: every text once, few shapes."""

import numpy as np
import pytest

from pal_jax.features import batching

LENGTHS = (4, 8, 16)
SIZES = (2, 5)


@pytest.mark.parametrize('count', [0, 1, 2, 3, 5, 6, 37])
def test_every_text_comes_once_and_whole(count):
  rng = np.random.default_rng(count)
  texts = [
    list(rng.integers(1, 100, size=rng.integers(1, 17))) for _ in range(count)
  ]
  seen = []
  for rows, ids, mask in batching.batches(texts, LENGTHS, SIZES):
    assert ids.shape == mask.shape
    assert ids.shape[0] in SIZES and ids.shape[1] in LENGTHS
    for i, row in enumerate(rows):
      assert ids[i][mask[i]].tolist() == texts[row]
      # Real tokens first: positions count from the left.
      assert mask[i, : len(texts[row])].all()
    assert not mask[len(rows) :].any() and not ids[~mask].any()
    seen.extend(rows.tolist())
  assert sorted(seen) == list(range(count))


def test_texts_of_like_length_share_a_batch():
  texts = [[1] * 16, [1], [1] * 15, [1] * 2, [1] * 14, [1] * 3] * 5
  shapes = [ids.shape for _, ids, _ in batching.batches(texts, LENGTHS, SIZES)]
  assert shapes == [(5, 16)] * 3 + [(5, 4)] * 3


def test_only_the_last_batch_has_empty_rows():
  texts = [[1] * 3] * 11
  batches = list(batching.batches(texts, LENGTHS, SIZES))
  assert [(len(rows), len(ids)) for rows, ids, _ in batches] == [
    (5, 5),
    (5, 5),
    (1, 2),
  ]
