"""The evaluation of one run, in a straight line: store and weights in, metrics.json, plots and page out."""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from common.device import pick_device
from common.errors import InputError
from common.files import locked, remove_asides, sha256
from common.processes import ALONE, Processes, joined
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
from evaluate.metrics.coactivation import Partners
from evaluate.metrics.contexts import Samples
from evaluate.metrics.language import Language, measure_language
from evaluate.metrics.measure import Select, training_selection
from evaluate.metrics.passes import First, first_pass, second_pass
from evaluate.metrics.redundancy import Neighbours, decoder_similarity
from evaluate.metrics.rows import own_rows
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
    Record,
    RedundancyMetrics,
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

AnyRecord = TypeVar("AnyRecord", bound=Record)


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


@dataclass(frozen=True)
class Begun:
    """What is known before anything is measured."""

    job: Job
    flat: OneGroupMetrics | None
    """The sibling without nesting."""
    there: There
    earlier: Evaluation | None
    """The evaluation that there is; it may lack the cross-entropy, and nothing else."""
    log: list[LogLine]

    @property
    def decided(self) -> "Decided":
        """What all processes have to know."""
        tokens = self.job.provenance.cross_entropy_tokens
        whole = self.earlier is not None and bool(self.earlier.tokens or not tokens)
        there = self.earlier is not None
        return Decided(
            run_dir=str(self.job.run_dir), provenance=self.job.provenance, there=there, whole=whole
        )


class Decided(Record):
    """What the first process tells the others of it."""

    run_dir: str
    provenance: Provenance
    there: bool
    """Whether there is an evaluation that lacks the cross-entropy at most."""
    whole: bool
    """Whether it lacks nothing."""


@dataclass(frozen=True)
class Found:
    """What was measured."""

    first: First
    samples: Samples
    measured: Measured
    partners: tuple[Partners, Partners]
    redundancy: RedundancyMetrics
    neighbours: Neighbours
    ends: tuple[int, ...]
    """Latents of each prefix."""
    text: TokenText


def evaluate(settings: Settings, ce_tokens: int = CROSS_ENTROPY_TOKENS) -> tuple[Metrics, bool]:
    """Metrics of the run that `settings` name, and whether they had to be measured.

    Nothing is done again when weights, store, settings, the sibling without nesting and the code that measures are
    those of the last time. Where each evaluation of a run is: evaluate/kept/evaluations.py.
    `ce_tokens`: tokens of the cross-entropy measurement, 0 for none; one that was measured before is kept then.
    """
    with joined(pick_device(settings.model.device)) as peers:
        return evaluate_with(peers, settings, ce_tokens)


def evaluate_with(peers: Processes, settings: Settings, ce_tokens: int) -> tuple[Metrics, bool]:
    """`evaluate` in these processes: the first decides and writes, each measures a part, all return the same."""
    begun = _begin(settings, ce_tokens) if peers.leads else None
    decided = _told(peers, begun and begun.decided, Decided)
    language, found, settled = None, None, decided.whole
    if not settled:
        job = begun.job if begun else _job_of(settings, decided)
        coder = load_coder(job)
        language = _language(job, coder, begun.there if begun else read_all(job.run_dir), peers)
        # as the last time, the language model cannot be had
        settled = decided.there and isinstance(language.cross_entropy, NotMeasured)
        if not settled:
            if begun:
                _tell_version(job.provenance, begun.there)
            found = _measure(job, coder, peers)
    metrics = begun and (_finish(begun, found, language) if found and language else _settled(begun))
    return _told(peers, metrics, Metrics), not settled


def _told(peers: Processes, told: AnyRecord | None, kind: type[AnyRecord]) -> AnyRecord:
    """What the first process tells: a record of this kind; the others have none."""
    if peers.world > 1:
        line = json.dumps(told.written()) if told else ""
        told = kind.model_validate_json(peers.said(line)[0])
    assert told is not None, "the first process has one"
    return told


def _begin(settings: Settings, ce_tokens: int) -> Begun:
    job = prepare(settings, ce_tokens)
    flat = None if settings.evaluate.checkpoint else one_group(settings, job.store, job.n_rows)
    there = read_all(job.run_dir)
    job = replace(job, provenance=_wanted(job.provenance, flat, there))
    earlier = find(there, job.provenance)
    if earlier and _baselines_are_back(earlier, job):
        earlier = None
    begun = Begun(job, flat, there, earlier, [])
    if begun.decided.whole:
        return begun
    # a broken line is told before the slow part
    return replace(begun, log=read_lines(settings.run_dir() / "metrics.jsonl"))


def _job_of(settings: Settings, decided: Decided) -> Job:
    of = decided.provenance
    return Job(settings, Store.of(settings), Path(decided.run_dir), of.rows, of, {})


def _finish(begun: Begun, found: Found, language: Language) -> Metrics:
    """Puts together what was measured, and writes it."""
    job = begun.job
    results, latent_catalogue = _results(job, found, language, begun.flat)
    with _lock(job, "another evaluation is writing it"):
        folder = place(job.run_dir, results, job.own)
        remove_asides(folder)
        make_room(folder, results)
        metrics = _write(folder, job, results, latent_catalogue, language, begun.log)
        remove_answered(job.run_dir, Evaluation(folder, metrics))
        there = read_all(job.run_dir)
        show_beside(there)
        show_probes(folder)
        _show_notes(job, there)
    return metrics


def _lock(job: Job, refusal: str | None = None) -> AbstractContextManager[None]:
    """Of who writes an evaluation of the run; without a refusal it is waited for."""
    return locked(job.run_dir / ".evaluation", refusal and f"{job.run_dir}: {refusal}")


def _wanted(of: Provenance, flat: OneGroupMetrics | None, there: There) -> Provenance:
    """With the sibling without nesting; where no cross-entropy is asked for, with the one that was measured before."""
    known = with_language(there, of)
    tokens = of.cross_entropy_tokens or (known.tokens if known else 0)
    return of.model_copy(
        update={"one_group_sha256": flat and flat.weights_sha256, "cross_entropy_tokens": tokens}
    )


def _language(job: Job, coder: Transcoder, there: There, peers: Processes) -> Language:
    """What the language model says of these weights on this text: as it said before, or asked now."""
    known = with_language(there, job.provenance)
    if not peers.any(known is None):
        assert known is not None
        return read_language(known)
    tokens = job.provenance.cross_entropy_tokens
    return measure_language(job.settings, job.store, job.split, coder, tokens, peers)


def _baselines_are_back(earlier: Evaluation, job: Job) -> bool:
    """Whether an evaluation lacks the baselines, and they can be had: the train rows are there again, or another run's
    evaluation has them."""
    if earlier.metrics.baselines.linear is not None:
        return False
    return (
        not job.store.train.removed
        or baselines_before(job.settings.run_dir().parent, job.provenance) is not None
    )


def _settled(begun: Begun) -> Metrics:
    """What was measured before, in its place, and shown beside the run's other evaluations."""
    job, earlier, there = begun.job, begun.earlier, begun.there
    assert earlier is not None, "there is one"
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


def baselines_for(job: Job, peers: Processes = ALONE) -> Baselines:
    """The mean and the best linear map of the train rows; where those were removed, as they were measured before."""
    if not job.store.train.removed:
        device = pick_device(job.settings.model.device)
        return Baselines(fit_ridge(job.store.train, device=device, peers=peers))
    before = baselines_before(job.settings.run_dir().parent, job.provenance)
    if before is None and peers.leads:
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


def _measure(job: Job, coder: Transcoder, peers: Processes) -> Found:
    """Both passes, and what is computed from the weights alone; in all processes."""
    split, select = job.split, _training_selection(job.run_dir)
    moments = job.store.manifest.splits[job.settings.evaluate.split].outputs
    assert moments is not None, "a split with rows has moments"
    text = TokenText(read_tokenizer(job.store.tokenizer_path))
    baselines = baselines_for(job, peers)
    start, stop = own_rows(job.n_rows, peers)
    with progress("statistics", stop - start, "rows") as bar:
        first = first_pass(coder, split, job.n_rows, select, baselines, moments, text.size, bar.update, peers)
    words, ends = Words(text, split.contexts), coder.prefix_ends
    firings = first.measurement.prefixes[-1].firing.firings.cpu().numpy()
    labels = choose(first.sampled, firings, split, job.n_rows, words, peers)
    measured = Measured(labels, split.contexts, words, coder.W_dec.device)
    with progress("contexts", stop - start, "rows") as bar:
        samples = second_pass(coder, split, job.n_rows, first, measured, bar.update, peers)
    redundancy, neighbours = decoder_similarity(coder.W_dec, ends, peers=peers)
    partners = first.coactivation.partners(ends, peers=peers)
    return Found(first, samples, measured, partners, redundancy, neighbours, ends, text)


def _results(
    job: Job, found: Found, language: Language, flat: OneGroupMetrics | None
) -> tuple[Results, Catalogue]:
    first, ends, split = found.first, found.ends, job.split
    text, measurement = found.text, found.first.measurement
    latent_catalogue = catalogue(
        first, found.samples, found.neighbours, language.effects, ends, found.measured, found.partners
    )
    results = Results(
        rows=measurement.deviation.rows,
        prefixes=measurement.result(language.prefixes),
        latents=LatentMetrics(
            **dict(measurement.prefixes[-1].firing.result()),
            groups=group_summaries(latent_catalogue, ends),
            splitting=splitting(latent_catalogue),
            labels=label_metrics(latent_catalogue),
            effects=effect_metrics(
                language.effects, latent_catalogue.firings, tokens_in(split.contexts, text.size)
            ),
            coactivation_rows=first.coactivation.rows,
        ),
        baselines=first.baselines.result(measurement.deviation.total, flat),
        errors=first.errors(text.label),
        redundancy=found.redundancy,
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
