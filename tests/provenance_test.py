"""A result names the code that made it."""

import importlib.util
import os
import pathlib
import shutil
import subprocess

import jax
import pytest

from cifar_jax import provenance

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout of git")
def test_a_checkout_names_its_commit_and_whether_files_differ():
    def git(*arguments):
        command = ["git", *arguments]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return found.stdout.strip()

    differ = git("status", "--porcelain", "--untracked-files=no")
    made = provenance.environment()
    assert made["commit"] == git("rev-parse", "HEAD") + ("-dirty" if differ else "")
    assert made["device"] == f"{jax.device_count()} x cpu ({provenance.device_name()})"
    assert made["device"].endswith(f", {len(os.sched_getaffinity(0))} cores)")
    assert made["versions"].keys() == {"python", *provenance.PACKAGES}
    assert made["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("said", ["0123456789", "", None])
def test_installed_without_git_it_says_what_it_was_told(said, tmp_path, monkeypatch):
    """Within another checkout too: that one's commit says nothing about this code."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    path = shutil.copy(provenance.__file__, tmp_path)
    spec = importlib.util.spec_from_file_location("installed", path)
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    monkeypatch.delenv("CIFAR_JAX_COMMIT", raising=False)
    if said is not None:
        monkeypatch.setenv("CIFAR_JAX_COMMIT", said)
    assert installed.environment()["commit"] == (said or None)
