"""A run's notes: every kind of file that a person may bring, and one line for each that cannot be read."""

import csv
import hashlib
import json
from pathlib import Path

import pytest

from common.errors import InputError
from evaluate.notes import Note, notes_of, read_notes

HEAD = "layer,latent,label,score,source\n"
CITIES = {7: Note(label="capital cities", score=0.5, source="me")}


def file_of(folder: Path, data: str | bytes, name: str = "notes.csv") -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    "data",
    [
        HEAD + "3,7,capital cities,0.5,me\n",
        "\ufeff" + HEAD.replace(",", ";") + "3;7;capital cities;0,5;me\r\n",
        "sep=;\r\n" + HEAD.replace(",", ";") + "3;7;capital cities;0.5;me\r\n",
        HEAD.replace(",", "\t") + "3\t7\tcapital cities\t0.5\tme",
        'Source, Score ,LABEL,latent,layer,more\nme,.5,"capital\n cities",7.0, 3,x\n,,,,,\n\n',
        '"layer","latent","label","score","source"\r3,7,"capital cities",5e-1,me\r',
    ],
    ids=["plain", "semicolons", "sep", "tabs", "order", "carriage returns"],
)
def test_a_spreadsheets_files_say_the_same(tmp_path: Path, data: str) -> None:
    assert read_notes(file_of(tmp_path, data), 3, 24) == CITIES


def test_json_csv_and_what_may_be_left_out(tmp_path: Path) -> None:
    values = [{"layer": 3, "latent": 7, "label": "capital cities", "score": 0.5, "source": "me", "p": 1}]
    assert read_notes(file_of(tmp_path, json.dumps(values), "labels.json"), 3, 24) == CITIES
    short = file_of(tmp_path, 'layer,latent,label\n3,0,"a, ""b"" \x1b[2J"\n')
    assert read_notes(short, 3, 24) == {0: Note(label='a, "b" \x1b[2J', score=None, source="")}
    starred = file_of(tmp_path, HEAD + "3,1,,1,page\n")
    assert read_notes(starred, 3, 24) == {1: Note(label="", score=1.0, source="page")}
    assert read_notes(file_of(tmp_path, HEAD), 3, 24) == {}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", "expected a first line with the columns layer, latent, label, score, source, found none"),
        (
            "layer,latent,score\n3,7,1\n",
            "line 1: no column label; expected layer, latent, label, score, source",
        ),
        ("3,7,capital cities,0.5,me\n", "line 1: no column layer; expected"),
        ("layer,latent,label,label\n3,7,a,b\n", "line 1: column label twice"),
        (HEAD + "4,7,a,,\n", "line 2: layer: expected 3, the run's, found 4"),
        (HEAD + "3,24,a,,\n", "line 2: latent: expected 0 to 23, found 24"),
        (HEAD + "3,-1,a,,\n", "line 2: latent: expected a whole number from 0, found '-1'"),
        (HEAD + "3,1.5,a,,\n", "line 2: latent: expected a whole number from 0, found '1.5'"),
        (HEAD + "3,٧,a,,\n", "line 2: latent: expected a whole number from 0, found '٧'"),
        (HEAD + "3\n", "line 2: latent: expected a whole number from 0, found None"),
        (HEAD + "3,7,a,,\n\n3,7,b,,\n", "line 4: latent 7 is already in line 2; keep one of them"),
        (HEAD + "3,7,a, b,1,me\n", "line 2: expected 5 values, found 6; a label with ',' in it needs double"),
        (HEAD + "3,7,,,me\n", "line 2: latent 7: no label and no score"),
        (HEAD + "3,7,a,high,\n", "line 2: score: expected a number or nothing, found 'high'"),
        (HEAD + "3,7,a,nan,\n", "line 2: score: expected a number or nothing, found 'nan'"),
        (HEAD + '3,7,"a,,\n3,8,b,,\n', "line 3: unexpected end of data"),
        (HEAD + f"3,7,{'a' * 1001},,\n", "line 2: label: expected at most 1,000 characters, found 1,001"),
        (HEAD + f"3,7,{'a' * 140_000},,\n", "field larger than field limit"),
        ((HEAD + "3,7,café,,\n").encode("cp1252"), "not UTF-8 at byte 39; save it as CSV UTF-8"),
        ('[{"layer": 3, "latent": 7, "label": "a"}]', "holds JSON; name it notes.json"),
        ((HEAD + "3,7,a,,\n").encode("utf-16"), "expected UTF-8, found UTF-16; save it as CSV UTF-8"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, data: str | bytes, said: str) -> None:
    path = file_of(tmp_path, data)
    before = csv.field_size_limit(2**17)  # Python's own: `datasets` raises it for the whole process
    with pytest.raises(InputError) as raised:
        read_notes(path, 3, 24)
    csv.field_size_limit(before)
    assert str(raised.value).startswith(f"{path}: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("[", "not JSON: Expecting value"),
        ("[" * 100_000, "not JSON"),
        ("{}", "expected a JSON array of objects with layer, latent, label, score, source, found {}"),
        ("[1]", "object 1: expected an object, found 1"),
        ('[{"layer": 3, "latent": 7}]', "object 1: no key label"),
        ('[{"layer": true, "latent": 7, "label": "a"}]', "layer: expected a whole number from 0, found True"),
        ('[{"layer": 3, "latent": 7, "label": 5}]', "object 1: label: expected text, found 5"),
        (r'[{"layer": 3, "latent": 7, "label": "\ud800"}]', "object 1: label: half of a surrogate pair"),
        ('[{"layer": 3, "latent": 7, "label": "a", "score": NaN}]', "score: expected a number or nothing"),
        ('[{"layer": 3, "latent": 7, "label": "a", "score": [1]}]', "score: expected a number or nothing"),
    ],
)
def test_a_bad_json_file_is_one_line(tmp_path: Path, data: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        read_notes(file_of(tmp_path, data, "notes.json"), 3, 24)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_explanations_stand_beside_notes(tmp_path: Path) -> None:
    """Of one latent both are told, the person's first; a star keeps its explanation."""
    file_of(tmp_path, HEAD + "3,7,capital cities,0.5,me\n3,8,,1,page\n3,9,mine,,page\n")
    file_of(tmp_path, HEAD + "3,7,towns,0.83333,gpt-4\n3,8,rivers,,\n3,2,days,0.5,\n", "explanations.csv")
    said = notes_of(tmp_path, 3, 24)
    assert [*said] == [2, 7, 8, 9]
    assert {latent: note.text for latent, note in said.items()} == {
        2: "days (score 0.5)",
        7: "capital cities (me, score 0.5); towns (gpt-4, score 0.833)",
        8: "★; rivers",
        9: "mine",
    }
    assert (said[7].label, said[7].explanation) == (
        "capital cities",
        Note(label="towns", score=0.83333, source="gpt-4"),
    )
    file_of(tmp_path, "[]", "Explanations (1).json")
    with pytest.raises(InputError, match="expected one file of explanations, found Explanations"):
        notes_of(tmp_path, 3, 24)


def test_explanations_of_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file that says which they are of; one without that column, or with words there, is of these."""
    (tmp_path / "transcoder.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    lines = [
        f"3,1,a,,m,{digest[:12]}",
        f"3,2,b,,m,{digest}",
        "3,3,c,,m,0123456789ab",
        "3,4,d,,m,heavy",
        "3,5,e,,m,",
    ]
    path = file_of(
        tmp_path, "layer,latent,label,score,source,weights\n" + "\n".join(lines), "explanations.csv"
    )
    assert [*notes_of(tmp_path, 3, 24)] == [1, 2, 4, 5]
    assert capsys.readouterr().err == f"{path}: 1 lines are of other weights than the run's: left out\n"


def test_the_run_directory_holds_one_file_of_notes(tmp_path: Path) -> None:
    file_of(tmp_path, "{}", "settings.json")
    assert notes_of(tmp_path, 3, 24) == {}
    file_of(tmp_path, HEAD + "3,7,capital cities,0.5,me\n", "notes (1).csv")
    assert notes_of(tmp_path, 3, 24) == CITIES
    checkpoint = tmp_path / "at_step_40"
    checkpoint.mkdir()
    assert notes_of(checkpoint, 3, 24) == CITIES  # its run's
    file_of(checkpoint, (HEAD + "3,8,a,,\n").replace(",", "\t"), "labels.tsv")
    assert list(notes_of(checkpoint, 3, 24)) == [8]
    (checkpoint / "labels.tsv").unlink()
    (checkpoint / "labels.csv").symlink_to("gone.csv")
    with pytest.raises(InputError, match=r"labels\.csv: cannot be read: No such file"):
        notes_of(checkpoint, 3, 24)
    file_of(tmp_path, "[]", "Labels.JSON")
    with pytest.raises(InputError, match=r"expected one file of notes, found Labels.JSON, notes \(1\).csv"):
        notes_of(tmp_path, 3, 24)
