"""``make elasticsearch`` and ``make elasticsearch-stop``: a real server for the tests.

``python -m tests.elasticsearch start`` prints the address of a server as its last line: the one in
``ELASTICSEARCH_URL``, or one that an earlier call started and that still runs, or a new one.
``stop`` ends what ``start`` started, and nothing else.
"""

from __future__ import annotations

import os
import sys

from research_env.system.paths import cache_folder
from tests.elasticsearch.server import ServerError, save, saved, start


def main(command: str) -> None:
    note = cache_folder() / "elasticsearch" / "server.json"
    named = os.environ.get("ELASTICSEARCH_URL")
    server = saved(note)
    if command == "stop":
        if server is None:
            print("no server that was started here runs")
        else:
            server.stop()
            print(f"stopped {server.url}")
        note.unlink(missing_ok=True)
    elif command == "start":
        if not named and server is None:
            print("starting Elasticsearch (it is downloaded at the first start)", flush=True)
            server = start()
            save(server, note)
        print(named or (server.url if server else ""))
    else:
        raise SystemExit("python -m tests.elasticsearch start | stop")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) == 2 else "")
    except ServerError as error:
        raise SystemExit(f"elasticsearch: {error}") from None
