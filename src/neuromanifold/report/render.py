"""From analyses, which are plain dicts, to one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neuromanifold._extras import require_extra
from neuromanifold.report.kinds import require_kind

__all__ = ["fill", "render"]

_KIND, _VERSION = "neuromanifold.analysis", 1


def render(analyses: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """One HTML page that explains what was measured.

    The page carries everything it needs: style, data and the program that draws the charts. It
    loads nothing from anywhere, its content security policy forbids it, and without JavaScript
    its tables still hold the numbers. The same analyses give the same page, byte for byte.

    Args:
        analyses: one per model, each as `neuromanifold.report.collect` returns it; what is None
            or empty in it is left out of the page.
        title: heading of the page, plain text.

    Returns:
        The page; write it as UTF-8.

    Raises:
        UnsupportedError: If the report extra is not installed.
        ValueError: If there is nothing to report, or a dict is not an analysis.

    Example:
        >>> import torch
        >>> from neuromanifold import Categorical
        >>> from neuromanifold.report import collect
        >>> model, inputs = torch.nn.Linear(3, 2), torch.ones(4, 3)
        >>> page = render([collect(model, Categorical(), inputs, name="linear")], title="One layer")
        >>> page.startswith("<!doctype html>"), "<h1>One layer</h1>" in page
        (True, True)
    """
    _check(analyses)
    require_extra("report", "jinja2", "altair", "vl_convert")
    # The extra is needed from here on only, so that the library can be imported without it.
    from neuromanifold.report.headline import facts
    from neuromanifold.report.provenance import coverage, origin
    from neuromanifold.report.sections import sections

    models = [
        {
            "id": f"model-{number}",
            "name": analysis["name"],
            "origin": origin(analysis),
            "facts": facts(analysis),
            "sections": sections(analysis),
            "coverage": coverage(analysis),
            "notes": analysis.get("notes") or (),
        }
        for number, analysis in enumerate(analyses, 1)
    ]
    return fill("page.html", title=title, models=models)


def fill(template: str, *, templates: Path | None = None, **values: Any) -> str:
    """A page from one of the templates, with the program that draws its charts.

    Args:
        template: its name.
        templates: a folder with further ones, which may extend those of this package.
        **values: what it shows.
    """
    import jinja2

    own = jinja2.PackageLoader("neuromanifold.report")
    further = [] if templates is None else [jinja2.FileSystemLoader(templates)]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([*further, own]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(
        **values, drawing_library=_drawing_library(), version=version("neuromanifold")
    )


def _breakable(name: str) -> str:
    """Markup of a name that may be broken after its dots, so that tables of long names fit."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(name.split("."))


def _check(analyses: Sequence[Mapping[str, Any]]) -> None:
    if not analyses:
        raise ValueError("There is nothing to report: pass at least one analysis.")
    for number, analysis in enumerate(analyses, 1):
        what = f"Number {number} of the analyses"
        made_by = "neuromanifold.report.collect"
        require_kind(analysis, (_KIND, _VERSION), what=what, made_by=made_by)


@cache
def _drawing_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; a page needs it once for all its charts."""
    import altair as alt
    import vl_convert

    major_minor = alt.SCHEMA_VERSION.rpartition(".")[0]
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=major_minor)
