"""What the coming steps need, made ahead of them by one thread.

In the order of the steps, so that nothing depends on how fast either side is.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar('T')


class Prefetch(Generic[T]):
  """Iterates over make(number), in order, some of them made ahead.

  An error of `make` is raised where its result would have come, with the
  traceback of the thread.

  Args:
    make: called by the thread alone.
    numbers: what it is called with.
    ahead: how many are made ahead; 0 has no thread.
  """

  def __init__(
    self,
    make: Callable[[int], T],
    numbers: Iterable[int],
    ahead: int,
  ):
    self._make, self._numbers, self._ahead = make, iter(numbers), ahead
    self._pool = ThreadPoolExecutor(1, 'prefetch') if ahead else None

  def __iter__(self) -> Iterator[T]:
    if self._pool is None:
      yield from map(self._make, self._numbers)
      return
    pending: deque[Future[T]] = deque()
    for number in self._numbers:
      pending.append(self._pool.submit(self._make, number))
      if len(pending) > self._ahead:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()

  def close(self) -> None:
    """Ends the thread, after the call that it is in."""
    if self._pool is not None:
      self._pool.shutdown(wait=True, cancel_futures=True)
