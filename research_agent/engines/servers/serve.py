"""vLLM servers that a run starts itself: one per node, watched, and stopped with the run.

The first rank of a node starts ``vllm serve`` on the node's GPUs, beside the learner, and gives it
weights: by CUDA IPC if it has as many GPUs as the node has ranks, otherwise through a folder. All
ranks of the node sample on it. It listens on 127.0.0.1 only, without a key: other users of the
machine can reach it.

It starts with the model's configuration and no weights, since the run's weights follow at once.
"""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from research_agent.engines.checks import CONTINUE, require_gpus
from research_agent.errors import EngineError
from research_agent.system.torchrun import without_torchrun

if TYPE_CHECKING:
    import torch

    from research_agent.engines.spec import EngineSpec, WeightTransfer
    from research_agent.renderer import Renderer

START_TIMEOUT = 840.0
"""Seconds that a server may take to start; after a minute more the other ranks give up."""

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_PROGRAM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")  # what ``vllm serve`` runs
_CPU_STEP = 4096  # tokens that one step may compute on a CPU, where no prompt is cut
_LOG_TAIL = 2000  # characters of a server's output that an error shows


class ServerProcess:
    """A ``vllm serve`` of this run, which answers once the object is made.

    Closing or deleting the object stops it, and so does the end of this process.

    Args:
        model: the policy, whose configuration it gets.
        renderer: its tokenizer.
        settings: what ``vllm_settings`` returned.

    Raises:
        EngineError: it does not start.
    """

    def __init__(self, model: Any, renderer: Renderer, settings: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="research-agent-serve-")
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(self._folder.name)
        renderer.tokenizer.save_pretrained(self._folder.name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        own = [f"--model={self._folder.name}", f"--port={port}"]
        self._log = Path(self._folder.name) / "vllm.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_SUPERVISOR), *_PROGRAM, *own, *settings],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,  # a signal for our group, such as Ctrl-C, is not for it
            )
        self.close = weakref.finalize(self, _stop, self._process, self._folder)
        self._wait()

    def _wait(self) -> None:
        """Wait until it answers.

        Raises:
            EngineError: it ended, or takes too long; with the end of its output.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self.require_alive()
            health = f"{self.url}/health"
            with suppress(httpx.HTTPError), httpx.stream("GET", health, trust_env=False) as answer:
                if answer.status_code == 200:  # its body is not read
                    return
            time.sleep(0.2)
        raise EngineError(f"vllm serve does not answer after {START_TIMEOUT:g} s: {self._output()}")

    def require_alive(self) -> None:
        """Check that it runs.

        Raises:
            EngineError: it ended; with the end of its output.
        """
        status = self._process.poll()
        if status is not None:
            raise EngineError(
                f"vllm serve ended with status {status}. {CONTINUE}. {self._output()}"
            )

    def _output(self) -> str:
        """The first error in its output, which the others may follow from, and the end of it."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        first = re.search(r"\w+Error: .+", text)
        cause = f"Its first error: {first[0]}. " if first else ""
        return f"{cause}The end of its output: {text[-_LOG_TAIL:].strip()}"


def vllm_settings(
    spec: EngineSpec,
    context: int,
    slots: int,
    *,
    dtype: str,
    device: torch.device,
    transfer: WeightTransfer,
) -> list[str]:
    """The settings of vLLM that follow from the run's.

    Args:
        spec: how many GPUs, and how much of their memory.
        context: tokens that a trajectory may have.
        slots: trajectories sampled at the same time.
        dtype: number format of the weights.
        device: where the learner's weights are.
        transfer: how weights get to the server, "ipc" or "folder".

    Raises:
        ConfigError: the server would need more GPUs than there are.
    """
    require_gpus("serve", spec.tp * spec.dp, device)
    settings = [
        "--served-model-name=policy",
        "--host=127.0.0.1",
        "--load-format=dummy",
        f"--dtype={dtype}",
        f"--max-model-len={context}",
        f"--max-num-seqs={slots}",
        f"--tensor-parallel-size={spec.tp}",
        f"--data-parallel-size={spec.dp}",
        f"--gpu-memory-utilization={spec.memory}",
        "--logprobs-mode=processed_logprobs",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",  # a line for every turn of the run
    ]
    if transfer == "ipc":
        settings.append('--weight-transfer-config={"backend": "ipc"}')
    if device.type != "cpu":
        return settings
    # A CPU's random generator cannot go back, as one must between a prompt's pieces.
    pieces = ["--no-enable-chunked-prefill", f"--max-num-batched-tokens={max(_CPU_STEP, context)}"]
    return [*settings, "--enforce-eager", *pieces]


def _environment() -> dict[str, str]:
    """Our environment without what torchrun put there, which vLLM would take for its own."""
    ours = without_torchrun(os.environ)
    ours.pop("VLLM_API_KEY", None)
    vllm = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for CUDA IPC
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    return {"VLLM_CPU_KVCACHE_SPACE": "1"} | ours | vllm


def _stop(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    """Let the supervisor end vLLM.

    It would do so when its standard input is closed, but a process that ours has forked since may
    hold that open; so something is written there.
    """
    assert process.stdin
    with suppress(OSError):  # it has ended already
        process.stdin.write(b"\n")
        process.stdin.flush()
    with suppress(OSError):
        process.stdin.close()
    process.wait()
    folder.cleanup()
