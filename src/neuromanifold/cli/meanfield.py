"""The command that holds a random network, or the user's own, against theory."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuromanifold.cli.app import Debug, Json, Out, Seed, _page, _readable_errors, app
from neuromanifold.cli.output import (
    MISSING,
    MOST_LAYERS,
    check_page,
    measured,
    note,
    number,
    write_page,
)

if TYPE_CHECKING:
    from neuromanifold.meanfield.initialisation import Variances

__all__ = ["meanfield"]

DEPTH, WIDTH, OUTPUTS, SEEDS = 10, 400, 1, 5
SAMPLES, SAMPLES_OF_MODEL = 16, 64


class Init(StrEnum):
    """Initialisations by name."""

    PYTORCH = "pytorch"
    XAVIER = "xavier"
    KAIMING = "kaiming"
    LECUN = "lecun"
    CRITICAL = "critical"


@app.command()
def meanfield(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE.PY:FUNCTION]",
            help="A function without arguments that returns (model, likelihood, data): your own "
            "network in place of random ones.",
            show_default=False,
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(help="relu, tanh, gelu, ...: any of torch (default: tanh).", metavar="NAME"),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(help=f"Layers; the last one is linear (default: {DEPTH}).", min=1),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help=f"Units of input and hidden layers (default: {WIDTH}).", min=1),
    ] = None,
    init: Annotated[
        Init | None,
        typer.Option(
            help="What weights and biases begin with; critical is the edge of chaos "
            "(default: pytorch).",
            show_default=False,
        ),
    ] = None,
    weight_variance: Annotated[
        float | None, typer.Option(help="Of weights, times fan-in, in place of --init.")
    ] = None,
    bias_variance: Annotated[
        float | None, typer.Option(help="Of biases (default: the initialisation's, or 0).")
    ] = None,
    outputs: Annotated[
        int | None, typer.Option(help=f"Units of the last layer (default: {OUTPUTS}).", min=1)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help=f"Random inputs (default: {SAMPLES}), or so many of the first batch "
            f"(default: {SAMPLES_OF_MODEL}).",
            min=1,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help=f"Random networks, with seeds that follow --seed (default: {SEEDS}).", min=1
        ),
    ] = None,
    out: Out = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Random deep networks: is an initialisation where theory wants it?

    Signals, gradients and the Fisher spectrum, predicted and measured, layer by layer; a phase
    diagram, and the initialisation and learning rate to begin with.
    """
    page = _page(out, as_json)
    with _readable_errors(debug):
        check_page(page)
        with contextlib.redirect_stdout(sys.stderr):
            import torch

            from neuromanifold.report import study_model, study_random

            if target is None:
                name = activation or "tanh"
                variances = _variances(
                    name,
                    [width or WIDTH] * (depth or DEPTH) + [outputs or OUTPUTS],
                    init,
                    weight_variance,
                    bias_variance,
                )
                note(f"Drawing {seeds or SEEDS} random networks of {depth or DEPTH} layers")
                study = study_random(
                    name,
                    variances,
                    samples=samples or SAMPLES,
                    seeds=range(seed, seed + (seeds or SEEDS)),
                    progress=sys.stderr.isatty(),
                )
                title = f"Random networks: {study['name']}"
            else:
                from neuromanifold.cli.target import load_target

                _refuse_beside_target(
                    activation=activation,
                    depth=depth,
                    width=width,
                    init=init,
                    weight_variance=weight_variance,
                    bias_variance=bias_variance,
                    outputs=outputs,
                    seeds=seeds,
                )
                torch.manual_seed(seed)  # for what the target draws: weights, batches
                model, likelihood, data = load_target(target)
                note(f"Measuring {target}")
                study = study_model(model, likelihood, data, samples=samples or SAMPLES_OF_MODEL)
                title = f"Mean-field theory of {target}"
        publish_study(study, title=title, page=page, as_json=as_json)


def _variances(
    activation: str,
    widths: Sequence[int],
    init: Init | None,
    weight: float | None,
    bias: float | None,
) -> Variances:
    """What the options say.

    Raises:
        ValueError: If they contradict one another.
    """
    from neuromanifold.meanfield.initialisation import Variances, variances
    from neuromanifold.meanfield.phases import edge_of_chaos

    layers = len(widths) - 1
    if weight is not None and init is not None:
        raise ValueError(
            f"--weight-variance {weight:g} and --init {init} both set the weights: give one."
        )
    for option, value in (("--weight-variance", weight), ("--bias-variance", bias)):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{option} is a variance, ≥ 0 and finite; got {value:g}.")
    if init is Init.CRITICAL:
        weight = float(edge_of_chaos(activation, bias or 0.0))
    if weight is not None:
        return Variances((weight,) * layers, (bias or 0.0,) * layers, tuple(widths))
    found = variances((init or Init.PYTORCH).value, widths, activation=activation)
    biases = found.bias if bias is None else (bias,) * layers
    return Variances(found.weight, biases, found.widths)


def _refuse_beside_target(**options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} describe random networks; with FILE.PY:FUNCTION the network is "
            f"the one that the function returns. Leave out one or the other."
        )


def publish_study(
    study: Mapping[str, Any], *, title: str, page: Path | None, as_json: bool
) -> None:
    """Write the page if there is to be one, then print the study."""
    if page is not None:
        from neuromanifold.report import render_meanfield

        write_page(page, render_meanfield(study, title=title))
    if as_json:
        typer.echo(json.dumps(study, indent=2, allow_nan=False))
        return
    console = Console()
    console.print(_layers(study))
    console.print(_spectrum(study))
    lines = [study["verdict"], _recommendation(study)]
    lines += [f"Not in the theory: {what}." for what in study["left_out"]]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _layers(study: Mapping[str, Any]) -> Table:
    layers = shown = study["layers"]
    if len(layers) > MOST_LAYERS:
        shown = [*layers[: MOST_LAYERS // 2], *layers[-MOST_LAYERS // 2 :]]
    table = Table(
        title=Text(f"{study['name']}: predicted / measured"),
        title_justify="left",
        caption=None
        if len(shown) == len(layers)
        else f"{len(layers) - len(shown)} layers between them are in the page and in --json.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("layer")
    for column in ("activity", "overlap\n(correlation)", "gain", "error"):
        table.add_column(column, justify="right")
    for layer in shown:
        table.add_row(
            Text(layer["name"] or "(root)"),
            _pair(layer["activity"]),
            _pair(layer["correlation"], ".3f"),
            *(_pair(layer[signal]) for signal in ("gain", "error")),
        )
    return table


def _pair(found: Mapping[str, float | None], spec: str = ".3g") -> str:
    return " / ".join(
        MISSING if value is None else format(value, spec)
        for value in (found["predicted"], found["measured"])
    )


def _spectrum(study: Mapping[str, Any]) -> Table:
    networks = "one network" if study["seeds"] is None else f"{len(study['seeds'])} networks"
    table = Table(
        title=Text(f"Fisher spectrum, {networks}, {study['samples']} samples"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for column in ("predicted", "measured", "scatter"):
        table.add_column(column, justify="right")
    for key, words in (
        ("mean", "mean eigenvalue"),
        ("largest", "largest eigenvalue λmax"),
        ("learning_rate_bound", "learning-rate bound 2/λmax"),
    ):
        found = study["spectrum"][key]
        table.add_row(
            words,
            number(found["predicted"]),
            measured(found["measured"], found["stderr"])
            if found["stderr"] is not None
            else number(found["measured"]),
            MISSING if found["scatter"] is None else f"{found['scatter']:.1%}",
        )
    return table


def _recommendation(study: Mapping[str, Any]) -> str:
    wanted = study["recommended"]
    if wanted is None:
        return "Recommended: nothing; no initialisation of these layers is at the edge of chaos."
    return (
        f"Recommended: weights of variance {number(wanted['weight_variance'])} / fan-in, biases of "
        f"variance {number(wanted['bias_variance'])}; learning rate below "
        f"{number(wanted['learning_rate_bound'])}."
    )
