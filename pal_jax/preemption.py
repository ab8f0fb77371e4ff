"""SIGTERM, the notice that a machine is about to be taken away.

Schedulers and clouds send it some seconds before they kill. A run then saves
where it is and ends with `EXIT_CODE`; the same command goes on from there.
"""

import contextlib
import signal
import threading

# EX_TEMPFAIL of sysexits.h: not done, try again.
EXIT_CODE = 75


class Preempted(Exception):
  """A run was asked to stop and did; nothing is lost."""


class Preemption:
  """Whether SIGTERM came. Within `listening` it no longer kills.

  Where nothing is under way that must be ended in order, `Preempted` is raised
  at once. Within `held` it waits: look at `requested`.
  """

  def __init__(self):
    self.requested = False
    self._held = False

  @contextlib.contextmanager
  def listening(self):
    """Takes SIGTERM over; outside the main thread nobody can, and it kills."""
    if threading.current_thread() is not threading.main_thread():
      yield self
      return
    before = signal.signal(signal.SIGTERM, self._receive)
    try:
      yield self
    finally:
      # None: it was not set from Python, which cannot set it again.
      signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

  @contextlib.contextmanager
  def held(self):
    """Leaves it to the caller to stop where it suits; at the end it must.

    Raises:
      Preempted: if SIGTERM came and the caller went on to the end.
    """
    self._held = True
    try:
      yield self
    finally:
      self._held = False
    if self.requested:
      self._stop()

  def _receive(self, number, frame):
    del number, frame
    self.requested = True
    # A second one finds nobody listening.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not self._held:
      self._stop()

  def _stop(self):
    raise Preempted(
      'stopped by SIGTERM; the same command goes on from the last checkpoint'
    )
