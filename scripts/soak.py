"""Kill a training run again and again and see that nothing is lost: scripts/soak.py --kills 100

A small run on the embedded digits is started, killed at a random moment with a random signal, and
started again with the same command until it is done; then anew, until --kills are spent. Each
finished run must equal an uninterrupted one bit for bit: every array of the last checkpoint (by its
checksums), every line of metrics.jsonl (but for times), result.json's figures. Then a tiny run of
--epochs must not grow in memory. Exit code 1 if not; what was found goes to --out. --fork spares
imports (tests/running.py) and reports, and with them those moments.
"""

import argparse
import collections
import contextlib
import json
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import running  # noqa: E402

from cifar_jax import usage  # noqa: E402
from cifar_jax import workdir as files  # noqa: E402
from cifar_jax.provenance import environment  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GROWTH = 0.05  # MiB an epoch, at most: what an allocator does not give back


def content(workdir):
    """What must be the same: the last checkpoint's checksums, the log and the figures."""
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    meta = json.loads((workdir / "checkpoints" / str(max(steps)) / "meta" / "metadata").read_text())
    result = running.result(workdir)
    return {
        "step": max(steps),
        "checksums": meta["checksums"],
        "log": running.metrics(workdir),
        "result": {k: result[k] for k in ("status", "best", "last", "test", "per_class", "steps")},
    }


def soak(kills, rng, start, folder):
    """{'survived', 'runs', 'kills': {signal: count}} of that many kills.

    `start(workdir)` starts the run. SystemExit, with what went wrong, if it is not the same.
    """
    for name in ("warm", "reference"):  # the second run says how long one takes
        began = time.monotonic()
        running.finish(start(folder / name))
    lifetime = time.monotonic() - began
    reference = content(folder / "reference")
    tally, runs, workdir = collections.Counter(), 0, folder / "run"
    while tally.total() < kills or workdir.exists():
        process = start(workdir)
        try:
            wait = rng.uniform(0, lifetime) if tally.total() < kills else None
            _, err = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            signum = rng.choice(SIGNALS)
            process.send_signal(signum)
            if rng.random() < 0.3:  # a second one at once
                process.send_signal(rng.choice(SIGNALS))
            tally[signum.name] += 1
            _, err = process.communicate()
        if process.returncode not in (0, 75, *(-signum for signum in SIGNALS)):
            sys.exit(f"a run ended with exit code {process.returncode}: {err}")
        if process.returncode == 0:
            found = content(workdir)
            differing = [key for key in reference if found[key] != reference[key]]
            if differing:
                sys.exit(f"run {runs + 1} differs in {differing} after {dict(tally)}")
            runs += 1
            shutil.rmtree(workdir)
    return {"survived": tally.total(), "runs": runs, "kills": dict(sorted(tally.items()))}


def watch_memory(epochs, start, folder):
    """{'epochs', 'settled', 'end': MiB resident} of a run of one step an epoch; SystemExit if it
    grows by more than GROWTH.

    Medians of the second and of the last fifth of its epochs: from save to save it swings.
    """
    workdir = folder / "memory"
    process = start(workdir)
    log, sizes = workdir / "metrics.jsonl", collections.defaultdict(list)
    reader = threading.Thread(target=process.communicate)  # else it would wait for its pipes
    reader.start()
    while reader.is_alive():
        with contextlib.suppress(OSError):
            size = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]) / 256
            sizes[5 * log.read_text().count("\n") // epochs].append(size)
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"the run of {epochs} epochs ended with exit code {process.returncode}")
    settled, end = (statistics.median(sizes[fifth]) for fifth in (1, 4))
    if end - settled > GROWTH * epochs * 3 / 5:
        sys.exit(f"memory grew from {settled:.0f} to {end:.0f} MiB")
    return {"epochs": epochs, "settled": settled, "end": end}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="0: those in --out stand")
    parser.add_argument("--epochs", type=int, default=1000, help="of the run for memory; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--fork", action="store_true", help="quicker starts")
    parser.add_argument("--out", default=ROOT / "results" / "soak.json", help="JSON file")
    return parser.parse_args(argv)


def main(arguments, cache=None):
    """See the file's docstring; `cache`: the folder of compiled programs, else one of its own."""
    start = running.Fork if arguments.fork else running.start
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)

        def run(workdir, *more):
            return start(
                *running.QUICK, *more, f"--workdir={workdir}", cache=cache or folder / "cache"
            )

        out = files.output(arguments.out)
        found = files.read_json(out) or {} if not arguments.kills else {}
        if arguments.kills:
            found = {**environment(), "fork": arguments.fork, "seed": arguments.seed}
            report = f"--config.report={not arguments.fork}"
            found |= soak(
                arguments.kills, random.Random(arguments.seed), lambda w: run(w, report), folder
            )
            print(json.dumps(found["kills"], indent=2))
            print(
                f"{found['survived']} kills survived by {found['runs']} runs, each equal to the "
                "uninterrupted one bit for bit",
                flush=True,
            )
            files.write_json(out, found)  # the memory part takes longer
        if arguments.epochs:
            tiny = (f"--config.epochs={arguments.epochs}", "--config.batch_size=1500")
            tiny = (*tiny, "--config.drop_last=True")
            grown = watch_memory(arguments.epochs, lambda w: run(w, *tiny), folder)
            found["memory"] = {**grown, "commit": environment()["commit"]}
            print("MiB in the second and in the last fifth of the epochs:", grown)
            files.write_json(out, found)
        return found


if __name__ == "__main__":
    with usage.exit_codes():
        main(parse(sys.argv[1:]))
