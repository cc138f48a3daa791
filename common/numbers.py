"""Numbers for people."""


def number_or_dash(value: float | None, spec: str = ".3f", dash: str = "-") -> str:
    """`value` as the format `spec` writes it, or `dash` for none."""
    return dash if value is None else format(value, spec)
