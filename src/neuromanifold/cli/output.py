"""What a command leaves behind: tables or JSON on stdout, a page in a file, notes on stderr."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from itertools import islice, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuromanifold._extras import require_extra
from neuromanifold._files import atomic_path
from neuromanifold._intervals import plus_minus, quantile

if TYPE_CHECKING:
    from neuromanifold._estimation import Estimated

__all__ = ["check_page", "note", "publish", "publish_estimate"]

Analysis = Mapping[str, Any]
"""What `neuromanifold.report.collect` returns."""


def note(text: str) -> None:
    """Say something on stderr, as it is: no markup, no line breaks of our own."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def check_page(page: Path | None) -> None:
    """Refuse early a page that could not be written.

    Raises:
        UnsupportedError: If the report extra is not installed.
        ValueError: If the folder does not exist.
    """
    if page is None:
        return
    require_extra("report", "jinja2", "altair", "vl_convert")
    if not page.parent.is_dir():
        raise ValueError(f"No folder {page.parent} to write {page.name} into. Create it first.")


def write_page(page: Path, html: str) -> None:
    """Write it completely or not at all, and say so."""
    with atomic_path(page) as partial:
        partial.write_text(html, encoding="utf-8")
    note(f"Wrote {page}. Open it in a browser.")


def publish(analyses: Sequence[Analysis], *, title: str, page: Path | None, as_json: bool) -> None:
    """Write the page if there is to be one, then print the analyses."""
    if page is not None:
        from neuromanifold.report import render

        write_page(page, render(list(analyses), title=title))
    if as_json:
        typer.echo(json.dumps(list(analyses), indent=2, allow_nan=False))
    else:
        console = Console()
        for table in tables(analyses, console.width):
            console.print(table)
            console.print()
        for text in (f"{a['name']}: {line}" for a in analyses for line in a["notes"]):
            console.print(text, markup=False, highlight=False)


def publish_estimate(
    estimate: Estimated, quantity: str, *, confidence: float, as_json: bool
) -> None:
    """Print what was estimated to a tolerance: a row for each number that was asked for."""
    if as_json:
        typer.echo(json.dumps(estimate.to_dict(), indent=2, allow_nan=False))
        return
    from neuromanifold._estimation import shares

    names, numbers = shares(estimate)
    table = Table(
        title=Text(f"Fisher information: {quantity}"),
        title_justify="left",
        caption=Text(
            f"{estimate.num_samples:,} inputs, {estimate.draws:,} labels for each. The interval "
            f"covers the truth with {confidence:.0%} confidence."
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for column in ("nats/param²", "interval", "from data", "from labels"):
        table.add_column(column, justify="right")
    console, width = Console(), quantile(confidence)
    for name, (square, data, drawn) in zip(names, numbers.T.tolist(), strict=True):
        value, stderr = square**0.5, (data + drawn) ** 0.5
        share = f"± {width * stderr / value:.1%}" if value else MISSING
        table.add_row(
            Text(_folded(name or quantity, console.width - WIDTH_OF_ERRORS)),
            plus_minus(value, stderr),
            share,
            *(f"± {width * part**0.5 / value:.1%}" if value else MISSING for part in (data, drawn)),
        )
    console.print(table)
    if not estimate.reached:
        note(estimate.note)


MOST_LAYERS = 30
"""Rows of a table of layers; the page and the JSON document have all of them."""

WIDTH_OF_ERRORS = 62
"""Columns of the terminal that the numbers of an estimate take."""

MISSING = "–"
"""Stands for what was not measured."""


def number(value: float | None) -> str:
    """Three significant digits.

    Example:
        >>> number(1234.5), number(0.00012345), number(None)
        ('1.23e+03', '0.000123', '–')
    """
    return MISSING if value is None else f"{value:.3g}"


def measured(value: float | None, stderr: float | None, *, between: str = " ") -> str:
    """A number with its standard error, which has two digits.

    Example:
        >>> measured(22.18, 0.5971), measured(22.18, None), measured(None, None)
        ('22.2 ± 0.6', '22.2 ± –', '–')
    """
    if value is None:
        return MISSING
    return f"{number(value)}{between}± {MISSING if stderr is None else f'{stderr:.2g}'}"


def shown_share(layer: Analysis, between: str) -> str:
    """The share of a layer in the trace, with its standard error."""
    stderr = layer["stderr"]["share"]
    return f"{layer['share']:.1%}{between}± {MISSING if stderr is None else f'{stderr:.1%}'}"


def tables(analyses: Sequence[Analysis], width: int) -> list[Table]:
    """One table that compares the models, then one per model with a row per layer."""
    return [_overview(analyses), *(_layers(analysis, width) for analysis in analyses)]


def _overview(analyses: Sequence[Analysis]) -> Table:
    table = Table("", title="Fisher information", title_justify="left")
    columns = [_facts(analysis) for analysis in analyses]
    for analysis in analyses:
        table.add_column(Text(analysis["name"]), justify="right")
    for label in dict.fromkeys(label for facts in columns for label in facts):
        table.add_row(label, *(facts.get(label, MISSING) for facts in columns))
    return table


def _facts(analysis: Analysis) -> dict[str, str]:
    """What one model's column says; a fact that was not measured is left out."""
    facts = {
        "trainable parameters": f"{analysis['model']['num_trainable']:,}",
        "samples measured": f"{analysis['num_samples']:,}",
    }
    if training := analysis["training"]:
        facts["test accuracy"] = f"{training['test_accuracy']:.1%}"
    errors = analysis["stderr"]
    facts |= {
        label: measured(analysis[name], errors.get(name))
        for label, name in (
            ("trace (nats/param²)", "trace"),
            ("Frobenius norm (nats/param²)", "frobenius"),
            ("largest eigenvalue (nats/param²)", "largest_eigenvalue"),
            ("trace / largest eigenvalue", "stable_rank"),
            ("participation ratio", "participation_ratio"),
            ("largest stable learning rate", "max_learning_rate"),
        )
    }
    spectrum = analysis["spectrum"]
    if spectrum and spectrum["eigenvalues"]:
        damping = spectrum["eigenvalues"][0] / 100
        leading = zip(spectrum["leading"], spectrum["stderr"]["leading"], strict=True)
        dimension = sum(value / (value + damping) for value in spectrum["eigenvalues"])
        facts |= {
            "the next three eigenvalues": "\n".join(starmap(measured, islice(leading, 1, 4))),
            "non-zero eigenvalues": f"{spectrum['count']:,}",
            "effective dimension at λmax/100": measured(
                dimension, errors.get("effective_dimension")
            ),
        }
    for structure, error in (analysis["whole_errors"] or {}).items():
        facts[f"relative error of {structure}"] = measured(error, errors["whole_errors"][structure])
    for advice in (analysis["estimators"] or {"advice": ()})["advice"][:1]:
        facts["recommended estimator"] = advice["estimator"]
    return facts


def _layers(analysis: Analysis, width: int) -> Table:
    layers = analysis["layers"]
    shown = _largest(layers)
    table = Table(
        title=Text(f"{analysis['name']}, layer by layer"),
        title_justify="left",
        caption=_left_out(layers, shown),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("layer")
    for name in ("params", "trace", "share", "Kronecker\nerror", "unit-wise\nerror"):
        table.add_column(name, justify="right")
    between = " " if width >= WIDTH_OF_ONE_LINE else "\n"
    for layer in shown:
        table.add_row(
            Text(_folded(layer["name"] or "(root)", width - WIDTH_OF_NUMBERS)),
            f"{layer['num_parameters']:,}",
            measured(layer["trace"], layer["stderr"]["trace"], between=between),
            shown_share(layer, between),
            *(
                measured(layer[name], layer["stderr"][name], between=between)
                for name in ("kronecker_error", "unitwise_error")
            ),
        )
    return table


WIDTH_OF_ONE_LINE = 120
"""Characters of a terminal in which numbers and their errors stand side by side."""

WIDTH_OF_NUMBERS = 58
"""Characters that the columns beside the name of a layer take."""


def _largest(layers: Sequence[Analysis]) -> list[Analysis]:
    """The layers with the largest trace, in the order of the network."""
    by_trace = sorted(range(len(layers)), key=lambda i: -layers[i]["trace"])
    return [layers[i] for i in sorted(by_trace[:MOST_LAYERS])]


def _left_out(layers: Sequence[Analysis], shown: Sequence[Analysis]) -> str | None:
    """What is said under a table that does not show all layers."""
    if len(shown) == len(layers):
        return None
    share = sum(layer["share"] for layer in layers) - sum(layer["share"] for layer in shown)
    return (
        f"{len(layers) - len(shown)} more layers, with {max(share, 0):.1%} of the trace, are in "
        f"the page and in --json."
    )


def _folded(name: str, width: int) -> str:
    """A long name on several lines, broken after its dots: its end tells layers apart.

    Example:
        >>> _folded("encoder.layer.0.attention.output", 20).splitlines()
        ['encoder.layer.0.', 'attention.output']
    """
    return "\n".join(
        line.replace(". ", ".")
        for line in textwrap.wrap(name.replace(".", ". "), max(width, 16), break_on_hyphens=False)
    )
