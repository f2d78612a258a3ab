"""Kill a training run again and again and see that nothing is lost: scripts/soak.py --kills 100

A small run on the embedded digits is started, killed at a random moment with a random signal, and
started again with the same command until it is done; then anew, until --kills are spent. Each
finished run must equal an uninterrupted one bit for bit: every array of the last checkpoint (by its
checksums), every line of metrics.jsonl (but for times), result.json's figures. Exit code 1 if not.
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import running  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(workdir, cache):
    """A process that trains in `workdir`, with its report."""
    arguments = (*running.QUICK, "--config.report=True", f"--workdir={workdir}")
    return running.start(*arguments, cache=cache)


def content(workdir):
    """What must be the same: the last checkpoint's checksums, the log and the figures."""
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    meta = json.loads((workdir / "checkpoints" / str(max(steps)) / "meta" / "metadata").read_text())
    result = running.result(workdir)
    return {
        "checkpoints": sorted(steps),
        "checksums": meta["checksums"],
        "log": running.metrics(workdir),
        "result": {k: result[k] for k in ("status", "best", "last", "test", "per_class", "steps")},
    }


def phase(workdir):
    """Where a run was when it was killed, by what lies on the disk."""
    if not (workdir / "checkpoints").exists():
        return "start"
    if list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
        return "save"
    if (workdir / "report").exists():
        return "report"
    return "steps and evaluation" if (workdir / "metrics.jsonl").exists() else "start"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        cache = folder / "cache"
        for name in ("warm", "reference"):  # the second run says how long one takes
            began = time.monotonic()
            _, err = (process := start(folder / name, cache)).communicate()
            if process.returncode:
                sys.exit(f"the uninterrupted run failed: {err}")
        lifetime = time.monotonic() - began
        reference = content(folder / "reference")
        tally, finished, lives, workdir = collections.Counter(), 0, 0, folder / "run"
        while sum(tally.values()) < args.kills or lives:
            process = start(workdir, cache)
            lives += 1
            spent = sum(tally.values()) >= args.kills
            try:
                process.wait(None if spent else rng.uniform(0, lifetime))
            except subprocess.TimeoutExpired:
                signum = rng.choice(SIGNALS)
                where = phase(workdir)
                process.send_signal(signum)
                if rng.random() < 0.3:  # a second one at once
                    process.send_signal(rng.choice(SIGNALS))
                _, err = process.communicate()
                if process.returncode not in (0, 75, *(-s for s in SIGNALS)):
                    sys.exit(f"exit code {process.returncode} after {signum.name}: {err}")
                tally[f"{signum.name} in {where}"] += 1
                if process.returncode != 0:
                    continue
            _, err = process.communicate()
            if process.returncode:
                sys.exit(f"a run failed by itself, exit code {process.returncode}: {err}")
            if content(workdir) != reference:
                sys.exit(
                    f"run {finished + 1}, in {lives} lives, differs from the uninterrupted one"
                )
            finished += 1
            lives = 0
            shutil.rmtree(workdir)
    for what, count in sorted(tally.items()):
        print(f"{count:4d}  {what}")
    print(
        f"{sum(tally.values())} kills survived by {finished} runs, "
        "each equal to the uninterrupted one bit for bit"
    )


if __name__ == "__main__":
    main()
