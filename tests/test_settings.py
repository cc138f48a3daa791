import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common.cli import MAKE_VARIABLES, PIPELINE_TOML, load, parser, read
from common.errors import InputError
from common.settings import SECTIONS, Paths, Settings, Transcoder, validated
from shards.storage import STORAGES

ROOT = Path(__file__).parent.parent
STORED = " or ".join(", ".join(map(repr, STORAGES)).rsplit(", ", 1))


def settings(*argv: str, toml: Path = PIPELINE_TOML) -> Settings:
    return load(parser("train", ""), argv, toml)[0]


@pytest.mark.parametrize(
    ("layer", "d_sae", "groups", "rows"),
    [
        ("17", 18_432, (1152, 2304, 4608, 10368), 15_000_000),
        ("12", 36_864, (2304, 4608, 9216, 20736), 20_000_000),
        ("8", 18_432, (1152, 2304, 4608, 10368), 1_000_000),
    ],
)
def test_the_recipes_for_gemma_2(layer: str, d_sae: int, groups: tuple[int, ...], rows: int) -> None:
    chosen = settings("--layer", layer)
    assert chosen.model.name == "google/gemma-2-2b"
    assert (chosen.data.dataset, chosen.data.name) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert chosen.transcoder.resolve(d_in=2304) == (d_sae, groups)
    assert chosen.transcoder.k == 96
    assert settings("--layer", layer, "--profile", "guide").train.lr == 4e-4
    assert (chosen.harvest.rows, chosen.train.rows) == (rows, rows)
    assert chosen.train.sample_every > 0


def test_precedence(tmp_path: Path) -> None:
    toml = tmp_path / "pipeline.toml"
    toml.write_text(
        '[model]\nname = "m"\n[train]\nlr = 1e-3\nbatch_size = 8\nseed = 3\norder_seed = 4\n'
        "[profile.p.train]\nbatch_size = 16\nseed = 5\norder_seed = 6\n"
        "[recipe.m.7.train]\nseed = 7\norder_seed = 8\n"
    )
    chosen = settings("--layer", "7", "--profile", "p", "--train.order_seed", "9", toml=toml)
    train = chosen.train
    assert (train.lr, train.batch_size, train.seed, train.order_seed) == (1e-3, 16, 7, 9)
    assert train.log_every == Settings().train.log_every


def test_a_recipe_applies_to_its_own_model_only() -> None:
    assert settings("--layer", "8", "--model.name", "other/model").harvest.rows == 15_000_000
    assert settings("--layer", "8").harvest.rows == 1_000_000


def test_any_layer_of_the_demo_model_works() -> None:
    assert settings("--profile", "demo").layers == (12,)
    assert settings("--profile", "demo", "--layer", "15").layers == (15,)


def test_sizes_may_be_multiples_of_d_in() -> None:
    transcoder = settings("--layer", "3", "--model.name", "m").transcoder
    assert transcoder.resolve(d_in=576) == (4608, (288, 576, 1152, 2592))


def test_a_rate_left_to_the_rule() -> None:
    train = settings("--profile", "demo", "--train.min_lr", "auto").train
    assert (train.lr, train.min_lr) == (None, None)


def test_run_names_tell_what_differs_from_the_recipe() -> None:
    assert settings("--layer", "17").run == "default"
    assert settings("--layer", "17", "--train.lr", "3e-4").run == "default-lr0.0003"
    assert settings("--profile", "demo", "--transcoder.k", "16").run == "demo-k16"
    assert settings("--layer", "17", "--run", "mine", "--train.lr", "3e-4").run == "mine"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--train.lrr", "1"],
            "command line: unknown option --train.lrr; did you mean --train.lr?; --help-all lists every option",
        ),
        (
            ["--train.lr", "fast"],
            "command line: train.lr: expected a valid number, unable to parse string as a number, found 'fast'",
        ),
        (["--train.lr", "-1"], "command line: train.lr: expected a number greater than 0, found '-1'"),
        (["--train.lr", "nan"], "command line: train.lr: expected a finite number, found 'nan'"),
        (
            ["--harvest.storage", "int4"],
            f"command line: harvest.storage: expected {STORED}, found 'int4'",
        ),
        (
            ["--transcoder.d_sae", "100"],
            "command line: transcoder: d_sae must be the sum of group_sizes: d_sae is 100, "
            "group_sizes 1152, 2304, 4608, 10368 do not sum to it; give both",
        ),
        (
            ["--transcoder.group_sizes", "1152,0,17280"],
            "command line: transcoder: size 0 is not a positive number of latents",
        ),
        (
            ["--transcoder.k", "20000"],
            "command line: transcoder: k is 20000, but there are only 18432 latents; ",
        ),
        (
            ["--train.lr", "4e-4", "--train.min_lr", "1"],
            "command line: train: min_lr 1 is above lr 0.0004; lower train.min_lr",
        ),
        (["--train.rows", "10"], "command line: train: rows 10 are less than one batch of 1024"),
        (
            ["--layer", "x"],
            "layer: expected layer numbers from 0, found 'x'; for example LAYER=17, LAYER=\"0-5 12\" or LAYER=all",
        ),
        (["--run", "../up"], "run: '../up' is not a name; use letters, digits and . _ + = - (at most 100)"),
        (
            ["--profile", "nope"],
            "profile: expected one of demo, circuit, guide, found 'nope'; see pipeline.toml",
        ),
        (
            ["--train.lr"],
            "command line: argument --train.lr: expected one argument; --help-all lists every option",
        ),
    ],
)
def test_mistakes_stop_with_one_line(argv: list[str], line: str) -> None:
    with pytest.raises(InputError) as stopped:
        settings("--layer", "17", *argv)
    assert str(stopped.value).startswith(line)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[train]\nlrr = 1\n", "pipeline.toml: unknown setting train.lrr; did you mean train.lr?"),
        ("[train]\nxyz = 1\n", "pipeline.toml: unknown setting train.xyz; known are rows, batch_size, lr,"),
        ("[trian]\nlr = 1\n", "pipeline.toml: unknown setting trian; did you mean train?"),
        ("[xyz]\nlr = 1\n", "pipeline.toml: unknown setting xyz; known are model, data,"),
        ("lr = 1\n", "pipeline.toml: unknown setting lr; did you mean train.lr or sweep.lr?"),
        ("[train]\nlr = 'x'\n", "pipeline.toml: train.lr: expected a valid number"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, line: str) -> None:
    toml = tmp_path / "pipeline.toml"
    toml.write_text(text)
    with pytest.raises(InputError) as stopped:
        settings("--layer", "1", toml=toml)
    assert line in str(stopped.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings("--layer", "17").train.lr = 1  # type: ignore[misc]


OWNERS = {
    "model": {"model", "Model"},
    "data": {"data", "Data"},
    "harvest": {"harvest", "options"},
    "transcoder": {"transcoder"},
    "train": {"train", "first"},
    "wandb": {"wandb"},
    "evaluate": {"evaluate"},
    "paths": {"paths"},
}
"""What a section is called where its settings are read: settings.train.lr, options.rows."""


def reads(tree: ast.AST) -> set[tuple[str, str]]:
    """(last name before the dot, attribute) of every attribute that is read."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {(ast.unparse(node.value).rpartition(".")[2], node.attr) for node in nodes}


def test_every_setting_is_read_somewhere() -> None:
    """As one of its own section; [sweep] is read as a whole, by train/sweep.py."""
    packages = ("common", "harvest", "shards", "transcoder", "train", "evaluate")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    used = set().union(*(reads(ast.parse(path.read_text())) for path in files))
    classes = [
        node
        for file in ("sections", "settings")
        for node in ast.parse((ROOT / f"common/settings/{file}.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    for node in classes:
        used |= {(node.name.lower() if owner == "self" else owner, key) for owner, key in reads(node)}
    unread = [
        f"{name}.{key}"
        for name, owners in OWNERS.items()
        for key in SECTIONS[name].model_fields
        if not {(owner, key) for owner in owners} & used
    ]
    assert unread == []
    assert OWNERS.keys() | {"sweep"} == SECTIONS.keys()


def test_the_file_lists_every_setting_with_its_default() -> None:
    """Commented out where the default is none, or a path of this machine; [sweep] has none."""
    text = PIPELINE_TOML.read_text().split("[recipe.")[0]
    file = tomllib.loads(text)
    for name, section in SECTIONS.items():
        if name == "sweep":
            continue
        defaults = section()
        lines = re.search(rf"^\[{name}\]\n(.*?)(?=^\[|\Z)", text, re.DOTALL | re.MULTILINE)
        assert lines
        for key in section.model_fields:
            default, listed = getattr(defaults, key), file[name].get(key)
            if listed is None:
                assert re.search(rf"^# {key} = ", lines[1], re.MULTILINE), f"{name}.{key} is not in the file"
                assert default is None or key == "cache", f"{name}.{key} is {default!r} by default"
            else:
                assert section.model_validate({key: listed}) == section(), f"{name}.{key}"


def test_every_setting_has_a_docstring() -> None:
    undocumented = [
        f"{n}.{k}" for n, s in SECTIONS.items() for k, f in s.model_fields.items() if not f.description
    ]
    assert not undocumented


def test_what_is_missing_is_named_as_make_has_it_too() -> None:
    options = parser("evaluate.read", "")
    options.add_argument("--text", required=True)
    with pytest.raises(InputError, match=re.escape("command line: expected TEXT=... (--text); --help-all")):
        load(options, ("--layer", "3"))
    with pytest.raises(
        InputError, match=re.escape("argument LAYER=... (--layer): expected one argument; --help-all")
    ):
        load(parser("train", ""), ("--layer",))
    with pytest.raises(InputError, match=re.escape("argument --harvest.rows: expected one argument")):
        load(parser("harvest", ""), ("--harvest.rows",))
    passed = set(re.findall(r"option,([A-Z]+),--([a-z]+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    passed = {
        pair for pair in passed if pair[0] not in ("NODES", "HEAD", "RESTARTS")
    }  # common.launch names them itself
    assert {name for name, _ in passed} <= set(MAKE_VARIABLES)
    assert all(name.lower() == option for name, option in passed)


@pytest.mark.parametrize(
    ("arguments", "where", "value"),
    [
        (("--train.rows", "1e6"), "train.rows", 1_000_000),
        (("--harvest.rows", "1.5E6"), "harvest.rows", 1_500_000),
        (("--evaluate.rows", "1e5"), "evaluate.rows", 100_000),
        (("--sweep.dead_after_rows", "1e4, 2e4"), "sweep.dead_after_rows", (10_000, 20_000)),
        (("--sweep.lr", "1e-4 2e-4"), "sweep.lr", (1e-4, 2e-4)),
        (("--transcoder.skip",), "transcoder.skip", True),
        (("--transcoder.skip", "false"), "transcoder.skip", False),
        (("--transcoder.d_sae", "8x"), "transcoder.d_sae", "8x"),
        (("--data.files", "a b.txt"), "data.files", ("a b.txt",)),
    ],
)
def test_values_as_people_type_them(arguments: tuple[str, ...], where: str, value: object) -> None:
    section, key = where.split(".")
    chosen = getattr(getattr(settings("--layer", "3", *arguments), section), key)
    assert (chosen, type(chosen)) == (value, type(value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--train.rows", "1.5e0"),
            "train.rows: expected a valid integer, got a number with a fractional part",
        ),
        (("\u2013-train.lr", "3"), "'\u2013-train.lr' begins with another dash than -; type --train.lr"),
        (("\u2014train.lr", "3"), "'\u2014train.lr' begins with another dash than -; type --train.lr"),
        (("--transcoder.group_sizes", ""), "transcoder.group_sizes: expected at least one value, found"),
        (("--transcoder.skip", "maybe"), "transcoder.skip: expected a valid boolean"),
        *(
            (
                ("--paths.activations", wrong),
                "paths.activations: expected a directory, or an address such as s3://",
            )
            for wrong in (
                "S3://b/a",
                "s3:/b/a",
                "s3:",
                "s3://",
                "ftp://h/a",
                "FILE:///a",
                "file:a",
                "file:///",
                "file://folder/a",
                "gs:///a",
            )
        ),
        (
            ("--paths.checkpoints", "s3://b/runs"),
            "paths.checkpoints: expected a directory, found 's3://b/runs'",
        ),
        (("--paths.cache", "file:///cache"), "paths.cache: expected a directory, found 'file:///cache'"),
    ],
)
def test_values_that_people_mistype(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        settings("--layer", "3", *arguments)


@pytest.mark.parametrize(
    "place",
    [
        "s3://b",
        "s3://b/a",
        "gs://b/a/",
        "az://c/a",
        "file:///a",
        "file://localhost/a",
        "hf://a/b",
        "./s3:/a",
        "a:b",
    ],
)
def test_places_that_are_right(place: str) -> None:
    assert settings("--layer", "3", "--paths.activations", place).paths.activations == place


def test_a_file_that_an_editor_of_windows_wrote(tmp_path: Path) -> None:
    toml = tmp_path / "pipeline.toml"
    toml.write_bytes(b"\xef\xbb\xbf" + b"[train]\r\nlr = 0.5\r\n")
    assert settings("--layer", "3", toml=toml).train.lr == 0.5


def test_help_shows_what_no_value_means() -> None:
    said = " ".join(parser("train", "").format_help().split())
    assert "auto: the rule in docs/training.md. [auto]" in said
    assert "a hundredth of the peak. [auto]" in said
    assert "none: never. [none]" in said
    assert "[None]" not in said


def test_exit_code_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "harvest", "--layer", "17", "--train.lrr", "1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert (
        process.stderr
        == "error: command line: unknown option --train.lrr; did you mean --train.lr?; --help-all lists every option\n"
    )
    assert process.stdout == ""


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ((), "default"),
        (("--train.lr", "1.2345678e-4"), "default-lr0.00012345678"),
        (("--train.log_every", "7", "--train.sample_every", "0", "--train.checkpoint_every", "9"), "default"),
        (
            (
                "--transcoder.d_sae=5120",
                "--transcoder.group_sizes=320,640,1280,2880",
                "--train.dead_after_rows=9",
            ),
            "default-d_sae5120-groups320_640_1280_2880-dead9",
        ),
    ],
)
def test_a_run_is_named_after_what_decides_its_weights(argv: tuple[str, ...], name: str) -> None:
    assert settings("--layer", "3", *argv).run == name


def test_a_long_name_ends_in_a_digest_of_all_that_differs() -> None:
    groups = ",".join(["100"] * 20)
    long = (
        "--layer",
        "3",
        "--train.lr",
        "1e-3",
        "--transcoder.d_sae",
        "2000",
        "--transcoder.group_sizes",
        groups,
    )
    names = [settings(*long, "--train.seed", seed).run for seed in ("1", "2", "1")]
    assert names[0] == names[2] != names[1]
    assert all(re.fullmatch(r"default-d_sae2000-[0-9a-f]{8}", name) for name in names)


def test_a_profiles_name_does_not_lead_a_run_elsewhere(tmp_path: Path) -> None:
    toml = tmp_path / "pipeline.toml"
    toml.write_text('[profile."my best".train]\nseed = 1\n[profile.".."]\nlayers = [1]\n')
    assert settings("--layer", "3", "--profile", "my best", toml=toml).run == "my_best"
    with pytest.raises(InputError, match=r"run: '\.\.' is not a name"):
        settings("--layer", "3", "--profile", "..", toml=toml)


@pytest.mark.parametrize("key", ["activations", "checkpoints", "cache"])
def test_a_place_may_be_below_the_home_and_is_never_empty(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one wrote to the root of the disk; a ~ in pipeline.toml made a directory of that name."""
    monkeypatch.setenv("HOME", "/home/me")
    assert str(getattr(Paths.model_validate({key: "~/acts"}), key)) == "/home/me/acts"
    assert str(getattr(Paths.model_validate({key: "a~b"}), key)) == "a~b"
    for wrong, why in (("", "empty name"), (" ", "empty name"), ("~no_such_user/x", "~no_such_user/x: ")):
        with pytest.raises(InputError, match=rf"^here: paths\.{key}: .*{why}"):
            validated({"paths": {key: wrong}}, "here")


@pytest.mark.parametrize("key", ["harvest.seed", "train.seed", "train.order_seed"])
def test_a_seed_fits_into_64_bits(key: str) -> None:
    section, name = key.split(".")
    values = {section: {name: 2**63 - 1}}
    assert getattr(getattr(validated(values, "here"), section), name) == 2**63 - 1
    with pytest.raises(
        InputError, match=rf"^here: {key}: expected a number less than 9223372036854775808, found"
    ):
        validated({section: {name: 2**63}}, "here")


def test_multiples_of_d_in_are_exact_and_wait_for_it() -> None:
    """0.7 * 640 is 447.99999999999994 as a float, and 0.1x is whole for 640 though not for every width."""
    sizes = Transcoder(d_sae="0.8x", group_sizes=("0.1x", "0.7x"), k=4)
    assert sizes.resolve(640) == (512, (64, 448))
    with pytest.raises(ValueError, match=r"size 0\.8x of d_in 64 is 51\.2, not a whole number"):
        sizes.resolve(64)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("17", (17,)),
        ("0-3", (0, 1, 2, 3)),
        ("0-2 12 7", (0, 1, 2, 7, 12)),
        ("0-2,12", (0, 1, 2, 12)),
        ("5-5 5", (5,)),
    ],
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert settings("--layer", text).layers == layers


def test_all_layers_are_those_of_the_model_that_was_asked_for(tmp_path: Path) -> None:
    toml = tmp_path / "pipeline.toml"
    toml.write_text('layers = "all"\n[model]\nname = "own/model"\n')
    asked: list[str] = []

    def n_layers(settings: Settings) -> int:
        asked.append(settings.model.name)
        return 4

    options = parser("train", "")
    assert load(options, ("--layer", "all"), toml, n_layers)[0].layers == (0, 1, 2, 3)
    assert load(options, (), toml, n_layers)[0].layers == (0, 1, 2, 3)
    assert load(options, ("--layer", "1"), toml, n_layers)[0].layers == (1,)
    assert asked == ["own/model"] * 2
    with pytest.raises(InputError, match="this stage takes no LAYER=all; give LAYER=17"):
        load(options, ("--layer", "all"), toml)
    for wrong in (("--train.lr", "fast"), ("--run", "a/b"), ("--profile", "none")):
        with pytest.raises(InputError, match=r"fast|a/b|none"):
            load(options, ("--layer", "all", *wrong), toml, n_layers)
    assert len(asked) == 2  # what is wrong with the command line shows before the model is looked for


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("5-2", "layer: 5-2 ends before it begins; give 2-5"),
        ("-3", "layer: expected layer numbers from 0, found '-3'"),
        ("0-", "layer: expected layer numbers from 0, found '0-'"),
        ("1 - 3", "layer: expected layer numbers from 0, found '1 - 3'"),
        ("1–3", "layer: expected layer numbers from 0, found '1–3'"),
        ("0-5-9", "layer: expected layer numbers from 0, found '0-5-9'"),
        ("ALL", "layer: expected layer numbers from 0, found 'ALL'"),
        ("all 3", "layer: expected layer numbers from 0, found 'all 3'; all stands alone"),
        ("0-999999999", "layer: 0-999999999: no model has so many layers; a range ends below 1000"),
    ],
)
def test_what_is_no_layer_is_named(text: str, line: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        settings(f"--layer={text}")


def test_a_set_gives_each_layer_its_recipe_and_all_of_them_one_name(tmp_path: Path) -> None:
    toml = tmp_path / "pipeline.toml"
    toml.write_text('[train]\nrows = 5000\n[recipe."google/gemma-2-2b".1.train]\nrows = 2000\nlr = 1e-3\n')
    options = parser("train", "")
    asked = read(options, ("--layer", "0-2", "--train.lr", "1e-3"), toml)
    both = asked.settings((0, 1, 2))
    assert (both.run, both.layers, both.train.rows) == ("default-lr0.001", (0, 1, 2), 5000)
    each = [asked.alone(layer, both.run) for layer in both.layers]
    assert [one.train.rows for one in each] == [5000, 2000, 5000]
    assert [(one.layer, one.run) for one in each] == [(0, both.run), (1, both.run), (2, both.run)]
    # Alone, layer 1 has nothing that the command line changed.
    assert load(options, ("--layer", "1", "--train.lr", "1e-3"), toml)[0].run == "default"
    assert load(options, ("--layer", "0", "--train.lr", "1e-3"), toml)[0] == each[0]
