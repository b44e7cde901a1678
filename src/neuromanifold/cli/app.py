"""Commands and their options.

Whatever needs torch is imported inside a command, so that `--help` answers at once. Results go to
stdout, everything else (progress, messages, what the user's own code prints) to stderr.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from neuromanifold import __version__
from neuromanifold.cli.output import check_page, note, publish, publish_estimate

__all__ = ["app"]

app = typer.Typer(
    name="neuromanifold",
    help="The Fisher information of a PyTorch model: measured and explained.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Out = Annotated[
    Path | None,
    typer.Option(
        help="Where to write the HTML page (default: report.html, but none with --json).",
        dir_okay=False,
        show_default=False,
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE.PY:FUNCTION",
        help="A function without arguments that returns (model, likelihood, data).",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(help="Measure only the first so many samples (default: all).", min=1),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.", min=0)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"neuromanifold {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """The Fisher information of a PyTorch model: measured and explained."""


@app.command()
def demo(
    out: Out = None,
    as_json: Json = False,
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 20,
    samples: Annotated[int, typer.Option(help="Training images to measure on.", min=1)] = 256,
    debug: Debug = False,
) -> None:
    """Train a conv net and an MLP on handwritten digits, and report their Fisher information."""
    page = _page(out, as_json)
    with _readable_errors(debug):
        check_page(page)
        with contextlib.redirect_stdout(sys.stderr):
            from neuromanifold.cli.demo_models import analyze_digits

            analyses = analyze_digits(seed=seed, epochs=epochs, samples=samples)
        publish(analyses, title="Two networks that read digits", page=page, as_json=as_json)


@app.command()
def analyze(
    target: Target,
    out: Out = None,
    as_json: Json = False,
    samples: Samples = None,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Report the Fisher information of your own model.

    The model is measured as the function returns it, in the mode (train or eval) it is in. The
    data are what `neuromanifold.fisher` takes: a batch, a pair (inputs, targets) or a DataLoader.
    """
    page = _page(out, as_json)
    with _readable_errors(debug):
        check_page(page)
        with contextlib.redirect_stdout(sys.stderr):
            import torch

            from neuromanifold.capture import unwrap
            from neuromanifold.cli.target import first_samples, load_target
            from neuromanifold.report import collect

            torch.manual_seed(seed)  # for what the target draws: weights, batches
            model, likelihood, data = load_target(target)
            note(f"Measuring the Fisher information of {target}")
            analysis = collect(
                model,
                likelihood,
                data if samples is None else first_samples(data, samples),
                name=type(unwrap(model)).__name__,
                generator=torch.Generator().manual_seed(seed),
                progress=sys.stderr.isatty(),
            )
        publish([analysis], title=f"Fisher information of {target}", page=page, as_json=as_json)


class Quantity(StrEnum):
    """What `estimate` can estimate."""

    TRACE = "trace"
    LAYERS = "layers"
    DIAGONAL = "diagonal"
    ENTRIES = "entries"
    EIGENVALUE = "eigenvalue"


@app.command()
def estimate(
    target: Target,
    quantity: Annotated[
        Quantity,
        typer.Option(
            help="The trace, that of each layer, the diagonal by parameter or by single entries, "
            "or the largest eigenvalue."
        ),
    ] = Quantity.TRACE,
    quantile: Annotated[
        float | None,
        typer.Option(
            help="Of entries: the share of each parameter's that is within the tolerance."
        ),
    ] = None,
    rtol: Annotated[
        float, typer.Option(help="Half the width of the interval over the value, at most.")
    ] = 0.05,
    confidence: Annotated[
        float, typer.Option(help="How often the interval covers the truth.")
    ] = 0.95,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="File in which the draws are kept: a stopped run goes on.", dir_okay=False
        ),
    ] = None,
    as_json: Json = False,
    samples: Samples = None,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Draw labels until a number is known well enough, with its error bar.

    Ctrl-C loses nothing with `--keep FILE`: the same command goes on where it stopped.
    """
    with _readable_errors(debug):
        with contextlib.redirect_stdout(sys.stderr):
            import torch

            from neuromanifold._estimation import estimate as run
            from neuromanifold.cli.target import first_samples, load_target

            torch.manual_seed(seed)
            model, likelihood, data = load_target(target)
            try:
                found = run(
                    model,
                    likelihood,
                    data if samples is None else first_samples(data, samples),
                    quantity.value,
                    rtol=rtol,
                    confidence=confidence,
                    quantile=quantile,
                    generator=torch.Generator().manual_seed(seed),
                    progress=sys.stderr.isatty(),
                    path=keep,
                )
            except KeyboardInterrupt:
                if keep is not None:
                    note(f"Stopped. What was drawn is in {keep}: the same command goes on.")
                raise
        publish_estimate(found, quantity.value, confidence=confidence, as_json=as_json)
    if not found.reached:
        raise typer.Exit(3)


def _page(out: Path | None, as_json: bool) -> Path | None:
    """Where the page goes; None when only JSON was asked for."""
    if out is None and not as_json:
        return Path("report.html")
    return out


@contextlib.contextmanager
def _readable_errors(debug: bool) -> Iterator[None]:
    """One message instead of a traceback: exit 2 for what the user can mend, 1 for the rest."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            raise
        expected = isinstance(error, (ValueError, TypeError, OSError))
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        said = [f"Error: {text}", *getattr(error, "__notes__", ())]
        note("\n".join([*said, "(--debug shows the traceback.)"]))
        raise typer.Exit(2 if expected else 1) from None
