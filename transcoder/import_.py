"""python -m transcoder.import_ --layer 17 --run name --from path: another tool's transcoder as a run of this project.

`--from` is what `Transcoder.load` takes: Gemma Scope's params.npz, a directory of SAELens, hf://owner/name/path.
The run has weights only, in our format; evaluate and compare measure it by its thresholds alone. What the file says
of layer, hooks and weights must be what was asked for, and what the layer's store holds where it is harvested already.
"""

from dataclasses import replace
from pathlib import Path

from common.cli import load, parser, run_stage
from common.errors import InputError
from common.files import sha256
from common.hooks import in_convention
from common.settings import Settings
from shards import Store
from shards.layout import COMMIT
from shards.remote import is_url
from transcoder import weights
from transcoder.formats import fetched, weights_file
from transcoder.gain import ON_PURPOSE, bind
from transcoder.transcoder import Transcoder

OF_THE_MODEL = (
    *("model", "revision", "weights_sha256", "dtype", "layer", "n_layers", "input_hook", "output_hook"),
    *("d_in", "d_out", "gain", "gain_bias"),
)
"""What a store's source says of the language model, whatever text was harvested."""


def bring(origin: str, settings: Settings) -> Transcoder:
    """Write the transcoder at `origin` as the run that `settings` name, in its own input convention.

    Raises `InputError` when a run is there already, or the transcoder is of another layer or does not belong to the
    layer's store.
    """
    run_dir, mismatch = settings.run_dir(), settings.evaluate.allow_mismatch
    if run_dir.exists():
        raise InputError(f"{run_dir}: there already; give another name (RUN=name), or remove the directory")
    path = fetched(origin)
    transcoder = Transcoder.load(path)
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


def completed(transcoder: Transcoder, store: Store) -> Transcoder:
    """The transcoder with what its file does not say and the store that it is bound to does: an export needs it."""
    known, own = store.manifest.source.model_dump(mode="json"), transcoder.metadata["source"]
    known["input_hook"] = in_convention(known["input_hook"], known["input"], own["input"])
    lacking = {key: known[key] for key in OF_THE_MODEL if own.get(key) is None}
    return replace(transcoder, metadata=transcoder.metadata | {"source": own | lacking})


def main() -> None:
    options = parser("transcoder.import_", "Bring another tool's transcoder in as a run.")
    options.add_argument(
        "--from", dest="origin", required=True, metavar="PATH", help="file, directory or hf:// address"
    )
    settings, arguments = load(options)
    transcoder = bring(arguments.origin, settings)
    sizes = f"{transcoder.d_in} -> {transcoder.d_sae:,} latents -> {transcoder.d_out}"
    print(f"{settings.run_dir() / weights.FILE_NAME}: {sizes}")


if __name__ == "__main__":
    run_stage(main)
