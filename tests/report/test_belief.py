"""Studies of Helmholtz machines, and the page about them."""

from __future__ import annotations

import html
import json
import re

import pytest
import torch

from neuromanifold import belief
from neuromanifold.errors import TooLargeError
from neuromanifold.report import render_belief, study_belief
from neuromanifold.report.belief import caught_up

NASTY = "<b>lines</b>"


def training(seed, sizes=(1, 4, 9), **options):
    generator = torch.Generator().manual_seed(seed)
    machine = belief.HelmholtzMachine(sizes, generator=generator)
    options = {"lr": 0.5, "damping": 0.1, "period": 5} | options
    return belief.ReweightedWakeSleep(machine, generator=generator, **options)


@pytest.fixture(scope="module")
def trained():
    trainings = {"natural": training(0), "<i>plain</i>": training(0, natural=False, lr=0.1)}
    study = study_belief(
        trainings, belief.lines(), name=NASTY, steps=30, evaluations=3, geometries=True
    )
    return trainings, study


@pytest.fixture(scope="module")
def study(trained):
    return trained[1]


@pytest.fixture(scope="module")
def held_out():
    digits = belief.binarised_digits(generator=torch.Generator().manual_seed(0))
    return study_belief(
        {"natural": training(0, sizes=(4, 8, 64)), "diagonal": training(0, (4, 8, 64), lr=0.01)},
        digits.train[:200],
        digits.test[:50],
        name="Digits",
        steps=10,
        evaluations=2,
        samples=20,
    )


def test_log_likelihoods_agree_with_enumeration(trained):
    trainings, study = trained
    data = belief.lines()
    for run, kept in zip(study["runs"], trainings.values(), strict=True):
        assert kept.steps == 30
        with torch.no_grad():
            exact = kept.machine.generative.exact_log_likelihood(data.states)
        end = run["curve"][-1]
        assert abs(end["value"] - float(data.probabilities @ exact)) < 5 * end["stderr"]
        assert 0 < end["stderr"] < 0.1
    assert study["best"] == pytest.approx(-float(data.entropy))


def test_the_lead_is_that_of_the_same_rows(study, held_out):
    for found in (study, held_out):
        ends = {run["name"]: run["curve"][-1] for run in found["runs"]}
        first, second = (ends[found["difference"][which]] for which in ("first", "second"))
        assert found["difference"]["value"] == pytest.approx(
            first["value"] - second["value"], abs=1e-4
        )
    # Images are harder or easier for both machines alike.
    assert held_out["difference"]["stderr"] < first["stderr"] + second["stderr"]


def test_geometries_are_those_of_the_first_training(trained):
    trainings, study = trained
    net = trainings["natural"].machine.generative.double()
    found = belief.compare_gradients(net, belief.lines(dtype=torch.float64))
    net.float()
    end = study["geometry"][-1]
    assert end["step"] == 30
    assert end["full_rate"] == pytest.approx(float(found.full_rate))
    assert end["cosine"] == pytest.approx(float(found.cosine))
    assert [point["step"] for point in study["geometry"]] == [0, 10, 20, 30]


def test_trainings_see_the_same_batches():
    alike = {name: training(0) for name in ("one", "other")}
    runs = study_belief(alike, belief.lines(), name="", steps=4, evaluations=1)["runs"]
    assert runs[0]["curve"][-1]["value"] == runs[1]["curve"][-1]["value"]
    assert runs[0]["dreams"] == runs[1]["dreams"]


def test_likeness_of_images_to_training_images(held_out):
    digits = belief.binarised_digits(generator=torch.Generator().manual_seed(0))
    apart = torch.cdist(digits.test[:50], digits.train[:200], p=1).min(-1).values
    assert held_out["test"]["nearest"] == pytest.approx(float(apart.mean()))
    assert held_out["test"]["on"] == pytest.approx(float(digits.test[:50].mean()))
    assert held_out["test"]["known"] == pytest.approx(float((apart == 0).float().mean()))
    assert held_out["images"] == digits.test[:12].tolist()


def test_it_is_plain_data(study, held_out):
    for found in (study, held_out):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_catching_up_is_counted_at_evaluations(study):
    def run(name, values):
        curve = [{"step": 10 * i, "seconds": 2.0 * i, "value": v} for i, v in enumerate(values)]
        return {"name": name, "curve": curve}

    found = {
        "runs": [run("a", [-9.0, -5.0, -3.0]), run("b", [-9.0, -7.0, -6.0])],
        "difference": {"first": "a", "second": "b"},
    }
    assert caught_up(found, "step") == 0.5
    assert caught_up(found, "seconds") == 0.5
    assert caught_up(found | {"difference": None}, "step") is None


def test_the_page_says_what_the_numbers_say(study, held_out):
    page = render_belief([study, held_out], title="Dreams")
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.partition("<script>")[0]))
    assert NASTY in text
    assert "<i>plain</i>" in text
    assert NASTY not in page
    assert "<i>plain</i>" not in page
    assert page.count("What does the local geometry cost?") == 2  # its heading and its chart
    assert "which no model exceeds" in page


def test_a_machine_can_be_trained_alone():
    alone = {"natural": training(0)}
    found = study_belief(alone, belief.lines(), name="", steps=2, evaluations=1)
    assert found["difference"] is None
    assert "It was trained alone." in render_belief([found], title="Alone")


def test_every_chart_is_drawn_on_light_and_dark_screens(visit, study, held_out):
    page = render_belief([study, held_out], title="Dreams")
    colours = []
    for dark in (False, True):
        seen = visit(page, dark=dark)
        assert 'data-ready="1"' in seen.attributes
        drawn = re.findall(r"<svg\b.*?</svg>", seen.dom, flags=re.DOTALL)
        assert len(drawn) == 5 + 4
        assert "NaN" not in "".join(drawn)
        assert seen.console == seen.requests == []
        colours.append(set(re.findall(r'fill="(#\w+|rgb[^"]+)"', "".join(drawn))))
    assert colours[0].isdisjoint(colours[1])


def test_other_dicts_are_refused(study):
    with pytest.raises(ValueError, match=r"expected 'neuromanifold\.belief'"):
        render_belief([study, {"kind": "neuromanifold.analysis", "version": 1}], title="")
    with pytest.raises(ValueError, match="nothing to show"):
        render_belief([], title="")


def test_what_cannot_be_studied_is_refused():
    data, shared = belief.lines(), training(0)
    own = {"own": training(0)}

    def refuse(message, trainings, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            study_belief(trainings, *args, name="", **({"steps": 20} | options))

    refuse("nothing to train", {}, data)
    refuse("machine of its own", {"one": shared, "other": shared}, data)
    refuse("none with patterns", own, data, data.states)
    refuse("Give test images", own, data.states)
    refuse("no image of 2 × 4 pixels", own, data, shape=(2, 4))
    refuse("at most steps", own, data, steps=3)
    gaussian = belief.HelmholtzMachine([2, 4], leaves="gaussian")
    refuse("Bernoulli leaves", {"g": belief.WakeSleep(gaussian, lr=0.1)}, data)
    refuse("same visible units", own | {"b": training(0, (2, 4))}, data)
    large = {"large": training(0, (2, 64))}
    images = torch.zeros(4, 64)
    refuse("states", large, images, images, error=TooLargeError, geometries=True)
