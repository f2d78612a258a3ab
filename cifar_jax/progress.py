"""How far an epoch is: a bar on a terminal, a line now and then elsewhere."""

import io
import sys

from tqdm import tqdm

PERIOD = 30  # seconds between lines


class Lines(tqdm):
    """tqdm as whole lines on stderr, the first after PERIOD seconds."""

    def display(self, msg=None, pos=None):
        if msg is None:  # closing, tqdm wipes the bar by an empty one
            print(self, file=sys.stderr, flush=True)


def progress(description, total, done, shown):
    """A tqdm over the images of an epoch: `update(n)` counts, `set_postfix_str(text,
    refresh=False)` says how it goes. On a terminal as wide as that is; `shown` False: nothing."""
    count = {"total": total, "initial": done, "desc": description, "leave": False}
    if not shown or sys.stderr.isatty():
        more = {"unit": " images", "unit_scale": True, "dynamic_ncols": True}
        return tqdm(**count, **more, disable=not shown)
    form = "{desc}: {n:,.0f} of {total:,.0f} images, {elapsed} gone, {remaining} left{postfix}"
    periods = {"delay": PERIOD, "mininterval": PERIOD, "miniters": 1}
    return Lines(**count, **periods, bar_format=form, file=io.StringIO())
