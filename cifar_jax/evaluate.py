"""--mode=evaluate, and what is measured of a state on the test images."""

import jax
import numpy as np

from cifar_jax import sharding
from cifar_jax import workdir as files
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.experiment import describe_data, make_experiment
from cifar_jax.provenance import environment


def evaluate(config, workdir):
    """Evaluate the best checkpoint in `workdir` on the test split: evaluation.json."""
    path = files.existing(workdir)
    if sharding.is_writer():
        files.writable(path)
    files.check_config(path, config.to_dict(), files.LOOKING_FIELDS)
    files.check_data(path, describe_data(config)._asdict())
    sharding.use_cores(config.batch_size)
    exp = make_experiment(config)
    state = exp.init_state()
    with Checkpoints(path / "checkpoints", exp.placement, read_only=True) as checkpoints:
        state = checkpoints.restore_best(state)
    step = int(state.step)
    metrics, _ = exp.evaluate(state, exp.test)
    evaluation = {
        "checkpoint_step": step,
        "epoch": exp.epochs_at(step),
        "split": "test",
        "augmented": config.eval.augmented,
        **metrics.summary(),
        **other_views(exp, state),
        "per_class": per_class(metrics, exp),
        "dataset": exp.provenance,
        **environment(),
    }
    files.write_json(path / "evaluation.json", evaluation)
    kind = "augmented test" if config.eval.augmented else "test"
    print(
        f"{kind}: accuracy {evaluation['accuracy']:.2f} %  top-3 {evaluation['top3']:.2f} %  "
        f"top-5 {evaluation['top5']:.2f} %  loss {evaluation['loss']:.4f}  "
        f"(epoch {evaluation['epoch']:g})"
    )
    if "tta" in evaluation:
        print(f"with {evaluation['tta']} views: accuracy {evaluation['accuracy_tta']:.2f} %")
    return evaluation


OTHER_VIEWS = ("tta", "accuracy_tta", "accuracy_clean")


def other_views(exp, state):
    """Of OTHER_VIEWS, test accuracies with the images seen otherwise: averaged over the views of
    config.eval.tta, and as they are where config.eval.augmented has them augmented."""
    found, tta = {}, exp.config.eval.tta
    if tta != "none":
        metrics, _ = exp.evaluations[tta](state, exp.test)
        found |= {"tta": tta, "accuracy_tta": metrics.summary()["accuracy"]}
    if exp.config.eval.augmented:
        metrics, _ = exp.evaluate_clean(state, exp.test)
        found["accuracy_clean"] = metrics.summary()["accuracy"]
    return found


def per_class(metrics, exp):
    """{class name: accuracy in percent} from the confusion sums of the test images."""
    right = np.asarray(jax.device_get(metrics.confusion)).diagonal()
    images = np.bincount(exp.test.labels, minlength=len(right))
    accuracy = 100.0 * right / np.maximum(images, 1)
    return {name: float(value) for name, value in zip(exp.class_names, accuracy, strict=True)}


def figures(summary):
    """What result.json says of an evaluation, from a summary of its Metrics."""
    return {
        "eval_loss": summary["loss"],
        **{key: summary[key] for key in ("accuracy", "top3", "top5")},
    }


def figures_of(record):
    """The same from a line of metrics.jsonl."""
    names = {
        "eval_loss": "eval_loss",
        "accuracy": "eval_accuracy",
        "top3": "eval_top3",
        "top5": "eval_top5",
    }
    return {"epoch": record["epoch"], **{name: record[key] for name, key in names.items()}}
