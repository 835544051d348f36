"""The notebook runs from top to bottom, on a federation smaller than its own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "experiments" / "colab.ipynb"
# Random weights and patches, for there is nothing to train first and little to compile; the results are noise.
SMALL = {
    "model.weights": "random", "model.convolution": "patches", "data.height": 32, "data.width": 16, "data.pad": 2
}  # fmt: skip


@pytest.mark.short
def test_the_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("method", ["fedavg", pytest.param("fedklpr", marks=pytest.mark.processes)])
def test_the_notebook_runs_from_top_to_bottom(method, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(NOTEBOOK, 4)
    (place,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    small = f'METHOD, CLIENTS, ROUNDS, EPOCHS = "{method}", "arena,harbour", 2, 1\nMORE = {SMALL}'
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(small))
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    done = NotebookClient(notebook, timeout=1800, resources=folder, kernel_name="python3").execute()

    outputs = {cell.id: cell.get("outputs", []) for cell in done.cells}
    for name in ("curves", "list", "compare"):
        assert any("image/png" in output.get("data", {}) for output in outputs[name]), f"{name} shows no picture"
    printed = "".join(output["text"] for output in outputs["compare"] if output.output_type == "stream")
    table = [line.split() for line in printed.splitlines()[1:]]
    assert [row[0] for row in table] == [method, "fedbn"]
    # What stays at the client is not sent.
    assert float(table[1][-1]) < float(table[0][-1])
