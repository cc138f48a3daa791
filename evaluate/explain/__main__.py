"""python -m evaluate.explain --layer 17 --run name --model gpt-4o-mini: latents explained by a language model.

Any OpenAI-compatible endpoint: --base-url or OPENAI_BASE_URL, the key in OPENAI_API_KEY. What is asked, what is sent
and how explanations are scored: docs/explain.md. With --from, the explanations of another tool are read.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import parser, read, run_stage
from common.errors import InputError, shown
from common.layers.driver import over_layers
from common.settings import Settings
from evaluate.explain.endpoint import Endpoint, endpoint_of

if TYPE_CHECKING:
    from evaluate.explain.ask import Cost
    from evaluate.explain.records import MeanScore, Summary
    from evaluate.explain.run import Explained

SAMPLE, N_SHOWN, N_SCORED = 50, 20, 20
CONCURRENCY, TIMEOUT, RETRIES, MAX_TOKENS = 8, 60.0, 5, 2000
NUMBERS = {
    "sample": (SAMPLE, 1, "latents, drawn at random, as many from each group"),
    "shown": (
        N_SHOWN,
        4,
        "passages (a token with its context) that the model is shown to explain a latent, at most",
    ),
    "scored": (
        N_SCORED,
        4,
        "passages of other documents in which the latent fires that its explanation is scored on, at most; as many in "
        "which it does not",
    ),
    "concurrency": (CONCURRENCY, 1, "requests at a time"),
    "retries": (RETRIES, 0, "retries of a request when the endpoint is busy or fails"),
}
"""Option -> default, least value, what it is."""


def _options() -> argparse.ArgumentParser:
    options = parser(
        "evaluate.explain",
        "Have a language model explain latents, and score how well the explanations predict where they fire.",
    )
    options.add_argument(
        "--model", metavar="NAME", help="language model, by its name on the server [OPENAI_MODEL]"
    )
    options.add_argument(
        "--base-url", metavar="URL", help="OpenAI-compatible endpoint [OPENAI_BASE_URL, else OpenAI's own]"
    )
    options.add_argument(
        "--key-variable",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="environment variable that holds the key [%(default)s]",
    )
    options.add_argument(
        "--latents", nargs="+", metavar="N", help="these latents, 5,17 or 5 17, in place of a sample"
    )
    for name, (default, _, text) in NUMBERS.items():
        options.add_argument(f"--{name}", metavar="N", default=str(default), help=f"{text} [%(default)s]")
    options.add_argument(
        "--timeout", metavar="S", default=f"{TIMEOUT:g}", help="seconds to wait for an answer [%(default)s]"
    )
    options.add_argument(
        "--temperature",
        metavar="T",
        default="0",
        help="sampling temperature; none: the server's own [%(default)s]",
    )
    options.add_argument(
        "--max-tokens",
        metavar="N",
        default=str(MAX_TOKENS),
        help="tokens of an answer, at most; none: no limit [%(default)s]",
    )
    options.add_argument(
        "--plan", action="store_true", help="print the number of requests and tokens, and send nothing"
    )
    options.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="read delphi's results, Neuronpedia's explanations, or a table (layer, latent, label, ...) instead",
    )
    return options


def main() -> None:
    asked = read(_options())
    arguments = asked.arguments
    numbers = {name: _whole(name, getattr(arguments, name), least) for name, (_, least, _) in NUMBERS.items()}
    latents = _latents(arguments)
    endpoint = None if arguments.source is not None else _endpoint(arguments, numbers["retries"])
    if endpoint is None and (arguments.plan or latents is not None):
        raise InputError("from: reads all explanations that are there; leave --plan and --latents out")
    from evaluate.explain.run import Options, planned, told  # with torch, which --help need not wait for
    from transcoder import weights

    options = Options(latents, *(numbers[name] for name in ("sample", "shown", "scored", "concurrency")))

    def one(settings: Settings, _: bool) -> None:
        if endpoint is None:
            _read_from(settings, Path(arguments.source))
            return
        made = planned(settings, endpoint, options)
        if made.chosen.left_out:
            print(f"left out: {told(made.chosen.left_out)}")
        _print_cost(made.cost(), len(made.chosen.tasks), endpoint)
        if not arguments.plan:
            _show(made.make())

    def chosen(settings: Settings) -> Settings:
        return weights.chosen_run(settings, arguments.run)

    over_layers(asked, one, n_layers=weights.n_layers, chosen=chosen)


def _latents(arguments: argparse.Namespace) -> list[int] | None:
    if arguments.latents is None:
        return None
    if arguments.sample != str(SAMPLE):
        raise InputError("sample: expected a sample or a list of latents, found both --sample and --latents")
    from train.samples_page import numbers

    if not (latents := numbers(arguments.latents)):
        raise InputError("latents: expected numbers, for example --latents 56,12, found none")
    return latents


def _endpoint(arguments: argparse.Namespace, retries: int) -> Endpoint:
    limit = arguments.max_tokens.lower()
    temperature = arguments.temperature.lower()
    return endpoint_of(
        arguments.model,
        arguments.base_url,
        arguments.key_variable,
        _number("timeout", arguments.timeout, 0.001),
        retries,
        None if temperature == "none" else _number("temperature", temperature, 0),
        None if limit == "none" else _whole("max-tokens", limit, 1),
        sends=not arguments.plan,
    )


def _read_from(settings: Settings, source: Path) -> None:
    from evaluate.explain.imported import bring

    found = bring(settings, source)
    print(f"{found.explanations:,} explanations, {found.scored:,} of them with a score")
    for why, n in found.left_out.items():
        print(f"left out: {n:,} {why}", file=sys.stderr)
    print(found.csv)


def _print_cost(cost: "Cost", latents: int, endpoint: Endpoint) -> None:
    before = f" ({cost.requests - cost.left:,} answered before)" if cost.left < cost.requests else ""
    print(
        f"{latents:,} latents, {cost.requests:,} requests{before}; to send: {cost.left:,} requests with about "
        f"{cost.tokens_in:,} tokens, for answers of about {cost.tokens_out:,} tokens (by the store's tokenizer)"
    )
    if cost.left:
        where = f"model {endpoint.model} at {endpoint.base_url}"
        print(f"what is sent, to {where}: passages of the store's text (docs/explain.md)", flush=True)


def _show(explained: "Explained") -> None:
    """The table of groups, what failed, and the paths. Raises `InputError` where requests failed."""
    from common.terminal.table import Table, console

    summary = explained.summary
    table = Table("group", "latents", "explained", "score", "detection", "fuzzing", title=_title(summary))
    for each in summary.groups:
        name = "all" if each.group is None else str(each.group)
        scores = (each.score, each.detection, each.fuzzing)
        table.add_row(name, f"{each.latents:,}", f"{each.explained:,}", *map(_mean, scores))
    console().print(table)
    requests = summary.requests
    print(
        f"{requests.sent:,} requests sent, {requests.kept:,} answered before; {requests.tokens_in:,} tokens in and "
        f"{requests.tokens_out:,} out, as the endpoint counts"
    )
    if requests.unreadable:
        kinds = ", ".join(f"{n:,} of {kind}" for kind, n in requests.unreadable.items())
        print(f"unreadable answers, counted in no score: {kinds}")
    print(f"replies      {explained.folder / 'replies.jsonl'}")
    print(f"summary      {explained.folder / 'summary.json'}")
    print(f"explanations {explained.csv}")
    if requests.failed:
        reasons = ", ".join(f"{why}: {n:,}" for why, n in requests.failed.items())
        raise InputError(
            f"{sum(requests.failed.values()):,} of {requests.sent:,} requests failed ({reasons}; see replies.jsonl); "
            "all others are kept, the same command asks these again"
        )


def _title(summary: "Summary") -> str:
    return f"{summary.model}: balanced accuracy ± standard error over latents (chance: 0.5)"


def _mean(score: "MeanScore") -> str:
    if score.mean is None:
        return "-"
    return f"{score.mean:.3f}" + (f" ± {score.error:.3f}" if score.error is not None else "")


def _whole(name: str, text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
        raise InputError(f"{name}: expected a whole number from {least}, found {shown(text)}")
    return int(text)


def _number(name: str, text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= least and math.isfinite(value)):
        raise InputError(f"{name}: expected a number from {least:g}, found {shown(text)}")
    return value


if __name__ == "__main__":
    run_stage(main)
