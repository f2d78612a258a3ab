"""Train and use CIFAR-10 convnets: python main.py --config=configs/resnet.py --workdir=runs/resnet [--mode=train]"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("train", "evaluate", "summary", "data")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the run: configs/NAME.py[:VARIANT]", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; holds all it writes")
MODE = flags.DEFINE_enum("mode", "train", MODES, "what to do; see README.md")
EXIT_CODES = {"done": 0, "stopped": 0, "diverged": 3, "interrupted": 75}


def parse(argv):
    """absl's flag parsing, with one sentence and exit code 2 for what is wrong."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            raise ValueError(
                "name a config, such as --config=configs/resnet.py (or quickstart, which needs no data)"
            )
        if WORKDIR.value is None and MODE.value != "summary":
            raise ValueError("name a folder for the run with --workdir=DIR")
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}")
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        refuse(error)
    return rest


def refuse(error):
    """Say what is wrong with the input in one line and leave with code 2."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    print(f"main.py: {text}", file=sys.stderr)
    sys.exit(2)


def main(argv):
    del argv
    logging.set_verbosity(logging.ERROR)  # Orbax logs a page a save
    from cifar_jax import InputError, overview, train

    actions = {
        "train": lambda: train.train_and_evaluate(CONFIG.value, WORKDIR.value),
        "evaluate": lambda: train.evaluate(CONFIG.value, WORKDIR.value),
        "summary": lambda: overview.print_summary(CONFIG.value),
        "data": lambda: overview.show_data(CONFIG.value, WORKDIR.value),
    }
    try:
        result = actions[MODE.value]()
    except InputError as error:
        refuse(error)
    if MODE.value == "train":
        sys.exit(EXIT_CODES[result["status"]])


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main, flags_parser=parse)
