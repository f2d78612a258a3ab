"""Train and use CIFAR-10 convnets: main.py --config=configs/vgg.py --workdir=DIR [--mode=train]"""

import gc
import os
import pkgutil
import sys

from absl import app, flags, logging
from ml_collections import config_flags

ACTIONS = {  # mode: the function, its module of cifar_jax imported only for that mode
    "train": "train:train_and_evaluate",
    "evaluate": "evaluate:evaluate",
    "summary": "overview:print_summary",
    "lr_find": "lr_finder:find_learning_rate",
    "predict": "predict:predict",
    "data": "overview:show_data",
    "export": "exchange:export_best",
    "import": "exchange:import_weights",
    "compare": "compare:compare",
    "seeds": "seeds:train_seeds",
    "search": "search:search",
}
CONFIG = config_flags.DEFINE_config_file("config", None, "the run: configs/NAME.py[:VARIANT]")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; holds all it writes")
MODE = flags.DEFINE_enum("mode", "train", [*ACTIONS], "what to do; see docs/train.md")
IMAGES = flags.DEFINE_string("images", "", "predict: files and folders, joined by commas")
JSON = flags.DEFINE_bool("json", False, "predict: a JSON object a line")
FORMAT = flags.DEFINE_enum("format", "torch", ["torch", "safetensors", "stablehlo"], "export: to")
WEIGHTS = flags.DEFINE_string("weights", "", "import: a .pt or .safetensors file")
TAKES = {"predict": (IMAGES, JSON), "export": (FORMAT,), "import": (WEIGHTS,)}  # a mode: its flags
JOB = flags.DEFINE_string("distributed", "", "many processes: auto, or HOST:PORT,PROCESSES,INDEX")


def parse(argv):
    """absl's flag parsing, with one sentence and exit code 2 for what is wrong."""
    argv[1:] = sorted(argv[1:], key=lambda a: not a.startswith("--config="))  # before its fields
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None or CONFIG.value.is_locked is None:  # or raises what loading it did
            raise ValueError("name a config, such as --config=configs/quickstart.py")
        if WORKDIR.value is None and MODE.value != "summary":
            raise ValueError("name a folder for the run with --workdir=DIR")
        if JOB.value and MODE.value not in ("train", "evaluate"):
            raise ValueError("--distributed is for the modes train and evaluate")
        other = [f for mode in TAKES if mode != MODE.value for f in TAKES[mode] if f.present]
        if other:
            raise ValueError(f"--{other[0].name} is not for the mode {MODE.value}")
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}")
    except Exception as error:  # what the parsers of values raise is not told
        from cifar_jax import usage

        usage.refuse(usage.explain(error))
    return rest


def main(_):
    logging.set_verbosity(logging.ERROR)  # Orbax logs a page a save
    more = [flag.value for flag in TAKES.get(MODE.value, ())]
    from cifar_jax import usage

    with usage.exit_codes():
        from cifar_jax import compilation, sharding

        compilation.enable_cache()
        with sharding.job(JOB.value):
            action = pkgutil.resolve_name(f"cifar_jax.{ACTIONS[MODE.value]}")
            gc.freeze()  # what is imported stays: no collection need walk it again
            result = action(CONFIG.value, WORKDIR.value, *more)
    if MODE.value in ("train", "seeds", "search"):
        if result["status"] == "interrupted":
            print("interrupted; the same command goes on from there")
        sys.exit({"done": 0, "stopped": 0, "diverged": 3, "interrupted": 75}[result["status"]])


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main, flags_parser=parse)
