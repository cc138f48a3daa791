"""python -m transcoder.import_ --layer 17 --run name --from path: another tool's transcoder as a run of this project.

`--from` is what `Transcoder.load` takes: Gemma Scope's params.npz, a directory of SAELens, hf://owner/name/path.
The run has weights only, in our format; evaluate and compare measure it by its thresholds alone.
"""

from pathlib import Path

from common.cli import load, parser, run_stage
from common.errors import InputError
from common.files import sha256
from transcoder import weights
from transcoder.formats import fetched, weights_file
from transcoder.transcoder import Transcoder


def bring(origin: str, run_dir: Path) -> Transcoder:
    """Write the transcoder at `origin` to `run_dir`; raises `InputError` when a run is there already."""
    if run_dir.exists():
        raise InputError(f"{run_dir}: there already; give another name (RUN=name), or remove the directory")
    path = fetched(origin)
    found = Transcoder.load(path)
    found.metadata["imported"] = {"from": origin, "sha256": sha256(weights_file(path))}
    found.save(run_dir)
    return found


def main() -> None:
    made = parser("transcoder.import_", "Bring another tool's transcoder in as a run.")
    made.add_argument(
        "--from", dest="origin", required=True, metavar="PATH", help="file, directory or hf:// address"
    )
    settings, given = load(made)
    run_dir = settings.run_dir()
    found = bring(given.origin, run_dir)
    print(f"{run_dir / weights.FILE_NAME}: {found.d_in} -> {found.d_sae:,} latents -> {found.d_out}")


if __name__ == "__main__":
    run_stage(main)
