"""How a run was trained, in the few words at the head of its page."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transcoder.weights import FILE_NAME, read_metadata

SELECTIONS = {"batch_topk": "batch top-k", "topk": "top-k"}


def training_of(run_dir: Path) -> list[tuple[str, str]]:
    """(name, value) pairs from the header of the run's weights, and the date of the file."""
    header = read_metadata(run_dir)
    day = datetime.fromtimestamp((run_dir / FILE_NAME).stat().st_mtime, UTC).date().isoformat()
    return [*_facts(header), ("weights of", day)]


def _facts(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = header.get("settings")
    if not settings:
        return [("imported from", str((header.get("imported") or {}).get("from", "another tool")))]
    coder, train, used = settings["transcoder"], settings.get("train") or {}, header.get("used") or {}
    ends = header["prefix_ends"]
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    rows = (header.get("training") or {}).get("rows", train.get("rows"))
    facts: list[tuple[str, Any]] = [
        ("k", coder.get("k")),
        ("selection", SELECTIONS.get(coder.get("selection", ""), coder.get("selection"))),
        ("learning rate", _number(used.get("lr", train.get("lr")))),
        ("rows trained", _number(rows)),
        ("groups" if len(sizes) > 1 else "latents", " + ".join(f"{size:,}" for size in sizes)),
        ("skip connection", "yes" if coder.get("skip") else None),
        ("begun from", Path(train["init_from"]).name if train.get("init_from") else None),
        ("seed", train.get("seed")),
        ("commit", _commit(header.get("git_commit"))),
    ]
    if checkpoint := header.get("checkpoint"):
        facts.append(("checkpoint", f"step {checkpoint['step']:,} of {checkpoint['of']:,}"))
    return [(name, str(value)) for name, value in facts if value is not None]


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _commit(commit: str | None) -> str | None:
    """Eight digits, and a + if files had been changed since that commit."""
    return commit and commit[:8] + ("+" if commit.endswith("+") else "")
