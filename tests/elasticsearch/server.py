"""Download, start and stop a real Elasticsearch server on a free port of 127.0.0.1.

It is Elastic's distribution for integration tests, the official one without most modules, from
Maven Central. A plugin of one class adds the analyzer ``english``, which it lacks. That needs Maven
and a Java development kit of version 17 or newer. Where they are missing and Docker has a daemon,
the official image runs instead.

All servers share what is installed in the cache folder. Each has its own folder of data, logs and
configuration, which is removed with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from research_env.system.locks import exclusive_lock
from research_env.system.paths import cache_folder

VERSION = "8.19.7"
HEAP = "-Xms512m -Xmx1g"
TIMEOUT = 180.0  # seconds within which a server must be ready
USER = "nobody"  # whom a server runs as when we are root: it refuses to run as root

_ARTIFACT = f"org.elasticsearch.distribution.integ-test-zip:elasticsearch:{VERSION}:zip"
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
_SETTINGS = {
    "discovery.type": "single-node",
    "network.host": "127.0.0.1",
    "xpack.security.enabled": "false",
    "cluster.routing.allocation.disk.threshold_enabled": "false",  # a full disk fails no test
}


class ServerError(RuntimeError):
    """A server that cannot be started here; the message says what is missing."""


@dataclass(frozen=True)
class Server:
    """A server that was started here, as a process or as a container of Docker.

    Attributes:
        url: its address, ``http://127.0.0.1:PORT``.
        folder: data, logs and configuration of a process; empty for a container.
        pid: the process group of a process; 0 for a container.
        born: when the process started, to recognize a pid that another process has got since.
        container: Docker's id of a container; empty for a process.
    """

    url: str
    folder: str = ""
    pid: int = 0
    born: str = ""
    container: str = ""

    @property
    def port(self) -> int:
        """The port of its address."""
        return int(self.url.rsplit(":", 1)[1])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes, if they are still there."""
        if self.pid and _born(self.pid) == self.born:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def pause(self) -> None:
        """Stop all its threads: connections stay open, and nothing is answered."""
        self.signal(signal.SIGSTOP)
        while not _is_stopped(self.pid):  # the kernel stops threads one after the other
            time.sleep(0.01)

    def resume(self) -> None:
        """Continue after ``pause``."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, as a power cut does, and keep its data."""
        self.signal(signal.SIGKILL)
        _wait(self.pid, self.born)

    def halt(self) -> None:
        """Shut it down in good order, and keep its data."""
        self.resume()
        self.signal(signal.SIGTERM)
        _wait(self.pid, self.born, 30)
        self.kill()

    def again(self) -> Server:
        """Start it again, on the same port with the same data, after ``kill`` or ``halt``."""
        return _launch(Path(self.folder), self.port)

    def stop(self) -> None:
        """End it, and remove its data."""
        if self.container:
            subprocess.run(["docker", "stop", self.container], capture_output=True, check=False)
            return
        self.kill()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def start() -> Server:
    """Start a server with nothing in it, and wait until it is ready.

    Raises:
        ServerError: there is neither Maven with Java nor Docker, or it does not come up.
    """
    if shutil.which("mvn") and shutil.which("javac"):
        _install()
        (_base() / "servers").mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=_base() / "servers"))
        try:
            folder.chmod(0o755)
            shutil.copytree(_home() / "config", folder / "config")
            (folder / "tmp").mkdir()
            return _launch(folder, _free_port())
        except BaseException:  # also KeyboardInterrupt: nobody else knows of it
            shutil.rmtree(folder, ignore_errors=True)
            raise
    if shutil.which("docker") and _run(["docker", "info"], check=False).returncode == 0:
        return _start_container()
    raise ServerError(
        "no Elasticsearch can be started: install Maven and a Java development kit (on Debian "
        "'apt-get install maven openjdk-17-jdk-headless'), or Docker, or name a server that runs "
        "in ELASTICSEARCH_URL"
    )


def index_url(server: str, name: str) -> str:
    """Return the URL of an index, or of an alias, for a retriever."""
    return f"{server.replace('http', 'elasticsearch', 1)}/{name}"


def call(server: str, method: str, path: str, body: object = None) -> Any:
    """Send a request with a JSON body to a server; return the parsed answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(server + path, data, headers, method=method)
    with _DIRECT.open(request, timeout=60) as answer:
        return json.loads(answer.read())


def save(server: Server, file: Path) -> None:
    """Write down a server, so that another process can find and stop it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(server)), encoding="utf-8")


def saved(file: Path) -> Server | None:
    """Return the server that ``save`` wrote down, if it still runs."""
    try:
        server = Server(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    if server.container:
        return server if _docker_runs(server.container) else None
    return server if _born(server.pid) == server.born else None


def _base() -> Path:
    """A folder in the cache, or one that all users can enter if the server's user cannot."""
    folder = cache_folder() / "elasticsearch"
    folder.mkdir(parents=True, exist_ok=True)
    closed = any(not each.stat().st_mode & 0o001 for each in (folder, *folder.parents))
    if os.geteuid() == 0 and closed:
        folder = Path("/var/tmp/research-env-elasticsearch")
        folder.mkdir(mode=0o755, exist_ok=True)
        if folder.stat().st_uid != 0:
            raise ServerError(f"{folder} belongs to another user; remove it")
    return folder


def _home() -> Path:
    return _base() / f"server-{VERSION}"


def _install() -> None:
    """Download the server and add its plugin, once for all processes."""
    with exclusive_lock(_base() / "install.lock"):
        if _home().exists():
            return
        version = re.search(r"\d+", _run(["javac", "-version"]).stdout)
        if version is None or int(version[0]) < 17:
            raise ServerError("Elasticsearch needs Java 17 or newer: install a newer kit")
        with tempfile.TemporaryDirectory(dir=_base()) as name:
            work = Path(name)
            _run(["mvn", "-q", "-B", _COPY, f"-Dartifact={_ARTIFACT}", f"-DoutputDirectory={work}"])
            with zipfile.ZipFile(work / f"elasticsearch-{VERSION}.zip") as archive:
                archive.extractall(work)
            home = work / f"elasticsearch-{VERSION}"
            _install_english(home, work / "classes")
            for path in home.rglob("*"):
                path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
            home.chmod(0o755)
            home.rename(_home())


def _install_english(home: Path, classes: Path) -> None:
    name = "EnglishAnalyzerFactory"
    source = Path(__file__).with_name(f"{name}.java")
    _run(["javac", "--release", "17", "-cp", f"{home}/lib/*", "-d", str(classes), str(source)])
    plugin = home / "plugins" / "english-analyzer"
    plugin.mkdir()
    with zipfile.ZipFile(plugin / "english-analyzer.jar", "w") as jar:
        jar.write(classes / "english" / f"{name}.class", f"english/{name}.class")
    properties = {
        "name": "english-analyzer",
        "description": "the analyzer english",
        "version": "1",
        "elasticsearch.version": VERSION,
        "java.version": "17",
    }
    lines = "".join(f"{key}={value}\n" for key, value in properties.items())
    (plugin / "stable-plugin-descriptor.properties").write_text(lines)
    components = {
        "org.elasticsearch.plugin.analysis.AnalyzerFactory": {"english": f"english.{name}"}
    }
    (plugin / "named_components.json").write_text(json.dumps(components))


def _launch(folder: Path, port: int) -> Server:
    """Start the server of a folder and wait until it is ready."""
    java = Path(shutil.which("javac") or "").resolve().parent.parent
    settings = _SETTINGS | {
        "http.port": str(port),
        "transport.port": str(_free_port()),
        "path.data": str(folder / "data"),
        "path.logs": str(folder / "logs"),
    }
    root = os.geteuid() == 0
    if root:
        _run(["chown", "-R", USER, str(folder)])
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [
                str(_home() / "bin" / "elasticsearch"),
                *(f"-E{key}={value}" for key, value in settings.items()),
            ],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(folder),
                "ES_JAVA_HOME": str(java),
                "ES_JAVA_OPTS": f"{HEAP} {os.environ.get('ES_JAVA_OPTS', '')}",
                "ES_PATH_CONF": str(folder / "config"),
                "ES_TMPDIR": str(folder / "tmp"),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
            user=USER if root else None,
        )
    server = Server(f"http://127.0.0.1:{port}", str(folder), process.pid, _born(process.pid))
    deadline = time.monotonic() + TIMEOUT
    try:
        while not _is_healthy(server.url):
            if process.poll() is not None or time.monotonic() > deadline:
                end = (folder / "output").read_text(errors="replace")[-2000:]
                raise ServerError(f"Elasticsearch did not start; its last words:\n{end}")
            time.sleep(0.2)
    except BaseException:
        server.kill()
        raise
    return server


def _start_container() -> Server:
    run = ["docker", "run", "--detach", "--rm", "--publish", "127.0.0.1::9200"]
    for key in ("discovery.type", "xpack.security.enabled"):
        run += ["--env", f"{key}={_SETTINGS[key]}"]
    container = _run([*run, "--env", f"ES_JAVA_OPTS={HEAP}", f"elasticsearch:{VERSION}"]).stdout
    server = Server("", container=container.strip())
    deadline = time.monotonic() + TIMEOUT
    try:
        port = _run(["docker", "port", server.container, "9200"]).stdout.strip().rsplit(":", 1)[1]
        server = replace(server, url=f"http://127.0.0.1:{port}")
        while not _is_healthy(server.url):
            if time.monotonic() > deadline:
                raise ServerError("the container with Elasticsearch did not become ready")
            time.sleep(0.5)
    except BaseException:
        server.stop()
        raise
    return server


def _docker_runs(container: str) -> bool:
    """Whether Docker runs that container, be it healthy or not."""
    if not shutil.which("docker"):
        return False
    state = _run(["docker", "inspect", "--format", "{{.State.Running}}", container], check=False)
    return state.returncode == 0 and state.stdout.strip() == "true"


def _is_healthy(url: str) -> bool:
    try:
        with _DIRECT.open(f"{url}/_cluster/health?wait_for_status=yellow", timeout=5):
            return True
    except OSError:
        return False


def _born(pid: int) -> str:
    """When a process started, in ticks since the machine did; empty if it is gone or a zombie."""
    try:
        fields = _stat(Path(f"/proc/{pid}"))
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _is_stopped(group: int) -> bool:
    """Whether every thread of a process group is stopped or gone; True if there is no /proc."""
    states = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it may end meanwhile
            if int(_stat(process)[2]) == group:
                states |= {_stat(thread)[0] for thread in (process / "task").iterdir()}
    return states <= {"T", "t", "Z", "X"}


def _stat(folder: Path) -> list[str]:
    """State, parent, group and more of a process or thread, from its ``stat`` file."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _wait(pid: int, born: str, seconds: float = 60) -> None:
    """Wait until a process is gone, and reap it if it is a child of this one."""
    deadline = time.monotonic() + seconds
    while pid and born and _born(pid) == born and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(command: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise ServerError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done
