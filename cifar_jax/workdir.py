"""The files of a run besides its checkpoints: config.json, metrics.jsonl, result.json.

Of several processes only the first writes: for the others the functions that do return at once.
"""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import platform
import re
import sys

from cifar_jax import InputError, meant_file, sharding

# Fields that may differ when a run goes on: they change where and how far, not what is computed.
# A section's name stands for all its fields.
ALWAYS_FREE = ("data.dir", "stop_after", "on_nonfinite", "report", "profile")
ALWAYS_FREE += ("log", "lr_find", "compare")
FREE_FIELDS = (*ALWAYS_FREE, "seeds", "replicas", "search")
FREE_IN_MODE = {
    "train": FREE_FIELDS,
    "seeds": (*ALWAYS_FREE, "search"),
    "search": (*ALWAYS_FREE, "search.trials"),
}
# And those that may differ when a run is only looked at.
LOOKING_FIELDS = (*FREE_FIELDS, "eval.augmented", "eval.batch_size", "eval.tta")
# What a mode writes last, of those that train.
RESULTS = {"train": "result.json", "seeds": "seeds.json", "search": "search.json"}


@sharding.by_writer
def write_json(path, value):
    """Write JSON, non-finite as null, so that the file is the old one or the new, never a part."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as file:
        json.dump(finite(value), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_json(path):
    """The JSON value in `path`, non-finite as None, None without such a file; InputError if it
    cannot be read."""
    try:
        return finite(json.loads(pathlib.Path(path).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def slug(text):
    """`text` as a file's name: lower case, letters and digits joined by '-'."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def short_commit(commit):
    """A result's commit as a reader sees it: ten digits, -dirty if it was; 'unknown' for None."""
    digits, dash, dirty = (commit or "unknown").partition("-")
    return digits[:10] + dash + dirty


def absolute(path):
    """The absolute path of what a user named; InputError for the home of nobody."""
    try:
        return pathlib.Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be found: {error}") from error


def writable(workdir):
    """The absolute path of `workdir`, created if need be; InputError if it cannot be written."""
    path = absolute(workdir)
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from error
    return path


def output(path):
    """The absolute path of a file to write, its folder made if need be; InputError if it cannot
    be."""
    path = absolute(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    return writable(path.parent) / path.name


@contextlib.contextmanager
def only_writer(workdir):
    """Hold `workdir` (made if need be) for this job; yields its absolute path.

    The lock is the kernel's (flock on the file `lock`), which lets it go when the process ends,
    however it ends. Raises InputError, naming the holder, while another process has it.
    """
    if not sharding.is_writer():
        yield existing(workdir)
        return
    fresh = not os.path.exists(absolute(workdir))  # noqa: PTH110 (Path.exists raises)
    path = writable(workdir)
    with open(path / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(f"{path} is being trained by {holder}; let it end first") from None
        except OSError:
            print(
                f"{path} is on a filesystem without locks: see to it that no other process trains "
                "there",
                file=sys.stderr,
            )
            yield path
            return
        if not os.fstat(file.fileno()).st_nlink:  # between open and flock a refused job tidied up
            raise InputError(f"{path} was just removed by another process; start again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield path
        except InputError:  # refused: of a folder made for it nothing is left
            if fresh and [*path.iterdir()] == [path / "lock"]:
                (path / "lock").unlink()
                path.rmdir()
            raise


@sharding.by_writer
def remove(path):
    """Delete a file that may be there."""
    pathlib.Path(path).unlink(missing_ok=True)


def existing(workdir):
    """The absolute path of `workdir`; InputError if there is no such folder."""
    path = absolute(workdir)
    try:
        if path.is_dir():
            return path
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    raise InputError(f"{path} holds no run: there is no such folder{meant_file(path)}")


def check_workdir(path, config, mode="train"):
    """Raise InputError unless `config` (nested dict) can begin or go on in the folder `path`."""
    if (path / "config.json").exists():
        check_config(path, config, FREE_IN_MODE[mode], mode)
    elif (path / "checkpoints").exists():
        raise InputError(f"{path} has checkpoints but no config.json; choose another workdir")


def open_workdir(workdir, config, environment, data=None, mode="train"):
    """The path of the folder `workdir`, made ready to train `config` (nested dict) in this mode on
    `data` (what a run keeps of them, a dict).

    It may hold that run already: an `environment` (device, versions, commit) other than the last
    is then added to config.json's list `resumed`. Raises InputError if it holds one with another
    config, mode or data.
    """
    path = existing(workdir)
    check_workdir(path, config, mode)
    check_data(path, data or {})
    kept = read_json(path / "config.json")
    if kept is None:
        kept = {"mode": mode, "config": config, "data": data, **environment}
        write_json(path / "config.json", kept)
        return path
    resumed = kept.get("resumed")
    resumed = resumed if isinstance(resumed, list) else []
    last = resumed[-1] if resumed else {key: kept.get(key) for key in environment}
    if last != finite(environment):
        write_json(path / "config.json", {**kept, "resumed": [*resumed, environment]})
    return path


def finished_result(workdir, config, mode="train"):
    """The result (see RESULTS) of the run of `config` in `workdir` if it is done, else None;
    touches nothing. Raises InputError if another config's run is done there or result.json lacks
    the accuracy."""
    path = absolute(workdir)
    result = read_json(path / RESULTS[mode])
    if not isinstance(result, dict) or result.get("status") != "done":
        return None
    check_config(path, config, FREE_IN_MODE[mode], mode)
    test = result.get("test")
    measured = isinstance(test, dict) and isinstance(test.get("accuracy"), float)
    if mode == "train" and not measured:
        raise InputError(f"{path / RESULTS[mode]} is not the result of a run; delete it")
    return result


def check_config(path, config, free_fields, mode="train"):
    """Raise InputError unless the run in `path` is of this mode (absent: train) and has `config`,
    `free_fields` aside."""
    before = read_json(path / "config.json")
    if before is None:
        raise InputError(f"{path} holds no run: it has no config.json")
    if not isinstance(before, dict) or not isinstance(before.get("config"), dict):
        raise InputError(
            f"{path / 'config.json'} is not the config of a run; choose another workdir"
        )
    if before.get("mode", "train") != mode:
        raise InputError(
            f"{path} holds a run of mode {before['mode']!r}, not {mode!r}: its figures are in "
            f"{RESULTS.get(before['mode'], 'it')}; choose another workdir"
        )
    differing = differences(before["config"], config, free_fields)
    if differing:
        (name, (old, new)), *others = differing.items()
        more = f", and so differ {', '.join(name for name, _ in others[:3])}" if others else ""
        raise InputError(
            f"{path} holds a run with another config ({name} is {old!r} there, {new!r} "
            f"here{more}); name the same fields as it, or another workdir"
        )


def differences(before, config, free_fields=()):
    """{dotted name: (value before, value now)} of the fields in which two configs (nested dicts)
    differ, `free_fields` and the sections so named aside, in order of the names. A field that
    `before` lacks, for it is older, counts as configs/base.py has it."""
    old, new = (flatten(finite(c)) for c in (before, config))
    old = {**{name: value for name, value in defaults().items() if name in new}, **old}
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if not {name, name.split(".")[0]} & {*free_fields} and old.get(name) != new.get(name)
    }


def data_of(path):
    """(class names, image shape) of the data that the run in `path` was made from; None where it
    does not say. InputError if what it says is no such thing."""
    kept = _kept_data(path)
    if kept is None:
        return None
    names, shape = (
        kept.get(key) if isinstance(kept, dict) else None for key in ("class_names", "image_shape")
    )
    lists = isinstance(names, list) and isinstance(shape, list)
    if not (
        lists
        and 2 <= len(names) <= 2**16
        and all(isinstance(name, str) for name in names)
        and [type(n) for n in shape] == [int] * 3
        and all(1 <= n <= 2**13 for n in shape)
    ):
        raise InputError(f"{path / 'config.json'} does not say what data the run was made from")
    return tuple(names), tuple(shape)


def _kept_data(path):
    """config.json's 'data', None without."""
    kept = read_json(path / "config.json")
    if kept is not None and not isinstance(kept, dict):
        raise InputError(f"{path / 'config.json'} is not the config of a run")
    return kept and kept.get("data")


def check_data(path, about):
    """Raise InputError if the run in `path` was made from data other than `about` (a dict)."""
    before = _kept_data(path)
    for key, now in finite(about).items() if before is not None else ():
        then = before.get(key, now) if isinstance(before, dict) else None
        if then != now:
            raise InputError(
                f"{path} holds a run on other data ({key} is {str(then)[:200]} there, "
                f"{str(now)[:200]} here); name its data with --config.data.dir or choose another "
                "workdir"
            )


@sharding.by_writer
def rewrite_metrics(path, records):
    """Make metrics.jsonl hold exactly `records`, those of the checkpoint a run goes on from."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(_line(record) for record in records))
    part.replace(path)


@sharding.by_writer
def append_metrics(path, *records):
    """Add a line for each, on disk before this returns."""
    with open(path, "a") as file:
        file.write("".join(_line(record) for record in records))
        file.flush()
        os.fsync(file.fileno())


def _line(record):
    return json.dumps(finite(record), allow_nan=False) + "\n"


def finite(value):
    """JSON has neither NaN nor infinity: None in their place; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def defaults():
    """{dotted name: value} of configs/base.py."""
    from configs.base import get_config

    return flatten(json.loads(get_config().to_json_best_effort()))


def flatten(tree, prefix=""):
    """{dotted name: value} of a nested dict."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
