"""A vLLM server without vLLM: it speaks the few words that the server engine needs.

As a program (``python -m tests.research_agent.fake_vllm``) it takes the arguments of vLLM's server,
and writes its own, its environment and its process id into the file ``FAKE_VLLM_RECORD``.
``FAKE_VLLM_RELOAD`` is the seconds that it takes to read weights.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from safetensors import safe_open

INSPECTION = """Qwen2ForCausalLM()(
  (model): Qwen2Model()(
    (embed_tokens): VocabParallelEmbedding(embedding_dim={width}, org_vocab_size={tokens})
    (layers): ModuleList()(
      (0-{last}): 2 x Qwen2DecoderLayer()(
        (experts): ModuleList()(
          (0-63): 64 x Expert()
        )
      )
    )
    (norm): RMSNorm(hidden_size={width}, eps=1e-06)
  )
)"""


def script(tokens: Sequence[int], seed: int, count: int) -> list[int]:
    """What a server samples: a function of the tokens and the seed only."""
    said: list[int] = []
    for _ in range(count):
        said.append((sum(tokens) + 7 * sum(said) + len(said) + seed) % 26 + 40)
    return said


class FakeVllm:
    """A server, and everything it was asked.

    Attributes:
        mode: how it answers turns: "well", or one of the faults in ``_turn``.
        fails: how many turns the mode is for; then all is well again.
        gate: turns wait for it.
        turns: (token ids, sampling parameters) of each.
        calls: the path of each request, and its body.
        weights: names and values of the last weights it read.
        wires: what is broadcast in NCCL groups, by their port and the rank of who listens.
        transfer: how it takes weights over a wire: "well", or one of the faults in ``_take``.
        sizes: layers, tokens and width of its model.
    """

    sizes: tuple[int, ...] = (2, 264, 128)

    def __init__(self, **settings: Any) -> None:
        self.port = 0  # any
        self.mode = "well"
        self.fails = 1_000_000
        self.context = 256
        self.dtype = "float32"
        self.logprobs = "processed_logprobs"
        self.quantization: str | None = None
        self.software = "0.32.0"
        self.backend = "nccl"
        self.unpickles = True
        self.paused = False
        self.workers: list[str] | None = None  # URLs behind it if it is a router
        self.balances = False  # other servers answer each time
        self.dummy = False  # it started without weights, and cannot read any
        self.reloads = True  # whether it can read weights from a folder
        self.missing: dict[str, int] = {}  # path -> status
        self.gate = threading.Event()
        self.gate.set()
        self.hung = threading.Event()
        self.version = self.before = "default"
        self.turns: list[tuple[list[int], dict[str, Any]]] = []
        self.calls: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        self.weights: dict[str, Any] = {}
        self.gpus = 1
        self.wires: dict[tuple[int, int], SimpleQueue[Any]] = {}
        self.transfer = "well"
        self.updating = False
        self.group: dict[str, Any] = {}
        self.now = self.most = 0
        self.stopped = False
        self.lock = threading.Lock()
        for name, value in settings.items():
            setattr(self, name, value)
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.answer(self, json.loads(body) if body else None)

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                pass  # a client that has gone

        self.http = Http(("127.0.0.1", self.port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """No connection is taken any more, and none that is open answers."""
        self.stopped = True
        self.http.shutdown()
        self.http.server_close()

    def folders(self) -> list[Path]:
        """The folders that it was told to read weights from."""
        rpc = [body for path, body in self.calls if path == "/collective_rpc"]
        return [
            Path(each["kwargs"]["weights_path"])
            for each in rpc
            if each["method"] == "reload_weights"
        ]

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        if self.stopped:
            handler.close_connection = True
            return
        path = handler.path.partition("?")[0]
        self.calls.append((handler.path, body))
        self.keys.append(handler.headers["Authorization"])
        status, reply = self.missing.get(path, 200), self.reply(path, body)
        if status != 200:
            reply = {"error": {"message": "that is not done here"}}
        if reply is None:  # the connection is cut
            handler.close_connection = True
            return
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        if data in (b"500", b"404", b"400"):
            status = int(data)
            said = "out of memory" if status == 500 else "this is too long"
            data = json.dumps({"error": {"message": said}}).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def reply(self, path: str, body: Any) -> Any:
        answers: dict[str, Callable[[Any], Any]] = {
            "/server_info": self._info,
            "/list_workers": lambda _: b"404" if self.workers is None else {"urls": self.workers},
            "/version": lambda _: {"version": self.software},
            "/collective_rpc": self._call,
            "/pause": lambda _: self._pause(True),
            "/resume": lambda _: self._pause(False),
            "/update_weight_version": self._set_version,
            "/weight_info": lambda _: {"weight_version": self.version},
            "/get_world_size": lambda _: {"world_size": self.gpus},
            "/init_weight_transfer_engine": self._join,
            "/start_weight_update": self._begin,
            "/update_weights": self._take,
            "/finish_weight_update": self._end,
            "/inference/v1/generate": self._generate,
        }
        return answers[path](body) if path in answers else {"success": True}

    def _info(self, _: Any) -> Any:
        return {
            "vllm_config": {
                "model_config": {
                    "dtype": f"torch.{self.dtype}",
                    "logprobs_mode": self.logprobs,
                    "max_model_len": self.context,
                    "quantization": self.quantization,
                },
                "weight_transfer_config": {"backend": self.backend},
                "instance_id": str(len(self.calls)) if self.balances else "1",
            },
            "vllm_env": {"VLLM_ALLOW_INSECURE_SERIALIZATION": self.unpickles},
        }

    def _pause(self, paused: bool) -> Any:
        self.paused = paused
        return {}

    def _call(self, body: Any) -> Any:
        if body["method"] == "get_model_inspection":
            layers, tokens, width = self.sizes
            return {"results": [INSPECTION.format(last=layers - 1, tokens=tokens, width=width)]}
        if body["method"] == "update_config":
            self.dummy = body["kwargs"]["overrides"]["load_config"]["load_format"] == "dummy"
            return {"results": [None]}
        if self.dummy or not self.reloads:
            return b"500"
        time.sleep(float(os.environ.get("FAKE_VLLM_RELOAD", "0")))
        folder = Path(body["kwargs"]["weights_path"])
        self.weights = {}
        for file in sorted(folder.iterdir()):
            with safe_open(file, "pt") as tensors:
                self.weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        return {"results": [None]}

    def _join(self, body: Any) -> Any:
        self.group = body["init_info"]
        return {}

    def _begin(self, _: Any) -> Any:
        if self.updating:
            return b"500"
        self.updating, self.weights = True, {}
        return {}

    def _take(self, body: Any) -> Any:
        info = body["update_info"]
        if not self.updating or not self.group or self.transfer == "500":
            self.updating = False
            return b"500"
        if self.transfer != "well":
            if self.transfer == "hang":
                self.hung.wait(20)
            if self.transfer == "die":
                threading.Thread(target=self.stop).start()
            return None
        names = info["names"]
        if pickled := info.get("ipc_handles_pickled"):
            tensors = pickle.loads(base64.b64decode(pickled))
        else:
            wire = self.wires[self.group["master_port"], self.group["rank_offset"]]
            tensors = [wire.get(timeout=20) for _ in names]
        assert info["shapes"] == [list(tensor.shape) for tensor in tensors]
        assert info["dtype_names"] == [str(tensor.dtype).split(".")[1] for tensor in tensors]
        self.weights |= dict(zip(names, tensors, strict=True))
        return {}

    def _end(self, _: Any) -> Any:
        if not self.updating:
            return b"500"
        self.updating = False
        return {}

    def _set_version(self, body: Any) -> Any:
        self.before, self.version = self.version, body["new_version"]
        return {"success": True}

    def _generate(self, body: Any) -> Any:
        tokens, params = body["token_ids"], body["sampling_params"]
        if "stop" not in params:  # a probe
            return _choice([0], [-0.5], "length", self.version)
        with self.lock:
            self.turns.append((tokens, params))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            while not self.gate.wait(0.01) or self.paused:
                time.sleep(0.005)
            return self._turn(tokens, params)
        finally:
            with self.lock:
                self.now -= 1

    def _turn(self, tokens: list[int], params: dict[str, Any]) -> Any:
        said = script(tokens, params["seed"], params["max_tokens"])
        with self.lock:
            mode = self.mode if self.fails > 0 else "well"
            self.fails -= mode != "well"
        logprobs = [-0.25] * len(said)
        if mode == "hang":
            self.hung.wait(20)
        return {
            "500": b"500",
            "400": b"400",
            "cut": None,
            "hang": None,
            "rubbish": b'{"choices": [{"token_ids": [1, 2',
            "other": {"object": "list", "data": []},
            "short": _choice(said[:-1], logprobs[:-1], "length", self.version),
            "abort": _choice(said[:1], logprobs[:1], "abort", self.version),
            "unequal": _choice(said, logprobs[:-1], "length", self.version),
            "old": _choice(said, logprobs, "length", "default"),
            "nan": _choice(said, [-9999.0] * len(said), "length", self.version),
            "mixed": self._mixed(said, logprobs),
            "well": _choice(said, logprobs, "length", self.version),
        }[mode]

    def _mixed(self, said: list[int], logprobs: list[float]) -> dict[str, Any]:
        """A turn whose first half was sampled with the weights before."""
        answer, half = _choice(said, logprobs, "length", self.version), len(said) // 2
        answer["choices"][0]["weight_versions"] = [
            {"version": self.before, "start": 0, "end": half},
            {"version": self.version, "start": half, "end": len(said)},
        ]
        return answer


def _choice(
    tokens: list[int], logprobs: list[float], reason: str, version: str, **more: Any
) -> dict[str, Any]:
    pairs = zip(tokens, logprobs, strict=False)
    return {
        "choices": [
            {
                "token_ids": tokens,
                "logprobs": {"content": [{"token_id": t, "logprob": p, **more} for t, p in pairs]},
                "finish_reason": reason,
                "stop_reason": None,
                "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
            }
        ]
    }


def main(words: list[str]) -> None:
    """Serve until a signal comes; with ``FAKE_VLLM_FAILS`` end at once with that message."""
    if message := os.environ.get("FAKE_VLLM_FAILS"):
        sys.exit(message)
    pairs = [word.removeprefix("--").partition("=") for word in words]
    settings = {name: value for name, _, value in pairs}
    sizes = FakeVllm.sizes
    if "model" in settings:
        config = json.loads((Path(settings["model"]) / "config.json").read_text())
        sizes = tuple(config[n] for n in ("num_hidden_layers", "vocab_size", "hidden_size"))
    FakeVllm(
        port=int(settings["port"]),
        context=int(settings["max-model-len"]),
        dtype=settings["dtype"],
        sizes=sizes,
        dummy=settings.get("load-format") == "dummy",
    )
    record = {"pid": os.getpid(), "settings": settings, "environment": dict(os.environ)}
    if file := os.environ.get("FAKE_VLLM_RECORD"):
        Path(file).write_text(json.dumps(record))
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
