"""shared_rows: each distinct text of a batch once, in arrays of fixed room."""

import jax
import numpy as np
import pytest

from pal_jax.data.batching import Batcher
from pal_jax.shared_rows import (
  measure_room,
  merge_shards,
  share_rows,
  share_shards,
  split,
)
from pal_jax.structs import make_comparisons


def comparisons(count=21, num_items=9, num_prompts=4, seed=0):
  rng = np.random.default_rng(seed)
  return make_comparisons(
    rng.integers(0, 5, count),
    rng.integers(0, num_items, (count, 2)),
    rng.random(count) < 0.5,
    prompt=rng.integers(0, num_prompts, count),
    weight=rng.random(count),
    mask=np.arange(count) % 7 != 3,
  )


def occurrences(batch, field):
  """How often each row is shown by comparisons that are not masked."""
  rows = getattr(batch, field)
  live = np.broadcast_to(
    batch.mask.reshape(-1, *[1] * (rows.ndim - 1)), rows.shape
  )
  return np.bincount(rows[live].ravel(), minlength=20)


def counted(rows, count):
  return np.bincount(rows, count, minlength=20)


@pytest.mark.parametrize('shards', [1, 2, 8])
def test_places_lead_back_to_the_rows(shards):
  batch = comparisons()
  (shared,) = share_shards([batch], shards)
  merged = merge_shards(shared)
  padded = split(batch, shards).flatten()
  mine = merged.comparisons
  np.testing.assert_array_equal(merged.items[mine.items], padded.items)
  np.testing.assert_array_equal(merged.prompts[mine.prompt], padded.prompt)
  for field in ('user', 'label', 'weight', 'mask'):
    np.testing.assert_array_equal(getattr(mine, field), getattr(padded, field))
  assert not mine.mask[21:].any()


@pytest.mark.parametrize('shards', [1, 2, 8])
def test_counts_are_those_of_comparisons_that_are_not_masked(shards):
  batch = comparisons()
  merged = merge_shards(share_shards([batch], shards)[0])
  np.testing.assert_array_equal(
    counted(merged.items, merged.item_count), occurrences(batch, 'items')
  )
  np.testing.assert_array_equal(
    counted(merged.prompts, merged.prompt_count), occurrences(batch, 'prompt')
  )


@pytest.mark.parametrize('shards', [1, 4])
def test_a_shard_has_each_text_once(shards):
  (shared,) = share_shards([comparisons(64)], shards)
  for i in range(shards):
    live = shared.items[i][shared.item_count[i] > 0]
    assert len(set(live.tolist())) == len(live)


def test_room_is_smaller_than_a_batch_and_enough_for_nearly_all():
  data = comparisons(5000, num_items=300, num_prompts=30)
  batcher = Batcher(data, 1000, 0)
  room = measure_room([batcher])
  assert room == (384, 64)
  shapes = {
    jax.tree.map(np.shape, share_shards([batcher(i)], room=room)[0]).items
    for i in range(20)
  }
  assert shapes == {(1, 384)}


def test_room_never_exceeds_what_a_batch_can_have():
  data = comparisons(5000, num_items=10**6, num_prompts=10**6)
  assert measure_room([Batcher(data, 100, 0)]) == (200, 100)
  assert measure_room([Batcher(data, 100, 0)], shards=8) == (26, 13)


def test_a_batch_with_more_than_there_is_room_for_gets_all_it_can_need():
  batch = comparisons(64, num_items=100, num_prompts=2)
  few = comparisons(64, num_items=4, num_prompts=2)
  for shared in share_shards([few, batch], room=(10, 5)):
    assert shared.items.shape == (1, 128) and shared.prompts.shape == (1, 5)
  merged = merge_shards(share_shards([batch], room=(10, 5))[0])
  np.testing.assert_array_equal(
    merged.items[merged.comparisons.items], batch.items
  )


def test_padding_is_a_row_that_exists_and_counts_nothing():
  shared = share_rows(comparisons(10, num_items=3, num_prompts=1))
  assert shared.items.shape == (20,) and shared.item_count[3:].sum() == 0
  assert set(shared.items[3:].tolist()) == {0}
