"""Coverage-guided mutations of safetensors headers, with Atheris (`pip install atheris`).

    python scripts/campaigns/fuzz_headers.py [-runs=200000] [-seed=1] [any option of libFuzzer]

Ends with an error at the first crash, at a header that takes more than a second, and at 200 MB.
`scripts/campaigns/reliability.py headers` needs nothing installed and has a fixed seed; the tests
use it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

OPTIONS = ("-runs=200000", "-seed=1", "-timeout=1", "-rss_limit_mb=200", "-max_len=4096")
FOLDER = "NF4_FUZZ_FOLDER"
"""Tells the process that fuzzes, which Atheris ends without cleaning up, where its files go."""


def fuzz(folder: Path) -> None:
    """Fuzzes from the valid headers that the tests start from."""
    import atheris

    # Only what is imported here for the first time is watched.
    with atheris.instrument_imports(include=["nf4_pipeline.checkpoint"]):
        from nf4_pipeline.checkpoint.safetensors_header import read_header
    from nf4_pipeline.errors import CheckpointError

    path = folder / "fuzz.safetensors"

    def read_one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read_header(path)
        except CheckpointError:
            pass

    atheris.Setup([sys.argv[0], *OPTIONS, *sys.argv[1:], str(folder / "corpus")], read_one)
    atheris.Fuzz()


def main() -> None:
    """Fuzzes in a process of its own, in a folder in memory where there is one."""
    if FOLDER in os.environ:
        fuzz(Path(os.environ[FOLDER]))
        return
    from tests.campaigns.headers import seeds

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="nf4-fuzz-", dir=memory) as name:
        corpus = Path(name, "corpus")
        corpus.mkdir()
        for number, file in enumerate(seeds()):
            (corpus / str(number)).write_bytes(file)
        command = [sys.executable, __file__, *sys.argv[1:]]
        done = subprocess.run(command, env={**os.environ, FOLDER: name}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
