"""Local files: which are read in which order, what of each row, and the line for what cannot be read."""

import bz2
import gzip
import json
import lzma
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.cli import load, parser
from common.errors import InputError
from common.settings import Data
from harvest.files import found_files
from harvest.lm import load_tokenizer
from harvest.text import RowCounts, documents
from tests.models import save_tokenizer, write_jsonl


def texts(*files: Path, **data: object) -> list[str]:
    return list(documents(Data.model_validate({"files": [str(file) for file in files], **data})))


def refused(*files: Path, **data: object) -> str:
    with pytest.raises(InputError) as stopped:
        texts(*files, **data)
    assert "\n" not in str(stopped.value)
    return str(stopped.value).removeprefix("data.files ")


def written(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# -- names ---------------------------------------------------------------------------------------------


def test_a_name_that_exists_is_that_file(tmp_path: Path) -> None:
    """And a pattern only where it does not: text[1].jsonl beside text1.jsonl, and beside nothing."""
    one = write_jsonl(tmp_path / "text1.jsonl", ["another"])
    name = tmp_path / "text[1].jsonl"
    assert texts(name) == ["another"]
    write_jsonl(name, ["asked for"])
    assert texts(name) == ["asked for"]
    assert texts(one, name, one) == ["another", "asked for", "another"]
    for odd in ("a*b.jsonl", "a?.jsonl", "a,b.jsonl", "ä {x} %20.jsonl", "https:/x.jsonl", "-.jsonl"):
        assert texts(written(tmp_path / odd, json.dumps({"text": odd}))) == [odd]


def test_directories_and_patterns_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in ("d/b.jsonl", "d/a.jsonl", "d/in/c.jsonl", "d/.hidden.jsonl", "d/.git/x.jsonl", "e/z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(written(tmp_path / name, ""), [name])
    written(tmp_path / "d/README.md", "no text")
    (tmp_path / "d/linked").symlink_to(tmp_path / "e")
    (tmp_path / "e/round").symlink_to(tmp_path / "d")
    names = ["d/a.jsonl", "d/b.jsonl", "d/in/c.jsonl", "e/z.jsonl"]
    assert texts(tmp_path / "d") == names
    assert found_files(Data(files=(str(tmp_path / "d"),))).left_out == [tmp_path / "d/README.md"]
    assert texts(tmp_path / "d/*.jsonl") == names[:2]
    assert texts(tmp_path / "d/**/[bc].jsonl") == names[1:3]
    assert texts(tmp_path / "d/b.jsonl", tmp_path / "d/a.jsonl") == [names[1], names[0]]


def test_names_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("state.json", "data-00000-of-00001.arrow"):
        written(tmp_path / "saved" / name, "{}")
    (tmp_path / "broken/a.jsonl").parent.mkdir()
    (tmp_path / "broken/a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for name, line in {
        "none.jsonl": "no such file {}",
        "none/$HOME": "no such file {}",
        "none*.jsonl": "no such file {}, and as a pattern it matches none",
        "empty": "{}: holds no files",
        "pipe.jsonl": "{} is not a regular file (or a link to one); copy its text into a regular file",
        "broken": "{}/a.jsonl is not a regular file (or a link to one)",
        "saved": "{} was written by save_to_disk(); write it with to_parquet() instead",
    }.items():
        assert refused(tmp_path / name) == f"data.files: {line.format(tmp_path / name)}"
    for name, line in {
        "~/a.jsonl": "no such file ~/a.jsonl; ~ and $ are not expanded here: give the whole path",
        "$HOME/a.jsonl": "no such file $HOME/a.jsonl; ~ and $ are not expanded here: give the whole path",
        "https://host/a.jsonl": "no such file https://host/a.jsonl; addresses are not read: download it first",
    }.items():
        with pytest.raises(InputError, match=rf"^data\.files: {re.escape(line)}$"):
            list(documents(Data(files=(name,))))
    with pytest.raises(InputError, match=r"^data\.files: a name is empty"):
        list(documents(Data(files=("",))))
    with pytest.raises(InputError, match=r"^data\.dataset: .* is on this disk, .* \(--data\.files "):
        list(documents(Data(dataset=str(tmp_path))))


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("text[1].jsonl", ("text[1].jsonl",)),
        ("texts[1]", ("texts[1]",)),
        ("[1]", ("[1]",)),
        ("[a],[b]", ("[a]", "[b]")),
        ("a.txt, b.txt", ("a.txt", "b.txt")),
        ('["a,b.txt", "[c]"]', ("a,b.txt", "[c]")),
    ],
)
def test_names_on_the_command_line(text: str, files: tuple[str, ...]) -> None:
    assert load(parser("harvest", ""), ["--data.files", text])[0].data.files == files


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("a,b.txt", ("a,b.txt",)),
        ("a, b.txt", ("a, b.txt",)),
        ("c.txt,a,b.txt", ("c.txt", "a,b.txt")),
        ("a,b.txt,,c.txt", ("a,b.txt", "c.txt")),
        ("d,e,f/a,b.txt, c.txt", ("d,e,f/a,b.txt", "c.txt")),
        ("c.txt,none,b.txt", ("c.txt", "none", "b.txt")),
    ],
)
def test_names_with_commas_are_those_of_files(
    text: str, files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d,e,f").mkdir()
    for name in ("a,b.txt", "a, b.txt", "c.txt", "d,e,f/a,b.txt"):
        Path(name).write_text("text")
    assert load(parser("harvest", ""), ["--data.files", text])[0].data.files == files


# -- formats -------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a byte order mark, packed, in capitals, and what looks like a date or a number is text."""
    expected = ["2020-01-01", "12", 'a "quoted", text\u2028on', "true", "1e5 \U0001f600", "", " last "]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(expected))
    rows = [{"n": None, "text": text} for text in expected]
    quoted = "".join(f'{i},"{text}"\r\n' for i, text in enumerate(t.replace('"', '""') for t in expected))
    contents = {
        "a.jsonl": lines,
        "a.txt": "\n".join(expected),
        "crlf.txt": "\r\n".join(expected) + "\r\n",
        "lines.json": "\n" + lines,
        "list.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "jq.json": "\n".join(json.dumps(row, indent=1) for row in rows),
        "a.csv": f"id,text\r\n{quoted}",
    }
    for name, text in contents.items():
        for file, data in {
            name: text.encode(),
            f"bom-{name.upper()}": b"\xef\xbb\xbf" + text.encode(),
            f"{name}.gz": gzip.compress(text[:40].encode()) + gzip.compress(text[40:].encode()),
            f"{name}.zst": b"".join(
                pa.compress(part.encode(), "zstd", asbytes=True) for part in (text[:40], text[40:])
            ),
        }.items():
            assert texts(written(tmp_path / file, data)) == expected, file
    assert texts(table(tmp_path / "a.parquet", n=range(7), text=expected)) == expected
    large = pa.array(expected, pa.large_string()).dictionary_encode()
    assert texts(table(tmp_path / "b.parquet", text=large)) == expected


def test_a_quoted_text_of_several_lines(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", 'text,n\n"one\ntwo, ""three""",1\n\n' + "x" * 200_000 + ",2\n")
    assert texts(file) == ['one\ntwo, "three"', "x" * 200_000]


def test_files_that_were_joined(tmp_path: Path) -> None:
    """Each began with a byte order mark."""
    mark = b"\xef\xbb\xbf"
    assert texts(written(tmp_path / "a.txt", mark + b"one\n" + mark + b"two\n")) == ["one", "two"]
    line = mark + b'{"text": "one"}\n'
    assert texts(written(tmp_path / "a.jsonl", line + line)) == ["one", "one"]


def test_other_columns_may_be_anything(tmp_path: Path) -> None:
    """Types that change, keys that come late, numbers that no type holds, above the 10 MB that were once a block."""
    pad, others = "x" * 1000, [1, "a", None, [1, "b"], {"c": [{}]}, 1e400, "2020-01-01", "\ud800"]
    rows = [
        {"meta": others[i % 8], "text": f"{i} {pad}"} | ({"late": i} if i > 9500 else {})
        for i in range(12_000)
    ]
    lines = [json.dumps(row) for row in rows]
    lines[7] = lines[7].replace('"\\ud800"', "9" * 5000)
    file = written(tmp_path / "a.jsonl", "\n".join(lines).encode() + b'\n{"text": "end", "url": "caf\xe9"}\n')
    assert file.stat().st_size > 12_000_000
    assert texts(file) == [row["text"] for row in rows] + ["end"]


def test_columns_within_others(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a.jsonl", '{"meta": {"text": "in"}, "n": 1}\n{"meta.text": "flat", "meta": {"text": 1}}'
    )
    assert texts(file, text_column="meta.text") == ["in", "flat"]
    columns = {"n": [1, 2], "meta": [{"text": "in", "id": 1}, {"text": "two", "id": 2}]}
    assert texts(table(tmp_path / "a.parquet", **columns), text_column="meta.text") == ["in", "two"]
    flat = table(tmp_path / "b.parquet", **columns, **{"meta.text": ["flat", "two"]})
    assert texts(flat, text_column="meta.text") == ["flat", "two"]
    assert texts(written(tmp_path / "a.csv", "meta.text\nx\n"), text_column="meta.text") == ["x"]


# -- rows that are bad ---------------------------------------------------------------------------------

BAD = {
    '{"text": "two}': ": not valid JSON: Unterminated string at character 10",
    "[1]": ": expected a JSON object, found [1]",
    '{"texts": "x", "meta": {"a": 1}}': ": no column 'text'; expected data.text_column among texts, meta.a",
    '{"te\\nxt": 1}': ": no column 'text'; expected data.text_column among 'te\\nxt'",
    '{"text": null}': ": column 'text' is not text but null",
    '{"text": ["a", "b"]}': ": column 'text' is not text, nor a chat of role and content, but ['a', 'b']",
    '{"text": "a \\ud83d b"}': ": column 'text': a lone surrogate \\ud83d at character 3",
    b'{"text": "caf\xe9"}': ": column 'text': byte 0xe9 at character 4 is not UTF-8, or a lone "
    "surrogate \\udce9",
    '{"text": ' + "[" * 100_000: ": its values are nested too deeply",
}


@pytest.mark.parametrize(("bad", "why"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_line_stops_or_is_skipped(tmp_path: Path, bad: str | bytes, why: str) -> None:
    bad = bad.encode() if isinstance(bad, str) else bad
    file = written(tmp_path / "a.jsonl", b'{"text": "one"}\n\n' + bad + b'\n{"text": "four \\ud83d\\ude00"}')
    place = "line 3" + why
    assert refused(file) == f"{file}: {place}; data.on_bad_row skip leaves such rows out"
    counts = RowCounts()
    data = Data(files=(str(file),), on_bad_row="skip")
    assert list(documents(data, counts=counts)) == ["one", "four \U0001f600"]
    assert counts == RowCounts(skipped=1, first_skipped=f"data.files {file}: {place}")


def test_bad_rows_of_the_other_formats(tmp_path: Path) -> None:
    columns = written(tmp_path / "a.csv", 'id,text\n1,a, b\n2,"good"\n3,"x"y\n4,caf\xe9\n'.encode("latin-1"))
    assert refused(columns) == f"{columns}: line 2: 3 fields, expected 2; a text with commas is quoted"
    assert texts(columns, on_bad_row="skip") == ["good"]
    rows = table(tmp_path / "a.parquet", text=["a", None, "b"])
    assert refused(rows).startswith(f"{rows}: row 1: column 'text' is not text but null; data.on_bad_row ")
    assert texts(rows, on_bad_row="skip") == ["a", "b"]
    text = written(tmp_path / "a.txt", b"one\ncaf\xe9\nthree")
    said = f"{text}: line 2: byte 0xe9 at character 4 is not UTF-8; data.on_bad_row skip leaves such rows out"
    assert refused(text, text_column="body") == said
    assert texts(text, on_bad_row="skip") == ["one", "three"]


def test_a_file_of_nothing_but_bad_rows_is_refused(tmp_path: Path) -> None:
    """A column that is misspelt is no bad row."""
    file = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    line = refused(file, text_column="content", on_bad_row="skip")
    assert line == (
        f"all 2 rows are bad; the first: data.files {file}: line 1: no column 'content'; "
        "expected data.text_column among text"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Whatever data.on_bad_row is: what comes after is not known."""
    packed = gzip.compress(b'{"text": "one"}\n' * 9999)
    strings = pa.compress(b'{"text": "one"}\n' * 9999, "zstd", asbytes=True)
    for name, data, why in (
        ("packed.jsonl", packed, "it is compressed by gzip; its name must end in .gz"),
        ("packed.txt", strings, "it is compressed by zstd; its name must end in .zst"),
        ("a.jsonl", bz2.compress(b"x"), "it is compressed by bzip2, which is not read; unpack it (bunzip2)"),
        ("b.jsonl", lzma.compress(b"x"), "it is compressed by xz, which is not read; unpack it (unxz)"),
        ("c.jsonl", b"PK\x03\x04\0", "it is a zip archive, which is not read; unpack it (unzip)"),
        ("plain.txt.gz", b"text", "Not a gzipped file (b'te')"),
        ("cut.jsonl.gz", packed[:-20], "Compressed file ended before the end-of-stream marker was reached"),
        ("cut.jsonl.zst", strings[:-9], "Truncated compressed stream"),
        ("wide.txt", "text".encode("utf-16"), "it is UTF-16; expected UTF-8, convert it"),
        ("wide.csv", "text".encode("utf-16-le"), "it holds zero bytes; expected text in UTF-8"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "it is a pointer of Git LFS, not the file",
        ),
        ("b.parquet", b"PAR1", "Parquet file size is 4 bytes"),
        (
            "a.json",
            b'[{"text": "a"},\n{"text": }]',
            "line 2: not valid JSON: Expecting value at character 10",
        ),
        (
            "open.csv",
            b'text\na\n"b\nc\n',
            "line 3: a quote that begins here has no end (unexpected end of data)",
        ),
        ("twice.csv", b"text,text\na,b\n", "column 'text' is there twice"),
        ("space.csv", b"id, text\n1,a\n", "no column 'text'; expected data.text_column among id, ' text'"),
        (
            "none.csv",
            b"x" * 99 + b",y\na,1\n",
            f"no column 'text'; expected data.text_column among {'x' * 40}, y",
        ),
        ("other.csv", b"body;n\na;1\n", "no column 'text'; expected data.text_column among body;n"),
    ):
        file = written(tmp_path / name, data)
        assert refused(file, on_bad_row="skip").startswith(f"{file}: cannot be read: {why}"), name
    nothing = [table(tmp_path / "none.parquet", text=pa.array([], pa.string()))]
    for name, data in (
        ("a.jsonl", b""),
        ("b.jsonl", b"\n \n"),
        ("a.csv", b"text\n"),
        ("a.txt", b"\xef\xbb\xbf"),
    ):
        nothing.append(written(tmp_path / name, data))
    for file in nothing:
        assert refused(file) == f"{file}: is empty"
    other = table(tmp_path / "other.parquet", meta=[{"a": 1}], chat=[[{"role": "user"}]])
    assert refused(other).endswith("no column 'text'; expected data.text_column among meta.a, chat")


def test_empty_parts_of_a_directory_are_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    table(tmp_path / "d/part-0.parquet", text=pa.array([], pa.string()))
    assert refused(tmp_path / "d") == f"{tmp_path / 'd'}: all files are empty"
    table(tmp_path / "d/part-1.parquet", text=["a"])
    assert texts(tmp_path / "d") == ["a"]


# -- chats ---------------------------------------------------------------------------------------------

TEMPLATE = (
    "\n{% if strftime_now is defined %} {% endif %}{{ bos_token }}{{ strftime_now('%-d %b %Y') }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls is defined %}!{% endif %}<eos>{% endfor %}"
)


def test_chats_go_through_the_models_template(tmp_path: Path) -> None:
    """The year is the same on every day; a key that only another message of the .parquet has is not there."""
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)
    chat = [{"role": "user", "content": "red <eos>"}, {"role": "bot", "content": "blue"}]
    file = written(tmp_path / "a.jsonl", json.dumps({"messages": chat}))
    rows = table(tmp_path / "a.parquet", messages=pa.array([[{**m, "tool_calls": None} for m in chat]]))

    def rendered(file: Path, special_tokens: str = "parse") -> list[str]:
        data = {"files": [str(file)], "text_column": "messages", "special_tokens": special_tokens}
        return list(documents(Data.model_validate(data), tokenizer))

    with pytest.raises(
        InputError, match=r"^data\.text_column: messages holds chats, but .* has no chat template; "
    ):
        rendered(file)
    tokenizer.chat_template = TEMPLATE
    for each in (file, rows):
        assert rendered(each) == ["\n <bos>26 Jul 2024<user>red <eos><eos><bot>blue<eos>"]
    with pytest.raises(InputError, match=r"holds chats, .* give data\.special_tokens = \"parse\""):
        rendered(file, "text")
    written(file, json.dumps({"messages": [{"role": "user", "content": None}]}))
    with pytest.raises(
        InputError, match=r"line 1: column 'messages': a message of role 'user' has no content"
    ):
        rendered(file)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    written(file, json.dumps({"messages": chat}))
    with pytest.raises(InputError, match=r"line 1: .*: the chat template refuses it: roles must alternate"):
        rendered(file)
