"""The repository is the same wherever it lies: no file names a machine's folders or a package registry's host."""

from __future__ import annotations

import re
import subprocess

import pytest
from checkout import ROOT

FOLDER_OF_A_MACHINE = re.compile(r"(?<![\w.~-])/(?:home|root|work|workspace|Users)/\w")
# Written so that no pattern finds itself.
REGISTRY = re.compile(r"pypi\.(?:org|python)|python[h]osted|deb\.debian\.org|npmjs\.(?:org|com)|download\.pytorch\.org")


def tracked_texts() -> dict[str, str]:
    """Files that git tracks or would take, by path; binary ones left out."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    contents = {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}
    return {name: data.decode("utf-8") for name, data in contents.items() if b"\0" not in data}


@pytest.mark.parametrize("pattern", [FOLDER_OF_A_MACHINE, REGISTRY], ids=["folders", "registries"])
def test_no_file_names_a_machine(pattern: re.Pattern[str]) -> None:
    texts = tracked_texts()
    assert "pyproject.toml" in texts
    found = [f"{name}: {match[0]}" for name, text in texts.items() for match in pattern.finditer(text)]
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    assert FOLDER_OF_A_MACHINE.search('open("/' + 'home/ann/model")')
    assert not FOLDER_OF_A_MACHINE.search("example.com/home/page")
    assert REGISTRY.search("https://" + ".".join(["pypi", "org"]) + "/simple")
    assert not REGISTRY.search("pypi organises")
