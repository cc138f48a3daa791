"""Explain the latents of one layer's run: choose passages, say what it costs, ask, write."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.device import pick_device
from common.errors import InputError
from common.files import locked, sha256
from common.settings import Settings
from evaluate.explain.ask import Asked, Cost
from evaluate.explain.endpoint import Endpoint
from evaluate.explain.passages import Text
from evaluate.explain.records import VERSION, Passages, Summary
from evaluate.explain.replies import FILE, Replies
from evaluate.explain.scores import groups_of
from evaluate.explain.tasks import Kin, Task, sampled, task
from evaluate.explain.write import as_note, refuse_another_file, write_explanations
from evaluate.files import finished, is_of, latents_of, write_record
from evaluate.kept.evaluations import evaluation_on
from evaluate.metrics.contexts import REACH
from evaluate.notes import notes_of
from evaluate.probe.rows import separated
from evaluate.subject import read, run_of
from shards import Store
from shards.store import StoreSplit, read_tokenizer
from transcoder.weights import FILE_NAME, read_metadata

SEED = 0
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Options:
    """What is explained, and from how much."""

    latents: Sequence[int] | None
    """None: a sample."""
    sample: int
    shown: int
    scored: int
    concurrency: int


@dataclass(frozen=True)
class Subject:
    """A run, and the evaluation that knows its latents."""

    settings: Settings
    store: Store
    split: StoreSplit
    run_dir: Path
    weights_sha256: str
    n_latents: int
    evaluation: Path
    rows: int

    def folder(self, model: str) -> Path:
        """Where the explanations of a language model are kept."""
        name = re.sub(r"[^\w.-]+", "_", model).strip("._") or "model"
        return self.run_dir / "explanations" / name[:60]  # 240 bytes at most, in UTF-8


@dataclass
class Chosen:
    """The latents that are explained, and those that cannot be, by reason."""

    tasks: list[Task] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def add(self, latent: int, made: Task | str) -> None:
        """Take a task, or note why there is none."""
        if isinstance(made, str):
            self.left_out.setdefault(made, []).append(latent)
        else:
            self.tasks.append(made)


@dataclass(frozen=True)
class Explained:
    """What came of it."""

    summary: Summary
    folder: Path
    csv: Path


def subject_of(settings: Settings) -> Subject:
    """Raises `InputError` where the run, its rows or an evaluation of its weights on them is missing."""
    store = Store.of(settings)
    run_dir = run_of(settings, store)
    split = store.split(settings.evaluate.split)
    digest = sha256(run_dir / FILE_NAME)
    folder = evaluation_on(run_dir, digest, store.manifest.fingerprint, settings.evaluate.split)
    metrics = finished(folder) if is_of(folder, digest) else None
    of = metrics and metrics.provenance
    if of is None or (of.store_fingerprint, of.split) != (
        store.manifest.fingerprint,
        settings.evaluate.split,
    ):
        raise InputError(
            f"{run_dir}: explanations are of evaluated latents, and there is no evaluation of these weights on the "
            f"{settings.evaluate.split} rows of {store.path}; evaluate it first: "
            f"{settings.command('evaluate')}"
        )
    split.refuse_removed()
    # Whole windows: their rows are in random order, so in a part of one hardly a passage is known from end to end.
    window = store.manifest.source.shard_rows
    rows = min(len(split), -(-min(of.rows, settings.evaluate.rows or of.rows) // window) * window)
    n_latents = read_metadata(run_dir)["prefix_ends"][-1]
    return Subject(settings, store, split, run_dir, digest, n_latents, folder, rows)


def choose(subject: Subject, options: Options) -> Chosen:
    """The tasks of the latents asked for. Reads every measured row through the transcoder once.

    Raises `InputError` for a latent that the run does not have, and where none has passages enough.
    """
    group, firings, nearest, twins = latents_of(
        subject.evaluation, "group", "firings", "nearest_latents", "twins"
    )
    for latent in options.latents or ():
        if not 0 <= latent < len(group):
            raise InputError(
                f"latents: expected 0 to {len(group) - 1}, those of {subject.run_dir}, found {latent}"
            )
    device = pick_device(subject.settings.model.device)
    coder = read(subject.run_dir, subject.store, subject.settings.evaluate.allow_mismatch).to(device)
    text = Text(subject.store, subject.split, coder, subject.rows)
    kin = Kin(nearest, twins, text.fired > 0)
    chosen = Chosen()

    def add(latent: int) -> None:
        made = task(text, latent, int(group[latent]), kin, options.shown, options.scored, SEED)
        chosen.add(latent, made)

    if options.latents is not None:
        for latent in options.latents:
            add(latent)
    else:
        n_groups = int(group.max()) + 1
        for g, candidates in enumerate(sampled(group, firings > 0, SEED)):
            until = len(chosen.tasks) + len(range(g, options.sample, n_groups))
            for latent in candidates:
                if len(chosen.tasks) == until:
                    break
                add(latent)
    if not chosen.tasks:
        raise InputError(f"{subject.run_dir}: no latent can be explained ({told(chosen.left_out)})")
    return chosen


def told(left_out: dict[str, list[int]]) -> str:
    """Why latents are left out, in words."""
    parts = [
        f"{why}: {len(some)} latents" if len(some) > 5 else f"{why}: latent {' '.join(map(str, some))}"
        for why, some in left_out.items()
    ]
    return "; ".join(parts) or "none fires"


@dataclass
class Explanations:
    """One layer's explanations: planned, then asked for."""

    subject: Subject
    endpoint: Endpoint
    options: Options
    chosen: Chosen

    @property
    def folder(self) -> Path:
        """Of the replies and the summary."""
        return self.subject.folder(self.endpoint.model)

    def cost(self) -> Cost:
        """What is left to be asked."""
        return self._asked().cost(read_tokenizer(self.subject.store.tokenizer_path))

    def make(self) -> Explained:
        """Ask for what is lacking and write what came back, also where it stops early.

        Raises `InputError` for an endpoint that cannot be used, and for two that explain one run at a time; before
        anything is asked, for a file of labels in the run directory that cannot be read.
        """
        own = self.subject
        refuse_another_file(own.run_dir)
        notes_of(own.run_dir, own.settings.layer, own.n_latents)
        with locked(
            self.subject.run_dir / ".explanations", f"{self.folder}: other explanations are being written"
        ):
            asked = self._asked()
            for address, n in asked.elsewhere().items():
                print(
                    f"{n:,} of the answers were given by {address}; if that was another model, remove {self.folder}",
                    file=sys.stderr,
                )
            try:
                asked.explain(self.options.concurrency)
                asked.score(self.options.concurrency)
            except (InputError, KeyboardInterrupt):
                if any(asked.explanation(each) for each in asked.tasks):
                    self._write(asked)
                raise
            return self._write(asked)

    def _asked(self) -> Asked:
        return Asked(self.chosen.tasks, self.endpoint, Replies(self.folder / FILE))

    def _write(self, asked: Asked) -> Explained:
        own, store = self.subject, self.subject.store.manifest
        latents = sorted(map(asked.result, asked.tasks), key=lambda each: each.latent)
        summary = Summary(
            version=VERSION,
            model=self.endpoint.model,
            endpoint=self.endpoint.base_url,
            temperature=self.endpoint.temperature,
            weights_sha256=own.weights_sha256,
            store_fingerprint=store.fingerprint,
            passages=Passages(
                shown=self.options.shown,
                scored=self.options.scored,
                sample=self.options.sample if self.options.latents is None else None,
                reach=REACH,
                split=own.settings.evaluate.split,
                rows=own.rows,
                documents=separated(store.source),
            ),
            requests=asked.requests(),
            groups=groups_of(latents),
            latents=latents,
            left_out={why: sorted(some) for why, some in self.chosen.left_out.items()},
        )
        write_record(self.folder / SUMMARY, summary)
        said = {
            each.latent: as_note(each.explanation, each.score, self.endpoint.model)
            for each in latents
            if each.explanation is not None
        }
        layer, n_latents = own.settings.layer, own.n_latents
        csv = write_explanations(own.run_dir, layer, n_latents, own.weights_sha256, said)
        return Explained(summary, self.folder, csv)


def planned(settings: Settings, endpoint: Endpoint, options: Options) -> Explanations:
    """What is to be asked of one layer's run."""
    subject = subject_of(settings)
    return Explanations(subject, endpoint, options, choose(subject, options))
