"""python -m evaluate: measure a run on the held-out rows of its store."""

from typing import Any

from rich.console import Console
from rich.table import Table

from evaluate.run import CROSS_ENTROPY_TOKENS, evaluate
from evaluate.verdicts import verdicts
from pipeline import Settings, load, parser, run_stage

COLOURS = {"good": "green", "moderate": "yellow", "poor": "red", "unknown": "dim", "info": "cyan"}


def main() -> None:
    made = parser("evaluate", __doc__ or "")
    made.add_argument(
        "--cross-entropy-tokens",
        type=int,
        default=CROSS_ENTROPY_TOKENS,
        metavar="N",
        help="tokens on which the language model runs with its MLP replaced; 0: not at all [%(default)s]",
    )
    settings, given = load(made)
    metrics, fresh = evaluate(settings, max(0, given.cross_entropy_tokens))
    show(settings, metrics, fresh, Console())


def show(settings: Settings, metrics: dict[str, Any], fresh: bool, console: Console) -> None:
    """The short table, the verdicts and the paths."""
    table = Table(title=f"{metrics['rows']:,} {metrics['provenance']['split']} rows", title_justify="left")
    for column in ("prefix", "latents", "FVU", "L0", "threshold", "dead %"):
        table.add_column(column, justify="right")
    for g, prefix in enumerate(metrics["prefixes"]):
        fvu = "-" if prefix["fvu"] is None else f"{prefix['fvu']:.3f}"
        table.add_row(
            str(g),
            f"{prefix['end']:,}",
            fvu,
            f"{prefix['l0']:.1f}",
            f"{prefix['threshold']:.3g}",
            f"{100 * prefix['dead_fraction']:.1f}",
        )
    console.print(table)
    for verdict in verdicts(metrics):
        colour = COLOURS[verdict.level]
        console.print(
            f"[{colour}]{verdict.level:>8}[/] {verdict.name} {verdict.value} ({verdict.limit})",
            highlight=False,
        )
    if not fresh:
        console.print("nothing has changed since the last evaluation: nothing was measured again")
    run_dir = settings.run_dir()
    for name, path in (
        ("store", settings.store_path(settings.layer)),
        ("run", run_dir),
        ("report", run_dir / "evaluation" / "report.html"),
    ):
        console.print(f"{name:<7}{path}", soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    run_stage(main)
