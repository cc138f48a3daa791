"""Which text a store is of: what a harvest asks for again, and what the tokenizer's own settings may not change."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from common.errors import InputError
from common.files import sha256
from common.settings import Settings
from evaluate.read import Reader
from harvest.plan import plan_only
from harvest.run import _already_there, harvest, requested
from harvest.text import documents
from shards import Store
from shards.commit import read_commit
from shards.writer import StoreWriter
from tests.evaluate.fakes import random_coder
from tests.models import sentences, write_jsonl

Make = Callable[..., Settings]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Files of one name in two directories."""
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "text.jsonl", sentences(100, seed=seed))
    return tmp_path / "a/text.jsonl", tmp_path / "b/text.jsonl"


def given(*files: Path) -> tuple[str, str]:
    return "--data.files", ",".join(map(str, files))


def test_a_store_is_of_its_files_contents_in_their_order(
    llama: Path, settings_for: Make, two: tuple[Path, Path], tmp_path: Path
) -> None:
    """Not of their names: a copy elsewhere is the same text, the same name elsewhere is not."""
    first, second = two
    (path,) = harvest(settings_for(llama, *given(first, second), rows=1000))
    assert Store.open(path).manifest.source.files == [sha256(first), sha256(second)]
    third = write_jsonl(tmp_path / "third.jsonl", sentences(100, seed=2))
    digests = {file: f"{sha256(file)[:12]}..." for file in (first, second, third)}
    twice = "there 2, asked 3: the same ones, not as often"
    for files, said in {
        (second, first): "the same 2, in another order",
        (first,): f"there 2, asked 1: {digests[second]} not asked",
        (first, second, second): twice,
        (first, first, second): twice,
        (second, second): f"there 2, asked 2: {digests[first]} not asked",
        (
            first,
            third,
        ): f"there 2, asked 2: {third} ({digests[third]}) not among them, {digests[second]} not asked",
    }.items():
        with pytest.raises(InputError, match=rf"holds another harvest \(files: {re.escape(said)}\); give"):
            harvest(settings_for(llama, *given(*files), rows=1000))
    shutil.copy(first, tmp_path / "renamed.jsonl")
    assert harvest(settings_for(llama, *given(tmp_path / "renamed.jsonl", second), rows=1000)) == [path]
    (tmp_path / "one").mkdir()
    shutil.copy(first, tmp_path / "one/0.jsonl")
    shutil.copy(second, tmp_path / "one/1.jsonl")
    assert harvest(settings_for(llama, *given(tmp_path / "one"), rows=1000)) == [path]
    with pytest.raises(
        InputError, match=r"holds another harvest \(special_tokens: there 'text', asked 'parse'\)"
    ):
        harvest(settings_for(llama, *given(first, second), "--data.special_tokens", "parse", rows=1000))


def test_a_txt_has_no_column(llama: Path, settings_for: Make, two: tuple[Path, Path], tmp_path: Path) -> None:
    """Its harvest is the same whatever data.text_column is, which may be of a .jsonl beside it."""
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(sentences(100)))
    column = ("--data.text_column", "body")
    assert requested(settings_for(llama, *given(lines), *column)) == requested(
        settings_for(llama, *given(lines))
    )
    mixed = settings_for(llama, *given(lines, two[0]), *column)
    assert requested(mixed)["text_column"] == "body"
    written = write_jsonl(tmp_path / "body.jsonl", ["one"])
    written.write_text(written.read_text().replace('"text"', '"body"'))
    assert [*documents(settings_for(llama, *given(lines, written), *column).data)] == [*sentences(100), "one"]


def test_an_unfinished_store_of_before_goes_on(
    llama: Path, settings_for: Make, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It noted its files by name, in no order, and nothing of special tokens or bad rows."""
    settings = settings_for(llama, *given(*two), rows=1000)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_window", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            harvest(settings)
    work = Path(settings.store_path(1)) / ".harvest"
    files = {"z.jsonl": sha256(two[0]), "a.jsonl": sha256(two[1])}
    plan, source = (json.loads((work / name).read_text()) for name in ("plan.json", "source.json"))
    plan["request"]["files"] = source["files"] = files
    del plan["text"]["bad_rows"]
    (work / "plan.json").write_text(json.dumps(plan))
    (work / "source.json").write_text(json.dumps(source))
    (path,) = harvest(settings)
    assert Store.open(path).manifest.source.files == files
    assert harvest(settings) == [path]
    with pytest.raises(InputError, match="holds another harvest"):
        harvest(settings_for(llama, *given(two[0]), rows=1000))


def test_skipped_rows_are_counted(
    llama: Path, corpus: Path, settings_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store is the one of the good rows alone, but for the file's digest and the count."""
    lines = corpus.read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([lines[0], "{", *lines[1:20], '{"text": 1}', *lines[20:]]))
    with pytest.raises(InputError, match=r"bad\.jsonl: line 2: not valid JSON: "):
        harvest(settings_for(llama, *given(bad)))
    assert not Path(settings_for(llama).store_path(1)).exists()
    store = Store.open(harvest(settings_for(llama, *given(bad), "--data.on_bad_row", "skip"))[0])
    assert store.manifest.bad_rows == 2
    line = f"bad rows that were skipped: 2; the first: data.files {bad}: line 2: not valid JSON: "
    assert line in capsys.readouterr().err
    good = Store.open(harvest(settings_for(llama, "--harvest", "good"))[0])
    assert good.manifest.bad_rows == 0
    for split in ("train", "heldout"):
        assert good.manifest.splits[split] == store.manifest.splits[split]


# -- the tokenizer's own settings ----------------------------------------------------------------------


def changed(model: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy of the model whose tokenizer.json was changed."""
    shutil.copytree(model, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


def cuts_and_pads(values: Any) -> None:
    """As training scripts leave it, and drops merges at random."""
    values["truncation"] = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>", "direction": "Left", "pad_to_multiple_of": 64}
    values["padding"] = {"strategy": {"Fixed": 64}, **pad}
    values["model"]["dropout"] = 0.5
    pieces = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": ids,
    }


def test_a_tokenizer_that_cuts_and_pads_has_no_say(llama: Path, settings_for: Make, tmp_path: Path) -> None:
    plain = Store.open(harvest(settings_for(llama))[0])
    other = changed(llama, tmp_path / "other/tiny-llama", cuts_and_pads)
    options = ("--paths.activations", str(tmp_path / "others"))
    store = Store.open(harvest(settings_for(other, *options))[0])
    assert store.manifest.splits == plain.manifest.splits
    kept = Tokenizer.from_file(str(store.tokenizer_path))
    assert (kept.truncation, kept.padding, kept.model.dropout) == (None, None, None)


def test_make_read_has_the_whole_text_too(llama: Path, settings_for: Make) -> None:
    """Of a store whose tokenizer.json cuts, as those of before do."""
    store = Store.open(harvest(settings_for(llama))[0])
    coder, text = random_coder(32, 32, (8, 24), layer=1), "the red river sings and the blue stone falls"
    expected = Reader(store, coder)(text)
    values = json.loads(store.tokenizer_path.read_text())
    cuts_and_pads(values)
    store.tokenizer_path.write_text(json.dumps(values))
    sentence = Reader(store, coder)(text)
    assert sentence.tokens == expected.tokens
    assert sentence.inputs.equal(expected.inputs)
    assert "".join(sentence.tokens) == text


# -- special tokens in the text ------------------------------------------------------------------------


def test_special_tokens_are_text_and_announced_or_parsed(
    llama: Path, settings_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"<bos>{text}<eos> after it" if i % 2 else text for i, text in enumerate(sentences(300))]
    file = write_jsonl(tmp_path / "chats.jsonl", texts)
    text = Store.open(harvest(settings_for(llama, *given(file)))[0])
    line = "128 of 256 documents hold the name of a special token (the first: <bos>), which stays text; "
    assert f"{line}data.special_tokens parse makes it the token\n" in capsys.readouterr().err
    parsed = Store.open(
        harvest(settings_for(llama, *given(file), "--data.special_tokens", "parse", "--harvest", "parsed"))[0]
    )
    assert "special token" not in capsys.readouterr().err
    tokens = {name: store.train.contexts[:] for name, store in (("text", text), ("parsed", parsed))}
    assert (tokens["parsed"][:, 1] != 0).all()  # the text's own BOS gives way to the context's
    assert (tokens["parsed"][:, 2:] == 0).any()
    assert (tokens["parsed"] == 1).mean() > 1.4 * (tokens["text"] == 1).mean() > 0
    context, position = parsed.train.provenance(0, len(parsed.train))
    assert not np.isin(tokens["parsed"][context, position], [0, 1, 2]).any()
    coder = random_coder(32, 32, (8, 24), layer=1)
    assert Reader(parsed, coder)("<bos>red<eos> blue").tokens == Reader(text, coder)("red blue").tokens
    assert "".join(Reader(text, coder)("red<eos>").tokens) == "red<eos>"


TEMPLATE = "{{ bos_token }}{% for m in messages %}<pad>{{ m.role }} {{ m.content }}<eos>{% endfor %}"
CHATS = ("--data.text_column", "messages", "--data.special_tokens", "parse", "--data.pack", "document")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """200 conversations of one message."""
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}], "text": text} for text in sentences(200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def with_template(model: Path, template: str | None, file: str = "chat_template.jinja") -> None:
    """Give a model directory a chat template in one of its places; None: in neither."""
    said = json.loads((model / "tokenizer_config.json").read_text())
    said.pop("chat_template", None)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None and file == "tokenizer_config.json":
        said["chat_template"] = template
    elif template is not None:
        (model / file).write_text(template)
    (model / "tokenizer_config.json").write_text(json.dumps(said))


def test_chats_are_harvested_as_the_model_reads_them(
    llama: Path, settings_for: Make, chats: Path, tmp_path: Path
) -> None:
    model = changed(llama, tmp_path / "chat/tiny-llama", lambda _: None)
    with_template(model, TEMPLATE)
    (path,) = harvest(settings_for(model, *given(chats), *CHATS, rows=1000))
    store = Store.open(path)
    contexts = store.train.contexts[:]
    assert (contexts[:, :2] == [0, 2]).all()
    tokenizer = Tokenizer.from_file(str(store.tokenizer_path))
    assert {tokenizer.decode(context[2:6].tolist())[:5] for context in contexts} == {"user "}
    assert read_commit(path)


def test_another_chat_template_is_another_model_for_chats_alone(
    llama: Path, settings_for: Make, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it stands; the same one in another place is the same. A store of plain texts does not ask for it."""
    model = changed(llama, tmp_path / "chat/tiny-llama", lambda _: None)
    with_template(model, TEMPLATE)
    settings = settings_for(model, *given(chats), *CHATS, rows=1000)
    plain = settings_for(model, *given(chats), "--harvest", "plain", rows=1000)
    (path,), (plain_path,) = harvest(settings), harvest(plain)
    sources = [Store.open(each).manifest.source for each in (path, plain_path)]
    digest = sha256(model / "chat_template.jinja")
    assert [source.chat_template_sha256 for source in sources] == [digest, None]
    with_template(model, TEMPLATE, "tokenizer_config.json")
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "a processor's"}))
    assert harvest(settings) == [path]
    for template, file in (
        ("other " + TEMPLATE, "chat_template.jinja"),
        ("other " + TEMPLATE, "tokenizer_config.json"),
        (None, ""),
    ):
        with_template(model, template, file)
        now = r"\w{12}\.\.\." if template else "none"
        said = rf"\(the chat template in .*tiny-llama: there {digest[:12]}\.\.\., now {now}\)"
        for refused in (harvest, Store.of, plan_only):
            with pytest.raises(InputError, match=said):
                refused(settings)
        capsys.readouterr()
        assert harvest(plain) == [plain_path]
        assert "is already harvested" in capsys.readouterr().out
        Store.of(plain)


def test_a_begun_harvest_of_chats_notices_another_template(
    llama: Path, settings_for: Make, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a window it is begun anew, with one it is refused; a store of before noted no template and goes on."""
    model = changed(llama, tmp_path / "chat/tiny-llama", lambda _: None)
    with_template(model, TEMPLATE)
    settings = settings_for(model, *given(chats), *CHATS, rows=1000)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_window", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            harvest(settings)
    with_template(model, "other " + TEMPLATE)
    plan = Path(settings.store_path(1)) / ".harvest/plan.json"
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "has_rows", True)
        with pytest.raises(InputError, match="the chat template in"):
            harvest(settings)
        said = json.loads(plan.read_text())
        del said["request"]["chat_template_sha256"]
        plan.write_text(json.dumps(said))
        assert not _already_there(StoreWriter(plan.parent.parent), 1, settings, requested(settings), False)
    plan.write_text(json.dumps(said | {"request": said["request"] | {"chat_template_sha256": "0" * 64}}))
    (path,) = harvest(settings)
    store = Store.open(path)
    assert store.manifest.source.chat_template_sha256 == sha256(model / "chat_template.jinja")
    tokenizer = Tokenizer.from_file(str(store.tokenizer_path))
    assert "other " in tokenizer.decode(store.train.contexts[0].tolist())
