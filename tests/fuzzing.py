"""What fuzz_data_test.py and fuzz_run_test.py share: limits, mutations, hostile pickles.

Each reader sees FUZZ_EXAMPLES mutated inputs, here CI's share; all 10,000, and what they gave as
JSON:

    FUZZ_EXAMPLES=10000 FUZZ_RESULT=results/fuzz.json python -m pytest -n 0 tests/fuzz_*_test.py

None may run code, take longer than SECONDS or more resident memory than BOUND beyond the input's
size (an image: what its pixels need).
"""

import contextlib
import json
import math
import os
import pickle
import pickletools
import resource
import signal
import struct
import sys
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cifar_jax import InputError, images, workdir
from cifar_jax.provenance import environment

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
SECONDS = 30  # of an example; it shares the machine
BOUND = 256 << 20  # bytes of resident memory, beyond the input's size
OUTCOMES = {}  # reader: what its inputs gave
IMAGE_BOUND = 12 * images.PIXELS + (64 << 20)  # what the pixels of one need


class Hang(BaseException):
    """Not an Exception: no reader may catch it."""


class Watch:
    """Runs one input at a time under the limits; `canary` is the file that hostile inputs make."""

    FORBIDDEN = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen"}
    FORBIDDEN |= {"pty.spawn", "webbrowser.open", "socket.connect"}

    def __init__(self, folder):
        self.canary, self.active, self.ran = folder / "canary", False, []
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self.active and event in self.FORBIDDEN:
            self.ran.append(event)

    def __call__(self, reader, read, size=0, bound=BOUND):
        """What `read()` returns, None if it refuses the input with one line."""
        record = OUTCOMES[reader]
        record["reads"] += 1
        before = resident(reset=True)
        start = time.perf_counter()
        self.active = True
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            value = read()
        except InputError as error:
            value, message = None, str(error)
            assert message.isprintable() and 0 < len(message) <= 2000, message
            record["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.active = False
        record["slowest_seconds"] = max(record["slowest_seconds"], time.perf_counter() - start)
        taken = resident() - before - size
        record["peak_bytes"] = max(record["peak_bytes"], taken)
        assert taken <= bound, f"{taken >> 20} MiB"
        assert not self.ran and not self.canary.exists(), "it ran code"
        return value


def resident(reset=False):
    """Bytes of the largest resident set, since the last reset where the kernel can do that."""
    with contextlib.suppress(OSError):
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.fixture(scope="module", name="watch")
def watching(tmp_path_factory):
    def stop(signum, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    # the measured bound is BOUND; this one saves the machine from what breaks it
    resource.setrlimit(resource.RLIMIT_AS, (now + (8 << 30), limits[1]))
    yield Watch(tmp_path_factory.mktemp("fuzz"))
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)
    if "FUZZ_RESULT" in os.environ:
        limits = {"seconds": SECONDS, "bytes": BOUND, "bytes_of_an_image": IMAGE_BOUND}
        before = workdir.read_json(os.environ["FUZZ_RESULT"]) or {}  # of the other readers
        commit = environment()["commit"]
        readers = before.get("readers", {})
        for reader, outcome in OUTCOMES.items():
            readers[reader] = {**in_all(readers.get(reader, {}), outcome), "commit": commit}
        found = {"limits": limits, "readers": readers, **environment()}
        workdir.write_json(os.environ["FUZZ_RESULT"], found)
    OUTCOMES.clear()


def in_all(before, now):
    """The figures of a reader over all runs: sums, but for what is the largest."""
    largest = {key: max(before.get(key, 0), now[key]) for key in ("slowest_seconds", "peak_bytes")}
    added = ("inputs", "reads", "refused", "seconds")
    return {**now, **{key: before.get(key, 0) + now[key] for key in added}, **largest}


def fuzz(reader, inputs, check, once_failed=None):
    """`check` EXAMPLES of `inputs`, and before them {what went wrong: input} of those that once
    failed."""
    once_failed = once_failed or {}
    record = {"inputs": 0, "reads": 0, "refused": 0, "slowest_seconds": 0.0, "peak_bytes": 0}
    OUTCOMES[reader] = record

    @settings(
        max_examples=EXAMPLES,
        deadline=None,  # Watch has its own, which also ends what hangs
        derandomize=EXAMPLES < 1000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(value):
        record["inputs"] += 1
        check(value)

    for value in once_failed.values():
        run = example(value)(run)
    record["once_failed"] = [*once_failed]
    start = time.perf_counter()
    try:
        run()
    finally:
        record["seconds"] = time.perf_counter() - start


# ------------------------------------------------------------------------------------------------
# mutations

EXTREMES = [
    b"\x00" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\x7f",
    b"-1",
    b"\n",
]


@st.composite
def mutated(draw, content, most=4):
    """`content` (bytes) after up to `most` edits, most of them near its ends."""
    for _ in range(draw(st.integers(1, most))):
        size = len(content)
        near = st.integers(0, min(300, len(content)))
        at = draw(near | near.map(lambda i, size=size: size - i) | st.integers(0, len(content)))
        end = at + draw(st.sampled_from([1, 2, 4, 8, 30, 512, len(content)]))
        kind = draw(
            st.sampled_from(
                ["flip", "flip", "flip", "set", "cut", "insert", "delete", "double", "swap"]
            )
        )
        if kind == "flip":
            flipped = bytes(v ^ (1 << draw(st.integers(0, 7))) for v in content[at : at + 1])
            content = content[:at] + flipped + content[at + 1 :]
        elif kind == "set":
            value = draw(st.sampled_from(EXTREMES) | st.binary(min_size=1, max_size=8))
            content = content[:at] + value + content[at + len(value) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            value = draw(st.sampled_from(EXTREMES) | st.binary(max_size=40))
            content = content[:at] + value + content[at:]
        elif kind == "delete":
            content = content[:at] + content[end:]
        elif kind == "double":
            content = content[:end] + content[at:]
        else:
            far = end + (end - at)
            content = content[:at] + content[end:far] + content[at:end] + content[far:]
    return content


ODD = [None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, 5e-324, math.nan, math.inf, "", "x", "\x00"]
ODD += [
    "a\nb",
    "\x1b[2J",
    "../..",
    "/dev/zero",
    "9" * 5000,
    "x" * 10_000,
    [],
    {},
    [[]],
    [None],
    {"": 0},
]
DEEP = "@deep@"  # becomes JSON nested this deep
DEPTHS = [300, 499, 700, 990, 100_000]


def paths(value, before=()):
    """The path of every value inside a JSON value."""
    yield before
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*before, key))


@st.composite
def mutated_json(draw, value, sign=lambda value: value):
    """The text of a JSON value with some of its values changed, lost, renamed; then `sign`ed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([p for p in paths([value]) if p]))
        inside = whole = [value]
        for key in way:
            inside = inside[key]
        kind = draw(st.sampled_from(["change", "change", "change", "lose", "rename"]))
        if kind == "change" or not isinstance(inside, dict):
            odd = st.sampled_from([*ODD, DEEP, *whole]) | st.text() | st.integers() | st.floats()
            inside[last] = json.loads(json.dumps(draw(odd)))
        elif kind == "lose":
            del inside[last]
        else:
            inside[draw(st.text() | st.sampled_from(["__class__", "a.b", "a\nb"]))] = inside.pop(
                last
            )
        value = whole[0]
    text = json.dumps(sign(value))
    left, right = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
    depth = draw(st.sampled_from(DEPTHS))
    return text.replace(f'"{DEEP}"', left * depth + "0" + right * depth).encode()


# ------------------------------------------------------------------------------------------------
# pickles


class Calls:
    """Pickled, a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles(canary):
    """Pickles that would make the file `canary`."""
    calls = [Calls(os.system, f"touch {canary}"), Calls(exec, f"open({str(canary)!r}, 'w')")]
    calls += [Calls(open, str(canary), "w"), Calls(eval, f"open({str(canary)!r}, 'w')")]
    for call in calls:
        for protocol in (0, 2, 4):
            yield pickle.dumps({b"data": call, b"labels": [call]}, protocol)
            yield pickle.dumps(call, protocol)


@st.composite
def mutated_pickle(draw, seeds):
    """A pickle after operations were inserted, lost or doubled, or its bytes edited."""
    content = draw(st.sampled_from(seeds))
    if draw(st.booleans()):
        return draw(mutated(content))
    starts = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    parts = [content[a:b] for a, b in zip(starts, starts[1:])]
    code = st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes])
    argument = st.sampled_from(
        [b"", b"\x00", b"\x02", b"\xff\xff\xff\x07", b"\xff" * 8, struct.pack("<Q", 2**33)]
        + [b"os\nsystem\n", b"numpy\nndarray\n", b"numpy\ndtype\n", b"builtins\nexec\n", b"9" * 99]
    )
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(parts) - 1))
        kind = draw(st.sampled_from(["insert", "insert", "lose", "double", "swap"]))
        if kind == "insert":
            parts.insert(at, draw(code) + draw(argument | st.binary(max_size=9)))
        elif kind == "lose" and len(parts) > 1:
            del parts[at]
        elif kind == "double":
            parts.insert(at, parts[draw(st.integers(0, len(parts) - 1))])
        else:
            other = draw(st.integers(0, len(parts) - 1))
            parts[at], parts[other] = parts[other], parts[at]
    return b"".join(parts)


# ------------------------------------------------------------------------------------------------
# places of files

PLACES = ("content", "content", "content", "gone", "a folder", "a link to itself", "endless")


def spoil(path, how, content):
    """Put something else in the place of a file."""
    path.unlink()
    if how == "content":
        path.write_bytes(content)
    elif how == "a folder":
        path.mkdir()
    elif how == "a link to itself":
        path.symlink_to(path)
    elif how == "endless":
        path.symlink_to("/dev/zero")
