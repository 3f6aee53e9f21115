"""docs/operations.md has the messages as the code says them."""

from __future__ import annotations

import ast
import re

from tests.support.command_line import ROOT

PLACEHOLDER = re.compile(r"\.\.\.|[:,;()]|\b[A-Z]\w*(?:=\S*)?|\d+|`[^`]*`")  # what differs each time
SHORTEST = 8  # letters of a piece that is looked for


def messages() -> list[str]:
    """Read the first column of the tables below the last part's heading."""
    text = (ROOT / "docs/operations.md").read_text().partition("## Messages")[2].partition("\n## ")[0]
    cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    return [cell for cell in cells if cell != "message" and not set(cell) <= set("-")]


def words_of_the_code() -> list[str]:
    return [node.value for path in (ROOT / "moescale").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_every_message_is_one_of_the_code() -> None:
    said = "\n".join(words_of_the_code())
    found = messages()
    assert len(found) >= 25
    missing = [(message, piece) for message in found for piece in map(str.strip, PLACEHOLDER.split(message))
               if len(piece) >= SHORTEST and piece not in said]
    assert not missing
    for message in found:
        assert any(len(piece.strip()) >= SHORTEST for piece in PLACEHOLDER.split(message)), f"{message}: nothing known"
