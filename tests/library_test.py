"""cifar_jax as a library: installed by pip, imported elsewhere."""

import json
import os
import re
import subprocess
import sys

import pytest
from running import ROOT, copy_checkout


@pytest.mark.long
def test_the_readmes_example_runs_with_what_pip_installs(cache, tmp_path):
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    copy_checkout(source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", target, source], check=True, capture_output=True)
    elsewhere.mkdir()
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)  # not ours: no commit of it
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport cifar_jax; print(cifar_jax.__file__)"],
        cwd=elsewhere,
        env={
            **os.environ,
            "PYTHONPATH": str(target),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(target))
    assert "'accuracy'" in done.stdout
    result = json.loads((elsewhere / "runs" / "library" / "result.json").read_text())
    assert result["status"] == "done" and result["commit"] is None
    assert (elsewhere / "runs" / "library" / "report" / "index.html").exists()
