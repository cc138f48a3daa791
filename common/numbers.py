"""Numbers for people."""

import math


def number_or_dash(value: float | None, spec: str = ".3f", dash: str = "-") -> str:
    """`value` as the format `spec` writes it, or `dash` for none."""
    return dash if value is None else format(value, spec)


def percent_or_dash(share: float | None) -> str:
    """A share as a percentage, or a dash for none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def with_error(value: float, error: float | None) -> str:
    """A signed number and its standard error, if it has one: three decimals, more where the error is smaller than that.

    >>> with_error(0.1234, 0.0042), with_error(-0.00012, 0.00003), with_error(0.5, None)
    ('+0.123 ± 0.004', '-0.00012 ± 0.00003', '+0.500')
    """
    if error is None:
        return f"{value:+.3f}"
    decimals = 3 if error == 0 else min(6, max(3, math.ceil(-math.log10(error))))
    return f"{value:+.{decimals}f} ± {error:.{decimals}f}"
