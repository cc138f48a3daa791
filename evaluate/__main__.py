"""python -m evaluate [compare]: measure a run on the held-out rows of its store, or several side by side."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evaluate.run import CROSS_ENTROPY_TOKENS, evaluate
from evaluate.verdicts import verdicts
from pipeline import Settings, load, parser, run_stage

COLOURS = {"good": "green", "moderate": "yellow", "poor": "red", "unknown": "dim", "info": "cyan"}


def main() -> None:
    made = parser("evaluate", __doc__ or "")
    made.add_argument("command", nargs="?", choices=("report", "compare"), default="report")
    made.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        metavar="DIR",
        help="compare: other runs' directories, or Gemma Scope's (params.npz)",
    )
    made.add_argument(
        "--cross-entropy-tokens",
        type=int,
        default=CROSS_ENTROPY_TOKENS,
        metavar="N",
        help="tokens on which the language model runs with its MLP replaced; 0: not at all [%(default)s]",
    )
    settings, given = load(made)
    console = Console()
    if given.command == "compare":
        from evaluate.compare import compare

        show_comparison(*compare(settings, given.others), console)
        return
    metrics, fresh = evaluate(settings, max(0, given.cross_entropy_tokens))
    show(settings, metrics, fresh, console)


def show(settings: Settings, metrics: dict[str, Any], fresh: bool, console: Console) -> None:
    """The short table, the verdicts and the paths."""
    table = _table(
        f"{metrics['rows']:,} {metrics['provenance']['split']} rows",
        ("prefix", "latents", "FVU", "L0", "threshold", "dead %"),
    )
    for g, prefix in enumerate(metrics["prefixes"]):
        table.add_row(
            str(g),
            f"{prefix['end']:,}",
            _number(prefix["fvu"]),
            f"{prefix['l0']:.1f}",
            f"{prefix['threshold']:.3g}",
            f"{100 * prefix['dead_fraction']:.1f}",
        )
    console.print(table)
    for verdict in verdicts(metrics):
        colour = COLOURS[verdict.level]
        line = f"[{colour}]{verdict.level:>8}[/] {verdict.name} {verdict.value} ({verdict.limit})"
        console.print(line, highlight=False, soft_wrap=True)
    if metrics["cross_entropy"]["skipped"] is not None:
        _plain(console, f"cross-entropy was not measured: {metrics['cross_entropy']['skipped']}")
    if not metrics["provenance"]["trained_on_this_store"]:
        _plain(console, "note: this run was trained on another harvest than it was evaluated on")
    if not fresh:
        _plain(console, "nothing has changed since the last evaluation: nothing was measured again")
    run_dir = settings.run_dir()
    _plain(console, f"store  {settings.store_path(settings.layer)}")
    _plain(console, f"run    {run_dir}")
    _plain(console, f"report {run_dir / 'evaluation' / 'report.html'}")


def show_comparison(values: dict[str, Any], folder: Path, console: Console) -> None:
    """One line per transcoder and prefix, differences to the run's full dictionary in brackets."""
    columns = ("transcoder", "prefix", "latents", "FVU", "L0", "dead %")
    table = _table(f"the same {values['rows']:,} {values['provenance']['split']} rows", columns)
    for line in values["lines"]:
        change = line["difference"]["fvu"]
        table.add_row(
            line["transcoder"],
            str(line["prefix"]),
            f"{line['end']:,}",
            _number(line["fvu"]) + (f" ({change:+.3f})" if change else ""),
            f"{line['l0']:.1f}",
            f"{100 * line['dead_fraction']:.1f}",
        )
    console.print(table)
    _plain(console, f"best linear map: FVU {_number(values['linear_map_fvu'])}")
    _plain(console, f"report {folder / 'compare.html'}")


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "transcoder" else "right")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plain(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    run_stage(main)
