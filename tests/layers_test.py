"""The house: arrows point one way, each heavy dependency lives in one file."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "cifar_jax"
LAYERS = [
    ["__init__"],
    ["dataset", "own_process", "progress", "usage"],
    ["images", "official"],
    ["tfds_reader"],
    ["sharding"],  # who writes, and agreeing with the other processes: files and checkpoints ask
    [
        "augment",
        "checkpoint",
        "compilation",
        "data",
        "interruption",
        "metrics",
        "models",
        "optim",
        "provenance",
        "samples",
        "significance",
        "workdir",
        "tensorboard",
        "torch_twin",
        "weights",
    ],
    ["steps", "page", "flops"],
    ["experiment", "report"],
    ["evaluate", "replicas"],
    ["train", "overview", "lr_finder", "predict", "exchange"],
    ["timing", "seeds"],
    ["compare", "search"],
]
ONLY_IN = {
    "matplotlib": "report",
    "orbax": "checkpoint",
    "tensorstore": "checkpoint",
    "torch": "torch_twin",
    "tensorboardX": "tensorboard",
    "tensorflow_datasets": "tfds_reader",
    "optuna": "search",
}


def imports(path):
    """All modules a file imports, ours as cifar_jax.NAME."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def files():
    return sorted(PACKAGE.rglob("*.py"))


def room(path):
    """'models' for any file of models/, else the file's own name."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = room(path)
    rooms = {name for names in LAYERS for name in names}
    assert own in rooms, f"LAYERS lacks {own}"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "cifar_jax" and len(parts) > 1 and parts[1] in rooms and parts[1] != own:
            assert layer(parts[1]) < layer(own), f"{own} imports {parts[1]}"


@pytest.mark.parametrize("dependency", ONLY_IN)
def test_heavy_dependencies_live_in_one_file(dependency):
    users = {
        room(path) for path in files() if dependency in {n.split(".")[0] for n in imports(path)}
    }
    assert users <= {ONLY_IN[dependency]}


def test_only_sharding_says_mesh():
    for path in files():
        if room(path) != "sharding":
            assert "Mesh" not in path.read_text()


def test_main_is_short():
    assert len((ROOT / "main.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(check):
    command = [sys.executable, "-m", "ruff", *check, "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
