"""Weight files: what is read, what is refused, and that PyTorch stays optional."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from cifar_jax import InputError, exchange, torch_twin
from cifar_jax.exchange import load_torch_twin, read_weights


class Hostile:
    """A pickle that would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_both_formats_are_read(tmp_path, rng):
    values = {"a.weight": rng.normal(size=(3, 2)).astype(np.float32), "n": np.array(3)}
    torch_twin.save_file(tmp_path / "w.pt", values)
    save_file(values, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        found = read_weights(tmp_path / name)
        assert found.keys() == values.keys()
        for key in values:
            np.testing.assert_array_equal(found[key], values[key])


def test_wrappings_of_training_scripts_are_opened(tmp_path):
    tensor = torch.ones(2, dtype=torch.bfloat16)
    torch.save({"epoch": 3, "state_dict": {"module.fc.weight": tensor}}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    np.testing.assert_array_equal(found["fc.weight"], np.ones(2, np.float32))


@pytest.mark.case(29)
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    target = tmp_path / "made"
    torch.save({"w": Hostile(target)}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Hostile(target)))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(InputError, match=f"{name} is not a PyTorch file of tensors alone"):
            read_weights(tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"\xff" * 20, "is not a safetensors file"),
        ("w.safetensors", b"", "is not a safetensors file"),
        ("w.pt", b"no zip", "is not a PyTorch file of tensors alone"),
        ("w.pt", b"", "is not a PyTorch file of tensors alone"),
    ],
)
def test_broken_files_get_a_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / name)


def test_a_file_of_something_else_gets_a_sentence(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "w.pt")
    with pytest.raises(InputError, match="is not a state_dict"):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(InputError, match="nowhere.pt is not a file"):
        read_weights(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (True, "does not hold what was written; nothing exported"),
        (False, "gives other logits"),
    ],
    ids=["weights", "logits"],
)
def test_what_reads_back_otherwise_is_not_exported(spoil, says, reference, monkeypatch):
    config = ConfigDict(json.loads((reference / "config.json").read_text())["config"])
    if spoil:
        state_dict = exchange._state_dict
        written = []

        def spoiled(config, trained):
            variables, tensors = state_dict(config, trained)
            if not written:  # what goes to the file, not what it is held against
                tensors["fc.weight"] = tensors["fc.weight"] + 1e-6
            written.append(1)
            return variables, tensors

        monkeypatch.setattr(exchange, "_state_dict", spoiled)
    else:
        read = exchange._flax_logits
        monkeypatch.setattr(exchange, "_flax_logits", lambda *args: 1.001 * read(*args))
    with pytest.raises(InputError, match=says):
        exchange.export_best(config, reference, "safetensors")
    assert not [*(reference / "export").iterdir()]


def test_without_torch_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "cifar_jax.torch_twin")
    monkeypatch.delattr("cifar_jax.torch_twin")
    with pytest.raises(InputError, match="needs PyTorch, which is not installed: pip install"):
        load_torch_twin()
