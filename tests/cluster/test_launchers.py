"""The files in launch/ start what they say, tried with fakes of Slurm's commands and read as Kubernetes would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moescale.cluster.launch import Launch, read_launch
from tests.support.command_line import ROOT
from tests.support.environments import SRUN, set_environment

LAUNCH = ROOT / "launch"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", *LAUNCH.glob("*.s*")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def slurm(folder: Path, status: int, **environment: str) -> tuple[int, list[str]]:
    """Run the batch script with a scontrol and an srun that note how they were called. Returns the status and that."""
    shown = ("HEAD=${HEAD:-} NODES=${NODES:-} RANKS=${RANKS:-} JOB=${JOB:-} MASTER=${MASTER_ADDR:-}:${MASTER_PORT:-} "
             "secret ${#MOESCALE_SECRET}")
    for name, body in (("scontrol", 'test "$1" != show || printf "node3\\nnode4\\n"'),
                       ("srun", f'echo "{shown}" >> "$NOTES"; exit {status}')):
        file = folder / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >> "$NOTES"\n{body}\n')
        file.chmod(0o755)
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(notes), "SLURM_JOB_NODELIST": "node[3-4]",
             "SLURM_JOB_ID": "1234567", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", **environment}
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "tiny.yaml", "run.steps=3"], env=given, timeout=30,
                          capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, notes.read_text().splitlines()


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, False)])
def test_slurm_puts_a_job_back_that_left_as_it_was_asked_to_and_no_other(
    tmp_path: Path, status: int, requeued: bool
) -> None:
    ended, notes = slurm(tmp_path, status)
    assert ended == status
    assert ("scontrol requeue 1234567" in notes) is requeued
    assert "srun --kill-on-bad-exit=1 launch/torchrun.sh tiny.yaml run.steps=3" in notes
    assert "HEAD=node3:24567 NODES=2 RANKS=8 JOB=1234567 MASTER=: secret 32" in notes


def test_slurm_starts_the_ranks_itself_where_there_is_a_task_for_each(tmp_path: Path) -> None:
    ended, notes = slurm(tmp_path, 75, SLURM_NTASKS_PER_NODE="8")
    assert ended == 75
    assert "srun --kill-on-bad-exit=1 python -m moescale train tiny.yaml run.steps=3" in notes
    assert "HEAD= NODES= RANKS= JOB= MASTER=node3:24567 secret 32" in notes


@pytest.mark.parametrize(("given", "expected"), [
    ({}, Launch(rank=5, size=12, local_rank=1, node_ranks=4, address="node03", port=15000 + (16 * 77 + 2) % 15000,
                run_id="77.2", node=1)),
    ({"SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "a[1-2]b[07,9],c", "MASTER_PORT": "999", "CUDA_VISIBLE_DEVICES": "3"},
     Launch(rank=5, size=12, local_rank=1, node_ranks=3, address="a1b07", port=999, run_id="77.2", node=2, bound=True)),
    ({"MASTER_ADDR": "10.0.0.1", "CUDA_VISIBLE_DEVICES": "0,1"},
     Launch(rank=5, size=12, local_rank=1, node_ranks=4, address="10.0.0.1", port=16234, run_id="77.2", node=1)),
])
def test_ranks_that_srun_starts_know_each_other(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: Launch
) -> None:
    set_environment(monkeypatch, **{**SRUN, **given})
    assert read_launch() == expected
    assert read_launch().device == (0 if expected.bound else 1)


# ---- Kubernetes


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def check_pod(pod: dict[str, Any], nodes: int) -> dict[str, str]:
    """Hold what both kinds of job share to what pods are made of. Returns the environment, where it is plain."""
    (container,) = pod["containers"]
    assert set(container) <= {"name", "image", "command", "args", "env", "resources", "securityContext", "volumeMounts"}
    environment = {each["name"]: each.get("value", "") for each in container["env"]}
    assert all(isinstance(value, str) for value in environment.values()), "Kubernetes takes strings alone"
    assert environment["NODES"] == str(nodes)
    assert environment["RANKS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    secret = next(each for each in container["env"] if each["name"] == "MOESCALE_SECRET")
    assert secret["valueFrom"]["secretKeyRef"] == {"name": "moescale", "key": "secret"}
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert container["securityContext"]["runAsNonRoot"]
    assert pod["terminationGracePeriodSeconds"] >= 30
    return environment


def test_the_indexed_job_finds_its_first_pod_and_counts_as_failed_what_failed() -> None:
    service, policy, job = documents("kubernetes.yaml")
    assert [each["kind"] for each in (service, policy, job)] == ["Service", "NetworkPolicy", "Job"]
    assert [each["apiVersion"] for each in (service, policy, job)] == ["v1", "networking.k8s.io/v1", "batch/v1"]
    spec = job["spec"]
    pod, name = spec["template"]["spec"], job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never", "or the policy for failures is refused"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    environment = check_pod(pod, spec["completions"])
    assert environment["HEAD"] == f"{name}-0.{pod['subdomain']}:29500"
    for selector in (service["spec"]["selector"], policy["spec"]["podSelector"]["matchLabels"],
                     policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]):
        assert selector == {"job-name": name}
    rules = spec["podFailurePolicy"]["rules"]
    assert [(rule["action"], *rule.get("onExitCodes", {}).get("values", ())) for rule in rules] == [
        ("FailJob", 2), ("Ignore", 75), ("Ignore",)]
    for rule in rules:
        assert rule.get("onExitCodes", {}).get("containerName", "moescale") == pod["containers"][0]["name"]


def test_the_pytorchjob_has_as_many_pods_as_nodes() -> None:
    (job,) = documents("pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    nodes = sum(each["replicas"] for each in replicas.values())
    assert (job["apiVersion"], replicas["Master"]["replicas"], nodes) == ("kubeflow.org/v1", 1, 4)
    for each in replicas.values():
        pod = each["template"]["spec"]
        check_pod(pod, nodes)
        assert pod["containers"][0]["name"] == "pytorch"
        (line,) = pod["containers"][0]["args"]
        assert line.startswith("unset WORLD_SIZE RANK; exec env HEAD=\"$MASTER_ADDR:29500\" launch/torchrun.sh ")


def test_the_image_holds_what_the_launchers_start() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
    for name in ("kubernetes.yaml", "pytorchjob.yaml"):
        said = (LAUNCH / name).read_text()
        for path in re.findall(r"(?:launch|configs)/\S+\.(?:sh|yaml)\b", said):
            assert (ROOT / path).exists(), path
    assert text.index("USER 1000") < text.index("CMD")


@pytest.mark.parametrize("name", ["slurm.sbatch", "kubernetes.yaml", "pytorchjob.yaml"])
def test_what_a_user_must_change_is_marked(name: str) -> None:
    assert (LAUNCH / name).read_text().count("# Change") >= 4
