"""README's commands and keys are those that exist; `tools/readme_commands.py` runs the commands in a fresh clone."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moescale.config import Config, load_config
from moescale.config.values import group
from tools.readme_commands import Command, read_commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = read_commands(README)


def test_every_key_of_the_readme_exists() -> None:
    groups = "|".join(Config.model_fields)
    named = set(re.findall(rf"`(?:\w+: )?({groups})\.(\w+)", README)) - {("data", "files=[")}
    assert len(named) > 30
    unknown = {f"{home}.{name}" for home, name in named if name not in group(home).model_fields and name != "py"}
    assert not unknown


@pytest.mark.parametrize("command", [each for each in COMMANDS if "configs/" in each.text and each.language == "sh"],
                         ids=lambda command: f"line {command.line}")
def test_overrides_of_the_readme_fit_together(command: Command) -> None:
    words = shlex.split(command.text)
    place = next(place for place, word in enumerate(words) if word.startswith("configs/"))
    ranks = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
    overrides = [word for word in words[place + 1 :] if re.match(r"\w+\.\w+=", word)]
    config = load_config(ROOT / words[place], overrides)
    if command.reason is None:
        config.for_world(ranks)


def test_blocks_are_read_and_marked() -> None:
    text = ("```sh\na b  # said\n\nc '#d'\n```\n<!-- not run: a cluster -->\n```sh\ne\n```\n```\nf\n```\n"
            "```python\ng\nh\n```")
    assert read_commands(text) == [
        Command(2, "a b", "sh", None), Command(4, "c '#d'", "sh", None), Command(8, "e", "sh", "a cluster"),
        Command(14, "g\nh", "python", None)]
    run = [command for command in COMMANDS if command.reason is None]
    assert len(run) > 10
    assert any(command.text.startswith(". .venv") for command in run), "activation is said"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_new_users_first_minutes() -> None:
    command = [sys.executable, str(ROOT / "tools/readme_commands.py"), "--venv", str(Path(sys.prefix))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
