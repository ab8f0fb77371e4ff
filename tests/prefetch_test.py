"""prefetch: the same results in the same order, however they are made."""

import threading
import traceback

import pytest

from pal_jax.prefetch import Prefetch


def threads():
  return [t for t in threading.enumerate() if t.name.startswith('prefetch')]


@pytest.fixture(autouse=True)
def nobody_is_left_behind():
  yield
  assert not threads()


def closing(batches):
  try:
    yield from batches
  finally:
    batches.close()


@pytest.mark.parametrize('ahead', [0, 1, 2, 9])
def test_results_come_in_order_and_each_is_made_once(ahead):
  asked = []

  def make(number):
    asked.append(number)
    return number**2

  found = list(closing(Prefetch(make, range(3, 8), ahead)))
  assert found == [9, 16, 25, 36, 49] and asked == [3, 4, 5, 6, 7]


@pytest.mark.parametrize('ahead', [0, 1, 3])
def test_as_many_are_made_ahead_as_was_said(ahead):
  asked, made = [], threading.Semaphore(0)

  def make(number):
    asked.append(number)
    made.release()

  batches = Prefetch(make, range(10), ahead)
  steps = closing(batches)
  for number in range(4):
    next(steps)
    for _ in range(1 + ahead if number == 0 else 1):
      assert made.acquire(timeout=10)
    assert asked == list(range(number + 1 + ahead))
  steps.close()
  assert asked == list(range(4 + ahead))


def test_one_other_thread_makes_them_all():
  found = set(closing(Prefetch(lambda _: threading.get_ident(), range(9), 2)))
  assert len(found) == 1 and threading.get_ident() not in found
  found = set(closing(Prefetch(lambda _: threading.get_ident(), range(9), 0)))
  assert found == {threading.get_ident()}


@pytest.mark.parametrize('ahead', [0, 2])
def test_an_error_comes_where_its_result_would_have(ahead):
  def stumble(number):
    if number == 2:
      raise ValueError('row 2 is bad')
    return number

  found = []
  with pytest.raises(ValueError, match='row 2 is bad') as caught:
    for number in closing(Prefetch(stumble, range(9), ahead)):
      found.append(number)
  assert found == [0, 1]
  frames = traceback.extract_tb(caught.value.__traceback__)
  assert frames[-1].name == 'stumble'


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, ValueError])
def test_closing_waits_for_the_call_under_way_and_no_other(error):
  begun, asked = threading.Event(), []

  def make(number):
    asked.append(number)
    if number == 1:
      begun.set()
      # Only close() gets that far: nobody asks for this one.
      threading.Event().wait(0.05)
    return number

  batches = Prefetch(make, range(9), 3)
  with pytest.raises(error):
    try:
      for _ in batches:
        assert begun.wait(10)
        raise error
    finally:
      batches.close()
  assert asked == [0, 1]
