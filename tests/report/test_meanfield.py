"""Studies of random networks, and the page about them."""

from __future__ import annotations

import html
import json
import re

import pytest
import torch
from torch import nn

import neuromanifold as nm
from neuromanifold.meanfield import variances
from neuromanifold.report import render_meanfield, study_model, study_random

WIDTHS = [30, 30, 30, 1]
NASTY = "<b>Net</b>"


@pytest.fixture(scope="module")
def study():
    return study_random("erf", variances("pytorch", WIDTHS), samples=4, seeds=range(20))


@pytest.fixture(scope="module")
def page(study):
    return render_meanfield(study, title=NASTY)


def test_predictions_are_those_of_the_given_variances():
    study = study_random("erf", variances("pytorch", WIDTHS), samples=1, seeds=[0])
    for layer, fan_in in zip(study["layers"], WIDTHS, strict=False):
        assert layer["weight_variance"] == pytest.approx(1 / 3)
        assert layer["bias_variance"] == pytest.approx(1 / (3 * fan_in))
    net = nm.meanfield.propagate(
        "erf",
        weight_variance=1 / 3,
        bias_variance=1 / 90,
        widths=WIDTHS,
        activity=study["layers"][0]["activity"]["predicted"],
    )
    for signal, expected in (("activity", net.activity[:-1]), ("error", net.error)):
        predicted = [layer[signal]["predicted"] for layer in study["layers"]]
        assert predicted == pytest.approx(expected.tolist(), rel=1e-9)
    theory = nm.meanfield.spectrum_statistics(net, samples=1)
    assert study["spectrum"]["largest"]["predicted"] == pytest.approx(theory.largest, rel=1e-9)


def test_means_over_networks_agree_with_theory(study):
    """Erf at width 30: theory of infinite width is a few percent off, besides chance."""
    for layer in study["layers"]:
        for signal in ("activity", "error"):
            found = layer[signal]
            allowed = 5 * found["stderr"] + 0.1 * found["predicted"]
            assert abs(found["measured"] - found["predicted"]) < allowed
    found = study["spectrum"]["mean"]
    assert (
        abs(found["measured"] - found["predicted"]) < 5 * found["stderr"] + 0.1 * found["measured"]
    )
    assert len(found["networks"]) == 20


def test_inputs_are_not_the_weights():
    """Drawn from one seed they would be the same numbers, and signals far too large."""
    wide = variances("lecun", [400, 400, 1])
    found = study_random("linear", wide, samples=16, seeds=[0])["layers"][1]["activity"]
    # A sum of 16 × 400 squares of which 400 are independent of one another.
    assert found["measured"] == pytest.approx(found["predicted"], rel=5 * (2 / 400) ** 0.5)


def test_it_is_plain_data(study):
    assert json.loads(json.dumps(study, allow_nan=False)) == study


def test_ordered_networks_get_a_recommendation_on_the_edge(study):
    assert study["phase"] == "ordered"
    wanted = study["recommended"]
    assert wanted["changed"]
    at = nm.meanfield.fixed_point("erf", wanted["weight_variance"], wanted["bias_variance"])
    assert float(at.gain) == pytest.approx(1, abs=1e-6)
    assert wanted["learning_rate_bound"] > 0


def test_networks_on_the_edge_are_left_alone():
    kept = study_random("relu", variances("kaiming", [20, 20, 1]), samples=2, seeds=[3])
    assert kept["phase"] == "edge of chaos"
    assert kept["recommended"] == {
        "weight_variance": pytest.approx(2.0),
        "bias_variance": 0.0,
        "learning_rate_bound": kept["spectrum"]["learning_rate_bound"]["predicted"],
        "changed": False,
    }
    assert "Keep this initialisation" in render_meanfield(kept, title="Kept")


def test_the_diagram_has_the_edge_between_order_and_chaos(study):
    diagram = study["diagram"]
    for row, bias in zip(diagram["gain"], diagram["bias_variance"], strict=True):
        edge = float(nm.meanfield.edge_of_chaos("erf", bias))
        for gain, weight in zip(row, diagram["weight_variance"], strict=True):
            assert (gain > 1) == (weight > edge)


@pytest.mark.parametrize("hidden", [0, 2])
def test_a_model_is_studied_as_it_is(hidden):
    torch.manual_seed(0)
    parts = [part for _ in range(hidden) for part in (nn.Linear(8, 8), nn.LeakyReLU(0.3))]
    model = nn.Sequential(*parts, nn.Linear(8, 3))
    data = torch.randn(6, 8), torch.zeros(6, dtype=torch.long)
    found = study_model(model, nm.Categorical(), data, samples=5)
    exact = nm.fisher(
        model, nm.Categorical(), (data[0][:5], data[1][:5]), nm.Gram(), estimator=nm.Exact()
    )
    largest = found["spectrum"]["largest"]
    assert largest["measured"] == pytest.approx(float(exact.eigenvalues(1)[0]), rel=1e-4)
    assert largest["stderr"] is None
    assert found["seeds"] is None
    assert found["samples"] == 5
    assert (found["diagram"] is None) == (hidden == 0)
    text = render_meanfield(found, title="Own")
    assert ("Order or chaos?" in text) == (hidden > 0)


def test_the_page_says_what_the_numbers_say(study, page):
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.partition("<script>")[0]))
    assert "Order or chaos?" in page
    assert study["verdict"][1:] in html.unescape(page)
    assert f"{study['recommended']['weight_variance']:.4g} / fan_in" in html.unescape(page)
    assert NASTY in text
    assert NASTY not in page


def test_every_chart_is_drawn_on_light_and_dark_screens(visit, page):
    for dark in (False, True):
        seen = visit(page, dark=dark)
        assert 'data-ready="1"' in seen.attributes
        assert len(re.findall(r"<svg\b", seen.dom)) == 4
        assert "NaN" not in "".join(re.findall(r"<svg\b.*?</svg>", seen.dom, flags=re.DOTALL))
        assert seen.console == seen.requests == []


def test_other_dicts_are_refused():
    with pytest.raises(ValueError, match=r"expected 'neuromanifold\.meanfield'"):
        render_meanfield({"kind": "neuromanifold.analysis", "version": 1}, title="")


@pytest.mark.parametrize(("samples", "seeds"), [(0, [0]), (1, [])])
def test_nothing_to_measure_is_refused(samples, seeds):
    with pytest.raises(ValueError, match="At least one sample and one network"):
        study_random("relu", variances("kaiming", [2, 1]), samples=samples, seeds=seeds)
