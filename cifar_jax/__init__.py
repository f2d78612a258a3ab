"""CIFAR-10 convnets in JAX/Flax: five published PyTorch systems, re-implemented faithfully."""

import difflib
import itertools
import pathlib


class InputError(ValueError):
    """Bad input or usage: the message is one clear sentence; main.py prints it and exits with 2.

    Whatever a file's content put into it, it is one line of printable characters, 2,000 at most.
    """

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text, most=2000):
    """`text` as one line of printable characters, `most` at most."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in line[:most])


def first_line(error):
    """The first line of what an exception says, 300 characters at most; its kind if it says nothing
    (Orbax tells stories, assert nothing)."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def meant(word, known, cutoff=0.6):
    """'; did you mean X?' where one of the names `known` is as close to `word` as `cutoff` (1: the
    same; see difflib), else ''."""
    close = difflib.get_close_matches(str(word), map(str, known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def meant_file(path):
    """As meant, of the names in the folder that should hold `path`."""
    try:
        beside = itertools.islice(pathlib.Path(path).parent.iterdir(), 10_000)
        return meant(pathlib.Path(path).name, [place.name for place in beside], cutoff=0.8)
    except (OSError, ValueError):  # the latter for a name that no file can have
        return ""
