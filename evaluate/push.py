"""python -m evaluate.push --layer 17 --run name --repo owner/name[/path]: a run on the Hugging Face hub.

Published in one commit: transcoder.safetensors, settings.json, and README.md, the card made from metrics.json.
Loaded again with Transcoder.load("hf://owner/name/path"). Local paths stay here.
"""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common import hub
from common.cli import load, parser, run_stage
from common.errors import InputError
from common.files import sha256
from evaluate.files import finished
from evaluate.report.report import FILTERS, PAGE
from transcoder import Transcoder, weights


def push(run_dir: Path, address: str) -> None:
    """Publish the evaluated run at `address` (hf://owner/name/path).

    Raises `InputError` when the run is not trained here, not evaluated as it is now, or the hub refuses.
    """
    hub.parse(address)
    transcoder = Transcoder.load(run_dir)
    if "training" not in transcoder.metadata:
        raise InputError(f"{run_dir}: was not trained here; push what it was imported from")
    metrics = finished(run_dir / "evaluation")
    if metrics is None or metrics["provenance"].get("weights_sha256") != sha256(run_dir / weights.FILE_NAME):
        raise InputError(
            f"{run_dir}: the card needs the evaluation of these weights; evaluate it (make evaluate)"
        )
    settings = {key: value for key, value in transcoder.metadata["settings"].items() if key != "paths"}
    published = replace(transcoder, metadata=transcoder.metadata | {"settings": settings})
    with tempfile.TemporaryDirectory() as folder:
        published.save(folder)
        Path(folder, "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        Path(folder, "README.md").write_text(card(published, metrics, address), encoding="utf-8")
        hub.upload(
            Path(folder),
            address,
            f"Transcoder {run_dir.name}, layer {transcoder.metadata['source']['layer']}",
        )


def plain(value: Any) -> Any:
    """`value` with all its strings as words: a manifest's names become neither HTML nor Markdown nor a header."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return re.sub(r"[^\w ./:,@+=-]", "_", value) if isinstance(value, str) else value


def card(transcoder: Transcoder, metrics: dict[str, Any], address: str) -> str:
    """The model card, Markdown with the hub's header."""
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    model = transcoder.metadata["source"]["model"]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("embedded/")
    return environment.get_template("card.md").render(
        **plain(transcoder.metadata),
        metrics=plain(metrics),
        address=address,
        base_model=model if on_hub else None,
        d_in=transcoder.d_in,
        d_sae=transcoder.d_sae,
        d_out=transcoder.d_out,
        skip=transcoder.W_skip is not None,
    )


def main() -> None:
    made = parser("evaluate.push", "Publish a run and its card on the Hugging Face hub.")
    made.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="repository, or owner/name/path within one"
    )
    settings, given = load(made)
    address = f"{hub.SCHEME}{given.repo.removeprefix(hub.SCHEME)}"
    push(settings.run_dir(), address)
    print(address)


if __name__ == "__main__":
    run_stage(main)
