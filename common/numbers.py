"""Numbers for people."""


def number_or_dash(value: float | None, spec: str = ".3f", dash: str = "-") -> str:
    """`value` as the format `spec` writes it, or `dash` for none."""
    return dash if value is None else format(value, spec)


def percent_or_dash(share: float | None) -> str:
    """A share as a percentage, or a dash for none."""
    return "-" if share is None else f"{100 * share:.1f} %"
