"""data.batching: batches as a pure function of (seed, step)."""

import jax
import numpy as np
import pytest

from pal_jax.data import batching
from pal_jax.data.batching import Batcher, pad, stream_rows, weight_by_user
from pal_jax.errors import InputError
from pal_jax.structs import make_comparisons


def table(counts):
  """counts[i] comparisons of user i, shuffled; items tell rows apart."""
  user = np.repeat(np.arange(len(counts)), counts)
  user = np.random.default_rng(0).permutation(user)
  n = len(user)
  return make_comparisons(
    user,
    np.stack([np.arange(n), n + np.arange(n)], -1),
    np.arange(n) % 2,
    prompt=10 * np.arange(n),
    weight=1 + np.arange(n),
  )


def rows_of(batch):
  return batch.items[:, 0][np.asarray(batch.mask)].tolist()


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('by_user', [False, True])
def test_a_batch_depends_on_seed_and_step_alone(by_user):
  data = table([3, 4, 5, 2, 1])
  batcher = Batcher(data, 6, seed=3, by_user=by_user)
  in_order = [batcher(step) for step in range(30)]
  for step in (29, 0, 7, 7, 13):  # asked out of order, of a fresh one
    assert_equal(Batcher(data, 6, 3, by_user)(step), in_order[step])
    assert_equal(batcher(step), in_order[step])


@pytest.mark.parametrize('by_user', [False, True])
def test_seeds_and_epochs_have_orders_of_their_own(by_user):
  data = table([2] * 20)
  first = rows_of(Batcher(data, 40, 0, by_user)(0))
  assert first != rows_of(Batcher(data, 40, 1, by_user)(0))
  assert first != rows_of(Batcher(data, 40, 0, by_user)(1))


@pytest.mark.parametrize('batch_size', [1, 4, 6, 12])
def test_an_epoch_visits_every_comparison_once(batch_size):
  batcher = Batcher(table([3, 4, 5]), batch_size, seed=0)
  steps = 12 // batch_size
  for epoch in range(3):
    seen = [
      row
      for step in range(epoch * steps, (epoch + 1) * steps)
      for row in rows_of(batcher(step))
    ]
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize('batch_size', [5, 7, 30])
def test_batches_span_epochs_without_dropping_or_repeating(batch_size):
  batcher = Batcher(table([3, 4, 5]), batch_size, seed=0)
  stream = [row for step in range(24) for row in rows_of(batcher(step))]
  assert len(stream) == 24 * batch_size
  for start in range(0, len(stream) - 12, 12):
    assert sorted(stream[start : start + 12]) == list(range(12))


def test_rows_of_a_batch_stay_together():
  """User, items, prompt, label and weight of a row are those of the table."""
  data = table([3, 4, 5])
  for by_user in (False, True):
    batch = Batcher(data, 7, 0, by_user)(2)
    live = batch[np.asarray(batch.mask)]
    assert_equal(live, data[live.items[:, 0]])


@pytest.mark.parametrize('by_user', [False, True])
@pytest.mark.parametrize('batch_size', [5, 8, 64])
def test_all_batches_have_one_shape_and_dtype(by_user, batch_size):
  batcher = Batcher(table([3, 4, 5, 1]), batch_size, 0, by_user)
  for step in range(20):
    batch = batcher(step)
    assert batch.shape == (batch_size,)
    assert batch.items.shape == (batch_size, 2)
    assert batch.user.dtype == batch.items.dtype == np.int32
    assert batch.label.dtype == batch.weight.dtype == np.float32
    assert batch.mask.dtype == bool


@pytest.mark.parametrize('batch_size', [5, 9, 11, 64])
def test_users_come_whole_and_never_twice_in_a_batch(batch_size):
  counts = [3, 4, 5, 1, 2, 5]
  data = table(counts)
  rows_by_user = [
    np.flatnonzero(data.user == user).tolist() for user in range(6)
  ]
  batcher = Batcher(data, batch_size, 0, by_user=True)
  for step in range(40):
    batch = batcher(step)
    live = batch[np.asarray(batch.mask)]
    rows = live.items[:, 0].tolist()
    assert len(set(rows)) == len(rows)
    for user in np.unique(live.user):
      found = sorted(live.items[live.user == user, 0].tolist())
      assert found == rows_by_user[user]


def test_every_user_comes_once_an_epoch():
  batcher = Batcher(table([3, 4, 5, 1, 2, 5]), 10, 0, by_user=True)
  for epoch in range(4):  # two users a batch, three batches an epoch
    users = [
      user
      for step in range(3 * epoch, 3 * epoch + 3)
      for user in set(batcher(step).user.tolist())
    ]
    assert sorted(users) == list(range(6))


def test_users_without_comparisons_are_no_users_of_the_stream():
  data = table([3, 0, 2])
  batch = Batcher(data, 3, 0, by_user=True)
  for step in range(6):
    assert set(batch(step).user.tolist()) <= {0, 2}
    assert batch(step).mask.any()


def test_a_user_that_fits_no_batch_is_an_error_with_both_sizes():
  Batcher(table([3, 7]), 7, 0, by_user=True)
  with pytest.raises(InputError, match='7 comparisons.*train.batch_size=6'):
    Batcher(table([3, 7]), 6, 0, by_user=True)
  Batcher(table([3, 7]), 6, 0)


def test_padding_is_masked_and_made_of_valid_rows():
  data = table([3])
  padded = pad(data, 5)
  np.testing.assert_array_equal(padded.mask, [1, 1, 1, 0, 0])
  assert_equal(padded[:3], data)
  assert set(padded.user.tolist()) <= set(data.user.tolist())
  assert set(padded.items[:, 0].tolist()) <= {0, 1, 2}
  assert np.all(data.mask)  # the original is left as it was


def test_padding_keeps_the_mask_that_was_there():
  data = table([3])
  data = data.replace(mask=np.array([False, True, False]))
  np.testing.assert_array_equal(pad(data, 5).mask, [0, 1, 0, 0, 0])


def test_padding_to_no_more_than_there_is_changes_nothing():
  data = table([3])
  assert pad(data, 3) is data


def test_the_stream_is_one_permutation_after_the_other():
  rows = stream_rows(seed=5, start=0, count=30, size=10)
  for start in (0, 10, 20):
    assert sorted(rows[start : start + 10]) == list(range(10))
  np.testing.assert_array_equal(rows[7:26], stream_rows(5, 7, 19, 10))
  np.testing.assert_array_equal(stream_rows(5, 10**9, 3, 1), [0, 0, 0])


@pytest.mark.parametrize('size', [1, 2, 10, 63, 64, 65, 1000])
def test_a_long_permutation_is_one_without_being_drawn(monkeypatch, size):
  monkeypatch.setattr(batching, 'MOST_DRAWN', 0)
  epochs = [stream_rows(4, e * size, size, size) for e in range(3)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
  np.testing.assert_array_equal(
    stream_rows(4, size // 3, size, size),
    np.concatenate(epochs)[size // 3 : size // 3 + size],
  )
  if size == 1000:
    other = stream_rows(5, 0, size, size)
    orders = [*epochs, other, np.arange(size)]
    for i, a in enumerate(orders):
      for b in orders[:i]:
        # Of a thousand numbers about one stays where it is.
        assert np.sum(a == b) < 10
    # Neighbours are strangers.
    assert abs(np.corrcoef(epochs[0][:-1], epochs[0][1:])[0, 1]) < 0.15


def test_users_who_stand_in_order_need_no_sorting():
  data = table([3, 1, 4])
  sorted_data = data[np.argsort(data.user, kind='stable')]
  for step in range(3):
    a, b = (
      Batcher(each, 6, 0, by_user=True)(step) for each in (data, sorted_data)
    )
    assert_equal(a, b)


def test_inverse_counts_give_every_user_the_same_total_and_a_mean_of_one():
  data = table([1, 4, 10, 85])
  data = data.replace(weight=np.ones(100, np.float32))
  weighted = weight_by_user(data, 'inverse_count')
  total = np.bincount(data.user, weighted.weight)
  np.testing.assert_allclose(total, 25.0, rtol=1e-5)
  np.testing.assert_allclose(weighted.weight.mean(), 1.0, rtol=1e-6)
  assert weighted.weight.dtype == np.float32
  np.testing.assert_array_equal(weighted.items, data.items)


def test_inverse_counts_multiply_the_weights_that_were_there():
  data = make_comparisons(
    [0, 0, 1], np.zeros((3, 2)), np.zeros(3), weight=[1, 3, 2]
  )
  # [1/2, 3/2, 2] over their mean, 4/3.
  np.testing.assert_allclose(
    weight_by_user(data, 'inverse_count').weight, [0.375, 1.125, 1.5]
  )


def test_inverse_counts_leave_equal_users_alone():
  data = table([5, 5, 5])
  data = data.replace(weight=np.ones(15, np.float32))
  np.testing.assert_allclose(weight_by_user(data, 'inverse_count').weight, 1.0)


def test_no_user_weighting_returns_the_same_comparisons():
  data = table([1, 4])
  assert weight_by_user(data, 'none') is data


@pytest.mark.parametrize('kind', ['inverse', '', 'None'])
def test_an_unknown_user_weighting_lists_the_known_ones(kind):
  with pytest.raises(InputError, match="'none' or 'inverse_count'"):
    weight_by_user(table([2]), kind)
