"""How the measured network was trained."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from neuromanifold.report import charts
from neuromanifold.report.numerals import counted, percent, quantity
from neuromanifold.report.sections._base import Analysis, Section, Table


def loss_by_epoch(analysis: Analysis) -> Section | None:
    """The loss during training, if the model was trained as a part of the measurement."""
    training = analysis.get("training")
    if not training or len(training["loss"]) < 2:
        return None
    losses = training["loss"]
    says = Markup(
        "In {} of {} the mean loss went from {} to {} nats per sample, and the network now gets {} "
        "of the training data and {} of the test data right."
    ).format(
        counted(len(losses), "epoch"),
        training["optimizer"],
        quantity(losses[0]),
        quantity(losses[-1]),
        percent(training["train_accuracy"]),
        percent(training["test_accuracy"]),
    )
    rows = [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate(losses, 1)]
    table = Table(
        "Loss by epoch",
        ("epoch", "mean loss (nats per sample)"),
        [[str(row["epoch"]), quantity(row["loss"])] for row in rows],
        num_names=0,
    )
    return Section(
        key="training",
        title="Was the network trained to the end?",
        says=says,
        advice=_advice(losses, training["train_accuracy"] - training["test_accuracy"]),
        reading="",
        chart=charts.loss_curve(rows, says.striptags()),
        table=table,
    )


def _advice(losses: Sequence[float], gap: float) -> Markup:
    quarter = max(1, len(losses) // 4)
    fall, late = losses[0] - losses[-1], losses[-1 - quarter] - losses[-1]
    if fall <= 0:
        return Markup("The loss did not fall: mend the training before you read the numbers above.")
    if late > 0.02 * fall:
        return Markup(
            "The last {} still brought {} of the fall: the numbers above belong to this moment, so "
            "measure again if you train on."
        ).format(counted(quarter, "epoch"), percent(late / fall))
    if gap > 0.02:
        return Markup(
            "The loss has levelled off, but the network does worse on test data: measure on those "
            "too before you judge which parameters matter."
        )
    return Markup("The loss has levelled off: the numbers above are those of a converged network.")
