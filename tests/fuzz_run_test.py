"""Mutated files of a run, weights and flags: every reader gives what is right or one InputError, a
flag exit code 2.

metrics.jsonl is not here: no reader of it is in the program.
"""

import contextlib
import io
import json
import shutil
import sys
import zipfile

import jax
import numpy as np
import torch
from absl.testing import flagsaver
from checkpoint_test import saved, state_at, sums
from fuzzing import (
    fuzz,
    hostile_pickles,
    mutated,
    mutated_json,
    mutated_pickle,
    spoil,
    watching,  # noqa: F401
)
from hypothesis import strategies as st
from safetensors.numpy import save as safetensors_bytes

import main
from cifar_jax import InputError, weights, workdir
from cifar_jax.checkpoint import Checkpoints, _checksum_of_json
from cifar_jax.exchange import read_weights
from cifar_jax.models import create_model
from configs import base
from configs.quickstart import get_config

# ------------------------------------------------------------------------------------------------
# weights


def torch_bytes(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def repacked(content, changes, compression=zipfile.ZIP_STORED):
    """The zip file `content` with members changed by {end of the name: bytes}."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compresslevel=1) as new,
    ):
        for name in old.namelist():
            part = next((v for end, v in changes.items() if name.endswith(end)), old.read(name))
            new.writestr(name, part, compression)
    return buffer.getvalue()


def test_weights(watch, tmp_path):
    model = create_model("resnet", num_classes=10, widths=(2, 2, 2, 2))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = weights.to_state_dict("resnet", model, zeros)
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    first = next(iter(state))
    zipped = torch_bytes(tensors)
    legacy = torch_bytes(tensors, _use_new_zipfile_serialization=False)
    safe = safetensors_bytes(state)
    length = 8 + int.from_bytes(safe[:8], "little")
    with zipfile.ZipFile(io.BytesIO(zipped)) as members:
        pickled = next(members.read(n) for n in members.namelist() if n.endswith("data.pkl"))
    hostile = list(hostile_pickles(watch.canary))

    def with_header(text):
        return len(text).to_bytes(8, "little") + text + safe[length:]

    inputs = st.one_of(
        st.sampled_from([zipped, legacy, *hostile]).flatmap(mutated).map(lambda b: ("pt", b)),
        mutated_pickle([pickled, *hostile]).map(
            lambda b: ("pt", repacked(zipped, {"data.pkl": b}))
        ),
        mutated(safe).map(lambda b: ("safetensors", b)),
        mutated_json(json.loads(safe[8:length])).map(lambda b: ("safetensors", with_header(b))),
    )

    def check(value):
        suffix, content = value
        path = tmp_path / f"w.{suffix}"
        path.write_bytes(content)

        def read():
            return weights.from_state_dict("resnet", model, zeros, read_weights(path))

        found = watch("weights", read, len(content))
        if found is not None:
            same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), zeros, found)
            assert all(jax.tree.leaves(same))

    def pt(value, **kwargs):
        return "pt", torch_bytes(value, **kwargs)

    sparse = torch.eye(3).to_sparse()
    view = torch.ones(1, dtype=torch.bfloat16).expand(1 << 30)
    large = torch_bytes({first: torch.zeros(300 << 20, dtype=torch.uint8)})
    fuzz(
        "weights",
        inputs,
        check,
        {
            "traceback: names that are numbers": pt({1: torch.ones(2)}),
            "traceback: a sparse tensor": pt({first: sparse}),
            "traceback: a tensor without storage": pt({first: torch.ones(2, device="meta")}),
            "memory: a view of one element": pt({first: view}),
            "memory: compressed zeros": ("pt", repacked(large, {}, zipfile.ZIP_DEFLATED)),
            "traceback: a shape of no elements": (
                "safetensors",
                with_header(
                    b'{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}'
                )[: -len(safe[length:])],
            ),
        },
    )


# ------------------------------------------------------------------------------------------------
# the files of a run


def fields_of(config, before="config"):
    """{name of the flag: value} of every field."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from fields_of(value, f"{before}.{key}")
        else:
            yield f"{before}.{key}", value


CONFIG = {
    "seed": 0,
    "epochs": 3,
    "report": True,
    "data": {"name": "digits", "dir": "data"},
    "model": {"name": "resnet", "widths": [4, 8]},
    "optim": {"clip_norm": None, "b1": 0.9},
}
RESULT = {"status": "done", "test": {"accuracy": 87.5, "eval_loss": 0.4}, "epochs": 3}


def test_files_of_a_run(watch, tmp_path):
    about = {"class_names": ["a", "b"], "image_shape": [32, 32, 3], "sha256": {"train": "0"}}
    config_json = {"config": CONFIG, "imported": None, "data": about}
    files = {"config.json": config_json, "result.json": RESULT}
    names = st.sampled_from(list(files))

    @st.composite
    def inputs(draw):
        name = draw(names)
        text = json.dumps(files[name]).encode()
        return name, draw(mutated_json(files[name]) | mutated(text))

    def fixed(config):
        """What may not differ; a field that is not there is as configs/base.py has it, or None."""
        free = tuple(f".{name}" for name in workdir.FREE_FIELDS)
        mine = dict(fields_of(CONFIG, ""))
        usual = {k: v for k, v in fields_of(base.get_config().to_dict(), "") if k in mine}
        fields = usual | dict(fields_of(config, ""))
        return {k: v for k, v in fields.items() if v is not None and not k.startswith(free)}

    def check(value):
        name, content = value
        for other in files:
            (tmp_path / other).write_text(json.dumps(files[other]))
        (tmp_path / name).write_bytes(content)
        read = lambda: workdir.finished_result(tmp_path, CONFIG)  # noqa: E731
        finished = watch("files of a run", read, len(content))
        if finished is not None:
            assert f"{finished['test']['accuracy']:.2f}"
        found = watch("files of a run", lambda: workdir.data_of(tmp_path), len(content))
        if found is not None:
            names, shape = found
            assert all(isinstance(n, str) for n in names) and len(np.empty(shape, np.uint8))
        read = lambda: workdir.open_workdir(tmp_path, CONFIG, {}, about)  # noqa: E731
        if watch("files of a run", read, len(content)) and name == "config.json":
            now = json.loads(content, parse_constant=lambda text: None)
            assert fixed(now["config"]) == fixed(CONFIG)

    def config(value):
        return "config.json", json.dumps({"config": {**CONFIG, "seed": value}}).encode()

    nested = b'{"config": ' + b'{"a":' * 480 + b"0" + b"}" * 481
    fuzz(
        "files of a run",
        inputs(),
        check,
        {
            "traceback: brackets": ("result.json", b"[" * 100_000),
            "traceback: nested 480 deep": ("config.json", nested),
            "traceback: done without a test": ("result.json", b'{"status": "done"}'),
            "traceback: accuracy is text": (
                "result.json",
                b'{"status": "done", "test": {"accuracy": "a"}}',
            ),
            "two lines: a name with a line break": ("config.json", b'{"config": {"a\\nb": 1}}'),
            "a page: a value of 100,000 letters": config("x" * 100_000),
        },
    )


# ------------------------------------------------------------------------------------------------
# checkpoints


def test_checkpoints(watch, tmp_path, capsys):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    whole, folder = saved(tmp_path / "whole", {1: 0.5, 2: 0.4}), tmp_path / "c"
    paths = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    contents = {str(path): (whole / path).read_bytes() for path in paths}
    as_json = {}
    for name, content in contents.items():
        with contextlib.suppress(ValueError):
            as_json[name] = json.loads(content)
    kernels = [np.asarray(jax.tree.leaves(state_at(step).params)[0]) for step in (1, 2)]
    like, zeros = state_at(0), sums()

    def sign(meta):
        """A meta whose checksum is right."""
        if isinstance(meta, dict) and "checksum" in meta:
            meta = {k: v for k, v in meta.items() if k != "checksum"}
            meta["checksum"] = _checksum_of_json(meta)
        return meta

    @st.composite
    def inputs(draw):
        """(file, what becomes of it, bytes), and how it is read."""
        return draw(changes()), draw(st.sampled_from(["best", "newest"]))

    @st.composite
    def changes(draw):
        how = draw(st.sampled_from(["json", "json", "bytes", "bytes", "place", "step"]))
        if how == "json":
            name = draw(st.sampled_from(sorted(as_json)))
            return name, "content", draw(mutated_json(as_json[name], sign))
        name = draw(st.sampled_from(sorted(contents)))
        if how == "bytes":
            return name, "content", draw(mutated(contents[name]))
        if how == "place":
            return name, draw(st.sampled_from(["gone", "a folder", "a link to itself"])), b""
        steps = ["3", "0", "01", "-1", "2147483648", "9" * 30, "²", "٣", "2.tmp", "x"]
        return "2", draw(st.sampled_from(steps)), b""

    def check(value):
        (name, how, content), kind = value
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        if name == "2":
            (folder / "2").rename(folder / how)
        else:
            spoil(folder / name, how, content)

        def best():
            with Checkpoints(folder, place, read_only=True) as checkpoints:
                return checkpoints.restore_best(like)

        def newest():
            with Checkpoints(folder, place) as checkpoints:
                return checkpoints.restore_latest(like, zeros)

        found = watch("checkpoints", best if kind == "best" else newest, len(content))
        if found is not None:
            state = found if kind == "best" else found[0]
            kernel = np.asarray(jax.tree.leaves(state.params)[0])
            assert any(np.array_equal(kernel, k) for k in kernels)
        capsys.readouterr()

    metas = [name for name in sorted(as_json) if "/meta/" in name and name.startswith("2")]
    meta = next(name for name in metas if "checksums" in as_json[name])
    loss = next(
        name for name in as_json if name.startswith("2/metrics/") and "eval_loss" in as_json[name]
    )
    no_sums = {k: v for k, v in as_json[meta].items() if k != "checksums"}
    fuzz(
        "checkpoints",
        inputs(),
        check,
        {
            f"traceback: {what} ({kind})": ((name, how, content), kind)
            for what, name, how, content in (
                ("the loss is text", loss, "content", b'{"eval_loss": "low"}'),
                ("the losses are a list", loss, "content", b"[1.0]"),
                ("brackets for a loss", loss, "content", b"[" * 100_000),
                ("the loss is a folder", loss, "a folder", b""),
                ("metadata is no object", "1/_CHECKPOINT_METADATA", "content", b"true"),
                ("meta without checksums", meta, "content", json.dumps(sign(no_sums)).encode()),
            )
            for kind in ("best", "newest")
        }
        | {"traceback: step 2147483648": (("2", "2147483648", b""), "best")},
    )


# ------------------------------------------------------------------------------------------------
# the command line


def test_overrides(watch, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # and back
    defaults = dict(fields_of(get_config().to_dict()))
    name = known = st.sampled_from(sorted(defaults))
    name |= st.tuples(name, st.sampled_from(["x", ".x", ".", "[0]", "\n", " ", "é"])).map("".join)
    name |= st.sampled_from(
        ["config.", "config..", "config.to_dict", "config.__class__", "config._x"]
    )
    value = st.text(max_size=30) | st.integers().map(str) | st.floats().map(str)
    value |= st.sampled_from(
        ["", "None", "True", "1e400", "nan", "9" * 5000, "(1,", "()", "1,2", "a,b"]
    )
    value |= st.sampled_from(["__import__('os').system('touch x')", "(" * 500, "-" * 9_000 + "1"])
    value |= st.sampled_from(
        ["[" * 90 + "]" * 90, "'", "b'x'", "{1: 2}", "1_0", "0x1", "\x1b[2J", "a\nb"]
    )
    pairs = st.tuples(known, value) | st.tuples(known, value) | st.tuples(name, value)
    flag = pairs.map(lambda pair: f"--{pair[0]}={pair[1]}") | name.map("--{}".format)
    inputs = st.lists(flag, min_size=1, max_size=3)

    def parse(arguments):
        with flagsaver.flagsaver():
            try:
                sys.argv = ["main.py", "--config=configs/quickstart.py", "--workdir=w", *arguments]
                main.parse(sys.argv)  # ml_collections looks for overrides in the first
            except SystemExit as error:
                lines = capsys.readouterr().err.splitlines()
                assert error.code == 2 and len(lines) == 1, lines
                raise InputError(lines[0]) from error
            return dict(fields_of(main.CONFIG.value.to_dict()))

    def check(arguments):
        found = watch("overrides", lambda: parse(arguments))
        if found is not None:
            assert found.keys() == defaults.keys()
            for key, default in defaults.items():
                assert default is None or type(found[key]) is type(default), key

    fuzz(
        "overrides",
        inputs,
        check,
        {
            "traceback: an index into a text": ["--config.data.dir[0]=x"],
            "traceback: an index into a switch": ["--config.alternating_flip[0]=x"],
        },
    )
