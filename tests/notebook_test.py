"""notebooks/tour.ipynb runs from its first cell to its last."""

import nbclient
import nbformat
import pytest
from running import ROOT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jupyter's own
def test_the_tour(cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / "notebooks" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none is committed
    client = nbclient.NotebookClient(
        notebook, timeout=200, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    assert not [output for output in outputs if output.get("name") == "stderr"]
