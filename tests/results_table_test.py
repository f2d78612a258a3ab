"""README says what results/ holds, no more and no less."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import results_table  # noqa: E402


def test_readme_is_in_step_with_results():
    text = (ROOT / "README.md").read_text()
    assert results_table.with_tables(text) == text, "run: python scripts/results_table.py"


def test_readme_accuracies_come_from_results():
    """A figure that no JSON holds would stand outside the marks: there is none."""
    text = (ROOT / "README.md").read_text()
    outside = text
    for name in results_table.BLOCKS:
        before, rest = outside.split(f"<!-- {name} -->")
        outside = before + rest.split(f"<!-- /{name} -->")[1]
    quoted = {"82 %", "87.27 %"}  # one original's README and log
    assert set(re.findall(r"\d[\d.]* ?%", outside)) <= quoted


def test_comparisons_say_where_they_come_from():
    paths = sorted(results_table.COMPARISONS.glob("*.json"))
    assert {path.stem for path in paths} == {*results_table.ORIGINALS}
    for path in paths:
        comparison = json.loads(path.read_text())
        assert comparison["status"] == "done"
        assert "-dirty" not in comparison["commit"]
        for key in ("settings", "versions", "device", "dataset", "runs", "timing"):
            assert comparison[key], key


@pytest.mark.parametrize("path", sorted(results_table.RUNS.glob("*.json")), ids=lambda p: p.stem)
def test_results_say_where_they_come_from(path):
    result = json.loads(path.read_text())
    for key in ("config", "seed", "commit", "versions", "device", "dataset", "records"):
        assert result[key] not in (None, "", [], {}), key
    assert [r["epoch"] for r in result["records"]] == list(range(1, int(result["epochs"]) + 1))


def test_the_readmes_python_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
