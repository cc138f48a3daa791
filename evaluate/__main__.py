"""python -m evaluate: measure a run on the held-out rows of its store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from common.cli import parser, read, run_stage
from common.layers.driver import add_spread, over_layers
from common.nodes.environment import rank
from common.numbers import Uncertain, marked_fvu, number_or_dash, percent_or_dash
from common.settings import Settings
from common.terminal.table import console
from evaluate import CROSS_ENTROPY_TOKENS
from evaluate.report.console import increase, plain, rows_of, table_of, typical_fvu
from evaluate.report.verdicts import verdicts
from transcoder.layers import chosen_run, n_layers

if TYPE_CHECKING:  # --help does not wait for the records
    from pathlib import Path

    from evaluate.records import Metrics
    from evaluate.report.sides import Side

NOTHING_NEW = "nothing has changed since the last evaluation: nothing was measured again"
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
    add_spread(options)
    asked = read(options)
    named, ce_tokens = asked.arguments.run, max(0, asked.arguments.cross_entropy_tokens)

    def chosen(settings: Settings) -> Settings:
        from train import log

        log.check(settings.wandb)
        return chosen_run(settings, named)

    def one(settings: Settings, of_several: bool) -> None:
        from evaluate.kept.evaluations import beside_a_larger, read_all
        from evaluate.run import evaluate
        from train import log

        metrics, fresh = evaluate(settings, ce_tokens)
        if rank():
            return  # the first process talks
        if fresh:
            size = beside_a_larger(read_all(_weights_dir(settings, metrics)), metrics)
            log.log_evaluation(settings.run_dir(), settings, metrics.written(), size)
        if of_several and not fresh:
            print(NOTHING_NEW)
        else:
            show(settings, metrics, fresh, console())

    over_layers(asked, one, n_layers=n_layers, chosen=chosen, lines=_lines)


def _weights_dir(settings: Settings, metrics: Metrics) -> Path:
    """Directory of the weights that were measured: the run's, or a checkpoint's in it."""
    at = metrics.provenance.checkpoint
    return settings.run_dir() / f"at_step_{at.step}" if at else settings.run_dir()


def _lines(settings: Settings) -> list[dict[str, str | Uncertain]]:
    """What the table of several layers says of one that is evaluated."""
    from common.files import sha256
    from evaluate.files import finished
    from evaluate.kept.evaluations import evaluation_on
    from shards import Store
    from train.record import latest, step_of
    from train.snapshot import folder_of
    from transcoder.weights import FILE_NAME

    run_dir = settings.run_dir()
    if settings.evaluate.checkpoint and (newest := latest(run_dir)):
        run_dir = folder_of(run_dir, step_of(newest))
    fingerprint = Store.of(settings).manifest.fingerprint
    digest = sha256(run_dir / FILE_NAME)
    metrics = finished(evaluation_on(run_dir, digest, fingerprint, settings.evaluate.split))
    if metrics is None:
        return []
    last = metrics.prefixes[-1]
    language = last.cross_entropy
    return [
        {
            "FVU of each prefix": " ".join(
                marked_fvu(prefix.fvu, typical_fvu(metrics.errors, g))
                for g, prefix in enumerate(metrics.prefixes)
            ),
            "L0": f"{last.l0:.1f}",
            "dead %": f"{100 * last.dead_fraction:.1f}",
            "over 10 %": f"{100 * last.over_10_percent_fraction:.1f}",
            "CE recovered": percent_or_dash(language and language.recovered_zero),
            "CE increase": increase(language),
        }
    ]


def show(settings: Settings, metrics: Metrics, fresh: bool, console: Console) -> None:
    """The short table, the verdicts and the paths."""
    from evaluate.kept.evaluations import MAIN, find, read_all
    from evaluate.report.sides import sides
    from evaluate.subject import checkpoint_note
    from train.log import where
    from train.record import went_on

    table = table_of(
        rows_of(metrics.rows, metrics.provenance.split),
        ("prefix", "latents", "FVU", "L0", "threshold", "dead %", "over 10 %")
        + ("CE increase",) * (metrics.cross_entropy.skipped is None),
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
            *[increase(prefix.cross_entropy)] * (metrics.cross_entropy.skipped is None),
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
        plain(console, NOTHING_NEW)
    run_dir = settings.run_dir()
    if at := metrics.provenance.checkpoint:
        plain(console, f"note: {checkpoint_note(run_dir, at.step, at.of)}")
        run_dir = _weights_dir(settings, metrics)
    elif step := went_on(run_dir):
        plain(
            console,
            f"note: training went on since: interrupted, or still training, at step {step:,}; these are the finished "
            "weights of before (--evaluate.checkpoint true: the checkpoint)",
        )
    plain(console, f"store  {settings.store_path(settings.layer)}")
    plain(console, f"run    {run_dir}")
    there = read_all(run_dir)
    evaluation = find(there, metrics.provenance)
    plain(console, f"report {(evaluation.folder if evaluation else run_dir / MAIN) / 'report.html'}")
    beside(sides(there, metrics.provenance.weights_sha256), console)
    for line in where(run_dir):
        plain(console, line)


def beside(shown: Sequence[Side], console: Console) -> None:
    """The run's evaluations side by side, where there are several: the full dictionary, differences in brackets."""
    from common.tokens import printable

    if len(shown) < 2:
        return
    first = shown[0].prefix(-1)
    columns = ("measured on", "rows", "FVU", "L0", "dead %", "CE increase")
    table = table_of("the same weights on other rows", columns)
    for each in shown:
        prefix = each.prefix(-1)
        change = None if prefix.fvu is None or first.fvu is None else prefix.fvu - first.fvu
        table.add_row(
            printable(each.name),
            f"{each.rows:,}",
            number_or_dash(prefix.fvu) + ("" if change is None or each is shown[0] else f" ({change:+.3f})"),
            f"{prefix.l0:.1f}",
            f"{100 * prefix.dead_fraction:.1f}",
            increase(prefix.cross_entropy),
        )
    console.print(table)


if __name__ == "__main__":
    run_stage(main)
