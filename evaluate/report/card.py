"""The model cards of a run and of a layer set: metadata and numbers in the templates page/card.md and set_card.md."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from common import hub
from evaluate.records import PrefixMetrics, Results
from evaluate.report.templates import markdown
from transcoder import Transcoder
from transcoder.public import ON_HUB


def plain(value: Any) -> Any:
    """`value` with all its strings as words: a manifest's names become neither HTML nor Markdown nor a header."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return re.sub(r"[^\w ./:,@+=-]", "_", value) if isinstance(value, str) else value


def card(transcoder: Transcoder, results: Results, address: str) -> str:
    """The model card, Markdown with the hub's header."""
    model = transcoder.metadata["source"]["model"]
    on_hub = ON_HUB.fullmatch(model)
    return markdown(
        "card.md",
        **plain(transcoder.metadata),
        metrics=plain(results.written()),
        address=address,
        base_model=model if on_hub else None,
        d_in=transcoder.d_in,
        d_sae=transcoder.d_sae,
        d_out=transcoder.d_out,
        skip=transcoder.W_skip is not None,
    )


class LayerLine(NamedTuple):
    """What the card of a set says of a layer."""

    layer: int
    first: PrefixMetrics
    last: PrefixMetrics
    typical: tuple[float | None, float | None] = (None, None)
    """FVU of both without heavy rows; none where the layer has none."""


def set_card(lines: Sequence[LayerLine], source: dict[str, Any], missing: Sequence[int], address: str) -> str:
    """The card of several layers; `source`: any layer's, `missing`: layers of the model without a transcoder."""
    where, model = hub.parse(address), plain(source["model"])
    return markdown(
        "set_card.md",
        layers=lines,
        missing=missing,
        whole=not missing,
        model=model,
        base_model=model if ON_HUB.fullmatch(model) else None,
        d_in=source["d_in"],
        release=where.repo,
        folder=f"{where.path}/" if where.path else "",
        repo=f"{where.repo}/{where.path}".rstrip("/"),
        address=address,
    )
