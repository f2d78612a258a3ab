"""The cache of compiled programs: where it lies, whom it trusts, and that a run is not hurt."""

import os
import stat
import subprocess
import sys

import jax
import pytest
from running import QUICK, ROOT, SMALLER

from cifar_jax import compilation


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def test_the_folder_is_private_and_follows_xdg(home, monkeypatch):
    before = os.umask(0o002)
    try:
        folder = compilation.private_folder()
    finally:
        os.umask(before)
    assert folder == home / ".cache" / "cifar_jax" / "xla"
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert compilation.private_folder() == folder  # again, now that it is there
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compilation.private_folder() == folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "other"))
    assert compilation.private_folder() == home / "other" / "cifar_jax" / "xla"


def writable_by_others(folder, monkeypatch):
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def of_another_user(folder, monkeypatch):
    folder.mkdir(parents=True, mode=0o700)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)


def a_link(folder, monkeypatch):
    folder.parent.mkdir(parents=True)
    folder.symlink_to(folder.parent, target_is_directory=True)


def a_file(folder, monkeypatch):
    folder.parent.mkdir(parents=True)
    folder.write_text("mine")


@pytest.mark.parametrize("case", [writable_by_others, of_another_user, a_link, a_file])
def test_a_folder_that_is_not_ours_alone_is_not_used(case, home, monkeypatch, capsys):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    case(home / ".cache" / "cifar_jax" / "xla", monkeypatch)
    before = jax.config.jax_compilation_cache_dir
    assert compilation.enable_cache() is None
    assert jax.config.jax_compilation_cache_dir == before
    err = capsys.readouterr().err
    assert err.startswith("compiled programs are not kept: ") and err.count("\n") == 1


def program(home, tmp_path, **variables):
    """The run's stderr; it must succeed."""
    dropped = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HOME": str(home)}
    environment |= variables
    small = ("--config.stop_after=0.05", "--config.report=False")
    command = [sys.executable, "main.py", *QUICK, *SMALLER, *small, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_second_run_compiles_nothing_anew_and_is_silent(tmp_path):
    home = tmp_path / "home"
    assert program(home, tmp_path / "first") == ""
    folder = home / ".cache" / "cifar_jax" / "xla"
    assert any(p.name.startswith("jit_run") for p in folder.glob("*-cache"))
    told = program(home, tmp_path / "second", JAX_DEBUG_LOG_MODULES="jax._src.compiler")
    lines = told.splitlines()
    assert all("compiler.py:" in line for line in lines)  # and no warning of what was read
    for name in ("jit_run", "jit_evaluate"):
        of = [line for line in lines if name in line and "ersistent compilation cache" in line]
        assert any("cache hit for" in line for line in of)
        assert not any("CACHE MISS" in line for line in of)


@pytest.mark.long
def test_no_home_no_cache_and_a_run_all_the_same(tmp_path):
    err = program("/dev/null", tmp_path)
    assert err.startswith("compiled programs are not kept: ") and err.count("\n") == 1


def test_the_users_own_settings_go_first(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "own"))
    assert compilation.enable_cache() is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_enable_compilation_cache", False)  # JAX_ENABLE_COMPILATION_CACHE=0
    try:
        assert compilation.enable_cache() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not list(home.iterdir())
