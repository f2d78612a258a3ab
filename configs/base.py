"""The fields of all runs, with unit and default; a system's config states what differs.

A field is overridden on the command line: --config.epochs=10 --config.augment.random_crop.padding=2
"""

from ml_collections import ConfigDict, config_dict


def get_config():
    """The defaults as a ConfigDict; a system's config sets model.name, recipe and augmentation."""
    c = ConfigDict()
    c.seed = 0  # initial weights, order, augmentation, dropout: everything random follows from it
    c.epochs = 24  # passes over the training images; the schedule spans them
    c.batch_size = 128  # images a step, over all devices together
    # parts of a batch of which each is normalised by its own statistics (steps.apply_in_parts); 1:
    # BatchNorm over the whole batch, over all devices; as many as devices: each device its own
    c.ghost_batches = 1
    c.drop_last = False  # leave out the last images of an epoch's order that fill no batch
    c.alternating_flip = False  # mirror every image in every other epoch (see steps.make_batches)
    # epochs after which to stop (0: run them all); the same command with more, or 0, goes on
    c.stop_after = 0.0
    # training steps in one compiled call; 0: up to 512 images on CPU, a whole epoch on a GPU
    c.steps_per_call = 0
    # epochs from one checkpoint to the next; the last epoch leaves one too. The best is one of
    # them, and not of those that a run leaves where it stops or is interrupted between
    c.save_every = 1
    c.report = True  # draw report/ at the end
    # once the loss or the state is not finite: stop (exit code 3) | rollback: to the newest
    # checkpoint, and on from there at half the learning rate; at most three times
    c.on_nonfinite = "stop"
    c.profile = False  # first trace a few steps to profile/, for TensorBoard and Perfetto

    c.log = ConfigDict()
    # keep tensorboard/ in the workdir: every epoch's figures, samples, the report's pictures
    c.log.tensorboard = False

    c.data = ConfigDict()
    # cifar10 | cifar100 | digits | folder | tfds:NAME, an image-classification set of TFDS
    c.data.name = "cifar10"
    # folder with a CIFAR set in any official form, where a download goes; a TFDS data folder;
    # for name=folder that of train/CLASS/*.png and test/CLASS/*.png (or .jpg, ...), all of one size
    c.data.dir = "data"
    # images held out of train by seed; then they, not the test set, are evaluated each epoch
    c.data.validation = 0
    c.data.split_seed = config_dict.placeholder(int)  # by which they are drawn; None: c.seed

    c.model = ConfigDict()
    # vgg | convnet | resnet | mixture | dilated | airbench; a config may name more fields
    c.model.name = ""
    # compute dtype: float32 | bfloat16 | float16; parameters and statistics stay float32
    c.model.dtype = "float32"

    c.loss = ConfigDict()
    # mean | sum over the batch; what is logged is always the mean an image
    c.loss.reduction = "mean"
    c.loss.label_smoothing = 0.0  # share of the target spread evenly over the classes

    c.optim = ConfigDict()
    c.optim.name = "adam"  # sgd | adam (L2) | adamw | muon (both decoupled)
    # on every parameter; schedule.weight_decay, where there is one, goes before it
    c.optim.weight_decay = 0.0
    c.optim.clip_value = config_dict.placeholder(float)  # clip each gradient element to +-this
    c.optim.clip_norm = config_dict.placeholder(float)  # clip the gradient's global norm to this
    c.optim.momentum = 0.9  # sgd; schedule.momentum goes before it, and before b1
    c.optim.nesterov = False  # sgd, muon
    c.optim.norm_bias_factor = 1.0  # sgd: learning rate of BatchNorm's biases over that of the rest
    c.optim.b1 = 0.9  # adam, adamw, muon
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8

    c.schedule = ConfigDict()
    # constant | one_cycle | phases | triangle | linear_ramp | exponential_ramp
    c.schedule.name = "constant"
    c.schedule.peak_lr = 1e-3
    c.schedule.start_lr = 1e-6  # the ramps: where they begin

    c.lookahead = ConfigDict()  # slow weights that follow the trained ones (optim.make_lookahead)
    c.lookahead.every = 0  # steps between their meetings; 0: none
    c.lookahead.decay = 0.95  # share of the slow ones kept a step, at the end of the run
    c.lookahead.power = 3  # of the run's progress, by which that share grows from 0

    c.seeds = 1  # --mode=seeds: replicas of the run, from seed, seed + 1, ...
    c.replicas = ConfigDict()
    # peak learning rates and weight decays, the first with the first, (): the recipe's own; each
    # pair is trained from every seed. One value stands for all, phases keep their proportions.
    c.replicas.lr = ()
    c.replicas.weight_decay = ()
    # auto | sequence: one after the other, call by call | map: one after the other in one compiled
    # loop | vmap: all in one computation; auto is sequence on CPU, else map (see seeds.py)
    c.replicas.strategy = "auto"

    c.search = ConfigDict()  # --mode=search, each proposal trained from c.seeds seeds
    c.search.trials = 20  # proposals in all; the same command with more goes on
    c.search.at_once = 10  # that are trained as replicas of one run
    c.search.epochs = 5.0  # that each is trained, of the whole recipe's schedule
    c.search.sampler = "random"  # random: uniform in the logarithm | tpe: learns from those before
    # lowest and highest, those of system 001's first draws; (): the recipe's own value
    c.search.lr = (1e-5, 1e-3)
    c.search.weight_decay = (1e-5, 1e-4)

    c.lr_find = ConfigDict()  # --mode=lr_find
    c.lr_find.range = "exponential"  # exponential | linear: how the rate grows
    c.lr_find.start_lr = 1e-6
    c.lr_find.end_lr = 10.0
    c.lr_find.steps = 200

    c.compare = ConfigDict()  # --mode=compare
    c.compare.epochs = 1.0  # that each side trains, of the whole recipe's schedule
    c.compare.seeds = 3  # pairs: seed, seed + 1, ...
    c.compare.test_images = 0  # the first so many test images; 0: all
    c.compare.dtypes = ("float32", "bfloat16")  # timed; memory is measured for the first
    c.compare.compiled = True  # time torch.compile as well
    c.compare.rounds = 5  # of timing, every form once in each
    c.compare.steps = 0  # of a form in a round; 0: 512 images on a CPU, 16,384 on a GPU

    c.augment = ConfigDict()
    # operations of augment.py, in this order; their fields beside it
    c.augment.ops = ("normalize",)
    c.augment.normalize = ConfigDict(
        {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    )

    c.eval = ConfigDict()
    c.eval.batch_size = 512  # images a batch; changes no figure unless eval.augmented
    # none | mirror | multicrop: views averaged for a second accuracy of the final model on test
    c.eval.tta = "none"
    # True: evaluate under the training augmentation (system 004 measured so)
    c.eval.augmented = False
    return c


def tune(c, *, epochs, peak_lr, weight_decay, batch_size=512, cutout=8):
    """Give `c` one recipe for every network, after airbench's: Muon, smoothed labels, a triangle of
    learning rates, lookahead, alternating flip, random crop and a cutout of `cutout` pixels a side
    (0: none)."""
    c.epochs = epochs
    c.batch_size = batch_size
    c.drop_last = True
    c.alternating_flip = True
    c.loss = {"reduction": "mean", "label_smoothing": 0.2}
    c.optim.name = "muon"
    c.optim.nesterov = True
    c.optim.b2 = 0.99
    c.optim.weight_decay = weight_decay
    c.optim.clip_value = None
    c.schedule = {
        "name": "triangle",
        "peak_lr": peak_lr,
        "pct_start": 0.2,
        "start_factor": 0.1,
        "end_factor": 0.01,
    }
    c.lookahead.every = 5
    c.augment.ops = ("normalize", "random_crop")
    c.augment.random_crop = {"padding": 4, "mode": "reflect"}
    if cutout:
        c.augment.ops += ("coarse_dropout",)
        # the grey of the mean, which is 0 after normalisation
        c.augment.coarse_dropout = {
            "min_size": cutout,
            "max_size": cutout,
            "fill": 0.0,
            "p": 1.0,
        }
    c.eval.augmented = False
    c.eval.tta = "mirror"


def check_variant(name, variant, *known):
    """ValueError unless `variant` is "" or one of those that configs/NAME.py knows."""
    if variant not in ("", *known):
        has = f"; it has: {', '.join(known)}" if known else ""
        raise ValueError(f"configs/{name}.py has no variant {variant!r}{has}")
