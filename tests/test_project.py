"""The project as a whole: its version, its table of contents, what it imports and when."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import neuromanifold

ROOT = Path(__file__).parents[1]
EXTRAS = {
    "accelerate",
    "altair",
    "jinja2",
    "lightning",
    "rich",
    "scipy",
    "sklearn",
    "transformers",
    "typer",
    "vl_convert",
}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    report = "\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


@pytest.fixture(scope="module")
def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_version_is_said_once_and_repeated_right(version):
    assert neuromanifold.__version__ == version
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)


def test_the_readme_names_both_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("name", neuromanifold.__all__)
def test_public_names_are_documented(name):
    assert getattr(neuromanifold, name).__doc__


def public_modules() -> list[str]:
    found = pkgutil.walk_packages(neuromanifold.__path__, "neuromanifold.")
    return [module.name for module in found if not module.name.endswith("__main__")]


@pytest.mark.parametrize("name", public_modules())
def test_what_a_module_lists_exists_and_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{public} has no docstring"


def test_the_table_of_contents_is_the_same_for_type_checkers():
    tree = ast.parse(Path(neuromanifold.__file__).read_text(encoding="utf-8"))
    static = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("neuromanifold")
        for alias in node.names
    }
    lazy = {name: f"neuromanifold.{home}" for name, home in neuromanifold._HOME.items()}
    folders = set(neuromanifold.__all__) - lazy.keys()
    assert static == lazy | dict.fromkeys(folders, "neuromanifold")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'neuromanifold' has no attribute 'fischer'"):
        neuromanifold.fischer  # noqa: B018


def test_the_package_alone_does_not_load_torch():
    assert not loaded_after("import neuromanifold") & {"torch", *EXTRAS}


def test_the_library_does_not_load_the_extras():
    code = "import neuromanifold as nm\nfor name in nm.__all__: getattr(nm, name)"
    loaded = loaded_after(code)
    assert "torch" in loaded
    assert not loaded & EXTRAS


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["analyze"], ["estimate"], ["train"], ["meanfield"]], ids=" ".join
)
def test_help_does_not_load_torch(command):
    code = f"from neuromanifold.cli import app\napp({[*command, '--help']}, standalone_mode=False)"
    loaded = loaded_after(code)
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "jinja2", "altair", "sklearn"}


def test_the_reference_names_what_exists():
    text = (ROOT / "docs" / "reference.md").read_text()
    for entry in text.split("\n::: ")[1:]:
        path, *_ = entry.split(maxsplit=1)
        listed = re.search(r"members: \[(.*)\]", entry)
        value = pkgutil.resolve_name(path)
        for member in listed[1].split(", ") if listed else ():
            assert hasattr(value, member), f"{path} has no {member}"
