"""A stage's command line: from its arguments to the settings, and from what happened to the exit code."""

import argparse
import contextlib
import faulthandler
import io
import os
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from common import launched, stop_at_once
from common.errors import ENVIRONMENT, InputError
from common.nodes.environment import end_with_launcher, place, rank, recognise_srun
from common.settings import ROOT, SECTIONS, Model, Settings, changes, nearest, run_name, validated

PIPELINE_TOML = ROOT / "pipeline.toml"


OWN_SECTIONS = {
    "harvest": ("model", "data", "harvest"),
    "train": ("transcoder", "train", "wandb"),
    "train.sweep": ("sweep",),
    "evaluate": ("evaluate",),
}
"""Sections of the settings that a stage's --help shows; --help-all shows all."""


MAKE_VARIABLES = (
    *("LAYER", "PROFILE", "RUN", "HARVEST", "TEXT", "FILE", "SET", "SCALE", "ABLATE", "FORMAT"),
    *("PREFIX", "TO", "FROM", "REPO", "WITH", "MINUTES", "SPREAD", "MODEL"),
    *("NPROC", "NODES", "MEMORY", "WIDTH"),
)
"""Variables of the Makefile that are passed on as the option of the same name."""


ANOTHER_DASH = re.compile("-*[\u2010-\u2015\u2212][-\u2010-\u2015\u2212]*")
"""In an option pasted from a typeset text: hyphens, dashes, a minus sign, which look like - and are not."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        self.hidden: dict[argparse.Action, str] = {}
        """Help of the options that --help leaves out."""
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"--(\w+)(?![\w.-])", lambda match: _both_names(match[0], match[1]), message)
        text = text.replace("the following arguments are required:", "expected")
        raise InputError(f"command line: {text}; --help-all lists every option")


def _both_names(option: str, word: str) -> str:
    """An option, and the variable of make that passes it on, if any."""
    return f"{word.upper()}=... ({option})" if word.upper() in MAKE_VARIABLES else option


class _HelpAll(argparse.Action):
    """Print the help with the options of every section."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, _Parser)
        for action, text in parser.hidden.items():
            action.help = text
        parser.print_help()
        raise SystemExit(0)


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=120)


def parser(prog: str, purpose: str) -> argparse.ArgumentParser:
    """A stage's command line: --layer, --profile, --run, --harvest and every --section.key.

    Uses argparse because a recipe is chosen by the layer on the command line, and --help shows one stage's sections.
    pydantic-settings does neither, and takes `--harvest NAME` for the section; docs/log.md has the figures.
    """
    options = _Parser(
        prog=f"python -m {prog}",
        usage=f"python -m {prog} [options]",
        description=purpose,
        epilog="--help-all lists the settings of every stage; pipeline.toml has them with their defaults and units.",
        allow_abbrev=False,
        formatter_class=_help_format,
    )
    options.add_argument(
        "--layer", help='layer; several: "8 12 17", 0-25, "0-5 12", or all layers of the model: all'
    )
    options.add_argument("--profile", help="profile of pipeline.toml, for example demo")
    options.add_argument("--run", help="name of the training run")
    options.add_argument("--harvest", dest="harvest_name", help="name of a second harvest of the same layer")
    options.add_argument(
        "--help-all", action=_HelpAll, nargs=0, help="list the settings of every stage and exit"
    )
    for name, section in SECTIONS.items():
        group = options.add_argument_group(name)
        for key, field in section.model_fields.items():
            several, default = str(field.annotation).startswith("tuple"), field.default
            metavar = "VALUE,..." if several else "VALUE"
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            if default is None:  # as the command line takes it
                shown = "auto" if "auto: " in (field.description or "") else "none"
            help_text = f"{field.description} [{shown}]".replace("%", "%%")
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
            action = group.add_argument(f"--{name}.{key}", metavar=metavar, help=help_text, **flag)
            if name not in OWN_SECTIONS.get(prog, ()):
                options.hidden[action], action.help = help_text, argparse.SUPPRESS
    return options


@dataclass(frozen=True)
class Asked:
    """A command line over pipeline.toml, before it is known which layers it is of."""

    toml: str
    """Name of the file, for errors."""
    merged: dict[str, Any]
    """The file and the profile."""
    recipes: dict[str, Any]
    """[recipe."MODEL".LAYER] -> settings."""
    overrides: dict[str, dict[str, Any]]
    """The options --section.key."""
    arguments: argparse.Namespace

    def both(self, layers: tuple[int, ...]) -> tuple[Settings, Settings]:
        """Settings without and with the options; of one layer with its recipe."""
        merged = self.merged
        model = _merge(merged, self.overrides).get("model", {})
        if len(layers) == 1 and isinstance(model, dict):
            recipe = self.recipes.get(model.get("name", Model().name), {})
            merged = _merge(merged, recipe.get(str(layers[0]), {}))
        top = {
            "layers": layers,
            "profile": self.arguments.profile,
            "harvest_name": _name("harvest", self.arguments.harvest_name),
        }
        base = validated(_merge(merged, top), self.toml)
        return base, validated(_merge(_merge(merged, top), self.overrides), "command line")

    def layers(self, n_layers: Callable[[Settings], int]) -> tuple[int, ...]:
        """The layers asked for, in rising order; `n_layers`: of the model, called for `all` alone."""
        text = self.arguments.layer if self.arguments.layer is not None else self.merged.get("layers", ())
        layers = _layers(text)
        if layers is not None:
            return layers
        _name("run", self.arguments.run)  # what is wrong with the command line shows before anything is read
        return tuple(range(n_layers(self.both(())[1])))

    def settings(self, layers: tuple[int, ...]) -> Settings:
        """Settings of a stage over these layers."""
        pairs = [self.both((layer,)) for layer in layers] if len(layers) > 1 else []
        base, settings = self.both(layers)
        run = _name("run", self.arguments.run) or _run_name(pairs or [(base, settings)])
        return settings.model_copy(update={"run": run})

    def alone(self, layer: int, run: str) -> Settings:
        """Settings of one layer of a set, as it has them alone; the set's runs have one name."""
        return self.both((layer,))[1].model_copy(update={"run": run})


def load(
    options: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    toml: Path | None = None,
    n_layers: Callable[[Settings], int] | None = None,
) -> tuple[Settings, argparse.Namespace]:
    """Settings from defaults < `toml` (none: PIPELINE_TOML) < profile < recipe of (model, layer) < `argv`.

    Also returns the parsed command line, for the options that are a stage's own. `n_layers`: how many layers the model
    has, asked for LAYER=all alone; a stage without it takes no `all`.
    Raises `InputError` with one line that names the key, the value and what is allowed.
    """
    asked = read(options, argv, toml)
    return asked.settings(asked.layers(n_layers or _not_all)), asked.arguments


def _not_all(_: Settings) -> NoReturn:
    raise InputError("layer: this stage takes no LAYER=all; give LAYER=17 (--layer 17)")


def read(
    options: argparse.ArgumentParser, argv: Sequence[str] | None = None, toml: Path | None = None
) -> Asked:
    """What `load` makes settings of, for a stage that takes several layers and gives each its own."""
    arguments, unknown = options.parse_known_args(argv)
    if unknown:
        raise InputError(f"command line: {_unknown(unknown[0], options)}; --help-all lists every option")
    toml = toml or PIPELINE_TOML
    overrides = _sections_of(arguments)
    file = _read_toml(toml)
    profiles = _tables(file, "profile", "[profile.NAME.train]", toml.name)
    recipes = _tables(file, "recipe", '[recipe."MODEL".LAYER.train]', toml.name)
    if stray := sorted(file.keys() & {"run", "harvest_name"}):
        where = "give RUN=name or HARVEST=name on the command line"
        raise InputError(f"{toml.name}: {stray[0]}: is not a setting; {where}")
    profile = profiles.get(arguments.profile, {}) if arguments.profile else {}
    if arguments.profile and arguments.profile not in profiles:
        known = ", ".join(profiles) or "none"
        raise InputError(f"profile: expected one of {known}, found {arguments.profile!r}; see {toml.name}")
    return Asked(toml.name, _merge(file, profile), recipes, overrides, arguments)


def _unknown(argument: str, options: argparse.ArgumentParser) -> str:
    """What to say of an argument that no option takes, with the option that may have been meant."""
    if dashes := ANOTHER_DASH.match(argument):
        return f"{argument!r} begins with another dash than -; type --{argument[dashes.end() :]}"
    if not argument.startswith("-"):
        return f"{argument!r} is not an option; give settings as --section.key value"
    option = argument.partition("=")[0]
    return f"unknown option {option}{nearest(option, list(options._option_string_actions))}"


def _sections_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The --section.key options that were given, nested; comma-separated lists are split."""
    sections: dict[str, dict[str, Any]] = {}
    for option, text in vars(arguments).items():
        section, _, key = option.partition(".")
        if text is None or not key:
            continue
        is_list = str(SECTIONS[section].model_fields[key].annotation).startswith("tuple")
        value = _list(text, names=option == "data.files") if is_list else text
        sections.setdefault(section, {})[key] = None if text.lower() == "none" else value
    return sections


def _list(text: str, names: bool) -> list[Any]:
    """A list as pipeline.toml has it, ["a,b.jsonl", "c.txt"], or what is between commas, or spaces but for names.

    Of names, brackets that make no list of strings are a part: text[1].jsonl.
    """
    if text.startswith("[") and text.endswith("]"):
        try:
            values = tomllib.loads(f"list = {text}")["list"]
        except tomllib.TOMLDecodeError:
            values = []
        if values and all(isinstance(value, str) for value in values):
            return values
        text = text if names else text[1:-1]
    parts = text.split(",") if names else text.replace(",", " ").split()
    return _joined_names(parts) if names else parts


def _joined_names(parts: Sequence[str]) -> list[str]:
    """What was between commas as names of files: where no file has a part's name, a comma may be in its name."""
    names: list[str] = []
    start = 0
    while start < len(parts):
        # All that is left, else as few parts as make a name.
        ends = (len(parts), *range(start + 1, len(parts)))
        candidates = [(end, ",".join(parts[start:end]).strip()) for end in ends]
        present = (each for each in candidates if each[1] and Path(each[1]).exists())
        start, name = next(present, (start + 1, parts[start].strip()))
        names.append(name)
    return [name for name in names if name]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(
            path.read_text(encoding="utf-8-sig")
        )  # Windows' editors begin a file with a mark
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error


def _tables(file: dict[str, Any], key: str, example: str, source: str) -> dict[str, Any]:
    """Take the tables [key.NAME.SECTION] out of a read file; a recipe's name has a layer below it."""
    tables = file.pop(key, {})
    levels = [tables]
    for _ in range(example.count(".")):
        if wrong := [level for level in levels if not isinstance(level, dict)]:
            raise InputError(f"{source}: {key}: expected tables like {example}, found {wrong[0]!r}")
        levels = [each for level in levels for each in level.values()]
    return tables


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`low` overlaid with `high`, section by section."""
    both = dict(low)
    for key, value in high.items():
        old = both.get(key)
        both[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


MOST_LAYERS = 1000
"""A range that ends beyond is a slip of the finger: no model has as many."""


def _layers(text: Any) -> tuple[int, ...] | None:
    """Layer numbers and ranges, "0-5 12", in rising order, each once; None: all layers of the model."""
    parts = text.replace(",", " ").split() if isinstance(text, str) else text
    parts = [str(part) for part in (parts if isinstance(parts, list | tuple) else [parts])]
    if parts == ["all"]:
        return None
    layers: set[int] = set()
    for part in parts:
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if match is None:
            alone = "all stands alone; " if "all" in parts else ""
            raise InputError(
                f"layer: expected layer numbers from 0, found {text!r}; {alone}for example LAYER=17, "
                'LAYER="0-5 12" or LAYER=all'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"layer: {part} ends before it begins; give {last}-{first}")
        if match[2] and last >= MOST_LAYERS:
            raise InputError(f"layer: {part}: no model has so many layers; a range ends below {MOST_LAYERS}")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _name(what: str, text: str | None) -> str | None:
    """A run's or harvest's name: becomes a directory, so it must not leave its parent."""
    if text and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}", text):
        raise InputError(f"{what}: {text!r} is not a name; use letters, digits and . _ + = - (at most 100)")
    return text or None


def _run_name(pairs: Sequence[tuple[Settings, Settings]]) -> str:
    """Profile (or "default"), then every training setting that the command line changed, by its short name.

    Of a set, what it changed in any layer: recipes may have what is asked for in some layers, and the name is one.
    """
    first = re.sub(r"[^A-Za-z0-9._+=-]", "_", pairs[0][1].profile or "default")
    parts = dict.fromkeys(part for base, settings in pairs for part in changes(base, settings))
    return _name("run", run_name(first, list(parts))) or "default"


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """End the stage; at once where it is importing: PyTorch swallows an exception while it imports numpy, and would
    go on with half of it (a training ended so, at its last step).
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            stop_at_once(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Give closed standard streams (2>&-) the null device, before a file that a stage writes gets their numbers; and
    let the others write a character that their encoding lacks as its escape.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is not
            stream.reconfigure(errors="backslashreplace")


def _last_word(line: str) -> None:
    """A line on standard error where that can be written; on a full disk, or with its reader gone, the code says it."""
    with contextlib.suppress(OSError):
        print(f"{line}\n", end="", file=sys.stderr, flush=True)  # at once: several processes may end together


def mendable(error: Exception) -> str | None:
    """What to say of an error that the user can mend; None: a defect."""
    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, OSError) or error.errno not in ENVIRONMENT:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; fix that and rerun the same command to continue"


def run_stage(stage: Callable[[], None]) -> NoReturn:
    """Run a stage's main function and leave with the exit code of the interface."""
    _open_streams()
    # A script's background jobs inherit an ignored Ctrl-C; a stage that is asked to stop stops, and says so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    end_with_launcher()
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a mapped file that somebody truncates kills the process: say where it was
    leads = True
    try:
        recognise_srun()
        leads = rank() == 0
        if not leads:  # the first process talks; all say what ends them
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        stage()
        print(end="", flush=True)  # at Python's end, a reader that has left means exit code 120
    except InputError as error:
        _last_word(f"error: {place()}{error}")
        raise SystemExit(2) from None
    except BrokenPipeError:  # `| head` has what it wanted; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if (line := mendable(error)) is None:
            raise
        _last_word(f"error: {place()}{line}")
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:
        hint = str(interrupt)
        if leads and (hint or not launched()):  # the launcher says it too
            _last_word(f"interrupted: {hint or 'the same command continues'}")
        raise SystemExit(130) from None
    raise SystemExit(0)
