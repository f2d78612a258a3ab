"""Minutes on a laptop: python main.py --config=configs/quickstart.py --workdir=runs/quickstart

A narrow ResNet on scikit-learn's handwritten digits (1,797 real images, enlarged to 32x32x3).
"""

from configs.base import check_variant
from configs.base import get_config as base


def get_config(variant=""):
    check_variant("quickstart", variant)
    c = base()
    c.data.name = "digits"
    c.model.name = "resnet"
    c.model.widths = (8, 16, 32, 64)
    c.epochs = 12
    c.batch_size = 64
    c.optim.name = "adam"
    c.optim.weight_decay = 1e-4
    c.schedule = {
        "name": "one_cycle",
        "peak_lr": 1e-2,
        "pct_start": 0.3,
        "div_factor": 25.0,
        "final_div_factor": 1e4,
        "anneal": "cosine",
        "momentum": (0.85, 0.95),
    }
    c.augment.ops = ("random_crop", "normalize")
    c.augment.random_crop = {"padding": 2, "mode": "constant"}
    c.augment.normalize = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return c
