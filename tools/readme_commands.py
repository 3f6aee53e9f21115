"""A new user's first minutes: every command of README.md, as it is written there, in a fresh clone.

Commands are the lines of blocks marked as `sh`, and blocks marked as `python`. A block that cannot be run by everybody
has `<!-- not run: REASON -->` in the line above; those are listed with their reason. Lines that begin with `. ` change
the shell of those below them, as they would for a person.

    python tools/readme_commands.py                      # clones, installs, trains: half an hour on two cores
    python tools/readme_commands.py --venv .venv         # with the packages of a virtual environment that is there
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"<!-- not run: (.+) -->")
SECONDS = 1800  # for one command


@dataclass(frozen=True)
class Command:
    """text: a line of a shell, or a program in Python. reason: why it is not run, if it is not."""

    line: int
    text: str
    language: str
    reason: str | None


def read_commands(readme: str) -> list[Command]:
    """Read the commands out of Markdown, comments stripped."""
    lines = readme.splitlines()
    commands: list[Command] = []
    language = ""
    block: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            if language:
                block.append((number, line))
            continue
        if language:
            above = lines[block[0][0] - 3] if block and block[0][0] >= 3 else ""
            mark = MARK.fullmatch(above.strip())
            reason = mark[1] if mark else None
            if language == "python" and block:
                commands.append(Command(block[0][0], "\n".join(text for _, text in block), language, reason))
            if language == "sh":
                commands += [Command(place, text, language, reason)
                             for place, text in ((place, re.sub(r"(^|\s+)# .*", "", text)) for place, text in block)
                             if text.strip()]
        language, block = ("" if language else line[3:].strip() or "text"), []
    return commands


def run(command: Command, clone: Path, before: list[str]) -> tuple[int, float, str]:
    """Run one command. before: lines that set up its shell. -> exit status, seconds, the end of its output"""
    text = f"python - <<'END'\n{command.text}\nEND" if command.language == "python" else command.text
    started = time.monotonic()
    try:
        done = subprocess.run(["bash", "-c", "\n".join([*before, text])], cwd=clone, text=True, errors="replace",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                              timeout=SECONDS)
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        status, output = 124, (late.stdout or b"").decode(errors="replace")
    return status, time.monotonic() - started, "\n".join(output.splitlines()[-8:])


def borrow(clone: Path, venv: Path) -> None:
    """Make the clone's .venv one that finds the packages of another, so that `make` installs nothing."""
    python = venv.absolute() / "bin/python"
    subprocess.run([python, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    bin_folder, (site,) = clone / ".venv/bin", (clone / ".venv/lib").glob("python*/site-packages")
    theirs = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                            capture_output=True, text=True).stdout.strip()
    (site / "clone.pth").write_text(f"{clone}\n{theirs}\n")
    for name, module in (("moescale", "moescale"), ("torchrun", "torch.distributed.run")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec "{bin_folder}/python" -m {module} "$@"\n')
        (bin_folder / name).chmod(0o755)
    (clone / ".venv/installed").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="a virtual environment that has what MoEScale needs")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="moescale-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if arguments.venv is not None:
            borrow(clone, arguments.venv)
        before: list[str] = []
        for command in read_commands((clone / "README.md").read_text(encoding="utf-8")):
            first = command.text.splitlines()[0] + (" ..." if "\n" in command.text else "")
            if command.reason is not None:
                print(f"not run ({command.reason}): line {command.line}: {first}", flush=True)
                continue
            status, seconds, output = run(command, clone, before)
            print(f"{'ok' if status == 0 else 'FAILED'} {seconds:5.0f} s: line {command.line}: {first}", flush=True)
            if status != 0:
                failed += 1
                print(f"exit status {status}\n{output}", flush=True)
            elif command.text.startswith(". "):
                before.append(command.text)
    print(f"{failed} failed" if failed else "all of them work", flush=True)
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
