"""python -m bench.gpu [PART ...]: every part below on this machine's GPU, one table with the device's name.

A part takes less than 10 minutes. One that was done on this device with this code is shown and not done again unless
--again asks for it. Results by device: bench/results/gpu.json; profiles of the steps beside it. docs/gpu.md says what
was measured. `--device cpu` runs the same at a small size, for tests, and writes nothing.
"""

import argparse
import hashlib
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu.parts import FULL, PARTS, RESULTS, SMALL, Sizes
from common.cli import run_stage
from common.device import pick_device
from common.progress import progress
from common.settings import ROOT

PACKAGES = ("common", "shards", "harvest", "transcoder", "train", "evaluate", "bench/gpu")


def main() -> None:
    options = argparse.ArgumentParser(description="Training, harvest and evaluation on a GPU, beside floors.")
    options.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all of them]")
    options.add_argument("--device", default="cuda", help="[%(default)s]")
    options.add_argument("--again", action="store_true", help="also what was done with this code before")
    arguments = options.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        options.error(f"PART: expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    device = pick_device(arguments.device)
    run(arguments.parts or [*PARTS], device, SMALL if device.type == "cpu" else FULL, arguments.again)


def run(parts: list[str], device: torch.device, sizes: Sizes, again: bool = False) -> None:
    """Do the parts that are left and print all tables; a GPU's are written after each part."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    own, code = kept.setdefault(name, {}), code_version()
    with progress("gpu", len(parts), "parts") as bar:
        for part in parts:
            if again or own.get("code", {}).get(part) != code:
                own[part] = PARTS[part](device, sizes)
                own["torch"] = torch.__version__
                own.setdefault("code", {})[part] = code
            else:
                print(f"{part}: done with this code before; ARGS=--again does it again", flush=True)
            Console(width=150).print(table(f"{part} on {name}", own[part]))
            if device.type == "cuda":
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            bar.update(1)


def code_version() -> str:
    """Of every Python file that a part runs."""
    digest = hashlib.sha256()
    for file in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def table(title: str, results: dict[str, Any]) -> Table:
    """One line a figure, or a case and its figures."""
    nested = {
        name: value if isinstance(value, dict) else {"figure": value} for name, value in results.items()
    }
    columns = list(dict.fromkeys(column for figures in nested.values() for column in figures))
    shown = Table("", *columns, title=title, title_justify="left")
    for name, figures in nested.items():
        shown.add_row(name, *(f"{figures[column]:,.4g}" if column in figures else "-" for column in columns))
    return shown


if __name__ == "__main__":
    run_stage(main)
