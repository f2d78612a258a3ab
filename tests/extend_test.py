"""docs/extend.md, followed literally."""

import json
import re
import subprocess
import sys

import pytest
from running import ROOT, copy_checkout


@pytest.mark.long
def test_the_page_can_be_followed(cache, monkeypatch, tmp_path):
    """Its files and changes in a copy of the checkout; then its commands, as they stand."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    copy_checkout(tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    page = (ROOT / "docs" / "extend.md").read_text()
    for kind, text in re.findall(r"^```(python|diff)\n(.*?)^```$", page, re.S | re.M):
        if kind == "diff":
            apply = ["git", "apply", "--unidiff-zero", "-"]
            subprocess.run(apply, cwd=tmp_path, input=text, text=True, check=True)
        else:
            name, _, content = text.removeprefix("# ").partition("\n")
            (tmp_path / name).write_text(content)
    commands = re.findall(r"^    (scripts/.*)$", page, re.M)
    done = {}
    for command in commands:
        run = subprocess.run(
            command.split(), cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stdout + run.stderr
        done[command] = run.stdout
    tests, summary, _ = done.values()
    assert re.search(r"^[1-9]\d* passed", tests, re.M)
    assert re.search(r"^Total params: \d", summary, re.M)
    result = json.loads((tmp_path / "runs" / "allconv" / "result.json").read_text())
    assert result["status"] == "done" and result["model"] == "allconv"
    assert result["test"]["accuracy"] > 60
