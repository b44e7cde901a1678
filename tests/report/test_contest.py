"""The page that compares optimizers, and its verdict."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest

from neuromanifold.report import render_contest, verdict

NASTY = "<b>Net</b>"


def run(optimizer: str, seed: int, final: float | None, *, seconds: float = 2.0) -> dict[str, Any]:
    """A run of 40 steps in 4 epochs whose loss falls from 2 by equal factors."""
    factor = 1.0 if final is None else (final / 2) ** (1 / 40)
    loss = [None if final is None and step else 2 * factor**step for step in range(41)]
    natural = optimizer == "kfac"
    return {
        "optimizer": optimizer,
        "lr": 0.1,
        "seed": seed,
        "epochs": 4,
        "steps": 40,
        "seconds": seconds,
        "train_loss": final,
        "train_accuracy": None if final is None else 1 - final / 2,
        "test_loss": final,
        "test_accuracy": None if final is None else 1 - final / 2,
        "curve": [
            {"step": step, "seconds": seconds * step / 40, "loss": loss[step]}
            for step in range(1, 41)
        ],
        "history": [
            {"epoch": step // 10, "step": step, "seconds": seconds * step / 40, "loss": loss[step]}
            for step in range(0, 41, 10)
        ],
        "scalars": [
            {
                "step": step,
                "seconds": seconds * step / 40,
                "kl": 0.1 * 0.8**step,
                "damping": 0.1 * 0.9**step,
                "curvature_seconds": 0.4 * seconds * step / 40,
                "skipped": 0.0,
                "failed": 0.0,
            }
            for step in range(1, 41)
            if natural
        ],
        "non_finite": {"count": 0, "first_step": None},
        "diverged": final is None,
    }


def contest(*runs: dict[str, Any], notes: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "kind": "neuromanifold.contest",
        "version": 1,
        "model": {"class": NASTY, "num_trainable": 1234},
        "likelihood": "Categorical()",
        "dtype": "float32",
        "device": "cpu",
        "samples_per_epoch": 100,
        "steps_per_epoch": 10,
        "has_test": True,
        "epochs": 4,
        "seeds": sorted({run["seed"] for run in runs}),
        "damping": None,
        "runs": list(runs),
        "notes": list(notes),
    }


THREE = contest(
    *(run("kfac", seed, final, seconds=3.0) for seed, final in enumerate((0.10, 0.11, 0.12))),
    *(run("adamw", seed, final) for seed, final in enumerate((0.50, 0.55, 0.57))),
    notes=("adamw, seed 0: said <i>.",),
)


def test_the_winner_over_seeds():
    said = verdict(THREE)
    # Differences 0.40, 0.44, 0.45: mean 0.43, standard error 0.0153, times t = 4.303.
    assert "kfac won over adamw with a test loss of 0.110 ± 0.0058 against 0.540 ± 0.021" in said
    assert "lower by 0.430 ± 0.066 over 3 seeds (95% interval)" in said
    # At step 20 of 40 kfac is at 2 √(0.055), under 0.5; its steps take half as long again.
    assert "after 50.0% of the steps and 75.0% of the seconds" in said


def test_a_difference_that_could_be_chance():
    pairs = zip((0.10, 0.30, 0.20), (0.12, 0.15, 0.36), strict=True)
    runs = [
        made
        for seed, (a, b) in enumerate(pairs)
        for made in (run("kfac", seed, a), run("adamw", seed, b))
    ]
    assert "kfac and adamw cannot be told apart" in verdict(contest(*runs))
    page = render_contest(contest(*runs), title="T")
    assert "kfac was not where adamw ended, for one seed at least." in page
    assert "the clock decides nothing here" in page


def test_one_seed_promises_nothing():
    said = verdict(contest(run("adamw", 0, 0.5), run("kfac", 0, 0.1)))
    assert said.startswith("kfac is ahead of adamw")
    assert "--seeds 3 would tell" in said


def test_one_optimizer_and_those_that_diverged():
    assert "kfac ended at a test loss of 0.100" in verdict(contest(run("kfac", 0, 0.1)))
    said = verdict(contest(run("adamw", 0, None), run("kfac", 0, 0.1)))
    assert "kfac won" in said
    assert "no other optimizer ended at a finite loss" in said
    assert "No optimizer ended" in verdict(contest(run("adamw", 0, None)))


def articles(page: str) -> list[str]:
    return re.findall(r'<article id="contest-([\w-]+)"', page)


def test_the_page_holds_the_sections_that_there_are_numbers_for():
    assert articles(render_contest(THREE, title="T")) == [
        "by-step",
        "by-second",
        "kl",
        "damping",
        "time",
    ]
    plain = contest(run("adamw", 0, 0.5), run("sgd", 0, 0.6))
    assert articles(render_contest(plain, title="T")) == ["by-step", "by-second"]
    for lost in (contest(run("sgd", 0, None)), contest(run("kfac", 0, 0.1))):
        assert "by-step" in articles(render_contest(lost, title="T"))


def test_the_sentences_stand_beside_their_numbers():
    text = html.unescape(re.sub(r"<[^>]+>", "", render_contest(THREE, title="Digits")))
    for expected in (
        "kfac won over adamw",
        "A step of kfac takes 75.0 ms, 1.5 times as long as one of adamw.",
        "Measuring and inverting curvature took 40.0% of the seconds of kfac.",
        "The damping of kfac went from 0.0900 to 0.00148 nats per parameter².",
        "The steps shortened by themselves",
        "1,234 parameters",
        "adamw, seed 0: said <i>.",
    ):
        assert expected in text, expected


def test_the_bands_are_intervals_over_seeds():
    page = render_contest(THREE, title="T")
    specs = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    band = json.loads(specs[0])["layer"][0]
    ends = [row for row in band["data"]["values"] if row["step"] == 40]
    kfac = next(row for row in ends if row["optimizer"] == "kfac")
    assert kfac["loss"] == pytest.approx(0.11)
    assert kfac["high"] == pytest.approx(0.11 + 4.303 * 0.01 / 3**0.5)
    assert {row["data"] for row in ends} == {"test data"}


def test_something_else_is_refused():
    with pytest.raises(ValueError, match=r"kind 'neuromanifold\.analysis'"):
        render_contest({"kind": "neuromanifold.analysis", "version": 1}, title="T")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_draws_every_chart(visit, dark):
    seen = visit(render_contest(THREE, title=f"Training {NASTY}"), dark=dark)
    assert 'data-ready="1"' in seen.attributes
    assert seen.console == []
    assert seen.requests == []
    charts = re.findall(r"<svg\b.*?</svg>", seen.dom, flags=re.DOTALL)
    assert len(charts) == 5
    assert all("NaN" not in chart for chart in charts)
    assert "<b>" not in seen.dom
    assert ">kfac<" in charts[0]
