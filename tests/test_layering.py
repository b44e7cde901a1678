"""A module imports only from lower levels and its own folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import neuromanifold

ROOT = Path(neuromanifold.__file__).parent

LEVELS = {
    name: level
    for level, names in {
        0: "_files _intervals _progress _typing errors",
        1: "_estimate _extras _writing linalg",
        2: "likelihoods layers operators distributed",
        3: "capture estimators",
        4: "structures",
        5: "_fisher",
        6: "_estimation _forecast",
        7: "variance relative spectral meanfield optim belief apps testing",
        8: "training",
        9: "report",
        10: "cli",
        11: "__main__",
    }.items()
    for name in names.split()
}


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def offences(source: str, module: str) -> list[str]:
    """Imports of `module` (such as `capture.tape`) that the levels do not allow."""
    folder = module.partition(".")[0]
    package = f"neuromanifold.{module}".rpartition(".")[0]
    found = []
    for line, name in imports(source, package):
        top, _, rest = name.partition(".")
        if top != "neuromanifold" or rest == "__version__":
            continue
        target = rest.partition(".")[0]
        target = neuromanifold._HOME.get(target, target)
        if target == folder:
            continue
        if target not in LEVELS:
            found.append(f"{module}:{line} imports {name}: import from the module that defines it")
        elif target == "testing":
            found.append(f"{module}:{line} imports {name}: testing is for tests and users")
        elif LEVELS[target] >= LEVELS[folder]:
            found.append(
                f"{module}:{line} (level {LEVELS[folder]}) imports {name} (level {LEVELS[target]})"
            )
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):  # the table of contents names everything
            yield ".".join(parts), path


def test_every_module_has_a_level():
    without = {name.partition(".")[0] for name, _ in modules()} - LEVELS.keys()
    assert not without, f"Give {without} a level in {Path(__file__).name}."


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_downwards(module, path):
    assert not offences(path.read_text(encoding="utf-8"), module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("linalg.psd", "import neuromanifold.layers", id="upwards"),
        pytest.param("layers.conv", "from neuromanifold.operators import load", id="sideways"),
        pytest.param("layers.conv", "from ..operators import load", id="relative"),
        pytest.param("layers.conv", "from .. import operators", id="relative module"),
        pytest.param("layers.__init__", "from neuromanifold import fisher", id="by its short name"),
        pytest.param("capture.tape", "import neuromanifold", id="the whole package"),
        pytest.param("report.collect", "from neuromanifold import testing", id="testing"),
        pytest.param(
            "linalg.psd",
            "def f():\n    from neuromanifold.structures import Dense",
            id="inside a function",
        ),
        pytest.param(
            "linalg.psd",
            "if TYPE_CHECKING:\n    from neuromanifold.layers import Record",
            id="for types only",
        ),
    ],
)
def test_the_check_finds(module, source):
    assert len(offences(source, module)) == 1


def test_the_check_allows_what_is_below_and_beside():
    source = (
        "import torch\n"
        "from neuromanifold.errors import CaptureError\n"
        "from neuromanifold.capture.data import Batch\n"
        "from .data import Batch\n"
        "from neuromanifold import __version__\n"
    )
    assert not offences(source, "capture.tape")
