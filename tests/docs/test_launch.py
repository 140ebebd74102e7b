"""The scripts that start a run on a cluster: their syntax, and the commands that they start."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from research_agent.cli import main
from research_agent.engines.spec import parse_engine

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
STUB = """#!/usr/bin/env bash
{ printf '%q ' "$(basename "$0")" "$@"; echo; } >> "$LOG"
"""
# Slurm's job step and Ray's job run what they are given; the rest only says how it was called.
RUNS_IT = """#!/usr/bin/env bash
while (($#)); do
  case $1 in bash | torchrun) exec "$@" ;; esac
  shift
done
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stubs of a cluster's programs in the PATH; a file has the commands that were started."""
    programs = {
        "torchrun": STUB,
        "vllm": STUB,
        "curl": "#!/usr/bin/env bash\n",
        "scontrol": "#!/usr/bin/env bash\nprintf '%s\\n' 10.1.0.1 10.1.0.2 localhost\n",
        "srun": RUNS_IT,
        "ray": STUB + RUNS_IT,
        "hostname": "#!/usr/bin/env bash\necho 10.0.0.7 fe80::1\n",
        "openssl": "#!/usr/bin/env bash\necho secret\n",
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    log = tmp_path / "log"
    for name, value in {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "LOG": log,
        "LAUNCH_FOLDER": FOLDER,
        "SHARED": tmp_path,
        "SLURM_JOB_NODELIST": "gpu[1-3]",
        "SLURM_JOB_ID": "7",
        "MODEL": "Qwen/Qwen2.5-7B",
        "CONTEXT": "8704",
    }.items():
        monkeypatch.setenv(name, str(value))
    return log


def start(script: str, *words: str) -> None:
    command = ["bash", str(FOLDER / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def started(log: Path) -> dict[str, list[list[str]]]:
    """The commands by the program that they call."""
    found: dict[str, list[list[str]]] = {}
    for line in log.read_text().splitlines():
        program, *words = shlex.split(line)
        found.setdefault(program, []).append(words)
    return found


def require_training(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Check the command of a learner; its engine."""
    train = words[words.index("research_agent.cli") + 1 :]
    assert words[words.index("research_agent.cli") - 1] == "-m"
    main([*train, "--plan", "8x8xH200"])  # exits if it cannot be parsed, or would not fit
    assert "does not fit" not in capsys.readouterr().out
    return train[train.index("--engine") + 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_syntax_is_right(script: Path) -> None:
    done = subprocess.run(
        ["bash", "-n", str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_server_listens_on_the_private_address_and_has_a_key(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bash", str(FOLDER / "sampler.sh"), "model", "8704"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1 and "VLLM_API_KEY" in refused.stderr
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("TP", "2")
    start("sampler.sh", "model", "8704")
    (words,) = started(cluster)["vllm"]
    assert words[:4] == ["serve", "model", "--host", "10.0.0.7"]
    pairs = dict(zip(words[2::2], words[3::2], strict=False))
    assert pairs["--tensor-parallel-size"] == "2" and pairs["--data-parallel-size"] == "4"
    assert pairs["--api-server-count"] == "1"  # several would look like a balancer
    assert "secret" not in " ".join(words)  # where other users of the machine would see it


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_knows_the_flags(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    start("sampler.sh", "model", "8704")
    (words,) = started(cluster)["vllm"]
    parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    parsed = parser.parse_args(words[1:])
    assert parsed.max_model_len == 8704 and parsed.data_parallel_size == 8


def test_slurm_starts_learners_and_samplers(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEARNERS", "1")
    start("slurm.sh", "research-7b", "runs/research-7b", "--steps", "5")
    found = started(cluster)
    (learner,) = found["torchrun"]
    assert len(found["vllm"]) == 2
    assert learner[learner.index("--nnodes") + 1] == "1"
    spec = parse_engine(require_training(learner, capsys))
    assert spec.transfer == "nccl" and len(spec.urls) == 2
    # Debian gives its own machine's name a loopback address, which other nodes cannot use.
    assert {words[words.index("--host") + 1] for words in found["vllm"]} == {"10.1.0.2", "10.0.0.7"}
    assert list(spec.urls) == ["http://10.1.0.2:8000", "http://10.0.0.7:8000"]
    assert learner[learner.index("--rdzv-endpoint") + 1] == "10.1.0.1:29500"


def test_slurm_starts_learners_that_sample_themselves(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start("slurm.sh", "research-7b", "runs/research-7b", "--engine", "serve:tp=2,dp=4")
    found = started(cluster)
    (learner,) = found["torchrun"]
    assert "vllm" not in found
    assert learner[learner.index("--nnodes") + 1] == "3"
    assert require_training(learner, capsys) == "serve:tp=2,dp=4"


def test_ray_starts_a_learner_that_finds_its_servers(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAMPLERS", "2")
    monkeypatch.setenv("VLLM_API_KEY", "secret")  # which Ray gives to its jobs
    start("ray.sh", "research-7b", "runs/research-7b")
    found = started(cluster)
    (learner,) = found["torchrun"]
    assert len(found["vllm"]) == 2
    engine = require_training(learner, capsys)
    assert engine == "server+nccl:http://10.0.0.7:8000,http://10.0.0.7:8000"
    assert len(found["ray"]) == 6  # three jobs, which are stopped
    assert all("secret" not in word for words in found["ray"] for word in words)


def test_ray_starts_a_learner_that_samples_itself(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start("ray.sh", "research-7b", "runs/research-7b", "--engine", "serve:tp=2,dp=4")
    found = started(cluster)
    assert "vllm" not in found
    assert require_training(found["torchrun"][0], capsys) == "serve:tp=2,dp=4"


def test_kubernetes_manifests_name_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    text = (FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")
    made: dict[tuple[str, str], dict[str, Any]] = {}
    for each in yaml.safe_load_all(text):
        assert each["apiVersion"] and each["spec"]
        made[each["kind"], each["metadata"]["name"]] = each["spec"]
    sampler, learner = made["StatefulSet", "sampler"], made["Job", "learner"]
    assert made["Service", "sampler"]["clusterIP"] == "None"  # no address outside of the cluster
    assert ("NetworkPolicy", "sampler") in made
    for spec in (sampler, learner):
        (container,) = spec["template"]["spec"]["containers"]
        volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    words = learner["template"]["spec"]["containers"][0]["command"]
    spec_ = parse_engine(require_training(words, capsys))
    service = sampler["serviceName"]
    expected = [f"http://sampler-{i}.{service}:8000" for i in range(sampler["replicas"])]
    assert list(spec_.urls) == expected
    waits = learner["template"]["spec"]["initContainers"][0]["command"][-1]
    assert all(url in waits for url in expected)
