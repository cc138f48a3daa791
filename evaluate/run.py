"""The evaluation of one run, in a straight line: store and weights in, metrics.json, plots and page out."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.device import pick_device
from common.errors import InputError
from common.files import locked, remove_asides, sha256
from common.progress import progress
from common.settings import Settings
from evaluate import CROSS_ENTROPY_TOKENS
from evaluate.files import METRICS_VERSION, bring_back, find, finished, make_room, read_lines, write_json
from evaluate.metrics.baselines import fit_ridge
from evaluate.metrics.catalogue import Catalogue, catalogue, group_summaries, splitting, tensors
from evaluate.metrics.language import measure_language
from evaluate.metrics.measure import Select, training_selection
from evaluate.metrics.passes import first_pass, second_pass
from evaluate.metrics.redundancy import decoder_similarity
from evaluate.metrics.tokens import TokenText
from evaluate.nesting import one_group
from evaluate.report.figures import draw
from evaluate.report.page_data import page_data
from evaluate.report.report import write_report
from evaluate.subject import read, refuse_missing, run_of
from shards import Store
from transcoder import Transcoder
from transcoder.gain import refuse_mismatch
from transcoder.weights import FILE_NAME, read_metadata, save_tensors


@dataclass(frozen=True)
class Job:
    """What is evaluated on what."""

    settings: Settings
    store: Store
    run_dir: Path
    n_rows: int
    provenance: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the evaluation is written."""
        return self.run_dir / "evaluation"

    @property
    def split(self) -> Any:
        """The rows that are evaluated."""
        return getattr(self.store, self.settings.evaluate.split)


def evaluate(settings: Settings, ce_tokens: int = CROSS_ENTROPY_TOKENS) -> tuple[dict[str, Any], bool]:
    """Metrics of the run that `settings` name, and whether they had to be measured.

    Nothing is done again when weights, store, settings, the sibling without nesting and the code that measures are
    those of the last time. An evaluation of another split, store, number of rows, or with the cross-entropy that this
    one is without, is kept in <run>/evaluations, and is back in its place when it is asked for again.
    `ce_tokens`: tokens of the cross-entropy measurement, 0 for none.
    """
    job = prepare(settings, ce_tokens)
    flat = None if settings.evaluate.checkpoint else one_group(settings, job.store, job.n_rows)
    job = replace(job, provenance=job.provenance | {"one_group_sha256": flat and flat["weights_sha256"]})
    done = find(job.folder, job.provenance)
    if done is not None and done != job.folder:
        with _lock(job):
            done = find(job.folder, job.provenance)  # another evaluation may have moved it
            if done is not None and done != job.folder:
                bring_back(done, job.folder)
    if done is not None and (metrics := finished(job.folder)) is not None:
        return metrics, False
    coder, trained = load_coder(job), _trained(job.run_dir)
    log = read_lines(settings.run_dir() / "metrics.jsonl")
    select = training_selection(trained["selection"], trained["k"]) if trained else None
    metrics, made = _measure(job, coder, select)
    metrics["baselines"] |= {"one_group": flat} if flat else {}
    language = measure_language(settings, job.store, job.split, coder, ce_tokens, metrics["prefixes"])
    metrics["cross_entropy"] = language.cross_entropy
    with _lock(job):
        remove_asides(job.folder)
        make_room(job.folder, metrics)
        _write(job, metrics, replace(made, promoted=language.promoted), log)
    return metrics, True


def _lock(job: Job) -> AbstractContextManager[None]:
    return locked(job.run_dir / ".evaluation", f"{job.folder}: another evaluation is writing it")


def prepare(settings: Settings, ce_tokens: int) -> Job:
    """Finds the store and the run; `InputError` when either is missing or the split has no rows."""
    if not settings.evaluate.checkpoint:
        refuse_missing(settings.run_dir())
    store = Store.of(settings)
    split = getattr(store, settings.evaluate.split)
    n_rows = min(settings.evaluate.rows or len(split), len(split))
    if not n_rows:
        raise InputError(
            f"{store.path}: expected rows in split {settings.evaluate.split}, found none; harvest with a larger "
            "harvest.heldout_fraction, or measure the rows it was trained on (--evaluate.split train)"
        )
    run_dir = run_of(settings, store)
    metadata = read_metadata(run_dir)
    trained_on = metadata.get("harvest_fingerprint")
    source = store.manifest.source
    provenance = {
        "run": settings.run,
        "model": source.model,
        "layer": source.layer,
        "input_hook": source.input_hook,
        "output_hook": source.output_hook,
        "dataset": source.dataset,
        "split": settings.evaluate.split,
        "rows": n_rows,
        "cross_entropy_tokens": ce_tokens,
        "store_fingerprint": store.manifest.fingerprint,
        "trained_on_this_store": trained_on and trained_on == store.manifest.fingerprint,
        "weights_sha256": sha256(run_dir / FILE_NAME),
        "metrics_version": METRICS_VERSION,
    }
    allowed = settings.evaluate.allow_mismatch
    if differing := refuse_mismatch(metadata.get("source", {}), store, str(run_dir), allowed):
        provenance["mismatch"] = differing
    if "checkpoint" in metadata:
        provenance["checkpoint"] = metadata["checkpoint"]
    if used := metadata.get("used"):  # an imported transcoder has none
        provenance |= {"learning_rate": used["lr"], "normalisation": used["normalisation"]}
    return Job(settings, store, run_dir, n_rows, provenance)


def load_coder(job: Job) -> Transcoder:
    """The run's transcoder, fed as the store's inputs are, on the device of model.device."""
    coder = read(job.run_dir, job.store, job.settings.evaluate.allow_mismatch)
    return coder.to(pick_device(job.settings.model.device))


def _trained(run_dir: Path) -> dict[str, Any] | None:
    """The transcoder settings that the run was trained with; none when it was imported."""
    settings = read_metadata(run_dir).get("settings")
    return settings and settings["transcoder"]


def _measure(job: Job, coder: Transcoder, select: Select | None) -> tuple[dict[str, Any], Catalogue]:
    """Both passes, and what is computed from the weights alone."""
    split = job.split
    moments = job.store.manifest.splits[job.settings.evaluate.split].outputs
    assert moments is not None, "a split with rows has moments"
    vocabulary = TokenText(job.store.tokenizer_path).size
    linear = fit_ridge(job.store.train)
    with progress("statistics", job.n_rows, "rows") as bar:
        first = first_pass(coder, split, job.n_rows, select, linear, moments, vocabulary, bar.update)
    with progress("contexts", job.n_rows, "rows") as bar:
        samples = second_pass(coder, split, job.n_rows, first, bar.update)
    redundancy, neighbours = decoder_similarity(coder.W_dec, coder.prefix_ends)
    made = catalogue(first, samples, neighbours, coder.prefix_ends)
    metrics = {**first.statistics(), "redundancy": redundancy, "provenance": job.provenance}
    metrics["latents"] |= {
        "groups": group_summaries(made, coder.prefix_ends),
        "splitting": splitting(made),
        "coactivation_rows": first.coactivation.rows,
    }
    return metrics, made


def _write(job: Job, metrics: dict[str, Any], made: Catalogue, log: list[dict[str, Any]]) -> None:
    """Plots, page, per-latent tensors; metrics.json last, so that it stands for a complete evaluation."""
    folder, text = job.folder, TokenText(job.store.tokenizer_path)
    folder.mkdir(exist_ok=True)
    for old in (folder / "metrics.json", *folder.glob("*.png")):
        old.unlink(missing_ok=True)
    for line in metrics["errors"]["by_token"]:
        line["token"] = text.label(line["class"])
    drawn = draw(metrics, made, log, folder)
    data = page_data(made, job.split.contexts, text)
    data["prefix_ends"] = [prefix["end"] for prefix in metrics["prefixes"]]
    write_report(folder / "report.html", metrics, data, drawn)
    save_tensors(folder / "latents.safetensors", tensors(made), {"provenance": json.dumps(job.provenance)})
    metrics["files"] = ["report.html", "latents.safetensors", *(each.plot.file for each in drawn)]
    write_json(folder / "metrics.json", metrics)
