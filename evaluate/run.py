"""The evaluation of one run, in a straight line: store and weights in, metrics.json, plots and page out."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluate import plots
from evaluate.files import code_sha256, read_json, read_lines, sha256, write_json
from evaluate.measure import measure
from evaluate.report import write_report
from evaluate.sparse import Coder
from evaluate.verdicts import FVU_GOOD, FVU_MODERATE
from pipeline import InputError, Settings
from shards import Store
from train import Transcoder

OUTPUTS = ("metrics.json", "report.html", "loss.png", "fvu.png", "l0.png", "density.png")


def evaluate(settings: Settings) -> tuple[dict[str, Any], bool]:
    """Metrics of the run that `settings` name, and whether they had to be measured.

    Nothing is done again when weights, store, settings and this package are those of the last time.
    """
    run_dir = settings.run_dir()
    weights = run_dir / "transcoder.safetensors"
    if not weights.exists():
        raise InputError(f"{weights}: not found; train this run first (make train)")
    store = Store.open(settings.store_path(settings.layer))
    split = getattr(store, settings.evaluate.split)
    n_rows = min(settings.evaluate.rows or len(split), len(split))
    if not n_rows:
        raise InputError(f"{store.path}: expected rows in split {settings.evaluate.split}, found none")
    provenance = _provenance(settings, store, weights, n_rows)
    folder = run_dir / "evaluation"
    done = _finished(folder)
    if done is not None and done["provenance"] == provenance:
        return done, False
    coder = _load(run_dir, store)
    run_settings = read_json(run_dir / "settings.json", "train this run again (make train)")
    with tqdm(total=n_rows, desc="evaluate", unit=" rows", unit_scale=True, dynamic_ncols=True) as bar:
        measured = measure(coder, split, n_rows, run_settings["transcoder"]["k"], bar.update)
    metrics = {**measured.result(), "redundancy": {}, "provenance": provenance}
    folder.mkdir(exist_ok=True)
    write_report(
        folder / "report.html", metrics, _plots(folder, metrics, read_lines(run_dir / "metrics.jsonl"))
    )
    write_json(folder / "metrics.json", metrics)
    return metrics, True


def _provenance(settings: Settings, store: Store, weights: Path, n_rows: int) -> dict[str, Any]:
    """What determines the metrics; equal provenance means equal metrics."""
    source = store.manifest.source
    return {
        "run": settings.run,
        "model": source.model,
        "layer": source.layer,
        "input_hook": source.input_hook,
        "output_hook": source.output_hook,
        "dataset": ", ".join(source.files) or source.dataset,
        "split": settings.evaluate.split,
        "rows": n_rows,
        "store_fingerprint": store.manifest.fingerprint,
        "weights_sha256": sha256(weights),
        "code_sha256": code_sha256(),
    }


def _finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of a complete evaluation: metrics.json is written last."""
    if not all((folder / name).exists() for name in OUTPUTS):
        return None
    metrics = read_json(folder / "metrics.json", f"remove {folder} to evaluate again")
    return metrics if "provenance" in metrics else None


def _load(run_dir: Path, store: Store) -> Coder:
    coder = Coder.of(Transcoder.load(run_dir))
    found = (coder.W_enc.shape[1], coder.W_dec.shape[1])
    source = store.manifest.source
    if found != (source.d_in, source.d_out):
        raise InputError(
            f"{run_dir}: expected widths {source.d_in} -> {source.d_out} as in {store.path}, "
            f"found {found[0]} -> {found[1]}; give the harvest that this run was trained on"
        )
    return coder


def _plots(folder: Path, metrics: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Path]:
    """Draws and saves; caption -> file."""
    prefixes = metrics["prefixes"]
    drawn = {
        "loss.png": ("Loss and held-out FVU while training", plots.loss_curve(log)),
        "fvu.png": ("FVU of every prefix", plots.fvu_by_prefix(prefixes, FVU_GOOD, FVU_MODERATE)),
        "l0.png": ("Active latents per row", plots.l0_histogram(prefixes)),
        "density.png": ("How often latents fire", plots.density_histogram(metrics["latents"])),
    }
    for name, (_, made) in drawn.items():
        plots.save(made, folder / name)
    return {caption: folder / name for name, (caption, _) in drawn.items()}
