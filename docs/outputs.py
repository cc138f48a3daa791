"""docs/outputs.md's tables of the JSON files of evaluate, from their records: python -m docs.outputs writes them."""

import typing
from collections.abc import Iterator
from pathlib import Path

from evaluate.absorption.records import Absorption
from evaluate.comparison.records import Comparison
from evaluate.explain.records import Summary
from evaluate.explain.replies import Reply
from evaluate.model.records import ModelMetrics
from evaluate.probe.records import Probes
from evaluate.prompt.records import Prompt
from evaluate.records import Metrics, Record

DOCUMENT = Path(__file__).with_name("outputs.md")
FILES = {
    "evaluation/metrics.json": Metrics,
    "evaluation/probes.json": Probes,
    "comparison/compare.json": Comparison,
    "absorption/absorption.json": Absorption,
    "sets/<run>/model.json": ModelMetrics,
    "prompts/<text>/prompt.json": Prompt,
    "explanations/<model>/summary.json": Summary,
    "explanations/<model>/replies.jsonl": Reply,
}


def places(record: type[Record], path: str = "") -> Iterator[tuple[str, type[Record]]]:
    """(where, what) of every record in a file, the whole first: ("prefixes[].cross_entropy", LanguageMetrics)."""
    yield path, record
    for name, field in record.model_fields.items():
        for many, part in _records(field.annotation):
            yield from places(part, f"{path}.{name}".removeprefix(".") + ("[]" if many else ""))


def _records(annotation: object, many: bool = False) -> Iterator[tuple[bool, type[Record]]]:
    """The records that an annotation names, and whether in a list, or a table by number."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        yield many, annotation
    for part in typing.get_args(annotation):
        yield from _records(part, many or typing.get_origin(annotation) in (list, dict))


def keys(record: type[Record]) -> dict[str, str]:
    """Each key as the file has it, and what it is."""
    return {
        field.serialization_alias or name: " ".join((field.description or "").split())
        for name, field in record.model_fields.items()
    }


def tables() -> str:
    """The document's part on these files: a table for each record, headed by all the places that have it.

    Of a record that extends one further up only what it adds.
    """
    lines: list[str] = []
    listed: dict[type[Record], str] = {}
    first: dict[type[Record], str] = {}
    for file, whole in FILES.items():
        lines += [f"## {file}", ""]
        where: dict[type[Record], list[str]] = {}
        again = []
        for path, record in places(whole):
            if record not in listed:
                where.setdefault(record, []).append(path)
            elif "." not in path:
                again.append(f"`{path}` is as `{listed[record]}` of {first[record]}.")
        for record, paths in where.items():
            known = next((base for base in record.__mro__[1:] if base in listed), None)
            more = {key: text for key, text in keys(record).items() if not known or key not in keys(known)}
            if paths != [""]:
                lines += ["### " + ", ".join(f"`{path}`" for path in paths), ""]
            also = f" All of `{listed[known]}`, and:" if known else ""
            lines += [" ".join((record.__doc__ or "").split()) + also, "", "| key | |", "|---|---|"]
            lines += [*(f"| `{key}` | {text} |" for key, text in more.items()), ""]
            listed[record], first[record] = paths[0], file
        lines += [*again, ""] if again else []
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The document with its last part, from the first of the files on, as the records have it."""
    return text[: text.index(f"## {next(iter(FILES))}")] + tables()


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
