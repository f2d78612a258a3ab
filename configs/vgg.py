"""System 000, eight convolutions: python main.py --config=configs/vgg.py --workdir=runs/vgg

Original (ZiadHelal/pytorch-cifar10, 120 epochs): test 88.24 %. Ours: see the README's table.
"""

from configs.base import check_variant, tune
from configs.base import get_config as base


def get_config(variant=""):
    check_variant("vgg", variant, "tuned", "short")
    c = base()
    c.model.name = "vgg"
    # BatchNorm's running variance as PyTorch keeps it; False: as Flax does
    c.model.unbiased_variance = True
    c.epochs = 120
    c.batch_size = 32
    c.optim.name = "sgd"
    c.optim.momentum = 0.9
    c.schedule.peak_lr = 1e-3
    c.augment.ops = (
        "random_rotation",
        "random_crop",
        "random_flip",
        "random_translation",
        "normalize",
    )
    c.augment.random_rotation = {"degrees": 30.0}
    c.augment.random_crop = {"padding": 4, "mode": "constant"}
    c.augment.random_flip = {"p": 0.5}
    c.augment.random_translation = {"fraction": 0.1}
    c.augment.normalize = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    if variant == "tuned":
        tune(c, epochs=60, peak_lr=4e-3, weight_decay=0.5)
        c.model.dropout, c.model.head_dropout = (0.1, 0.1, 0.2, 0.2), 0.2
    if variant == "short":
        tune(c, epochs=8, peak_lr=8e-3, weight_decay=0.5, cutout=0)
        c.model.dropout, c.model.head_dropout = (0.0, 0.0, 0.1, 0.1), 0.1
    return c
