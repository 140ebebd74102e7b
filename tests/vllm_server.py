"""Real vLLM servers for tests.

``with serving(folder) as url:`` starts vLLM's server with the model of a folder, and stops it. Mark
such tests ``vllm`` and ``slow``, and share a server by a fixture of the module. The model's name is
``model``.

A server is three processes, each of which takes ten seconds or more to load vLLM. So one process,
the `Launcher`, loads it once and forks the servers, and these fork their processes, as vLLM does on
a GPU. Tests with real servers are in one file and share a launcher.

`save_model` makes a model of a few kilobytes that always writes the first token of its vocabulary
or, if the answer must have a form, the first token that the form allows. So the answers of a real
server are known beforehand.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest

TIMEOUT = 900.0  # seconds for the start, which takes minutes on a busy machine
ROOT = Path(__file__).parents[1]
LOADED = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # addresses that change weights
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class Launcher:
    """A process that has loaded vLLM and forks servers.

    Args:
        plugins: folders in which vLLM looks for plugins, besides the installed ones.
    """

    def __init__(self, *plugins: Path) -> None:
        path = [str(ROOT), *map(str, plugins), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def launch(self, log: Path, words: list[str]) -> int:
        """Start a server in a session of its own; returns its process id."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(log), words]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the launcher, but not its servers."""
        self._process.communicate()


class VllmServer:
    """A server that can be started again on the same port.

    Args:
        launcher: starts it.
        folder: a model with its tokenizer.
        args: more arguments of vLLM's server.
    """

    def __init__(self, launcher: Launcher, folder: Path, *args: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder.with_name(f"server-{port}.log")
        self._launcher = launcher
        self._words = ["--model", str(folder), "--served-model-name", "model"]
        self._words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        self._words += ["--enforce-eager", *args]
        self._process = 0

    def start(self) -> None:
        """Start it; `ready` waits until it answers."""
        self._process = self._launcher.launch(self.log, self._words)

    def ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and self.runs():
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        last = self.log.read_text(encoding="utf-8", errors="replace")[-4000:]
        pytest.fail(f"vLLM's server did not start:\n{last}")

    def kill(self) -> None:
        """End all its processes, at once."""
        with suppress(ProcessLookupError):
            if self._process:
                os.killpg(self._process, signal.SIGKILL)
        while self.runs():
            time.sleep(0.01)

    def stop(self) -> None:
        """Ask it to stop, and kill what is left of its session."""
        with suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while self.runs() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()

    def runs(self) -> bool:
        """Whether its process exists."""
        return Path(f"/proc/{self._process}").exists()


@contextmanager
def serving(folder: Path, *args: str, launcher: Launcher | None = None) -> Iterator[str]:
    """The address of a server's /v1; the test is skipped where there is no vLLM (fails under CI).

    Args:
        folder: a model with its tokenizer.
        args: more arguments of vLLM's server.
        launcher: starts it; None: a new one.
    """
    need_vllm()
    own = launcher or Launcher()
    server = VllmServer(own, folder, *args)
    server.start()
    try:
        server.ready()
        yield f"{server.url}/v1"
    finally:
        server.stop()
        if launcher is None:
            own.close()


def save_model(folder: Path, context: int = 4096) -> None:
    """Save a Qwen2 model, tokenizer and chat template that greedily write the lowest token id.

    Its layers add nothing, so the hidden state does not depend on the input, and each logit is
    lower than that of the token before. Token 0 ends the answer, token 1 is the quotation mark, and
    the other bytes follow in order: so an answer without a form is empty, and so is a string in
    JSON.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c != '"', ord(c)))
    vocabulary = {token: number for number, token in enumerate(["<end>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", model_max_length=context
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    )
    tokenizer.save_pretrained(folder)
    width = 64
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        ranks = torch.arange(len(vocabulary), dtype=torch.float32)
        model.lm_head.weight.copy_((-ranks / width)[:, None].expand(-1, width))  # logit -rank
    model.save_pretrained(folder)


def need_vllm() -> None:
    """Skip the test where there is no vLLM; under CI it fails."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"vLLM is not here: {error}")
        pytest.skip(f"vLLM is not here: {error}")


def _launch_all() -> None:
    """Run as launcher: start a server for each line of the input, and print its process id."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM writes there too
    for module in LOADED:
        import_module(module)
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context(  # type: ignore[assignment]
        "fork" if method == "spawn" else method
    )
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a server that ends leaves no zombie
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            answers.close()
            _serve(*json.loads(line))
        print(process, file=answers)


def _serve(log: str, words: list[str]) -> None:
    main: Any = import_module(LOADED[0]).main
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["vllm", *words]
    try:
        main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    _launch_all()
