"""pyproject, constraints and what ships: said once, and true."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import gemma_ft

ROOT = Path(gemma_ft.__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="only in a checkout")


def pins(file: str = "constraints.txt") -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {
        re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in (line.split("==") for line in lines)
    }


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [one for one in map(Requirement, texts) if one.name != project["name"]]


@pytest.mark.parametrize("requirement", requirements() if (ROOT / "pyproject.toml").exists() else [], ids=str)
def test_the_tested_version_of_each_dependency_is_pinned_and_in_range(requirement: Requirement) -> None:
    assert pins()[requirement.name.lower().replace("_", "-")] in requirement.specifier


def test_the_tested_set_is_the_promised_one_and_fits_any_machine() -> None:
    promised = {"torch": "2.13.0", "transformers": "5.24.0", "trl": "1.16.0", "peft": "0.21.2", "accelerate": "1.15.0",
                "bitsandbytes": "0.50.2", "datasets": "5.2.0", "wandb": "0.31.0"}  # fmt: skip
    assert {name: str(pins()[name]) for name in promised} == promised
    assert all(version.local is None for version in pins().values()), "a +cpu pin shuts CUDA machines out"


def test_the_lowest_set_is_the_lower_end_of_every_range() -> None:
    """What users get by pip alone lies between two sets that were both run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for name in ("serve", "eval", "gguf") for text in extras[name])]
    floors = {}
    for one in map(Requirement, texts):
        (floor,) = (Version(part.version) for part in one.specifier if part.operator in (">=", "=="))
        floors[re.sub(r"[-_.]+", "-", one.name).lower()] = floor
    assert floors == pins("constraints-lowest.txt")


def test_the_licence_is_the_plain_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")
