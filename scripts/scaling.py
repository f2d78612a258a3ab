"""What data parallelism sends from device to device: python scripts/scaling.py

Compiles the whole training step of every family, at its full size, for 8 devices (virtual ones of
this CPU: the partitioner is the same) and reads the collectives in the program that XLA makes of
it, with BatchNorm over the whole batch and with each device's own (config.ghost_batches). Compares
the dataset whole on every device with a share of it on each. Writes results/scaling.json, from
which results_table.py makes the tables of docs/scaling.md.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
DEVICES = 8
if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"

import importlib  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from benchmark import CONFIGS  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from cifar_jax import compilation, flops, sharding, timing  # noqa: E402
from cifar_jax import workdir as files  # noqa: E402
from cifar_jax.experiment import make_experiment  # noqa: E402
from cifar_jax.provenance import environment  # noqa: E402
from cifar_jax.steps import make_batches  # noqa: E402

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
SIZES = {"train": 50_000, "test": 64}
# Assumed for the expected efficiency, from data sheets: an H200's dense bfloat16 peak, of which
# training takes a share; what a GPU or a host sends in one direction; a collective's start.
FLOPS_PER_SECOND = 989e12 / 3
GPUS_OF_A_HOST = 8
NVLINK = {"bytes_per_second": 450e9, "latency": 20e-6}
INFINIBAND = {"bytes_per_second": 8 * 50e9, "latency": 40e-6}  # a card of 400 Gb/s for each GPU
ETHERNET = {"bytes_per_second": 12.5e9, "latency": 100e-6}  # 100 Gb/s for all GPUs of a host
ROUNDS, STEPS = 5, 20  # of the comparison of the dataset's placements


def collectives(text):
    """[(kind, [bytes of each array it yields])] of the collectives in a compiled program's text.

    One in a loop's body is counted once, however often the loop turns.
    """
    found = []
    for result, kind in re.findall(rf"^.* = (.*?) ({KINDS})(?:-start)?\(", text, re.M):
        arrays = re.findall(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]", result)
        sizes = [
            int(bits or 8) // 8 * int(np.prod([int(n) for n in shape.split(",") if n], initial=1))
            for _, bits, shape in arrays
        ]
        found.append((kind, sizes))
    return found


def step_collectives(exp):
    """The collectives of a whole training step of `exp`, its Metrics' sums among them."""
    step = jax.jit(exp.step, out_shardings=(exp.placement, exp.placement))
    state = exp.abstract_state()
    return collectives(step.lower(state, exp.train).compile().as_text())


def measure(name):
    """The counts of one family, at its recipe's batch size."""
    config = importlib.import_module(f"configs.{CONFIGS[name]}").get_config("")
    counts = {}
    for key, parts in (("whole", 1), ("own", DEVICES)):
        config.ghost_batches = parts
        exp = make_experiment(config, splits=timing.random_splits(SIZES))
        found = step_collectives(exp)
        counts[key] = {
            "collectives": len(found),
            "kinds": sorted({kind for kind, _ in found}),
            "bytes": sum(sum(sizes) for _, sizes in found),
        }
    params = exp.abstract_state().params
    return {
        "batch_size": config.batch_size,
        "gradient_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
        "training_flops": 2 * flops.TRAINING * flops.forward_macs(exp.model),
        "batch_norm": counts,
    }


def compare_placements():
    """{'whole', 'split': seconds and collectives of a batch} of the dataset on every device or in
    shares, resnet's batch and augmentation; timed in turn."""
    config = importlib.import_module("configs.resnet").get_config("")
    exp = make_experiment(config, splits=timing.random_splits(SIZES))
    shares = NamedSharding(sharding.make_mesh(), PartitionSpec("data"))
    datasets = {"whole": exp.train, "split": jax.device_put(exp.train, shares)}
    batches = jax.jit(make_batches(**exp.batching))
    key = jax.random.key(0)
    programs, found = {}, {}
    for name, dataset in datasets.items():
        programs[name] = batches.lower(key, np.int32(0), dataset).compile()
        sent = collectives(programs[name].as_text())
        found[name] = {
            "collectives": len(sent),
            "bytes": sum(sum(sizes) for _, sizes in sent),
            "bytes_held": sum(x.nbytes for x in jax.tree.leaves(exp.train))
            // (DEVICES if name == "split" else 1),
            "seconds": [],
        }
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            for step in range(STEPS):
                jax.block_until_ready(program(key, np.int32(step), datasets[name]))
            found[name]["seconds"].append((time.perf_counter() - start) / STEPS)
    for entry in found.values():
        entry["seconds"] = statistics.median(entry["seconds"])
    return found


def all_reduce_seconds(size, calls, hosts, network):
    """Of `calls` all-reduces of `size` bytes together, rings within each host and between hosts."""
    n = GPUS_OF_A_HOST
    seconds = calls * NVLINK["latency"] + 2 * (n - 1) / n * size / NVLINK["bytes_per_second"]
    if hosts > 1:
        seconds += calls * network["latency"]
        seconds += 2 * (hosts - 1) / hosts * size / network["bytes_per_second"]
    return seconds


def efficiency(entry, statistics_of, images, hosts=1, network=None):
    """Share of a step that is spent computing, nothing being overlapped, `images` on each GPU."""
    counts = entry["batch_norm"][statistics_of]
    compute = images * entry["training_flops"] / FLOPS_PER_SECOND
    return compute / (
        compute + all_reduce_seconds(counts["bytes"], counts["collectives"], hosts, network)
    )


def markdown(result):
    """The tables of docs/scaling.md."""
    rows = [
        "| family | parameters, MiB | summed a step, MiB | all-reduces with the batch's statistics "
        "| with each device's own | GFLOP an image, trained |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, entry in result["families"].items():
        whole, own = (entry["batch_norm"][key] for key in ("whole", "own"))
        rows.append(
            f"| {name} | {entry['gradient_bytes'] / 2**20:.1f} "
            f"| {whole['bytes'] / 2**20:.1f} | {whole['collectives']} | {own['collectives']} "
            f"| {entry['training_flops'] / 1e9:.2f} |"
        )
    places = {
        "8 GPUs, NVLink": (1, None),
        "64, InfiniBand": (8, INFINIBAND),
        "64, Ethernet": (8, ETHERNET),
    }
    rows += [
        "",
        "An estimate, not a measurement: efficiency in percent, with the batch's statistics / with "
        "each device's own:",
        "",
        "| family | images a GPU | " + " | ".join(places) + " |",
        "|---|--:|" + "--:|" * len(places),
    ]

    def percent(entry, images, place):
        shares = (efficiency(entry, key, images, *place) for key in ("whole", "own"))
        return " / ".join(f"{100 * share:.0f}" for share in shares)

    for name, entry in result["families"].items():
        for images in (entry["batch_size"] // GPUS_OF_A_HOST, 512):
            shares = [percent(entry, images, place) for place in places.values()]
            rows.append(f"| {name} | {images} | " + " | ".join(shares) + " |")
    whole, split = (result["placements"][key] for key in ("whole", "split"))
    rows += [
        "",
        "| dataset | MiB on a device | collectives for a batch | MiB sent for a batch "
        f"| time for a batch ({1000 * whole['seconds']:.1f} ms: 1) |",
        "|---|--:|--:|--:|--:|",
    ]
    for text, entry in {"whole on every device": whole, "a share on each": split}.items():
        rows.append(
            f"| {text} | {entry['bytes_held'] / 2**20:.0f} | {entry['collectives']} "
            f"| {entry['bytes'] / 2**20:.2f} | {entry['seconds'] / whole['seconds']:.2f} |"
        )
    return "\n".join(rows)


def main():
    compilation.enable_cache()
    out = {**environment(), "devices": DEVICES, "families": {}}
    for name in CONFIGS:
        out["families"][name] = measure(name)
        print(name, out["families"][name], flush=True)
    out["placements"] = compare_placements()
    print(out["placements"])
    files.write_json(ROOT / "results" / "scaling.json", out)


if __name__ == "__main__":
    main()
