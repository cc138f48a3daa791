"""What evaluate and compare print alike."""

from rich.console import Console
from rich.table import Table


def table_of(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "transcoder" else "right")
    return table


def number_of(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def plain(console: Console, text: str) -> None:
    """A line as it is: paths are neither wrapped nor coloured."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
