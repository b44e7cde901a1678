"""Numbers as people read them: three significant digits, powers of ten, percentages."""

from __future__ import annotations

from collections.abc import Callable

__all__ = [
    "MISSING",
    "count",
    "counted",
    "measured",
    "percent",
    "power_of_ten",
    "quantity",
    "ratio",
]

MISSING = "–"
"""Stands for what was not measured."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def quantity(value: float | None, digits: int = 3) -> str:
    """Significant digits; very large and very small numbers as a multiple of a power of ten.

    Example:
        >>> quantity(12.345), quantity(0.0471), quantity(1234.5), quantity(-2.0)
        ('12.3', '0.0471', '1,230', '−2.00')
        >>> quantity(0.000012345), quantity(9.999e6), quantity(0.0), quantity(None)
        ('1.23×10⁻⁵', '1.00×10⁷', '0', '–')
        >>> quantity(0.0264, digits=2), quantity(12.34, digits=2)
        ('0.026', '12')
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    # Rounded first, so that 9.999 counts as 10.0 and not as 10.00.
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    order = int(exponent)
    if -3 <= order <= 3:
        decimals = digits - 1 - order
        text = f"{round(value, decimals):,.{max(0, decimals)}f}"
    else:
        text = f"{mantissa}×{power_of_ten(order)}"
    return text.replace("-", "−")


def measured(
    value: float | None, stderr: float | None, show: Callable[[float | None], str] | None = None
) -> str:
    """A number with its standard error, which has two digits.

    Args:
        value: None if it was not measured.
        stderr: None if it is not known.
        show: how both are written, such as `percent`.

    Example:
        >>> measured(22.18, 0.5971), measured(22.18, None), measured(None, None)
        ('22.2 ± 0.60', '22.2 ± –', '–')
        >>> measured(0.872, 0.011, percent)
        '87.2% ± 1.1%'
    """
    if value is None:
        return MISSING
    if show is not None:
        return f"{show(value)} ± {show(stderr)}"
    return f"{quantity(value)} ± {quantity(stderr, digits=2)}"


def power_of_ten(exponent: int) -> str:
    """A power of ten.

    Example:
        >>> power_of_ten(-12), power_of_ten(0)
        ('10⁻¹²', '1')
    """
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def count(number: int | None) -> str:
    """A whole number; from a million on with three digits and a prefix.

    Example:
        >>> count(3354), count(124_439_808), count(None)
        ('3,354', '124 M', '–')
    """
    if number is None:
        return MISSING
    for size, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{quantity(number / size)} {prefix}"
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "direction"), counted(2400, "direction")
        ('1 direction', '2,400 directions')
    """
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def percent(share: float | None) -> str:
    """A share of the whole.

    Example:
        >>> percent(0.0804), percent(0.00423), percent(1e-5), percent(0.0), percent(None)
        ('8.0%', '0.42%', '<0.01%', '0%', '–')
    """
    if share is None:
        return MISSING
    if share == 0:
        return "0%"
    if share < 1e-4:
        return "<0.01%"
    return f"{share:.2%}" if share < 0.01 else f"{share:.1%}"


def ratio(value: float) -> str:
    """How many times as much.

    Example:
        >>> ratio(4.71), ratio(38.2), ratio(25_000.0)
        ('4.7', '38', '2.50×10⁴')
    """
    if value < 10:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 1000 else quantity(value)
