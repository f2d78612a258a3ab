"""A page in headless Chromium: what it shows and how wide it is, and what its console says."""

import json
import pathlib
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium)"
)
PROBE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const found = (() => { try { %s } catch (error) { return { error: String(error) }; } })();
  const root = document.documentElement;
  found.overflow = root.scrollWidth - root.clientWidth;
  found.width = root.clientWidth;
  found.paper = getComputedStyle(document.body).backgroundColor;
  parent.postMessage(JSON.stringify(found), "*");
}, 100));
</script>
"""


FRAME = """<!doctype html>
<iframe src="probed.html" style="width: %dpx; height: 900px; border: 0"></iframe>
<script>
window.addEventListener("message", (event) => {
  const node = document.createElement("script");
  node.type = "application/json";
  node.id = "probe";
  node.textContent = event.data;
  document.body.append(node);
});
</script>
"""  # a window of its own is never narrower than 500 pixels


def look(page, folder, script, width=1280, dark=False):
    """What `script` (JavaScript that returns an object) finds in the file `page`, with the page's
    width, what sticks out of it (overflow) and its paper; the console must be silent."""
    folder = pathlib.Path(folder)
    (folder / "probed.html").write_text(page.read_text() + PROBE % script)
    (folder / "frame.html").write_text(FRAME % width)
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--disable-background-networking", f"--user-data-dir={folder / 'profile'}"),
        *(
            "--window-size=1400,1000",
            "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={int(not dark)}",
        ),
        *("--virtual-time-budget=3000", "--dump-dom", (folder / "frame.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    found = re.search(r'id="probe">(.*?)</script>', done.stdout, re.S)
    assert found, (done.returncode, done.stderr[-2000:])
    return json.loads(found.group(1))
