"""What the site holds that no page of docs/ does: settings, formulas and API, made from the code when it is built.

MkDocs calls the functions `on_...` (mkdocs.yml, `hooks`). Pages here are also read where the code is hosted, so that
their links to code are of files; in the site these lead to the page that shows the file.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fedklpr_jax.config import FIELDS  # noqa: E402
from fedklpr_jax.fields import ByTask, Field  # noqa: E402

PACKAGE = ROOT / "fedklpr_jax"
NOTEBOOK = "experiments/colab.ipynb"
# Pages made of files beside docs/.
BESIDE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
# Where a link to these leads; every other module has its page of the API.
SHOWN = {path: page for page, path in BESIDE.items()} | {
    "README.md": "index.md",
    "fedklpr_jax/config.py": "configuration.md",
    "fedklpr_jax/methods": "formulas.md",
    NOTEBOOK: NOTEBOOK,
}
# Tasks that are a part of a published system, and so have formulas.
TASKS = ("unsupervised", "bottom_up", "supervised", "classification")
# Long lines need the room of the list of pages.
WIDE = "---\nhide:\n  - navigation\n---\n\n"
TYPES = {bool: "True or False", str: "a text", int: "a whole number", float: "a number"}


def modules() -> list[str]:
    """Every public module, dotted, a package before what is in it.

    Packages whose `__init__.py` is empty have no page.
    """
    files = [file for file in PACKAGE.rglob("*.py") if file.stat().st_size and not re.match("_(?!_init)", file.name)]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)


def page_of(module: str) -> str:
    """The page of the API that shows a module.

    >>> page_of("fedklpr_jax.data.site")
    'api/data/site.md'
    """
    parts = module.split(".")[1:]
    return "/".join(["api", *parts]) + ".md" if parts else "api/fedklpr_jax.md"


def shown_at(path: str) -> str | None:
    """The page of the site that shows a file or folder of the repository; None if there is none."""
    if path in SHOWN:
        return SHOWN[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    module = path.removesuffix(".py").replace("/", ".")
    return page_of(module) if module in modules() else None


def relinked(text: str, page: str) -> str:
    """The Markdown of a page with its links to files of the repository leading to pages of the site."""
    folder = posixpath.dirname(BESIDE.get(page, f"docs/{page}"))

    def replace(match: re.Match) -> str:
        target = shown_at(posixpath.normpath(posixpath.join(folder, match[1])))
        if "://" in match[1] or target is None:
            # Left as it is: the strict build complains where nothing is there.
            return match[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}"

    return re.sub(r"\]\(([^)#\s]+)", replace, text)


def default_of(field: Field) -> str:
    """The default as it is typed, or what it is in each task."""
    if not isinstance(field.default, ByTask):
        return f"`{field.default}`" if field.default != "" else "empty"
    tasks = ("supervised", "unsupervised", "classification")
    values = {task: field.default.of(task) for task in tasks}
    return "; ".join(f"{task} `{value}`" if value != "" else f"{task} empty" for task, value in values.items())


def marks(field: Field) -> str:
    """`S` if its meaning says that a paper or its authors' code states it, `C` if it is a choice of ours."""
    return ", ".join(sorted(set(re.findall(r"\[([SC])\b", field.meaning))))


def sections(fields: Mapping[str, Field]) -> dict[str, dict[str, Field]]:
    """The settings by the part of their path before the name."""
    found: dict[str, dict[str, Field]] = {}
    for path, field in fields.items():
        found.setdefault(path.rpartition(".")[0], {})[path] = field
    return found


def plain(text: str) -> str:
    """The text as Markdown shows it unchanged in a table.

    >>> plain("a|b of <name>")
    'a\\\\|b of &lt;name>'
    """
    return re.sub(r"([|*])", r"\\\1", text).replace("<", "&lt;")


def configuration_page(fields: Mapping[str, Field] = FIELDS) -> str:
    """Every setting: its default, what is allowed, its mark and its meaning, a table a section."""
    lines = [
        f"{WIDE}# Settings\n",
        f"All {len(fields)} settings, made from [`config.py`](api/config.md). On a command line `--config.` stands in "
        "front, as in `--config.rounds=30`; in a configuration file `config.rounds = 30`. Where a default differs with "
        "`task.name`, the setting is empty until the run has chosen its task. **S**: stated by the method's paper or "
        "its authors' code. **C**: our choice, where the public text gives none. Anything else is a matter of the run.",
    ]
    for section, held in sections(fields).items():
        lines += [f"\n## {section or 'The run'}\n"]
        lines += ["| setting | meaning | default | allowed | mark |", "|---|---|---|---|---|"]
        for path, field in held.items():
            cells = (f"`{path}`", field.meaning, default_of(field), field.right or TYPES[field.type], marks(field))
            lines.append("| " + " | ".join(map(plain, cells)) + " |")
    return "\n".join(lines) + "\n"


def formulas_page() -> str:
    """The docstrings of all methods and tasks: citation, formulas, and what is ours."""
    methods = [name for name in modules() if name.startswith("fedklpr_jax.methods.")]
    lines = [
        f"{WIDE}# Formulas\n",
        "What every file of a method and of a task says first: citation, formulas, and what is ours where the paper is "
        "silent. [The methods](methods.md) has all of them in one table.",
    ]
    for title, names in (("Methods", methods), ("Tasks", [f"fedklpr_jax.tasks.{task}" for task in TASKS])):
        lines.append(f"\n## {title}")
        for name in names:
            short = name.rpartition(".")[2]
            lines += [f"\n### `{short}`\n", f"::: {name}", "    options:", "      members: false",
                      f"\n[Settings](configuration.md), [code]({page_of(name)})"]  # fmt: skip
    return "\n".join(lines) + "\n"


def generated() -> Iterator[tuple[str, str]]:
    """The pages that are not in docs/, with their Markdown."""
    yield "configuration.md", configuration_page()
    yield "formulas.md", formulas_page()
    for page, path in BESIDE.items():
        yield page, (ROOT / path).read_text(encoding="utf-8")
    for module in modules():
        yield page_of(module), f"# `{module}`\n\n::: {module}\n"


def api_entries() -> list[Any]:
    """The API in the navigation: modules of the package itself, then a group for each package in it."""
    groups: dict[str, list[Any]] = {}
    for module in modules():
        parts = module.split(".")[1:]
        inside = (PACKAGE / parts[0]).is_dir() if parts else False
        name = ".".join(parts[1:] if inside and len(parts) > 1 else parts) or "fedklpr_jax"
        groups.setdefault(f"{parts[0]}/" if inside else "", []).append({name: page_of(module)})
    return groups.pop("") + [{name: entries} for name, entries in groups.items()]


def on_config(config: Any) -> Any:
    """Puts the API into the navigation, in place of the entry that stands for it."""
    config.nav = [{"API": api_entries()} if entry == {"API": "api"} else entry for entry in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made here, and the notebook."""
    from mkdocs.structure.files import File

    for page, text in generated():
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, NOTEBOOK, abs_src_path=str(ROOT / NOTEBOOK)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links to code to the pages that show it."""
    return relinked(markdown, page.file.src_uri)
