"""What the site makes of the code is what the code says; `make docs` builds the whole of it strictly."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedklpr_jax import config
from fedklpr_jax.config import FIELDS
from fedklpr_jax.fields import ByTask, Field
from fedklpr_jax.methods import METHODS

pytestmark = pytest.mark.short

ROOT = Path(__file__).resolve().parents[1]


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


generated = imported("generated")


def rows(page: str) -> dict[str, list[str]]:
    """The cells of the tables of settings, by the setting."""
    lines = [re.sub(r"\\([*])", r"\1", line).replace("&lt;", "<") for line in page.splitlines() if line[:3] == "| `"]
    cells = [[cell.replace("\\|", "|") for cell in line[2:-2].split(" | ")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_page_of_settings_has_every_one_with_its_meaning() -> None:
    found = rows(generated.configuration_page())
    assert set(found) == set(FIELDS)
    for path, field in FIELDS.items():
        meaning, default, allowed, mark = found[path]
        assert meaning == field.meaning and (allowed == field.right or not field.right and allowed)
        assert ("[S" in meaning) == ("S" in mark) and ("[C]" in meaning) == ("C" in mark)
        told = re.findall(r"`(.*?)`", default)
        if not isinstance(field.default, ByTask):
            assert told == ([] if field.default == "" else [str(field.default)])


def test_defaults_of_tasks_are_those_a_run_resolves() -> None:
    found = rows(generated.configuration_page())
    for task in ("supervised", "unsupervised", "classification"):
        settings = config.default_config()
        settings.task.name = task
        values = config.flat(config.resolved(settings))
        for path, field in FIELDS.items():
            if isinstance(field.default, ByTask):
                shown = f"`{values[path]}`" if values[path] != "" else "empty"
                assert f"{task} {shown}" in found[path][1].split("; "), path


def test_a_setting_by_hand() -> None:
    fields = {
        "rounds": Field(3, "how many", "a number from 1"),
        "method.x.form": Field("", "[S] a|b, or <none>"),
    }
    page = generated.configuration_page(fields)
    assert "## The run\n" in page and "## method.x\n" in page
    assert "| `rounds` | how many | `3` | a number from 1 |  |" in page
    assert r"| `method.x.form` | [S] a\|b, or &lt;none> | empty | a text | S |" in page


@pytest.mark.parametrize("name", ["generated", "doctests"])
def test_examples_of_the_sites_own_code(name: str) -> None:
    if name == "doctests":
        pytest.importorskip("griffe", reason="the extra docs is not installed")
    found = doctest.testmod(imported(name))
    assert found.attempted and not found.failed


def test_links_to_code_lead_to_pages() -> None:
    link = generated.relinked
    assert link("[a](../fedklpr_jax/config.py)", "data.md") == "[a](configuration.md)"
    assert link("[a](../fedklpr_jax/wire.py)", "data.md") == "[a](api/wire.md)"
    assert link("[a](docs/data.md#x)", "changelog.md") == "[a](data.md#x)"
    assert link("[a](deploy.md#b) [c](https://example.org/d)", "data.md") == (
        "[a](deploy.md#b) [c](https://example.org/d)"
    )
    assert link("[a](../nothing.py)", "data.md") == "[a](../nothing.py)"


def test_every_method_has_its_formulas_and_every_module_its_page() -> None:
    pages = dict(generated.generated())
    assert {f"fedklpr_jax.methods.{name}" for name in METHODS} <= set(re.findall("::: (.*)", pages["formulas.md"]))
    for module in ("fedklpr_jax.federated", "fedklpr_jax.deploy", "fedklpr_jax.data.site"):
        assert f"::: {module}\n" in pages[generated.page_of(module)]
    assert not any("_" == part[0] for module in generated.modules() for part in module.split("."))
