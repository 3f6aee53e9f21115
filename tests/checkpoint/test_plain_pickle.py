"""Pickles are read into plain values: nothing that they name is imported, called or changed, whatever they hold."""

from __future__ import annotations

import enum
import pickle
import random
import struct
import sys
import time
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from moescale.checkpoint.archive import read_archive
from moescale.checkpoint.index import read_metadata
from moescale.checkpoint.plain_pickle import Name, PlainPickleError, Record, read_plain
from moescale.checkpoint.strided_view import Stored, read_region, region
from moescale.config import ConfigError
from moescale.convert.containers import create_distributed, open_distributed


class Colour(enum.Enum):
    RED = 1


def listed(value: Any) -> Any:
    """Turn sets into sorted lists, all through a value."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return type(value)(map(listed, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back_from_every_protocol(protocol: int) -> None:
    values = {"a": [1, -3, 2**40, -(2**70), 1.5, None, True, False], "b": ("x", "\N{SNOWMAN}" * 300, ((), (1, 2))),
              "c": {1: {2: []}, "k": {}, ("t", None): 1}, "d": b"\x00\xff" * 200, "many": list(range(3000)),
              "sets": [{3, 1, 2}, frozenset("ab")], "ordered": OrderedDict(x=1), "default": defaultdict(list, y=[2])}
    read = read_plain(pickle.dumps(values, protocol))
    read["sets"] = [sorted(item) for item in read["sets"]]
    assert read == listed(values)


@pytest.mark.parametrize("protocol", range(6))
def test_objects_become_records(protocol: int) -> None:
    shared = Namespace(x=1)
    found = read_plain(pickle.dumps([shared, shared, Colour.RED, PosixPath("a/b"), torch.Size((2, 3))], protocol))
    assert found[0] is found[1]
    assert isinstance(found[0], Record)
    assert (found[0].name, found[0].attributes()) == ("argparse.Namespace", {"x": 1})
    assert (found[2].name, found[2].args) == (f"{__name__}.Colour", (1,))
    assert found[3].name.endswith("PosixPath")
    assert found[4] == (2, 3)


def test_a_class_that_is_nowhere_becomes_a_record() -> None:
    room = types.ModuleType("nowhere")
    exec("class Plan:\n    pass\n", room.__dict__)
    room.Plan.__module__ = "nowhere"
    sys.modules["nowhere"] = room
    try:
        data = pickle.dumps({"plan": room.Plan(), "class": room.Plan})
    finally:
        del sys.modules["nowhere"]
    found = read_plain(data)
    assert found["plan"].name == "nowhere.Plan"
    assert found["class"] == Name("nowhere.Plan")
    assert "nowhere" not in sys.modules


def _laughs(levels: int, around: bytes = b"") -> bytes:
    """Lists that hold the list before twice, so that a few bytes stand for two to the power of the levels."""
    return b"\x80\x04]\x94" + b"".join(b"]\x94(h%ch%ce" % (level, level) for level in range(levels)) + around + b"."


def _nested(levels: int, open_: bytes = b"]", close: bytes = b"a") -> bytes:
    return b"\x80\x04" + open_ * levels + b"N" + close * levels + b"."


HOSTILE = {
    "laughs": _laughs(60), "deep lists": _nested(100_000), "deep tuples": b"\x80\x04N" + b"\x85" * 100_000 + b".",
    "a deep key": b"\x80\x04}" + b"N" + b"\x85" * 100_000 + b"Ns.", "itself": b"\x80\x04]\x94h\x00a.",
    "itself as a key": b"\x80\x04}\x94h\x00Ns.", "a huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "a huge frame": b"\x80\x04\x95" + b"\xff" * 8,
    "a huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", "a long number": b"\x80\x04\x8b"
    + struct.pack("<i", 400_000) + b"\x7f" * 400_000 + b".", "digits": b"L" + b"9" * 5000 + b"L\n.",
    "a negative length": b"\x80\x04\x8b" + struct.pack("<i", -4) + b".", "an empty stack": b"\x80\x04.",
    "no mark": b"\x80\x04e.", "nothing remembered": b"\x80\x04h\x07.", "no end": b"\x80\x04N", "nothing": b"",
    "a persistent name": b"Pabc\n.", "an extension": b"\x82\x01.", "a buffer": b"\x80\x05\x97.",
    "copies": b"\x80\x04\x8c\x07_codecs\x8c\x06encode\x93\x94X" + struct.pack("<I", 1_000_000) + b"x" * 1_000_000
    + b"\x94" + b"h\x00h\x01\x8c\x06latin1\x86R0" * 1000 + b"N.",
    "collisions": pickle.dumps({index * (2**61 - 1): None for index in range(100)}),
    "a number with attributes": b"\x80\x04K\x01}b.", "a state for a class": b"\x80\x04\x8c\x07pathlib\x8c\x09PosixPath"
    b"\x93N}\x8c\x06exists\x8c\x01xs\x86b.", "a call of nothing": b"\x80\x04N)R.", "a call with nothing": b"\x80\x04"
    b"\x8c\x01a\x8c\x01b\x93NR.", "items for a number": b"\x80\x04K\x01(NNu.", "an odd item": b"\x80\x04}(NNNu.",
    "os.system": b"cposix\nsystem\n(S'true'\ntR.", "eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "old eval": b"c__builtin__\neval\n(S'1'\ntR.", "a name of no text": b"\x80\x04K\x01K\x02\x93.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_ends_soon_and_in_one_line(data: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(PlainPickleError) as caught:
        read_plain(data)
    assert "\n" not in str(caught.value)
    assert time.process_time() - begin < 5


def attempt(work: Callable[[], object]) -> str:
    """Say what was refused, or nothing; any other error is one of the test."""
    try:
        work()
    except (PlainPickleError, ConfigError) as error:
        return str(error)
    return ""


def test_any_bytes_are_values_or_one_line() -> None:
    draw = random.Random(0)
    whole = pickle.dumps({"a": Namespace(x=[1, (2, "3")]), "b": OrderedDict(c=Colour.RED), "d": b"e" * 9}, 2)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.choice((draw.randrange(256), *b"}])(.sbRtue0"))
        said = attempt(lambda data=data: read_plain(bytes(data[: draw.choice((len(data), draw.randrange(len(data))))])))
        assert "\n" not in said


def make_index(folder: Path) -> dict[str, Stored]:
    return create_distributed(folder, {"__0_0.distcp": {"a": ((2, 3, 4), torch.float32), "b": ((3,), torch.bfloat16)},
                                       "__1_0.distcp": {"c": ((), torch.int64)}}, {"a": 1})


def test_an_index_changes_no_class(tmp_path: Path) -> None:
    """It may name classes, and set attributes: not those of the classes themselves."""
    make_index(tmp_path)
    before, data = dict(vars(PosixPath)), (tmp_path / ".metadata").read_bytes()
    attack = b"cpathlib\nPosixPath\n(N}S'exists'\nS'harm'\nstb0"
    (tmp_path / ".metadata").write_bytes(data[:2] + attack + data[11:])  # without the frame, which is too short now
    with pytest.raises(ConfigError, match="sets attributes"):
        open_distributed(tmp_path)
    assert dict(vars(PosixPath)) == before


def test_an_index_is_what_torch_reads(tmp_path: Path) -> None:
    written = make_index(tmp_path)
    theirs, ours = pickle.loads((tmp_path / ".metadata").read_bytes()), read_metadata(tmp_path)
    assert theirs == ours
    assert {name: [chunk.offset for chunk in stored.chunks] for name, stored in open_distributed(tmp_path).items()} \
        == {name: [chunk.offset for chunk in stored.chunks] for name, stored in written.items()}


def index_with(change: Any, tmp_path: Path) -> Path:
    make_index(tmp_path)
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    change(index)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    return tmp_path


def _same_parts(index: Metadata) -> None:
    index.state_dict_metadata["a"].chunks *= 3  # type: ignore[union-attr]


def _shared_parts(index: Metadata) -> None:
    """A pickle of some kilobytes that lists a billion parts."""
    index.state_dict_metadata["a"].chunks *= 30_000  # type: ignore[union-attr]
    for number in range(30_000):
        index.state_dict_metadata[f"a{number}"] = index.state_dict_metadata["a"]


def _attributes(index: Metadata) -> None:
    vars(index.state_dict_metadata["a"]).update({f"x{number}": 0 for number in range(1000)})


def _elsewhere(index: Metadata) -> None:
    index.storage_data[MetadataIndex("b", (0,))] = _StorageInfo("../outside", 0, 10)


def _beyond(index: Metadata) -> None:
    index.storage_data[MetadataIndex("b", (0,))].offset = 10**15


def _huge(index: Metadata) -> None:
    index.state_dict_metadata["b"].size = torch.Size((2**62,))  # type: ignore[union-attr]


def _outside(index: Metadata) -> None:
    index.state_dict_metadata["a"].chunks[0].sizes = torch.Size((9, 3, 4))  # type: ignore[union-attr]


def _no_tensor(index: Metadata) -> None:
    index.storage_data[MetadataIndex("b", (0,))] = index.storage_data[MetadataIndex("c", ())]


@pytest.mark.parametrize("change", [
    _same_parts, _shared_parts, _attributes, _elsewhere, _beyond, _huge, _outside, _no_tensor])
def test_an_index_that_cannot_be_is_one_line(tmp_path: Path, change: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        open_distributed(index_with(change, tmp_path))
    assert "\n" not in str(caught.value)


def test_plans_of_other_systems_are_left_out(tmp_path: Path) -> None:
    """Their index holds objects of classes that are not here, beside the tensors."""
    room = types.ModuleType("elsewhere")
    exec("class Plan:\n    pass\n", room.__dict__)
    room.Plan.__module__ = "elsewhere"
    sys.modules["elsewhere"] = room
    try:
        def add(index: Metadata) -> None:
            index.planner_data = {"a": room.Plan()}
            index.state_dict_metadata["object"] = room.Plan()
            index.mcore_data = {"a": {"nd_reformulated_orig_global_shape": (2, 3, 4)}}  # type: ignore[attr-defined]

        index_with(add, tmp_path)
    finally:
        del sys.modules["elsewhere"]
    assert open_distributed(tmp_path).keys() == {"a", "b", "c"}


def test_an_archive_is_what_torch_reads(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32)
    values = {"view": base[4:16].view(3, 4), "base": base, "half": torch.ones(2, 3).half(), "scalar": torch.tensor(3.5),
              "parameter": torch.nn.Parameter(torch.rand(3, 2)), "empty": torch.empty(0, 4), "bool": base > 3,
              "fp8": base.to(torch.float8_e4m3fn), "u16": torch.tensor([1, 65535], dtype=torch.uint16)}
    attributed = torch.rand(5)
    attributed.cut = True  # type: ignore[attr-defined]
    values["with attributes"] = attributed
    path = tmp_path / "values.pt"
    torch.save({"model": values, "step": 3}, path)
    found = read_archive(path)
    assert found["step"] == 3
    for name, tensor in values.items():
        stored = found["model"][name]
        assert stored.dtype == tensor.dtype
        assert torch.equal(read_region(stored, region(stored.shape)).float(), tensor.detach().float()), name
    torch.save({"t": torch.rand(4, 4).t()}, path)
    with pytest.raises(ConfigError, match="gaps between its elements"):
        read_archive(path)
    torch.save(values, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"before 1\.6"):
        read_archive(path)


def test_an_archive_that_is_packed_is_refused_unread(tmp_path: Path) -> None:
    """A packed entry may become a thousand times as large."""
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 50_000_000)
    with pytest.raises(ConfigError, match="compressed"):
        read_archive(path)


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    path, draw = tmp_path / "x.pt", random.Random(1)
    torch.save({"model": {"a": torch.rand(3, 4), "b": torch.rand(5)}, "args": Namespace(x=1)}, path)
    whole, values = path.read_bytes(), 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice((len(data), draw.randrange(len(data))))])
        said = attempt(lambda: read_archive(path))
        assert "\n" not in said
        values += not said
    assert values, "some bytes carry no meaning"
