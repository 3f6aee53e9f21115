"""Strangers reach as little as can be, and what is secret stays so."""

from __future__ import annotations

import ast
import math
import os
import pickle
import socket
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from typer.testing import CliRunner

from moescale.checkpoint.together import Ranks
from moescale.cli import app
from moescale.cluster.agreement import Agreement
from moescale.cluster.launch import read_launch
from moescale.cluster.listening import serve_store
from moescale.cluster.rendezvous import create_rendezvous
from moescale.config import ConfigError, parse_config
from moescale.errors import without_secrets
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.command_line import ROOT, TINY
from tests.support.ports import free_port


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def listening_stores() -> list[bool]:
    store = serve_store("127.0.0.1", 0)
    open_to_all = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torch's own
    return [answers(address, port) for port in (store.port, open_to_all.port) for address in ("127.0.0.1", "127.0.0.2")]


def test_a_store_listens_at_the_address_that_was_asked_for_alone() -> None:
    """Other tests fork, and a store has threads: it lives in a process of its own here."""
    assert run_ranks(1, listening_stores, timeout_seconds=30) == [[True, False, True, True]]
    with pytest.raises(OSError, match="assign requested address"):
        serve_store("192.0.2.1", 0)


def where_rank_0_listens() -> list[bool]:
    ranks = Agreement(read_launch())
    with ranks.one_voice():
        ranks.meet(20)
        return [answers(address, ranks.launch.port) for address in ("127.0.0.1", "127.0.0.2")]


def test_so_does_the_store_of_ranks_without_a_launcher() -> None:
    assert run_ranks(2, where_rank_0_listens, timeout_seconds=40) == [[True, False]] * 2


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def meet_a_stranger(file: Path, secret: str) -> str:
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    store.set("torch.rendezvous.job", b64encode(pickle.dumps(Evil(file))).decode())
    parameters = RendezvousParameters("c10d", f"127.0.0.1:{store.port}", "job", 1, 1, "127.0.0.1", join_timeout=5)
    try:
        create_rendezvous(parameters, secret).next_rendezvous()
    except (RendezvousError, AttributeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("secret", ["", "a secret of the job"])
def test_what_a_stranger_leaves_in_the_store_is_not_unpickled_where_there_is_a_secret(
    tmp_path: Path, secret: str
) -> None:
    """Without one it is: torch unpickles the state of the rendezvous."""
    (said,) = run_ranks(1, meet_a_stranger, tmp_path / "ran", secret, timeout_seconds=30)
    assert (tmp_path / "ran").exists() is not bool(secret)
    assert ("MOESCALE_SECRET" in said) is bool(secret)


def test_an_option_of_the_rendezvous_that_means_nothing_is_refused() -> None:
    parameters = RendezvousParameters("c10d", "127.0.0.1:0", "job", 1, 1, "127.0.0.1", is_host=1)
    with pytest.raises(RendezvousError, match="--rdzv-conf has is_host: write join_timeout"):
        create_rendezvous(parameters, "")


def meet_alone() -> list[Any]:
    handler = create_rendezvous(RendezvousParameters("c10d", "127.0.0.1:0", "job", 1, 1, "127.0.0.1"), "a secret")
    found = handler.next_rendezvous()
    port = found.bootstrap_store_info.master_port
    return [found.rank, found.world_size, answers("127.0.0.1", port), answers("127.0.0.2", port)]


def test_a_node_with_a_secret_meets_at_its_own_address() -> None:
    assert run_ranks(1, meet_alone, timeout_seconds=30) == [[0, 1, True, False]]


def values_of(rank: int) -> Any:
    return {"name": ("é\n", 2**62, None, b"\0" * 1000 * rank), 7: [[], (), math.inf, True, "tuple"]}


def gather() -> list[Any]:
    start_mesh(parse_config({"data": {"global_batch": 4}}, "test").for_world(2))
    try:
        rank = read_launch().rank
        return Ranks(None).gather(values_of(rank))
    finally:
        stop_mesh()


def test_what_ranks_gather_comes_as_it_was() -> None:
    assert run_ranks(2, gather, timeout_seconds=60) == [[values_of(0), values_of(1)]] * 2


UNPICKLING = {"pickle.load", "pickle.loads", "all_gather_object", "gather_object", "broadcast_object_list",
              "scatter_object_list", "recv_object_list", "Unpickler"}
OF_OWN_CHILDREN = {"parallel/ranks.py"}  # a pipe to a process that this one forked


def test_nothing_of_ours_unpickles_what_others_send() -> None:
    for path in sorted((ROOT / "moescale").rglob("*.py")):
        if path.relative_to(ROOT / "moescale").as_posix() in OF_OWN_CHILDREN:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in UNPICKLING, f"{path}:{node.lineno}"
                assert name.rpartition(".")[2] not in UNPICKLING, f"{path}:{node.lineno}"
                if name == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"


# ---- files and secrets

SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "MOESCALE_SECRET": "keep-this-to-yourself",
           "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"}


@pytest.mark.parametrize("wandb", ["off", pytest.param("offline", marks=pytest.mark.slow)])
def test_files_of_a_run_follow_the_umask_and_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "run": {"steps": 4, "dir": "run"}}))
    before = os.umask(0o027)
    try:
        outputs = [CliRunner().invoke(app, words).output for words in (
            ["train", "tiny.yaml", f"monitor.wandb={wandb}"], ["report", "run"], ["train", "tiny.yaml", "run.steps=x"])]
    finally:
        os.umask(before)
    assert (tmp_path / "run/report.html").exists(), outputs
    ours = [path for folder in ("run", "cache") for path in (tmp_path / folder).rglob("*")
            if "wandb" not in path.relative_to(tmp_path).parts]
    assert len(ours) > 10
    for path in ours:
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in SECRETS.values():
                assert secret.encode() not in content, path
    assert not any(secret in output for secret in SECRETS.values() for output in outputs)


@pytest.mark.parametrize("url", [
    "s3://me:pass-word@store/run", "https://host/run?token=pass-word", "https://host/a?X-Amz-Signature=pass-word&b=1",
    "https://ghp_pass-word0123456789@host/run",
])
def test_secrets_in_urls_are_neither_kept_nor_said(url: str, tmp_path: Path) -> None:
    assert "pass-word" not in without_secrets(url)
    assert "host" in without_secrets(url) or "store" in without_secrets(url)
    with pytest.raises(ConfigError) as caught:
        parse_config({"monitor": {"trace": url}}, "test")
    assert "pass-word" not in str(caught.value)
    output = CliRunner().invoke(app, ["report", url]).output
    assert "pass-word" not in output
    assert without_secrets("https://host:80/a?b=1, s3://bucket/key=1") == "https://host:80/a?b=1, s3://bucket/key=1"
