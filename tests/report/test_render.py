"""The page as text: what it says, what it leaves out, what it refuses."""

from __future__ import annotations

import html
import re
import sys

import pytest

from neuromanifold.errors import UnsupportedError
from neuromanifold.report import render


def words(page: str) -> str:
    """What a person reads: no style, no scripts, no tags."""
    visible = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", visible)))


def headings(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


def test_a_page_answers_every_question(conv_net):
    page = render([conv_net], title="Digits")
    assert headings(page) == [
        "Which layers do the predictions depend on?",
        "How much does each parameter matter on its own?",
        "How many directions carry the information?",
        "How many directions are left once damping is added?",
        "Which approximation fits each layer?",
        "What is lost over the whole network?",
        "How much does the network make of each unit?",
        "What does a layer’s own metric see?",
        "How sure is each estimator, and which one should I use?",
        "Was the network trained to the end?",
    ]
    assert page.count('class="says"') == page.count('class="advice"') == len(headings(page))


def test_the_same_analysis_gives_the_same_page(conv_net):
    assert render([conv_net], title="Digits") == render([conv_net], title="Digits")


def test_the_drawing_library_is_there_once_for_all_charts(conv_net, nasty_mlp):
    one = render([conv_net], title="Digits")
    two = render([conv_net, nasty_mlp], title="Digits")
    assert len(one) > 800_000  # the library is most of a page
    assert len(two) < 1.2 * len(one)


def test_nothing_is_referenced_from_elsewhere(page):
    body = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r'(?:href|src)="([^#"][^"]*)"', body) == []
    assert "url(" not in body
    assert "@import" not in body


def test_models_stand_side_by_side(conv_net, nasty_mlp):
    assert "Side by side" not in words(render([conv_net], title="Digits"))
    assert "Side by side" in words(render([conv_net, nasty_mlp], title="Digits"))


def test_headline_numbers(conv_net):
    text = words(render([conv_net], title="Digits"))
    # Σ k^-1.5 over 480 eigenvalues, times 8.8; and 2 / 8.8
    assert "Trace 22.2 ± 1.1 nats per parameter²" in text
    assert "Largest eigenvalue 8.80 ± 0.50 nats per parameter²" in text
    assert "this one direction holds 39.7% of the trace" in text
    assert "Largest stable learning rate 0.227 ± 0.013 parameter² per nat" in text
    assert "Trainable parameters 3,818" in text
    assert "Samples 400" in text


def test_frozen_parameters_are_told_apart(conv_net):
    conv_net["model"]["num_parameters"] = 5_000_000
    text = words(render([conv_net], title="Digits"))
    assert "Of 5.00 M in all; the others are frozen and not measured." in text


# Each case changes the numbers, and the advice has to follow.


def test_advice_on_unequal_layers(conv_net):
    text = words(render([conv_net], title="Digits"))
    assert "head holds 87.2% of the trace with 67.3% of the parameters." in text
    assert "Per parameter, conv1 is 21 times as sensitive as conv2" in text


def test_advice_on_equal_layers(conv_net):
    for layer in conv_net["layers"]:
        layer["trace_per_parameter"] = 0.01
    text = words(render([conv_net], title="Digits"))
    assert "no layer is more than 1.0 times as sensitive as another" in text


def test_advice_on_a_silent_layer(conv_net):
    conv_net["layers"][1] |= {"trace": 0.0, "share": 0.0, "trace_per_parameter": 0.0}
    assert "conv2 has no Fisher information at all" in words(render([conv_net], title="Digits"))


def test_a_model_of_one_layer_has_a_name(conv_net):
    conv_net["layers"] = [conv_net["layers"][0] | {"name": "", "share": 1.0}]
    text = words(render([conv_net], title="Digits"))
    assert "(root) holds 100.0% of the trace with 100.0% of the parameters." in text
    assert "Kronecker is the closest in (root), with an error of 0.488." in text


def test_advice_on_parameters_without_information(conv_net):
    text = words(render([conv_net], title="Digits"))
    assert "381 of 3,818 entries (10.0%) are exactly zero, above all in head.weight" in text


def test_advice_when_every_parameter_counts(conv_net):
    for group in conv_net["diagonal"]:
        group["zeros"] = 0
        group["quantiles"]["0.05"] = group["quantiles"]["0.25"]
    text = words(render([conv_net], title="Digits"))
    median = conv_net["diagonal"][1]["quantiles"]["0.5"]
    assert f"below {median * 1e4:.2f}×10⁻⁴, the median of conv2.weight" in text
    assert "left edge" not in text


def test_advice_on_a_steep_spectrum(conv_net):
    text = words(render([conv_net], title="Digits"))
    # Partial sums of k^-1.5 reach half of the whole with 2 terms and nine tenths with 34.
    # The last of those is 34^1.5 times as small as the first.
    assert "2 directions hold half of the trace, and 34 hold 90% of it" in text
    assert "plain gradient descent needs about 198 times as many steps" in text


def test_advice_on_a_flat_spectrum(conv_net):
    spectrum = conv_net["spectrum"]
    spectrum |= {"eigenvalues": [1.0] * 480, "leading": [1.0] * 20, "total_dimension": 600}
    text = words(render([conv_net], title="Digits"))
    assert "240 directions hold half of the trace, and 432 hold 90% of it" in text
    assert "The information is spread out" in text


def test_no_advice_on_rank_where_the_samples_are_too_few(conv_net):
    conv_net |= {"num_rows": 60}
    text = words(render([conv_net], title="Digits"))
    assert "34 hold 90% of it" in text
    assert "That is 56.7% of the 60 gradients that were sent back" in text
    assert "low-rank" not in text


def test_a_long_spectrum_is_thinned_for_the_chart_only(conv_net):
    spectrum = conv_net["spectrum"]
    spectrum |= {"eigenvalues": [rank**-1.5 for rank in range(1, 30_001)], "count": 30_000}
    page = render([conv_net], title="Digits")
    assert "only some of them are drawn" in words(page)
    assert '"rank": 30000' in page
    assert page.count('"rank": ') < 1100


def test_advice_where_one_approximation_wins(conv_net):
    text = words(render([conv_net], title="Digits"))
    assert "its error goes from 0.298 in head to 0.650 in conv2" in text
    assert "do not trust it in conv2" in text


def test_advice_where_layers_differ(nasty_mlp):
    nasty_mlp["layers"] = [
        layer | {"name": name}
        for layer, name in zip(nasty_mlp["layers"], ("hidden", "out"), strict=True)
    ]
    text = words(render([nasty_mlp], title="Digits"))
    assert "Kronecker is the closest in 1 of 2 layers" in text
    assert "Use Kronecker() in general, but UnitWise() for out" in text


def test_advice_on_coupling_between_layers(conv_net):
    text = words(render([conv_net], title="Digits"))
    # (0.437 / 0.515)²
    assert "72.0% of the squared error of Kronecker is coupling between layers" in text


def test_advice_on_errors_inside_layers(conv_net):
    conv_net["whole_errors"]["BlockDiagonal"] = 0.1
    text = words(render([conv_net], title="Digits"))
    # 1 - (0.1 / 0.515)²
    assert "96.2% of the squared error of Kronecker arises inside the layers" in text


@pytest.mark.parametrize(
    ("loss", "test_accuracy", "advice"),
    [
        pytest.param([2.0, 1.5, 1.0, 0.5], 0.97, "still brought 33.3% of the fall", id="falling"),
        pytest.param([2.0, 0.1, 0.1, 0.1], 0.97, "does worse on test data", id="overfitted"),
        pytest.param([2.0, 0.1, 0.1, 0.1], 0.99, "those of a converged network", id="converged"),
        pytest.param([2.0, 2.1, 2.2, 2.3], 0.10, "The loss did not fall", id="diverging"),
    ],
)
def test_advice_on_training(conv_net, loss, test_accuracy, advice):
    conv_net["training"] |= {"loss": loss, "test_accuracy": test_accuracy}
    assert advice in words(render([conv_net], title="Digits"))


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        pytest.param({"layers": []}, {0, 4}, id="layers"),
        pytest.param({"diagonal": []}, {1}, id="diagonal"),
        pytest.param({"spectrum": None}, {2, 3}, id="spectrum"),
        pytest.param({"effective_dimension": []}, {3}, id="effective dimension"),
        pytest.param({"whole_errors": {"Kronecker": None}}, {5}, id="whole errors"),
        pytest.param({"own_metrics": None}, {6, 7}, id="own metrics"),
        pytest.param({"estimators": None}, {8}, id="estimators"),
        pytest.param({"training": None}, {9}, id="training"),
    ],
)
def test_what_was_not_measured_is_left_out(conv_net, missing, lost):
    everything = headings(render([conv_net], title="Digits"))
    found = headings(render([conv_net | missing], title="Digits"))
    assert found == [title for i, title in enumerate(everything) if i not in lost]


def test_a_model_without_any_information(conv_net):
    conv_net |= {"trace": 0.0, "largest_eigenvalue": 0.0, "max_learning_rate": None}
    conv_net["spectrum"] |= {"eigenvalues": [], "leading": [], "count": 0}
    text = words(render([conv_net], title="Digits"))
    assert "Largest stable learning rate –" in text
    assert "No eigenvalue above zero was measured." in text


def test_one_structure_that_did_not_fit(conv_net):
    for layer in conv_net["layers"]:
        layer["kronecker_error"] = None
    text = words(render([conv_net], title="Digits"))
    assert "UnitWise is the closest in every layer" in text


def test_notes_are_shown(conv_net):
    conv_net["notes"] = ["Dense was left out: 1 TiB."]
    assert "Read with care: Dense was left out: 1 TiB." in words(render([conv_net], title="Digits"))


# ---- many layers -----------------------------------------------------------------------------


def drawn(page: str) -> list[list[str]]:
    """Names in the data of each chart."""
    charts = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    found = [re.findall(r'"(?:layer|parameter)": "(.*?)"', chart) for chart in charts]
    return [list(dict.fromkeys(names)) for names in found]


def test_charts_of_many_layers_show_as_many_as_can_be_read(deep):
    page = render([deep], title="Deep")
    shares, diagonal, _, _, errors, *_ = drawn(page)
    names = [layer["name"] for layer in deep["layers"]]
    assert shares == names[10:50]
    assert errors == names[18:42]
    weights = [f"{name}.weight" for name in names]
    assert diagonal == weights[:10] + weights[20:40] + weights[50:]
    text = words(page)
    assert "Drawn are the 40 of 60 layers with the largest trace, 88.2% of it" in text
    assert "the 20 parameters with the largest medians and the 20 with the smallest, of 60" in text


def test_tables_of_many_layers_have_all(deep):
    text = words(render([deep], title="Deep"))
    for depth in (0, 30, 59):
        assert text.count(f"encoder.layer.{depth}.attention.output.dense ") >= 2
        assert f"encoder.layer.{depth}.attention.output.dense.weight " in text


def test_the_coverage_says_how_many_parameters_each_rule_reads(conv_net):
    conv_net["coverage"] += [
        {**conv_net["coverage"][0], "parameter": "scale", "block": "scale", "rule": "generic"}
    ]
    text = words(render([conv_net], title="Digits"))
    assert "How each of 4 parameters is read: 2 by conv2d, 1 by linear, 1 by generic" in text


def test_nothing_to_report():
    with pytest.raises(ValueError, match="pass at least one analysis"):
        render([], title="Digits")


@pytest.mark.parametrize("foreign", [{}, {"kind": "neuromanifold.analysis", "version": 2}])
def test_a_foreign_dict_is_refused(conv_net, foreign):
    with pytest.raises(ValueError, match=r"Number 2 .* expected 'neuromanifold.analysis' and 1"):
        render([conv_net, foreign], title="Digits")


@pytest.mark.parametrize("module", ["altair", "jinja2", "vl_convert"])
def test_without_the_extra(conv_net, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=rf"{module}.*pip install 'neuromanifold\[report\]'"):
        render([conv_net], title="Digits")


# ---- error bars ------------------------------------------------------------------------------


def test_tables_give_the_error_beside_each_number(conv_net):
    text = words(render([conv_net], title="Digits"))
    assert "87.2% ± 1.1%" in text  # share
    assert "0.298 ± 0.015 0.482 ± 0.0060 0.992 ± 4.0×10⁻⁴ Kronecker" in text
    assert "1 8.80 ± 0.53" in text  # eigenvalue
    assert "BlockDiagonal 0.437 ± 0.010" in text
    assert "21.0%" in text  # of single entries


def test_charts_draw_intervals(conv_net):
    page = render([conv_net], title="Digits")
    assert words(page).count("95% interval") == 6
    assert page.count('"style": "whisker"') == 5  # and the band of the effective dimension
    # 1.96 standard errors to each side
    assert '"error": 0.298' in page
    assert '"high": 0.3274' in page
    assert '"low": 0.2686' in page


def without_errors(value):
    """What one sample leaves of an analysis."""
    if isinstance(value, dict):
        return {
            key: without_errors(part) if key != "stderr" else silent(part)
            for key, part in value.items()
        }
    return [without_errors(part) for part in value] if isinstance(value, list) else value


def silent(value):
    if isinstance(value, dict):
        return {key: silent(part) for key, part in value.items()}
    return [None for _ in value] if isinstance(value, list) else None


def test_what_is_not_known_is_a_dash(conv_net):
    page = render([without_errors(conv_net)], title="Digits")
    assert "95% interval" not in words(page)
    assert "0.298 ± –" in words(page)
    assert "87.2% ± –" in words(page)
    assert '"low"' not in page


def test_estimators_are_compared_and_one_is_recommended(conv_net):
    text = words(render([conv_net], title="Digits"))
    assert "Exact() leaves the median entry 24.7% off, with 10 sweeps" in text
    assert "MonteCarlo(samples=1) leaves it 56.2% off, 2.3 times as much, with 1 sweep" in text
    assert "Use RandomSigns(probes=1): 5 sweeps of RandomSigns(probes=1) add less than" in text


def test_another_estimator_for_a_layer_is_named(conv_net):
    conv_net["estimators"]["advice"][3]["estimator"] = "Exact()"
    assert "For head, Exact() would do." in words(render([conv_net], title="Digits"))


def test_estimators_without_any_information(conv_net):
    for row in conv_net["estimators"]["rows"]:
        row["relative_error"] = None
    assert "How sure is each" not in words(render([conv_net], title="Digits"))


def test_estimators_that_are_off_in_a_layer_alone(conv_net):
    for row in conv_net["estimators"]["rows"]:
        if row["kind"] == "model":
            row["relative_error"] = 0.0
    assert "How sure is each" not in words(render([conv_net], title="Digits"))


def test_own_metrics_are_explained(conv_net):
    text = words(render([conv_net], title="Digits"))
    assert "8.0 times as sensitive to the response of the median unit of conv2 as to" in text
    assert "the least. Scale it by layer, or take nm.optim.kfac." in text
    assert "a cosine of 0.910 with its exact block, the lowest of 2 hidden layers." in text
    assert "leaves out has a standard deviation of 80.0% over inputs." in text
    assert "nm.optim.relative is worth a try beside nm.optim.kfac" in text


@pytest.mark.parametrize(
    ("cosine", "advice"),
    [
        pytest.param(0.97, "follows nearly the directions of nm.optim.unitwise", id="good"),
        pytest.param(0.5, "its own metric does not know", id="poor"),
    ],
)
def test_advice_on_own_metrics(conv_net, cosine, advice):
    for layer in conv_net["own_metrics"]["layers"][:2]:
        layer["cosine"] = {"lower": cosine, "median": cosine, "upper": cosine}
    assert advice in words(render([conv_net], title="Digits"))


def test_dead_units_and_wide_layers(conv_net):
    first, second, _ = conv_net["own_metrics"]["layers"]
    first["dead"], second["cosine"] = 4, None
    text = words(render([conv_net], title="Digits"))
    assert "4 of 10 units of conv1 respond to none of these inputs" in text
    assert "the lowest of" not in text
    first["cosine"] = None
    assert "own metric see" not in words(render([conv_net], title="Digits"))


def test_one_hidden_layer_is_not_compared_with_itself(conv_net):
    del conv_net["own_metrics"]["layers"][1]
    text = words(render([conv_net], title="Digits"))
    assert "If the median unit of conv1 responds by d more" in text
    assert "one learning rate serves them all" in text


def test_an_analysis_without_errors_is_shown(conv_net):
    for part in (conv_net, conv_net["spectrum"], *conv_net["layers"], *conv_net["diagonal"]):
        del part["stderr"]
    del conv_net["estimators"]
    assert "0.298 ± –" in words(render([conv_net], title="Digits"))
