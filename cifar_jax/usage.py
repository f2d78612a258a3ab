"""What is wrong with a command line, in one sentence that says what may have been meant, and how a
program ends upon it."""

import contextlib
import difflib
import os
import pathlib
import re
import sys

from cifar_jax import InputError, meant, one_line

KINDS = {  # what the parsers of values say: what they wanted
    "int()": "a whole number",
    "to float": "a number",
    "Non-boolean": "True or False",
}


@contextlib.contextmanager
def exit_codes():
    """While entered, bad input ends the program with code 2 and one line, Ctrl-C with code 130, and
    a reader of its output that is gone (head, say) with code 1."""
    try:
        yield
    except InputError as error:
        refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # for Python's own last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def refuse(text):
    """End the program with code 2 and one line on stderr that begins with its name."""
    print(f"{pathlib.Path(sys.argv[0]).name}: {one_line(text)}", file=sys.stderr)
    sys.exit(2)


def explain(error):
    """One sentence for what parsing the flags raised."""
    text = str(error)
    if isinstance(error, (AttributeError, KeyError)):
        return _explain_field(text)
    if "Traceback" in text:  # raised by the config file: its last line says why
        text = text.strip().splitlines()[-1]
    missing = re.search(r"\[Errno 2\] No such file or directory: '([^']*)'", text)
    if missing:
        return _explain_file(missing[1])
    value = re.match(r"flag --(config\.[\w.]+)=(.*?): (.*)$", text, re.DOTALL)
    for sign, kind in KINDS.items():
        if value and sign in value[3]:
            return one_line(f"{value[1]} must be {kind}, not {value[2]!r}")
    choice = re.match(r"flag --\w+=(.*): value should be one of <(.*)>$", text, re.DOTALL)
    return one_line(text + (meant(choice[1], choice[2].split("|")) if choice else ""))


def _explain_field(text):
    """Of a field that the config has not; ml_collections looks for close names beside it only."""
    from configs.base import get_config

    field = text.replace("\\n", " ").replace("\\", "").strip("\"'")
    beside = re.match(r"(\w+)'?\s+(Did you mean .*)$", field, re.DOTALL)
    if beside:
        return one_line(f"the config has no field {beside[1]!r}: {beside[2]}")
    places = {name.rpartition(".")[2]: name for name in _names(get_config().to_dict())}
    close = difflib.get_close_matches(field, places, n=1)
    better = f"; did you mean --config.{places[close[0]]}?" if close else ""
    return one_line(f"the config has no such field: {field}{better}")


def _explain_file(name):
    """Of a config file that is not there."""
    path = pathlib.Path(name)
    if not (path.parent / "base.py").exists():
        path = pathlib.Path("configs") / path.name
    try:
        known = [
            str(p) for p in sorted(path.parent.glob("*.py")) if p.stem not in ("__init__", "base")
        ]
    except OSError:
        known = []
    wanted = str(path if path.suffix else path.with_suffix(".py"))
    return one_line(
        f"there is no config {name}{meant(wanted, known)} (there are {', '.join(known)})"
    )


def _names(config, before=""):
    for key, value in config.items():
        yield before + key
        if isinstance(value, dict):
            yield from _names(value, f"{before}{key}.")
