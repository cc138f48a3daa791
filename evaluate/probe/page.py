"""The probes in an evaluation's report.html, after the columns of other evaluations (evaluate/report/sides.py)."""

import json
from pathlib import Path

from pydantic import ValidationError

from common.files import write_whole
from evaluate.files import Asked, Done, complete
from evaluate.kept.evaluations import GUESTS
from evaluate.probe.console import K, lines, name_of, of_k, percent
from evaluate.probe.records import FamilyPrefix, ProbeAccuracy, Probes
from evaluate.report.sides import PAGE
from evaluate.report.sides import STOP as BEFORE
from evaluate.report.templates import HTML

(FILE,) = GUESTS
START, STOP = b"<!-- probes -->", b"<!-- /probes -->"


def read_probes(path: Path) -> Probes | None:
    """Probes of before; None where there are none, and where another version wrote them."""
    try:
        return Probes.model_validate(json.loads(path.read_bytes())) if path.exists() else None
    except (ValueError, ValidationError):
        return None


def show_probes(folder: Path) -> None:
    """Put the probes of an evaluation's weights into its page, in place of those that are there.

    The caller holds the run's lock. A page of a version without a place for them stays as it is.
    """
    values, probes = complete(folder), read_probes(folder / FILE)
    if values is None:
        return
    page = (folder / PAGE).read_bytes()
    of = Done.model_validate(values).provenance or Asked()
    shown = probes is not None and probes.provenance.weights_sha256 == of.weights_sha256
    own = START + _section(probes).encode() + STOP if probes is not None and shown else b""
    if START in page:
        start, stop = page.index(START), page.index(STOP) + len(STOP)
    elif BEFORE in page:
        start = stop = page.index(BEFORE) + len(BEFORE)
    else:
        return
    if page[start:stop] != own:
        write_whole(folder / PAGE, page[:start] + own + page[stop:])


def _section(probes: Probes) -> str:
    def text(of: ProbeAccuracy) -> str:
        return percent(of.accuracy, of.error)

    def random(prefix: FamilyPrefix) -> str:
        (found,) = (each for each in prefix.sparse if each.k == K)
        return percent(found.random, found.random_error)

    near, *_ = lines(probes)
    return HTML.get_template("probes.html").render(
        probes=probes,
        nested=len(probes.families[0].prefixes) > 1,
        ks=[each.k for each in probes.families[0].prefixes[0].sparse],
        k=K,
        name_of=name_of,
        of_k=of_k,
        text=text,
        random=random,
        notes=near,
    )
