"""python -m transcoder.import_ --layer 17 --run name --from path: another tool's transcoder as a run of this project.

`--from` is what `Transcoder.load` takes: a file or directory of SAELens, Gemma Scope (1 and 2), circuit-tracer or
sparsify, hf://owner/name/path; of a directory of layers, that of `--layer`.
The run has weights only, in our format; evaluate and compare measure it by its thresholds alone. What the file says
of layer, hooks and weights must be what was asked for, and what the layer's store holds where it is harvested already.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from common.cli import load, parser, run_stage
from common.errors import InputError
from common.files import sha256
from common.hooks import Convention, in_convention
from common.settings import Settings

if TYPE_CHECKING:
    from shards import Store
    from transcoder.transcoder import Transcoder

OF_THE_MODEL = (
    *("model", "revision", "weights_sha256", "dtype", "layer", "n_layers", "input_hook", "output_hook"),
    *("d_in", "d_out", "gain", "gain_bias"),
)
"""What a store's source says of the language model, whatever text was harvested."""


def bring(origin: str, settings: Settings, convention: Convention | None = None) -> "Transcoder":
    """Write the transcoder at `origin` as the run that `settings` name, in its own input convention.

    `convention`: what it reads, where its file does not say. Raises `InputError` when a run is there already, or the
    transcoder is of another layer or does not belong to the layer's store.
    """
    from shards import Store  # with torch, which --help need not wait for
    from shards.layout import COMMIT
    from shards.remote import is_url
    from transcoder.formats import fetched, weights_file
    from transcoder.gain import ON_PURPOSE, bind
    from transcoder.transcoder import Transcoder

    run_dir, mismatch = settings.run_dir(), settings.evaluate.allow_mismatch
    if run_dir.exists():
        raise InputError(f"{run_dir}: there already; give another name (RUN=name), or remove the directory")
    path = fetched(origin, settings.layer)
    transcoder = with_convention(Transcoder.load(path), convention, origin)
    layer = transcoder.metadata.get("source", {}).get("layer")
    if layer not in (None, settings.layer) and not mismatch:
        raise InputError(
            f"{origin}: it is of layer {layer}, asked for layer {settings.layer}; give --layer {layer}, or bring it "
            f"here on purpose with {ON_PURPOSE}"
        )
    where = settings.store_path(settings.layer)
    if is_url(where) or (Path(where) / COMMIT).is_file():
        store = Store.of(settings)
        bind(transcoder, store, origin, mismatch)
        transcoder = transcoder if mismatch else completed(transcoder, store)
    else:
        print(f"{where}: not harvested yet; make evaluate checks that the transcoder belongs to it")
    transcoder.metadata["imported"] = {"from": origin, "sha256": sha256(weights_file(path))}
    transcoder.save(run_dir)
    return transcoder


def with_convention(transcoder: "Transcoder", convention: Convention | None, origin: str) -> "Transcoder":
    """The transcoder with `convention` as what it reads; raises `InputError` where its file says another one."""
    source = transcoder.metadata.get("source", {})
    if convention is None or source.get("input") == convention:
        return transcoder
    if source.get("input") is not None:
        raise InputError(
            f"{origin}: input: its file says {source['input']}, asked {convention}; leave --input out"
        )
    return replace(transcoder, metadata=transcoder.metadata | {"source": source | {"input": convention}})


def completed(transcoder: "Transcoder", store: "Store") -> "Transcoder":
    """The transcoder with what its file does not say and the store that it is bound to does: an export needs it.

    The output hook is called as the store calls that tensor.
    """
    known, own = store.manifest.source.model_dump(mode="json"), transcoder.metadata["source"]
    known["input_hook"] = in_convention(known["input_hook"], known["input"], own["input"])
    lacking = {key: known[key] for key in OF_THE_MODEL if own.get(key) is None}
    named = own | lacking | {"output_hook": known["output_hook"]}
    return replace(transcoder, metadata=transcoder.metadata | {"source": named})


def main() -> None:
    options = parser("transcoder.import_", "Bring another tool's transcoder in as a run.")
    options.add_argument(
        "--from", dest="origin", required=True, metavar="PATH", help="file, directory or hf:// address"
    )
    options.add_argument(
        "--input",
        choices=get_args(Convention),
        help="what it reads, where its file does not say: inputs without or with the norm's gain",
    )
    settings, arguments = load(options)
    from transcoder import weights

    transcoder = bring(arguments.origin, settings, arguments.input)
    sizes = f"{transcoder.d_in} -> {transcoder.d_sae:,} latents -> {transcoder.d_out}"
    print(f"{settings.run_dir() / weights.FILE_NAME}: {sizes}")


if __name__ == "__main__":
    run_stage(main)
