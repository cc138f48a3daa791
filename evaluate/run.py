"""The evaluation of one run, in a straight line: store and weights in, metrics.json, plots and page out."""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from common.device import pick_device
from common.errors import InputError
from common.files import locked, remove_asides, sha256
from common.progress import progress
from common.settings import Settings
from common.tokens import TokenText
from evaluate import CROSS_ENTROPY_TOKENS
from evaluate.files import CONTEXTS, LATENTS, METRICS_VERSION, Asked, Done, read_lines, write_record
from evaluate.kept.evaluations import (
    Evaluation,
    There,
    baselines_before,
    find,
    make_room,
    place,
    read_all,
    remove_answered,
    settle,
    with_language,
)
from evaluate.kept.language import FILE as LANGUAGE
from evaluate.kept.language import read_language, save_language
from evaluate.labels.choose import choose
from evaluate.labels.effects import effect_metrics, tokens_in
from evaluate.labels.measured import Measured
from evaluate.labels.words import Words
from evaluate.metrics.baselines import Baselines, fit_ridge
from evaluate.metrics.catalogue import (
    Catalogue,
    catalogue,
    group_summaries,
    label_metrics,
    splitting,
    tensors,
)
from evaluate.metrics.language import Language, measure_language
from evaluate.metrics.measure import Select, training_selection
from evaluate.metrics.passes import first_pass, second_pass
from evaluate.metrics.redundancy import decoder_similarity
from evaluate.nesting import one_group
from evaluate.notes import Note, notes_of
from evaluate.probe.page import show_probes
from evaluate.records import (
    Checkpoint,
    LatentMetrics,
    Metrics,
    NotMeasured,
    OneGroupMetrics,
    Provenance,
    Results,
)
from evaluate.report.figures import draw
from evaluate.report.page_data import page_data
from evaluate.report.report import write_report
from evaluate.report.sides import changed_pages, show_beside, show_notes
from evaluate.report.training import training_of
from evaluate.subject import read, refuse_missing, run_of
from shards import Store
from shards.store import StoreSplit, read_tokenizer
from train.log import LogLine
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
    provenance: Provenance
    notes: Mapping[int, Note]
    """A person's notes on its latents."""

    @property
    def own(self) -> bool:
        """Whether it is of the held-out rows of the store that the run was trained on: the main evaluation.

        Where that store holds none out, of its train rows; a transcoder that does not say what it was trained on
        belongs to the harvest without a name.
        """
        known, store = self.provenance.trained_on_this_store, self.store
        trained_here = known or (known is None and not self.settings.harvest_name)
        main = "heldout" if len(store.heldout) else "train"
        return trained_here and self.provenance.split == main and not self.provenance.mismatch

    @property
    def split(self) -> StoreSplit:
        """The rows that are evaluated."""
        return getattr(self.store, self.settings.evaluate.split)


def evaluate(settings: Settings, ce_tokens: int = CROSS_ENTROPY_TOKENS) -> tuple[Metrics, bool]:
    """Metrics of the run that `settings` name, and whether they had to be measured.

    Nothing is done again when weights, store, settings, the sibling without nesting and the code that measures are
    those of the last time. Where each evaluation of a run is: evaluate/kept/evaluations.py.
    `ce_tokens`: tokens of the cross-entropy measurement, 0 for none; one that was measured before is kept then.
    """
    job = prepare(settings, ce_tokens)
    flat = None if settings.evaluate.checkpoint else one_group(settings, job.store, job.n_rows)
    there = read_all(job.run_dir)
    job = replace(job, provenance=_asked(job.provenance, flat, there))
    earlier = find(there, job.provenance)
    lacking = earlier is not None and _baselines_are_back(earlier, job)
    if earlier and not lacking and (earlier.tokens or not job.provenance.cross_entropy_tokens):
        return _settled(job, earlier, there), False
    coder, select = load_coder(job), _training_selection(job.run_dir)
    log = read_lines(settings.run_dir() / "metrics.jsonl")  # a broken line is told before the slow part
    language = _language(job, coder, there)
    if earlier and not lacking and isinstance(language.cross_entropy, NotMeasured):
        return _settled(job, earlier, there), False  # the language model cannot be had, as the last time
    _tell_version(job.provenance, there)
    results, latent_catalogue = _measure(job, coder, select, language, flat)
    with _lock(job, "another evaluation is writing it"):
        folder = place(job.run_dir, results, job.own)
        remove_asides(folder)
        make_room(folder, results)
        metrics = _write(folder, job, results, latent_catalogue, language, log)
        remove_answered(job.run_dir, Evaluation(folder, metrics))
        there = read_all(job.run_dir)
        show_beside(there)
        show_probes(folder)
        _show_notes(job, there)
    return metrics, True


def _lock(job: Job, refusal: str | None = None) -> AbstractContextManager[None]:
    """Of who writes an evaluation of the run; without a refusal it is waited for."""
    return locked(job.run_dir / ".evaluation", refusal and f"{job.run_dir}: {refusal}")


def _asked(of: Provenance, flat: OneGroupMetrics | None, there: There) -> Provenance:
    """With the sibling without nesting; where no cross-entropy is asked for, with the one that was measured before."""
    known = with_language(there, of)
    tokens = of.cross_entropy_tokens or (known.tokens if known else 0)
    return of.model_copy(
        update={"one_group_sha256": flat and flat.weights_sha256, "cross_entropy_tokens": tokens}
    )


def _language(job: Job, coder: Transcoder, there: There) -> Language:
    """What the language model says of these weights on this text: as it said before, or asked now."""
    if known := with_language(there, job.provenance):
        return read_language(known)
    return measure_language(job.settings, job.store, job.split, coder, job.provenance.cross_entropy_tokens)


def _baselines_are_back(earlier: Evaluation, job: Job) -> bool:
    """Whether an evaluation lacks the baselines, and they can be had: the train rows are there again, or another run's
    evaluation has them."""
    if earlier.metrics.baselines.linear is not None:
        return False
    return (
        not job.store.train.removed
        or baselines_before(job.settings.run_dir().parent, job.provenance) is not None
    )


def _settled(job: Job, earlier: Evaluation, there: There) -> Metrics:
    """What was measured before, in its place, and shown beside the run's other evaluations."""
    folder = place(job.run_dir, earlier.metrics, job.own)
    if earlier.folder == folder and not changed_pages(there, job.provenance.weights_sha256):
        _show_notes(job, there)
        return earlier.metrics
    with _lock(job):
        there = read_all(job.run_dir)
        if again := find(there, job.provenance):
            settle(again, place(job.run_dir, again.metrics, job.own))
            there = read_all(job.run_dir)
        show_beside(there)
        _show_notes(job, there)
    return earlier.metrics


def _show_notes(job: Job, there: There) -> None:
    show_notes(there, job.provenance.weights_sha256, job.notes)


def _tell_version(of: Provenance, there: There) -> None:
    """Say that an evaluation of another version is measured again."""
    for folder, values in there:
        before = Done.model_validate(values).provenance or Asked()
        same = {"weights_sha256", "store_fingerprint", "split", "rows"}
        alike = before.model_dump(include=same) == of.model_dump(include=same)
        if alike and before.metrics_version != METRICS_VERSION:
            print(
                f"{folder}: of version {before.metrics_version} of the evaluation, this is {METRICS_VERSION}: "
                "measured again",
                file=sys.stderr,
            )


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
    split.refuse_removed()
    run_dir = run_of(settings, store)
    metadata = read_metadata(run_dir)
    trained_on = metadata.get("harvest_fingerprint")
    source = store.manifest.source
    allowed, optional = settings.evaluate.allow_mismatch, {}
    if differing := refuse_mismatch(metadata.get("source", {}), store, str(run_dir), allowed):
        optional["mismatch"] = differing
    if "checkpoint" in metadata:
        optional["checkpoint"] = Checkpoint(**metadata["checkpoint"])
    if used := metadata.get("used"):  # an imported transcoder has none
        optional |= {"learning_rate": used["lr"], "normalisation": used["normalisation"]}
    provenance = Provenance(
        run=settings.run,
        model=source.model,
        layer=source.layer,
        input_hook=source.input_hook,
        output_hook=source.output_hook,
        dataset=source.dataset,
        split=settings.evaluate.split,
        rows=n_rows,
        cross_entropy_tokens=ce_tokens,
        store_fingerprint=store.manifest.fingerprint,
        trained_on_this_store=trained_on == store.manifest.fingerprint if trained_on else None,
        weights_sha256=sha256(run_dir / FILE_NAME),
        metrics_version=METRICS_VERSION,
        **optional,
    )
    notes = notes_of(run_dir, settings.layer, metadata["prefix_ends"][-1])
    return Job(settings, store, run_dir, n_rows, provenance, notes)


def load_coder(job: Job) -> Transcoder:
    """The run's transcoder, fed as the store's inputs are, on the device of model.device."""
    coder = read(job.run_dir, job.store, job.settings.evaluate.allow_mismatch)
    return coder.to(pick_device(job.settings.model.device))


def baselines_for(job: Job) -> Baselines:
    """The mean and the best linear map of the train rows; where those were removed, as they were measured before."""
    if not job.store.train.removed:
        device = pick_device(job.settings.model.device)
        return Baselines(fit_ridge(job.store.train, device=device))
    before = baselines_before(job.settings.run_dir().parent, job.provenance)
    if before is None:
        print(
            f"{job.store.path}: its train rows were removed, so their mean and best linear map cannot be measured; "
            "everything else is",
            file=sys.stderr,
        )
    return Baselines(None, before)


def _training_selection(run_dir: Path) -> Select | None:
    """The selection that the run was trained with; none when it was imported."""
    settings = read_metadata(run_dir).get("settings")
    return settings and training_selection(settings["transcoder"]["selection"], settings["transcoder"]["k"])


def _measure(
    job: Job,
    coder: Transcoder,
    select: Select | None,
    language: Language,
    flat: OneGroupMetrics | None,
) -> tuple[Results, Catalogue]:
    """Both passes, what is computed from the weights alone, and what the language model said before."""
    split = job.split
    moments = job.store.manifest.splits[job.settings.evaluate.split].outputs
    assert moments is not None, "a split with rows has moments"
    text = TokenText(read_tokenizer(job.store.tokenizer_path))
    baselines = baselines_for(job)
    with progress("statistics", job.n_rows, "rows") as bar:
        first = first_pass(coder, split, job.n_rows, select, baselines, moments, text.size, bar.update)
    measurement, words = first.measurement, Words(text, split.contexts)
    firings = measurement.prefixes[-1].firing.firings.cpu().numpy()
    labels = choose(first.sampled, firings, split, job.n_rows, words)
    measured = Measured(labels, split.contexts, words, coder.W_dec.device)
    with progress("contexts", job.n_rows, "rows") as bar:
        samples = second_pass(coder, split, job.n_rows, first, measured, bar.update)
    redundancy, neighbours = decoder_similarity(coder.W_dec, coder.prefix_ends)
    latent_catalogue = catalogue(first, samples, neighbours, language.effects, coder.prefix_ends, measured)
    results = Results(
        rows=measurement.deviation.rows,
        prefixes=measurement.result(language.prefixes),
        latents=LatentMetrics(
            **dict(measurement.prefixes[-1].firing.result()),
            groups=group_summaries(latent_catalogue, coder.prefix_ends),
            splitting=splitting(latent_catalogue),
            labels=label_metrics(latent_catalogue),
            effects=effect_metrics(
                language.effects, latent_catalogue.firings, tokens_in(split.contexts, text.size)
            ),
            coactivation_rows=first.coactivation.rows,
        ),
        baselines=first.baselines.result(measurement.deviation.total, flat),
        errors=first.errors(text.label),
        redundancy=redundancy,
        provenance=job.provenance,
        cross_entropy=language.cross_entropy,
    )
    return results, latent_catalogue


def _write(
    folder: Path,
    job: Job,
    results: Results,
    latent_catalogue: Catalogue,
    language: Language,
    log: list[LogLine],
) -> Metrics:
    """Plots, page, per-latent tensors; metrics.json last, so that it stands for a complete evaluation."""
    text = TokenText(read_tokenizer(job.store.tokenizer_path))
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "metrics.json", folder / LANGUAGE, *folder.glob("*.png")):
        old.unlink(missing_ok=True)
    drawn = draw(results, latent_catalogue, log, folder)
    data = page_data(latent_catalogue, job.split.contexts, text)
    write_report(folder / "report.html", results, data, drawn, training_of(job.run_dir), job.notes)
    provenance = json.dumps(results.provenance.written())
    save_tensors(folder / LATENTS, tensors(latent_catalogue), {"provenance": provenance})
    samples = latent_catalogue.samples.tensors(len(latent_catalogue.group), job.split.contexts.shape[1])
    save_tensors(folder / CONTEXTS, samples, {"provenance": provenance})
    files = ["report.html", LATENTS, CONTEXTS, *(each.plot.file for each in drawn)]
    if language.by_context:
        save_language(folder, language, results.provenance.written())
        files.append(LANGUAGE)
    metrics = Metrics(**dict(results), files=files)
    write_record(folder / "metrics.json", metrics)
    return metrics
