"""Downloads through an independent Hub server, olah, and compares with a download without it.

olah (https://pypi.org/project/olah) is a mirror; the Hub behind it is the one of the tests. It
needs packages of its own, so it lives in an environment of its own:

    python -m venv /tmp/olah && /tmp/olah/bin/pip install olah==0.5.4
    python scripts/campaigns/hub_through_olah.py /tmp/olah/bin/olah-cli

Exits 1 if a file differs. The result is kept in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer
from tests.support.tiny import content_of, write_falcon

REPO = "org/tiny-falcon"


def main() -> None:
    """Starts both servers, downloads from each, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("olah", type=Path, help="olah-cli of its environment")
    olah = parser.parse_args().olah
    with tempfile.TemporaryDirectory() as name, HubServer() as hub:
        folder = Path(name)
        hub.store.add(REPO, write_falcon(folder / "tiny-falcon", hidden=512))
        straight = _download(hub.url, folder / "straight")
        port = _free_port()
        mirror = _start(olah, port, hub, folder)
        try:
            _wait(mirror, port, folder)
            hub.seen.clear()
            first = _download(f"http://127.0.0.1:{port}", folder / "first")
            asked = len(hub.seen)
            again = _download(f"http://127.0.0.1:{port}", folder / "again")
        finally:
            mirror.terminate()
            mirror.wait()
        same = straight[1] == first[1] == again[1]
        same = same and straight[0]["files"] == first[0]["files"] == again[0]["files"]
        count, size = len(straight[1]), sum(map(len, straight[1].values()))
        print(
            f"{count} files, {size:,} bytes, commit {straight[0]['commit'][:12]}: "
            f"{'the same' if same else 'NOT the same'} straight from the Hub, through olah, and "
            f"through olah from its own cache ({asked} requests reached the Hub the first time, "
            f"{len(hub.seen) - asked} the second)"
        )
    sys.exit(0 if same else 1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def _start(olah: Path, port: int, hub: HubServer, folder: Path) -> subprocess.Popen[str]:
    here, netloc, cdn = f"127.0.0.1:{port}", hub.url.split("//")[1], hub.cdn_url.split("//")[1]
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "hf-scheme": "http",
        "hf-netloc": netloc,
        "hf-lfs-netloc": cdn,
        "mirror-scheme": "http",
        "mirror-netloc": here,
        "mirror-lfs-netloc": here,
        "repos-path": str(folder / "olah-repos"),
        "log-path": str(folder / "olah-logs"),
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", value)]
    with (folder / "olah.txt").open("w") as log:
        return subprocess.Popen(
            [olah, *arguments],
            cwd=folder,
            env=isolated(folder / "olah-home", hub.url),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _wait(mirror: subprocess.Popen[str], port: int, folder: Path) -> None:
    for _ in range(600):
        if mirror.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"olah did not start:\n{(folder / 'olah.txt').read_text()}")


def _download(endpoint: str, place: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What `nf4 download --json` says, and the files that it got."""
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "nf4_pipeline", "download", REPO, "--json"],
        cwd=place,
        env=isolated(place / "hf", endpoint),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        log = place.parent / "olah.txt"
        sys.exit(f"{endpoint}: {done.stderr}\n{log.read_text()[-3000:] if log.exists() else ''}")
    value = json.loads(done.stdout)
    return value, content_of(place / value["build"] / "source")


if __name__ == "__main__":
    main()
