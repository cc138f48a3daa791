"""docs/api.md: its examples run, and its names and parameters are the code's."""

import doctest
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import shards
import transcoder
from common.settings import ROOT, Settings
from evaluate import questions
from evaluate.questions import Questions
from evaluate.read import Intervention, Reader, Sentence
from harvest.run import harvest
from shards import Store
from tests.evaluate.fakes import random_coder

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
CLASSES = [
    *(getattr(package, name) for package in (shards, transcoder, questions) for name in package.__all__),
    Sentence,
    Intervention,
]
NAMED = {
    (match[1], match[2]): match[3]
    for cell in re.findall(r"^\| (`[^|]+`) \|", PAGE, re.MULTILINE)
    for match in re.finditer(r"`([A-Z]\w+)\.(\w+)(?:\(([^)]*)\))?`", cell)
}
"""(class, name) -> parameters, None of an attribute."""


def public(owner: type) -> set[str]:
    """Public names of a class: what it defines, its fields, and what its constructor sets."""
    names = {name for name in vars(owner) if not name.startswith("_")}
    names |= set(getattr(owner, "__annotations__", {}))
    if owner.__name__ in ("Store", "StoreSplit", "Questions", "Contexts"):
        targets = re.findall(r"^ +(.+?) = ", inspect.getsource(owner.__init__), re.MULTILINE)
        names |= {name for target in targets for name in re.findall(r"self\.([a-z]\w*)", target)}
    return names


@pytest.mark.parametrize("owner", CLASSES, ids=lambda owner: owner.__name__)
def test_every_public_name_is_on_the_page(owner: type) -> None:
    assert {name for of, name in NAMED if of == owner.__name__} == public(owner)


def test_parameters_are_those_of_the_code() -> None:
    owners = {owner.__name__: owner for owner in CLASSES}
    checked = 0
    for (of, name), listed in NAMED.items():
        member = getattr(owners[of], name, None)
        assert callable(member) == (listed is not None), f"{of}.{name}"
        if listed is not None and member is not None:
            own = [each for each in inspect.signature(member).parameters if each != "self"]
            assert listed.split(", ") == (own or [""]), f"{of}.{name}"
            checked += 1
    assert checked >= 15
    (reader,) = re.findall(r"^\| `Reader\(([^)]*)\)` \|", PAGE, re.MULTILINE)
    assert reader.split(", ") == list(inspect.signature(Reader).parameters)
    (asked,) = re.findall(r"^\| `Questions\(([^)]*)\)` \|", PAGE, re.MULTILINE)
    assert asked.split(", ") == list(inspect.signature(Questions).parameters)
    (run,) = re.findall(r"^\| `reader\.run\(([^)]*)\)` \|", PAGE, re.MULTILINE)
    assert ["self", *run.split(", ")] == list(inspect.signature(Reader.run).parameters)


def test_the_examples_are_right(
    llama: Path, settings_for: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(llama)
    harvest(settings)
    monkeypatch.chdir(tmp_path)
    store = Store.open(settings.store_path(1))
    source = store.manifest.source
    shutil.copytree(store.path, "activations/smollm2-135m/layer_12.zarr")
    random_coder(source.d_in, source.d_out, (4, 16), layer=1).save(
        "checkpoints/transcoder/smollm2-135m/layer_12/demo"
    )
    examples = doctest.DocTestParser().get_doctest(PAGE, {}, "docs/api.md", "docs/api.md", 0)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert result.failed == 0, "".join(said)
    assert result.attempted >= 20
