"""A Python process beside this one, to call functions in."""

import concurrent.futures
import multiprocessing
import os
import threading


class OwnProcess:
    """A Python process of its own: process(function, *arguments) is the function's result there.

    It sees the variables `environment`, keeps its modules' globals between calls, and ends with the
    `with` block or with this process. The call after one that it did not survive has a fresh one.
    """

    def __init__(self, environment=()):
        self.environment, self.pool = dict(environment), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def __call__(self, function, *arguments):
        try:
            if self.pool is None:
                self._begin()
            return self.pool.submit(function, *arguments).result()
        except concurrent.futures.process.BrokenProcessPool:
            self._end()
            raise

    def see(self, environment):
        """From now on see these variables: in a fresh process, if they are others."""
        if environment != self.environment:
            self._end()
            self.environment = dict(environment)

    def _begin(self):
        context = multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=context, initializer=_end_with_parent
        )
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            self.pool.submit(int).result()  # it begins with the first call
        finally:
            os.environ.clear()
            os.environ.update(before)

    def _end(self):
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


def _end_with_parent():
    """End this process when the one that began it has, however that ended."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
