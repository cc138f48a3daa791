"""The probes of one run, in a straight line: store and weights in, probes.json out."""

from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import locked
from common.progress import progress
from common.settings import Settings
from evaluate.files import write_record
from evaluate.kept.evaluations import beside
from evaluate.probe.classes import Task, class_tasks, token_tasks
from evaluate.probe.documents import Documents, documents_of, sides
from evaluate.probe.page import FILE, read_probes, show_probes
from evaluate.probe.records import PROBES_VERSION, LeftOutClass, Probes, ProbesProvenance
from evaluate.probe.rows import Places, places, values_of
from evaluate.run import Job, load_coder, prepare
from train.sweep import keep_earlier


def probe(settings: Settings) -> tuple[Probes, Path, bool]:
    """Probes of the run that `settings` name, the file that they are in, and whether they had to be measured."""
    job = prepare(settings, ce_tokens=0)
    documents = documents_of(settings, job.store, job.split, settings.evaluate.split)
    path = beside(job.run_dir, job.provenance, job.own) / FILE
    provenance = _provenance(job, documents)
    if (earlier := read_probes(path)) and earlier.provenance == provenance:
        return earlier, path, False
    probes = measure(job, documents, provenance)
    with locked(job.run_dir / ".evaluation", None):
        path = beside(job.run_dir, job.provenance, job.own) / FILE  # an evaluation may have come meanwhile
        path.parent.mkdir(parents=True, exist_ok=True)
        if (there := read_probes(path)) and not answers_all(there.provenance, provenance):
            keep_earlier(path.parent, FILE, alone=True)
        write_record(path, probes)
        show_probes(path.parent)
    return probes, path, True


def written(settings: Settings) -> Probes:
    """What `probe` has written for these settings, without reading the text again."""
    job = prepare(settings, ce_tokens=0)
    probes = read_probes(beside(job.run_dir, job.provenance, job.own) / FILE)
    assert probes is not None, "probe() was called before"
    return probes


def answers_all(there: ProbesProvenance, new: ProbesProvenance) -> bool:
    """Whether new probes say all that those of before do: on the same rows, with their labels if they had any."""
    same = ("store_fingerprint", "split", "rows")
    return all(getattr(there, key) == getattr(new, key) for key in same) and there.label_column in (
        None,
        new.label_column,
    )


def _provenance(job: Job, documents: Documents) -> ProbesProvenance:
    shared = {key: value for key, value in job.provenance if key in ProbesProvenance.model_fields}
    column = job.settings.data.label_column
    optional = {} if job.provenance.mismatch else {"mismatch"}
    return ProbesProvenance(
        **{key: value for key, value in shared.items() if key not in optional},
        documents=documents.how,
        label_column=column,
        labels_sha256=documents.labels_sha256,
        probes_version=PROBES_VERSION,
    )


def measure(job: Job, documents: Documents, provenance: ProbesProvenance) -> Probes:
    """Every probe; raises `InputError` for too few documents, and where no class has enough rows."""
    from evaluate.probe.measure import (
        answers,
        asked,
        class_record,
        family_records,
    )  # imports scikit-learn: seconds

    where = places(job.split, job.n_rows, job.store.manifest.source, documents.of)
    n_documents = int(documents.of.max()) + 1
    there = np.bincount(where.document, minlength=n_documents) > 0
    on = sides(there, documents.how)
    coder = load_coder(job)
    tasks = [*token_tasks(job.split.text, where.token, where.previous), *_document_tasks(documents, where)]
    questions = asked(tasks, where.document, on, coder.d_in + coder.d_out)
    if not questions.questions:
        raise InputError(
            f"{job.store.path}: no class of tokens or documents has enough of the {job.n_rows:,} rows for a probe "
            f"({questions.left_out[0].why if questions.left_out else 'there are none'}); harvest more text"
        )
    with progress("rows for probes", int(questions.rows[-1]) + 1, "rows") as bar:
        values = values_of(coder, job.split, questions.rows, bar.update)
    with progress("probes", len(questions.questions), "classes") as bar:
        found = answers(questions, values, where.document, n_documents, bar.update)
    left_out = questions.left_out
    if documents.sources_unknown:
        left_out = [*left_out, LeftOutClass(family="source", name="", why=documents.sources_unknown)]
    return Probes(
        train_documents=int(on.train.sum()),
        test_documents=int(on.test.sum()),
        families=family_records(found, coder.prefix_ends),
        classes=[class_record(each, coder.prefix_ends, where.document) for each in found],
        left_out=left_out,
        provenance=provenance,
    )


def _document_tasks(documents: Documents, where: Places) -> list[Task]:
    known = {"source": documents.sources, "label": documents.labels}
    return [
        task
        for family, of in known.items()
        if of is not None
        for task in class_tasks(family, of[0], of[1][where.document])
    ]
