"""python -m evaluate.push --layer 17 --run name --repo owner/name[/path]: a run on the Hugging Face hub.

Of several layers, all of them together: evaluate/model/push.py.

Published in one commit: transcoder.safetensors, settings.json, and README.md, the card made from metrics.json.
Loaded again with Transcoder.load("hf://owner/name/path"). Local paths stay here, see transcoder/public.py.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from common import hub
from common.cli import parser, read, run_stage
from common.errors import InputError
from common.files import sha256


def push(run_dir: Path, address: str, name: str | None = None) -> None:
    """Publish the evaluated run at `address` (hf://owner/name/path); `name`: what the model is called there.

    Raises `InputError` when the run is not trained here, not evaluated as it is now, or the hub refuses.
    """
    hub.parse(address)
    with tempfile.TemporaryDirectory() as folder:
        message = write(run_dir, Path(folder), address, name)
        hub.upload(Path(folder), address, message)


def write(run_dir: Path, folder: Path, address: str, name: str | None = None) -> str:
    """Write what `push` publishes into `folder`; returns the commit's message."""
    from evaluate.files import finished
    from evaluate.kept.evaluations import main_evaluation
    from evaluate.report.card import card
    from transcoder import Transcoder, weights
    from transcoder.public import last_part, published

    transcoder = Transcoder.load(run_dir)
    if "training" not in transcoder.metadata:
        raise InputError(f"{run_dir}: was imported, not trained here; push the original")
    digest = sha256(run_dir / weights.FILE_NAME)
    metrics = finished(main_evaluation(run_dir, digest))
    if metrics is None or metrics.provenance.weights_sha256 != digest:
        raise InputError(
            f"{run_dir}: the card needs the evaluation of these weights; evaluate it (make evaluate)"
        )
    seen = replace(transcoder, metadata=published(transcoder.metadata, name))
    source = seen.metadata["source"]
    files = map(last_part, metrics.provenance.dataset.split(", ")) if source.get("files") else ()
    dataset = ", ".join(files) or source.get("dataset", "unknown text")
    named = metrics.provenance.model_copy(update={"model": source["model"], "dataset": dataset})
    shown = metrics.model_copy(update={"provenance": named})
    seen.save(folder)
    text = json.dumps(seen.metadata["settings"], indent=1) + "\n"
    (folder / "settings.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card(seen, shown, address), encoding="utf-8")
    return f"Transcoder {run_dir.name}, layer {source['layer']}"


def main() -> None:
    options = parser("evaluate.push", "Publish a run, or those of several layers, on the Hugging Face hub.")
    options.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="repository, or owner/name/path within one"
    )
    options.add_argument(
        "--pages",
        action="store_true",
        help="several layers: with circuit-tracer's feature pages, which quote the text",
    )
    asked = read(options)
    address = f"{hub.SCHEME}{asked.arguments.repo.removeprefix(hub.SCHEME)}".rstrip("/")
    from transcoder import weights  # with torch, which --help need not wait for

    settings = asked.settings(asked.layers(weights.n_layers))
    of_several = len(settings.layers) > 1
    settings = weights.chosen_run(settings, asked.arguments.run, every_layer=of_several)
    if asked.arguments.pages and not of_several:
        raise InputError(
            "command line: --pages: circuit-tracer's feature pages are of a set of layers, found one layer; give "
            "several (LAYER=all), or leave --pages out"
        )
    if of_several:
        from evaluate.model.push import push_set

        push_set(settings, address, asked.arguments.pages)
    else:
        weights.refuse_another_model(settings.run_dir(), settings)
        push(settings.run_dir(), address, settings.model.public_name)
    print(address)


if __name__ == "__main__":
    run_stage(main)
