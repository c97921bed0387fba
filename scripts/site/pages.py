"""Pages of the site that are made from the code: the reference, the notebooks, and the source files that other pages link to.

Run by mkdocs (``make docs``); nothing is written into ``docs/``.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).parents[2]
ROOMS = {
    "tl_vpd": "What most notebooks need",
    "tl_vpd.training": "Training",
    "tl_vpd.importance": "Causal importances",
    "tl_vpd.masking": "Masks",
    "tl_vpd.losses": "Losses",
    "tl_vpd.evaluation": "Evaluation",
    "tl_vpd.analysis": "Analysis",
    "tl_vpd.analysis.attention": "Attention",
    "tl_vpd.editing": "Editing",
    "tl_vpd.planning": "Planning",
    "tl_vpd.formats": "Other formats",
    "tl_vpd.publishing": "Publishing",
    "tl_vpd.viz": "Pictures",
    "tl_vpd.bundled": "Bundled model and decomposition",
    "tl_vpd.toys": "Toys",
    "tl_vpd.baselines": "Baselines",
}
"""Rooms with a page of their own, and its title."""
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
"""A link of a page to a file outside ``docs/``."""


def exported(room: str) -> list[str]:
    """The full names of a room's public functions, classes and constants, where they are defined."""
    module = importlib.import_module(room)
    names = []
    for name in module.__all__:
        thing = getattr(module, name)
        if not isinstance(thing, type(importlib)):
            home = getattr(thing, "__module__", None)
            names.append(f"{home}.{name}" if isinstance(home, str) and home.startswith("tl_vpd") else f"{room}.{name}")
    return sorted(names, key=lambda full: full.rsplit(".", 1)[1].lower())


def reference() -> None:
    """One page per room."""
    contents = ["# Reference", "", "Every public name, with shapes, units, errors and the source of each equation.", ""]
    navigation = ["- [All names](index.md)"]
    documented: set[str] = set()
    for room, title in ROOMS.items():
        names = [name for name in exported(room) if name not in documented]
        documented.update(names)
        text = [f"# {title}", "", f"`{room}`", "", *(f"::: {name}\n" for name in names)]
        page = room.replace(".", "_") + ".md"
        with mkdocs_gen_files.open(f"reference/{page}", "w") as file:
            file.write("\n".join(text))
        navigation.append(f"- [{title}]({page})")
        short = ", ".join(f"`{name.rsplit('.', 1)[1]}`" for name in names)
        contents += [f"- [{title}]({page}) (`{room}`): {short}"]
    with mkdocs_gen_files.open("reference/index.md", "w") as file:
        file.write("\n".join(contents) + "\n")
    with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as file:
        file.write("\n".join(navigation) + "\n")


def notebooks() -> None:
    """The notebooks, with their stored outputs."""
    paths = sorted((ROOT / "examples").glob("*.ipynb"))
    with mkdocs_gen_files.open("notebooks/SUMMARY.md", "w") as file:
        file.writelines(f"- [{path.stem.replace('_', ' ').capitalize()}]({path.name})\n" for path in paths)
    for path in paths:
        with mkdocs_gen_files.open(f"notebooks/{path.name}", "w") as file:
            file.write(path.read_text(encoding="utf-8"))


def linked_files() -> None:
    """A page with its text for each file outside ``docs/`` that a page links to; ``links.py`` points the links at them."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    for name in sorted({match for text in pages for match in OUTSIDE.findall(text)}):
        path = ROOT / name
        if path.suffix in (".py", ".json", ".yaml"):
            language = {".py": "python", ".json": "json", ".yaml": "yaml"}[path.suffix]
            with mkdocs_gen_files.open(f"source/{name}.md", "w") as file:
                file.write(f"# {path.name}\n\n`{name}`\n\n````{language}\n{path.read_text(encoding='utf-8')}````\n")


def top_level() -> None:
    """The pages at the top of the repository that the site has too."""
    for name, page in (("CONTRIBUTING.md", "developers.md"), ("CHANGELOG.md", "changes.md")):
        with mkdocs_gen_files.open(page, "w") as file:
            file.write((ROOT / name).read_text(encoding="utf-8").replace("](docs/", "]("))


reference()
notebooks()
linked_files()
top_level()
