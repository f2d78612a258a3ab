"""Signals that ask a run to stop."""

import signal

from cifar_jax import sharding


class Interruption:
    """While entered, SIGTERM and SIGINT only set `requested`, for the loop to look at.

    One process's signal is every process's: all must look at the same points.
    """

    def __enter__(self):
        self.signalled = False
        self.before = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _request(self, signum, frame):
        self.signalled = True

    @property
    def requested(self):
        return any(sharding.gather("yes" if self.signalled else ""))
