"""The documentation: pages that follow from the code are up to date, links lead somewhere, commands run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *ROOT.glob("cluster/*.md"),
]


def test_generated_pages_are_up_to_date() -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert found.stdout == "up to date\n", found.stdout + found.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "lora_search").rglob("*.py")))
    said = re.sub(r'"\s*f?"', "", source)  # literals that stand side by side are one
    said = re.sub(r"\{[^{}]*\}", "...", said)
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    phrases = [phrase for row in rows for phrase in re.findall(r"`([^`]{12,})`", row)]
    assert len(phrases) > 8
    pieces = {phrase: [piece for piece in re.split(r"\.\.\.", phrase) if len(piece) > 8] for phrase in phrases}
    assert not [phrase for phrase, wanted in pieces.items() if not all(piece in said for piece in wanted)]
