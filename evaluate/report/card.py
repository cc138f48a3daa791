"""The model card of a run: its metadata and numbers in the template page/card.md."""

import re
from typing import Any

from evaluate.records import Results
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
