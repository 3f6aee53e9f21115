"""Whatever bytes lie where a command reads: it does its work or says one line, soon and within some memory."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moescale.cli import app
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from tests.support.models import make_config, write_run
from tests.support.reports import make_run, make_text

COMMANDS = {  # a folder: what reads it
    "native": (["convert", "--inspect"], ["generate", "--tokens", "2"], ["convert", "THERE", "--to", "hf"]),
    "hf": (["convert", "--inspect"], ["convert", "THERE", "--to", "moescale"]),
    "megatron": (["convert", "--inspect"],), "ranks": (["convert", "--inspect"],),
    "deepspeed": (["convert", "--inspect"],), "report": (["report"], ["report", "--terminal"]),
}
VALUES = ("NaN", "1e999", "-1", "0", "1000000000", "9" * 20, "null", "true", "[]", "{}", '""', '"\\u202e<b>"',
          "[[[[]]]]", "1.5", '"x"', "-0.0", "2147483648", "9223372036854775808", "/etc/passwd", "../outside")
SPOT = re.compile(r'-?\d+(\.\d+)?(e-?\d+)?|"[^"]*"|true|false|null|\[[^\[\]]*\]|(?<=: )\S+')
SECONDS, MEMORY = 60, 8 << 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that the commands read."""
    place = tmp_path_factory.mktemp("whole")
    write_run(place / "native", make_config({"num_layers": 1, "window": None}))
    opened = open_source(place / "native")
    for name, to, layout in (("hf", "hf", FileLayout()), ("megatron", "megatron", FileLayout()),
                             ("ranks", "megatron", FileLayout(tp=2)), ("deepspeed", "deepspeed", FileLayout())):
        convert(opened, place / name, to, layout)
    make_text(make_run(place / "report", layers=2, experts=4, steps=5), 2, 4)
    return place


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Change some bytes, or values where it is a text; cut it, lengthen it, repeat a part, or put a number in."""
    data, kind = bytearray(content), draw.random()
    if not data or kind < 0.05:
        return b""
    if kind < 0.45 and all(byte in b"\t\n\r" or byte >= 32 for byte in data[:200]):
        text = data.decode("utf-8", "replace")
        for _ in range(draw.randint(1, 2)):
            spots = [match.span() for match in SPOT.finditer(text)]
            begin, end = draw.choice(spots or [(0, 0)])
            text = text[:begin] + draw.choice(VALUES) + text[end:]
        return text.encode()
    begin, end = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
    if kind < 0.6:
        return bytes(data[:end])
    if kind < 0.65:
        return bytes(data[:begin] + data[end:])
    if kind < 0.7:
        return bytes(data[:end] + data[max(begin, end - 200) : end] * draw.randint(1, 20) + data[end:])
    if kind < 0.8:
        size = draw.choice((2, 4, 8))
        number = draw.choice((0, 1, 1 << 8 * size - 1, (1 << 8 * size) - 1))
        data[begin : begin + size] = number.to_bytes(size, "little")
        return bytes(data)
    hot = min(len(data), draw.choice((100, 2000, len(data))))
    for _ in range(draw.randint(1, 5)):
        data[draw.randrange(hot)] = draw.randrange(256)
    return bytes(data)


def agree(file: Path) -> None:
    """Let the manifest say of a file what is true, as one who means harm would."""
    manifest = file.parent / "checkpoint.json"
    if manifest.exists() and file != manifest:
        values, content = json.loads(manifest.read_text()), file.read_bytes()
        values["files"][file.name] = [len(content), zlib.crc32(content)]
        manifest.write_text(json.dumps(values))


class HangError(BaseException):
    """No Exception, so that no command takes it for a fault of a file."""


@contextmanager
def bounded() -> Iterator[None]:
    """Allow some time and memory."""
    def hang(*_: object) -> None:
        raise HangError

    before, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def hold_to_one_line(folders: Path, work: Path, seed: int, times: int) -> None:
    draw = random.Random(seed)
    for number in range(times):
        name = draw.choice(list(COMMANDS))
        place, there = work / "source", work / "there"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folders / name, place)
        files = [file for file in sorted(place.rglob("*")) if file.is_file()]
        texts = [file for file in files if file.suffix != ".distcp"]
        file = draw.choice(texts if draw.random() < 0.8 else files)
        file.write_bytes(damaged(file.read_bytes(), draw))
        if draw.random() < 0.8:
            agree(file)
        for command in COMMANDS[name]:
            shutil.rmtree(there, ignore_errors=True)
            words = [command[0], str(place), *(str(there) if word == "THERE" else word for word in command[1:])]
            with bounded():
                result = CliRunner().invoke(app, words)
            case = f"seed {seed}, number {number}: {file.relative_to(work)}, {' '.join(command)}"
            assert result.exit_code in (0, 2), f"{case}: {result.exception!r} {result.output[-500:]}"
            if result.exit_code == 2:
                assert result.output.startswith("moescale: "), case
                assert len(result.output.splitlines()) == 1, f"{case}: {result.output[-500:]}"


def test_damage_is_borne_or_one_line(folders: Path, tmp_path: Path) -> None:
    hold_to_one_line(folders, tmp_path, seed=0, times=40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_much_damage_is_borne_or_one_line(folders: Path, tmp_path: Path, seed: int) -> None:
    hold_to_one_line(folders, tmp_path, seed, times=400)
