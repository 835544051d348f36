from __future__ import annotations

import ast
import configparser
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.short

ROOT = Path(__file__).resolve().parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    lines = (line.strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared() -> list[Requirement]:
    parser = setup_cfg()
    return requirements(parser["options"]["install_requires"]) + requirements(parser["options.extras_require"]["test"])


def test_requirements_txt_repeats_setup_cfg() -> None:
    assert [str(r) for r in requirements((ROOT / "requirements.txt").read_text())] == [str(r) for r in declared()]


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_ranges_are_closed_and_hold_what_is_installed(requirement: Requirement) -> None:
    assert sorted(bound.operator for bound in requirement.specifier) == ["<", ">="]
    assert importlib.metadata.version(requirement.name) in requirement.specifier


def test_nothing_pulls_in_tensorflow_or_torch() -> None:
    seen: set[str] = set()
    queue = declared()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in seen:
            seen.add(name)
            wanted = [Requirement(line) for line in importlib.metadata.requires(name) or []]
            queue += [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {"jax", "ml-dtypes"} <= seen
    assert not seen & {"tensorflow", "tensorflow-cpu", "tf-nightly", "torch"}


def test_tensorflow_datasets_works_without_tensorflow() -> None:
    program = "import tensorflow_datasets as tfds, sys; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_foreign_import_is_declared() -> None:
    distributions = importlib.metadata.packages_distributions()
    parser = setup_cfg()
    # A test tool is no reason to import something; what an extra names is imported where it is asked for.
    extras = [text for name, text in parser["options.extras_require"].items() if name != "test"]
    wanted = requirements("\n".join([parser["options"]["install_requires"], *extras]))
    names = {canonicalize_name(requirement.name) for requirement in wanted}
    undeclared: set[str] = set()
    ours = {"fedklpr_jax", "benchmarks", *(file.stem for file in (ROOT / "experiments").glob("*.py"))}
    for file in sorted((ROOT / "fedklpr_jax").rglob("*.py")) + sorted((ROOT / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - ours:
                if not {canonicalize_name(name) for name in distributions.get(top, [])} & names:
                    undeclared.add(f"{file.relative_to(ROOT)}: {top}")
    assert not undeclared


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {file.parent for file in (ROOT / "fedklpr_jax").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_pyproject_only_names_the_build_backend() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    assert [line.split(" =")[0] for line in lines] == ["[build-system]", "requires", "build-backend"]


def test_a_wheel_holds_the_package_and_its_command(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer is not installed")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "fedklpr_jax", source / "fedklpr_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "fedklpr_jax-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        commands = file.read("fedklpr_jax-0.1.0.dist-info/entry_points.txt").decode()
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedklpr_jax").rglob("*.py")} <= held
    assert "fedklpr_jax/deploy/app/pyproject.toml" in held
    assert {name.split("/")[0] for name in held} == {"fedklpr_jax", "fedklpr_jax-0.1.0.dist-info"}
    assert commands.split() == ["[console_scripts]", "fedklpr", "=", "fedklpr_jax.cli:main"]


def test_metadata() -> None:
    parser = setup_cfg()
    assert (parser["metadata"]["name"], parser["options"]["python_requires"]) == ("fedklpr_jax", ">=3.11")
    assert "Apache License" in (ROOT / parser["metadata"]["license_files"]).read_text()[:200]


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    metadata = setup_cfg()["metadata"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert {f"version: {metadata['version']}", f"license: {metadata['license']}"} <= set(citation)
    changes = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "]
    assert changes[0] == "## [Unreleased]" or changes[0].startswith(f"## [{metadata['version']}]")
