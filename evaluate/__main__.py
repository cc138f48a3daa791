"""python -m evaluate: measure a run on the held-out rows of its store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from common.cli import load, parser, run_stage
from common.numbers import number_or_dash
from common.settings import Settings
from evaluate import CROSS_ENTROPY_TOKENS
from evaluate.report.console import plain, rows_of, table_of
from evaluate.report.verdicts import verdicts

if TYPE_CHECKING:  # --help does not wait for the records
    from evaluate.records import Metrics

COLOURS = {"good": "green", "moderate": "yellow", "poor": "red", "unknown": "dim", "info": "cyan"}


def main() -> None:
    options = parser("evaluate", __doc__ or "")
    options.add_argument(
        "--cross-entropy-tokens",
        type=int,
        default=CROSS_ENTROPY_TOKENS,
        metavar="N",
        help="tokens of the cross-entropy, the slow part: the language model runs with its MLP replaced; fewer are "
        "faster, 0: no cross-entropy [%(default)s]",
    )
    settings, arguments = load(options)
    from evaluate.run import evaluate  # after the settings are checked: torch takes seconds to import
    from train import log
    from transcoder.weights import chosen_run

    log.check(settings.wandb)
    settings = chosen_run(settings, arguments.run)
    metrics, fresh = evaluate(settings, max(0, arguments.cross_entropy_tokens))
    if fresh:
        log.log_evaluation(settings.run_dir(), settings, metrics.written())
    show(settings, metrics, fresh, Console())


def show(settings: Settings, metrics: Metrics, fresh: bool, console: Console) -> None:
    """The short table, the verdicts and the paths."""
    from evaluate.subject import checkpoint_note
    from train.log import where
    from train.record import went_on

    table = table_of(
        rows_of(metrics.rows, metrics.provenance.split),
        ("prefix", "latents", "FVU", "L0", "threshold", "dead %", "over 10 %"),
    )
    for g, prefix in enumerate(metrics.prefixes):
        table.add_row(
            str(g),
            f"{prefix.end:,}",
            number_or_dash(prefix.fvu),
            f"{prefix.l0:.1f}",
            f"{prefix.threshold:.3g}",
            f"{100 * prefix.dead_fraction:.1f}",
            f"{100 * prefix.over_10_percent_fraction:.1f} % {prefix.over_10_percent_verdict}",
        )
    console.print(table)
    for verdict in verdicts(metrics):
        colour = COLOURS[verdict.level]
        line = f"[{colour}]{verdict.level:>8}[/] {verdict.name} {verdict.value} ({verdict.limit})"
        console.print(line, highlight=False, soft_wrap=True)
    if metrics.cross_entropy.skipped is not None:
        plain(console, f"cross-entropy was not measured: {metrics.cross_entropy.skipped}")
    if metrics.provenance.trained_on_this_store is None:
        plain(console, "note: what this run was trained on is not known")
    elif not metrics.provenance.trained_on_this_store:
        plain(console, "note: this run was trained on another harvest than it was evaluated on")
    if differing := metrics.provenance.mismatch:
        plain(console, f"note: measured where it does not belong, as asked: {'; '.join(differing)}")
    if not fresh:
        plain(console, "nothing has changed since the last evaluation: nothing was measured again")
    run_dir = settings.run_dir()
    if at := metrics.provenance.checkpoint:
        plain(console, f"note: {checkpoint_note(run_dir, at.step, at.of)}")
        run_dir = run_dir / f"at_step_{at.step}"
    elif step := went_on(run_dir):
        plain(
            console,
            f"note: training went on since: interrupted, or still training, at step {step:,}; these are the finished "
            "weights of before (--evaluate.checkpoint true: the checkpoint)",
        )
    plain(console, f"store  {settings.store_path(settings.layer)}")
    plain(console, f"run    {run_dir}")
    plain(console, f"report {run_dir / 'evaluation' / 'report.html'}")
    for line in where(run_dir):
        plain(console, line)


if __name__ == "__main__":
    run_stage(main)
