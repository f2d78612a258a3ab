"""TensorBoard's event files, read record by record."""

import struct

import pytest
from running import QUICK, finish, metrics
from tensorboardX.proto.event_pb2 import Event

from cifar_jax.tensorboard import SCALARS, TensorBoard


def events(folder):
    """(scalars {tag: [(step, value)]}, names of pictures) of the one event file in `folder`."""
    (path,) = folder.iterdir()
    content, at = path.read_bytes(), 0
    scalars, pictures = {}, set()
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + size])
        at += 12 + size + 4  # a checksum of the length, one of the event
        for value in event.summary.value:
            if value.HasField("image"):
                pictures.add(value.tag)
            else:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars, pictures


def test_a_log_opened_again_holds_its_records_once(tmp_path):
    record = dict.fromkeys(SCALARS.values(), 0.5) | {"seconds": 2.0}
    log = TensorBoard(tmp_path)
    for step in (10, 20, 30):
        log.add_record(record | {"step": step})
    log.close()
    log = TensorBoard(tmp_path, [record | {"step": step} for step in (10, 20)])
    log.add_record(record | {"step": 30, "eval_loss": None, "lr": float("nan")})
    log.close()
    scalars, _ = events(tmp_path)
    assert scalars["loss/train"] == [(10, 0.5), (20, 0.5), (30, 0.5)]
    assert scalars["loss/eval"] == scalars["learning_rate"] == [(10, 0.5), (20, 0.5)]


@pytest.mark.long
def test_a_resumed_run_has_no_point_twice(program, tmp_path):
    run = (*QUICK, "--config.log.tensorboard=True", f"--workdir={tmp_path}")
    finish(program(*run, "--config.stop_after=1.5"))
    finish(program(*run, "--config.stop_after=2"))
    scalars, pictures = events(tmp_path / "tensorboard")
    for tag, name in SCALARS.items():
        if name != "images_per_second":
            points = [(r["step"], pytest.approx(r[name])) for r in metrics(tmp_path)]
            assert scalars[tag] == points and len(points) == 2
    assert pictures == {"samples", "augmented"} and scalars["accuracy/test"][0][0] == 38
