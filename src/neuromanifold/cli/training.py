"""The command that trains a model by one optimizer or several."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuromanifold.cli.app import Debug, Json, Out, Seed, Target, _page, _readable_errors, app
from neuromanifold.cli.output import MISSING, check_page, note, write_page

__all__ = ["train"]


@app.command()
def train(
    target: Target,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:LR]",
            help="kfac, projected, ekfac, unitwise, quasidiagonal, diagonal, relative, meanfield, "
            "gram, implicit, adamw or sgd, with a learning rate of its own if you like. Several "
            "are compared (default: kfac).",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.", min=1)] = 10,
    lr: Annotated[
        float | None,
        typer.Option(help="Of optimizers without their own (default: by optimizer)."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Samples in a minibatch, if the data are no loader.", min=1)
    ] = 64,
    damping: Annotated[
        float | None,
        typer.Option(help="Of natural gradients, in nats/parameter² (default: the optimizer's)."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Runs of each optimizer, with seeds that follow --seed.", min=1)
    ] = 1,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of checkpoints, written after each epoch and on Ctrl-C.", file_okay=False
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the checkpoints that are there.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train your own model, and compare optimizers by step and by second.

    The function returns (model, likelihood, data) or (model, likelihood, data, test). All
    optimizers begin with the same weights and see the same batches.
    """
    page = _page(out, as_json)
    with _readable_errors(debug):
        check_page(page)
        with contextlib.redirect_stdout(sys.stderr):
            import torch

            from neuromanifold.cli.target import training_target
            from neuromanifold.training import Problem, Stopped, compare_optimizers, parse_entry

            entries = [parse_entry(text, lr) for text in optimizer or ["kfac"]]
            torch.manual_seed(seed)  # for what the file draws when it is read
            load = training_target(target)
            try:
                result = compare_optimizers(
                    lambda _: Problem(*load()),
                    entries,
                    epochs=epochs,
                    batch_size=batch_size,
                    seeds=range(seed, seed + seeds),
                    damping=damping,
                    folder=checkpoint,
                    resume=resume,
                    note=note,
                    progress=sys.stderr.isatty(),
                )
            except Stopped:
                if checkpoint is not None:
                    note(f"Stopped. The same command with --resume goes on from {checkpoint}.")
                raise KeyboardInterrupt from None
        publish_contest(result, title=f"Training {target}", page=page, as_json=as_json)


def publish_contest(
    result: Mapping[str, Any], *, title: str, page: Path | None, as_json: bool
) -> None:
    """Write the page if there is to be one, then print what came of each run."""
    if page is not None:
        from neuromanifold.report import render_contest

        write_page(page, render_contest(result, title=title))
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
        return
    from neuromanifold.report import verdict

    console = Console()
    console.print(_table(result))
    for line in (verdict(result), *result["notes"]):
        console.print(line, markup=False, highlight=False)


def _table(result: Mapping[str, Any]) -> Table:
    table = Table(
        title=Text(f"{result['epochs']} epochs"), title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("optimizer")
    several = len(result["seeds"]) > 1
    columns = ["seed"] * several + ["steps", "seconds"]
    columns += [f"{data}\n{what}" for what in ("loss", "accuracy") for data in ("train", "test")]
    for name in columns:
        table.add_column(name, justify="right")
    for run in result["runs"]:
        table.add_row(
            Text(run["optimizer"]),
            *[str(run["seed"])] * several,
            f"{run['steps']:,}",
            f"{run['seconds']:.3g}",
            *(_shown(run[name], ".3g") for name in ("train_loss", "test_loss")),
            *(_shown(run[name], ".1%") for name in ("train_accuracy", "test_accuracy")),
        )
    return table


def _shown(value: float | None, spec: str) -> str:
    return MISSING if value is None else format(value, spec)
