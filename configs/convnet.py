"""System 001, five convolutions: python main.py --config=configs/convnet.py --workdir=runs/convnet

Original (iVishalr/cifar10-pytorch, 300 + 100 epochs): 87.27 % in its log (its README's 82 % was
measured with dropout on). Ours: see the README's table.
"""

from configs.base import check_variant, tune
from configs.base import get_config as base


def get_config(variant=""):
    check_variant("convnet", variant, "tuned", "short")
    c = base()
    c.model.name = "convnet"
    c.epochs = 400
    c.batch_size = 64
    c.optim.name = "adam"
    c.optim.b2 = 0.995
    c.schedule = {
        "name": "phases",
        "epochs": (300, 100),
        "peak_lr": (9.446932175584296e-4, 2.3570926966106847e-4),
        "weight_decay": (1.1257445443209662e-4, 2.1257445443209662e-4),
        "from_best": True,  # a phase starts from the best checkpoint so far, with fresh moments
    }
    c.augment.ops = ("random_flip", "random_rotation", "color_jitter", "normalize")
    c.augment.random_flip = {"p": 0.5}
    c.augment.random_rotation = {"degrees": 10.0}
    c.augment.color_jitter = {"brightness": 0.5, "uint8": False}
    c.augment.normalize = {
        "mean": (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
        "std": (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
    }
    if variant == "tuned":
        tune(c, epochs=40, peak_lr=8e-3, weight_decay=0.5)
        c.model.dropout = 0.1
    if variant == "short":
        tune(c, epochs=16, peak_lr=8e-3, weight_decay=0.5, cutout=0)
        c.model.dropout = 0.1
    return c
