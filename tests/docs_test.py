"""The commands of docs/, each as it stands, page after page in one folder."""

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from running import ROOT, Fork, finish

# what they need is not here: data, hosts, a GPU, many minutes; tests of their own try these
ELSEWHERE = re.compile(r"DIR\b|host1:|scripts/(benchmark|scaling|speedrun)\.py")
PAGES = ("data", "train", "predict", "export", "search", "compare", "scaling")


def commands(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    lines = re.findall(r"^    ((?:scripts/|\.venv/).*)$", text, re.M)
    return [line for line in lines if not ELSEWHERE.search(line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where they run: configs, and the pictures that predict.md speaks of."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "holidays").mkdir()
    for name in ("photo.png", "holidays/sea.jpg"):
        Image.linear_gradient("L").save(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.long] * (page != "data")) for page in PAGES]
)
def test_commands_run_as_they_stand(page, folder, cache):
    with contextlib.ExitStack() as background:
        for command in commands(page):
            script, *arguments = shlex.split(command)
            if script == "scripts/train.sh":
                at_once = arguments[-1] == "&"
                begin = functools.partial(os.chdir, folder)
                run = Fork(*arguments[: -1 if at_once else None], cache=cache, fault=begin)
                if at_once:
                    background.callback(finish, run)
                else:
                    finish(run)
            else:
                assert script == ".venv/bin/python"
                name, *rest = arguments
                subprocess.run([sys.executable, ROOT / name, *rest], cwd=folder, check=True)
    assert commands(page)


def test_the_readme_has_a_row_for_every_page():
    readme = (ROOT / "README.md").read_text()
    linked = set(re.findall(r"\(docs/(\w+)\.md\)", readme))
    assert linked == {path.stem for path in (ROOT / "docs").glob("*.md")}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([\w./-]+)\)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)
