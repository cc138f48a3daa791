"""Numbers for people."""

import math
from collections.abc import Sequence
from typing import NamedTuple

MARK = "†"
"""Behind an FVU that leaves out heavy rows (`transcoder.heavy`)."""
HEAVY = f"{MARK} FVU without heavy rows (docs/training.md#heavy-rows); the report has both"
"""The line below a table with such numbers."""


def marked_fvu(fvu: float | None, typical: float | None, spec: str = ".3f", dash: str = "-") -> str:
    """An FVU as tables of several layers or runs have it: `typical`, that without heavy rows, if it has any, marked.

    >>> marked_fvu(0.969, 0.442), marked_fvu(0.431, None), marked_fvu(None, None)
    ('0.442†', '0.431', '-')
    """
    return number_or_dash(fvu if typical is None else typical, spec, dash) + MARK * (typical is not None)


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
    return Uncertain(value, error).text()


class Uncertain(NamedTuple):
    """A signed number and its standard error, none where that is not known."""

    value: float
    error: float | None

    @property
    def decimals(self) -> int:
        """Three, more where the error is smaller than that."""
        return min(6, max(3, math.ceil(-math.log10(self.error)))) if self.error else 3

    def text(self, decimals: int | None = None) -> str:
        """Value and error with as many decimals."""
        n = self.decimals if decimals is None else decimals
        return f"{self.value:+.{n}f}" + ("" if self.error is None else f" ± {self.error:.{n}f}")


def aligned(cells: Sequence[str | Uncertain]) -> list[str]:
    """The cells of a column as text: numbers with errors have as many decimals as the one that needs most.

    >>> aligned([Uncertain(0.0363, 0.0006), Uncertain(0.07412, 0.007), "-"])
    ['+0.0363 ± 0.0006', '+0.0741 ± 0.0070', '-']
    """
    most = max((cell.decimals for cell in cells if isinstance(cell, Uncertain)), default=3)
    return [cell.text(most) if isinstance(cell, Uncertain) else cell for cell in cells]
