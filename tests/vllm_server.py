"""A real vLLM server for tests. Any test may use it; it knows nothing of who asks.

``with serving(folder) as url:`` starts ``vllm serve`` with the model of a folder, and stops it by
its process id. Starting takes half a minute and more: mark such tests ``vllm`` and ``slow``, and
share the server by a fixture of the module. The model's name is ``model``.

`save_model` makes a model of a few kilobytes that writes the first token of its vocabulary, always;
where a form of the answer is asked for, the first one that the form allows. So what a real server
answers is known beforehand.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

PATIENCE = 900.0  # seconds for the start, which takes minutes on a busy machine


@contextmanager
def serving(folder: Path, *args: str) -> Iterator[str]:
    """The address of a server's /v1; the test is skipped where there is no vLLM (fails under CI).

    Args:
        folder: a model with its tokenizer.
        args: more arguments of vLLM's server.
    """
    _need_vllm()
    log = folder.with_name(folder.name + "-server.log")
    with log.open("wb") as output:
        process, url = _start(folder, args, output.fileno())
        try:
            _wait(process, url, log)
            yield f"{url}/v1"
        finally:
            _stop(process)


def save_model(folder: Path, context: int = 4096) -> None:
    """Save a Qwen2 model, tokenizer and chat template that greedily write the lowest token id.

    Its layers add nothing, so that the hidden state is the same whatever it reads; the weights of
    the output are lower for each next token. Token 0 ends the answer, token 1 is the quotation
    mark, then come the other bytes in their order: an answer without a form is empty, and a text
    in JSON ends where it began.
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


def _need_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"vLLM is not here: {error}")
        pytest.skip(f"vLLM is not here: {error}")


def _start(folder: Path, args: tuple[str, ...], output: int) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not the command vllm: it looks for a package of that name, and the CPU's has another
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", *args]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"DO_NOT_TRACK": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # A session of its own: its processes are stopped together
    process = subprocess.Popen(
        command, stdout=output, stderr=output, env=env, start_new_session=True
    )
    return process, f"http://127.0.0.1:{port}"


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    last = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    pytest.fail(f"vLLM's server did not start (status {process.poll()}):\n{last}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, and end what is left of its session."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
