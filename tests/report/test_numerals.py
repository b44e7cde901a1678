"""Numbers are rounded, never changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuromanifold.report.numerals import count, percent, quantity, ratio

DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-", ",")


def read(text: str) -> float:
    """The number that a person would read."""
    mantissa, _, power = text.partition("×10")
    return float(mantissa.translate(DIGITS)) * 10.0 ** int(power.translate(DIGITS) or 0)


@given(st.floats(min_value=1e-30, max_value=1e30), st.sampled_from([1, -1]))
def test_a_quantity_keeps_three_digits(size, sign):
    # Half a unit of the third digit is at most 0.5 % of the number.
    assert read(quantity(sign * size)) == pytest.approx(sign * size, rel=0.00501)


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_a_quantity_is_short(value):
    assert sum(character.isdigit() for character in quantity(value).partition("×")[0]) <= 6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(0.0009994, "9.99×10⁻⁴", id="below the plain range"),
        pytest.param(0.0009996, "0.00100", id="rounds up into the plain range"),
        pytest.param(9.999, "10.0", id="rounds up to the next power of ten"),
        pytest.param(9994.0, "9,990", id="thousands"),
        pytest.param(9996.0, "1.00×10⁴", id="rounds up out of the plain range"),
        pytest.param(float("5e-324"), "4.94×10⁻³²⁴", id="smallest float"),
    ],
)
def test_a_quantity_at_the_edges(value, text):
    assert quantity(value) == text


def test_a_count_is_exact_below_a_million():
    assert count(999_999) == "999,999"
    assert count(1_000_000) == "1.00 M"


def test_a_small_share_does_not_look_like_none():
    assert percent(1e-9) != percent(0.0)


def test_a_ratio_has_no_false_precision():
    assert ratio(137.4) == "137"
