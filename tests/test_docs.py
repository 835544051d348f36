"""The code in the docs runs, the recipe in them works when it is followed, and the picture of the house is true."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedklpr_jax import cli, config
from fedklpr_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md"))]
# What the recipes add.
ADDED = ("method.momentum.beta", "upright", "experiments/fedavgm.py")
PACKAGE = ROOT / "fedklpr_jax"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_python_blocks_run_in_order(page):
    names: dict = {}
    for number, block in enumerate(python_blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.short
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.short
@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "experiments").glob("*.py"))], ids=lambda page: page.name)
def test_commands_have_settings_that_a_run_takes(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"--config\.([a-z]\w*(?:\.[a-z]\w*)*)", text):
        assert path in (*config.FIELDS, *ADDED), f"{page.name}: there is no setting {path}"
    for command, told in re.findall(r"python experiments/run\.py ([^`\n]*).*\n(?:error: (.*))?", text):
        if "[" in command or any(part in command for part in ADDED):
            continue
        try:
            config.validate(cli.parse(shlex.split(command)))
        except InputError as error:
            assert str(error) == told, f"{page.name}: {command}"
        else:
            assert not told, f"{page.name}: {command} is taken"


def replaced(path: Path, pattern: str, text: str) -> None:
    """Replaces the one place of `path` that matches `pattern`."""
    before = path.read_text(encoding="utf-8")
    after, count = re.subn(pattern, lambda match: text.replace("@", match.group()), before)
    assert count == 1, f"{path.name}: {count} places look like {pattern}"
    path.write_text(after, encoding="utf-8")


def test_the_recipe_for_a_method_works_when_followed(tmp_path):
    page = DOCS / "adding-a-method.md"
    for folder in ("fedklpr_jax", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / "fedklpr_jax"
    registered, field = (
        re.search(f"`({start}.*?)`", page.read_text(encoding="utf-8")).group(1)
        for start in ('"fedavgm": ', r'"method\.momentum\.beta": ')
    )

    (copy / "methods" / "fedavgm.py").write_text(python_blocks(page)[0], encoding="utf-8")
    replaced(copy / "methods" / "__init__.py", r"from fedklpr_jax\.methods import \(", "@fedavgm, ")
    replaced(copy / "methods" / "__init__.py", r"\nMETHODS\b.*\{\n", f"@    {registered}\n")
    replaced(copy / "config.py", r'"method\.name": Field\([\s\S]*?one_of\(', '@"fedavgm", ')
    replaced(copy / "config.py", r"\nFIELDS\b.*\{\n", f"@    {field}\n")
    shutil.copy(tmp_path / "experiments" / "fedpav.py", tmp_path / "experiments" / "fedavgm.py")
    replaced(tmp_path / "experiments" / "fedavgm.py", r'method\.name = "fedpav"', 'method.name = "fedavgm"')

    command = re.search(r"`python experiments/run.py (--config=experiments/fedavgm\.py.*?)`", page.read_text())
    program = (
        "import sys; from fedklpr_jax import cli, config, methods\n"
        "settings = cli.parse(sys.argv[1:]); config.validate(settings)\n"
        "print(methods.make_method(settings.method).name, settings.method.momentum.beta)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command.group(1).split()],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["fedavgm", "0.5"], done.stderr


def test_the_recipe_for_a_task_works_when_followed(tmp_path):
    page = DOCS / "adding-a-task.md"
    for folder in ("fedklpr_jax", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    copy, text = tmp_path / "fedklpr_jax", page.read_text(encoding="utf-8")
    before, after = re.findall(r"`(kind = .*?)`", text)

    (copy / "tasks" / "upright.py").write_text(python_blocks(page)[0], encoding="utf-8")
    replaced(copy / "config.py", r'"task\.name": Field\([\s\S]*?one_of\(', '@"upright", ')
    replaced(copy / "assembly.py", r"from fedklpr_jax\.tasks import ", "@upright, ")
    replaced(copy / "assembly.py", re.escape(before), after)

    command = re.search(r"`python experiments/run.py (--config=.*?upright)`", text)
    program = (
        "import sys; from fedklpr_jax import assembly, cli, config, console\n"
        "settings = cli.parse(sys.argv[1:]); config.validate(settings)\n"
        "made = assembly.make_federation(config.resolved(settings), console.Console())\n"
        "print(made.task.name, made.task.client_names[0])"
    )
    small = ["--config.data.clients=arena", "--config.model.weights=random"]
    done = subprocess.run(
        [sys.executable, "-c", program, *command.group(1).split(), *small],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["upright", "arena"], done.stderr


def floors() -> list[list[str]]:
    """The rooms of the package in the table of the architecture page, from the top floor down."""
    lines = (DOCS / "architecture.md").read_text(encoding="utf-8").splitlines()
    rooms = [re.findall(r"`([\w/]+(?:/|\.py))`", line.split("|")[1]) for line in lines if line.startswith("| `")]
    return [[room for room in floor if (PACKAGE / room).exists()] for floor in rooms]


def floor_of(module: str) -> int:
    """The floor of a module (`data/site.py`), counted from the top."""
    found = [
        number
        for number, rooms in enumerate(floors())
        if any(module == room or (room.endswith("/") and module.startswith(room)) for room in rooms)
    ]
    assert len(found) == 1, f"docs/architecture.md: {module} stands in {len(found)} rows of the rooms, not in one"
    return found[0]


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, late imports included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedklpr_jax":
            for name in ("", *(f".{alias.name}" for alias in node.names)):
                path = ROOT / f"{node.module}{name}".replace(".", "/")
                found |= {file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()}
    return {file.relative_to(PACKAGE).as_posix() for file in found} - {"__init__.py"}


@pytest.mark.short
def test_every_module_has_a_room_and_imports_run_downwards():
    modules = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))
    edges = [(module, below) for module in modules if module != "__init__.py" for below in imported(PACKAGE / module)]
    assert len(edges) > len(modules), "the imports were not found"
    upwards = [f"{module} imports {below}" for module, below in edges if floor_of(module) > floor_of(below)]
    assert not upwards
