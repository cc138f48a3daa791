"""CITATION.cff says what pyproject.toml says, and cites what the code cites."""

import re
import tomllib

import yaml

from common.settings import ROOT


def test_the_citation_is_of_this_project_and_of_every_paper_in_the_code() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
    assert (citation["abstract"], citation["license"]) == (project["description"], project["license"])
    assert citation["authors"] == [{"name": "The matryoshka-transcoder authors"}]
    packages = ("common", "harvest", "shards", "transcoder", "train", "evaluate")
    texts = [file.read_text() for package in packages for file in (ROOT / package).rglob("*.py")]
    cited = {paper for text in texts for paper in re.findall(r"arXiv:(\d{4}\.\d{5})", text)}
    listed = {
        re.findall(r"arXiv:(\d{4}\.\d{5})", reference["notes"])[0] for reference in citation["references"]
    }
    assert cited <= listed
    assert len(cited) >= 5
