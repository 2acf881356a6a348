"""The source of a build, for tasks on machines that do not see its build folder.

What is sent is small: the record of download, the config, and the header of each file of weights. A
task opens it in a folder of its own. There the weights are those that lie at the same paths on that
machine, or they come from the Hub, as those of a streamed source do, file by file.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import make_folder, write_bytes
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp
from nf4_pipeline.checkpoint.plain_file import read_beginning
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.records import DOWNLOAD, DownloadFacts
from nf4_pipeline.stages.streamed_source import header_path

_SUFFIX: Final = ".safetensors"
_LENGTH: Final = 8  # bytes that say how long the rest of a header is


@dataclass(frozen=True)
class SentSource:
    """What a machine is told of the source.

    Attributes:
        record: that download left.
        places: name in source/ -> where it lies on the host that asks.
        small: content of the files that hold no weights and that quantizing reads, by name.
        headers: the first bytes of each file of weights, by name.
    """

    record: Record[DownloadFacts]
    places: Mapping[str, Path]
    small: Mapping[str, bytes]
    headers: Mapping[str, bytes]

    @classmethod
    def of(cls, build: Build) -> SentSource:
        """That of a build whose weights are here.

        Raises:
            BuildError: download is not done.
        """
        record = build.need(DOWNLOAD)
        names = record.outputs_in("source")
        return cls(
            record,
            {name: (build.source / name).resolve() for name in names},
            {name: (build.source / name).read_bytes() for name in names if _is_read(name)},
            {name: _header(build.source / name) for name in names if name.endswith(_SUFFIX)},
        )

    def open_in(self, build: Build) -> None:
        """Makes an empty folder a build whose download is done.

        Args:
            build: the folder.

        Raises:
            ResourceError: the weights are neither at their paths here nor on the Hub.
        """
        if self._is_here():
            for name, place in self.places.items():
                link = build.source / name
                make_folder(link.parent)
                link.symlink_to(place)
            build.write_record(self.record)
            return
        facts = self.record.facts
        if facts.commit is None or facts.converted_from:
            place = next(iter(self.places.values())).parent
            raise ResourceError(
                f"{socket.gethostname()} sees neither the build folder nor the same files as "
                f"the host of the command in {place}, and such weights cannot be fetched from the "
                "Hub. Put the model where all nodes of the Ray cluster see it by one path, or name "
                "one that is on the Hub as it is."
            )
        digests = self.record.outputs_in("source")
        files = {f"source/{name}": content for name, content in self.small.items()}
        files |= {header_path(name): content for name, content in self.headers.items()}
        for name, content in files.items():
            make_folder((build.root / name).parent)
            write_bytes(build.root / name, content)
        build.write_record(
            replace(
                self.record,
                outputs={name: FileDigest.of(content) for name, content in files.items()},
                facts=replace(facts, streamed={name: digests[name] for name in self.headers}),
                stamps={},
            )
        )

    def _is_here(self) -> bool:
        """Whether the same files are at the same paths: nobody touched or copied them."""
        stamps = self.record.stamps
        try:
            return all(
                FileStamp.of(place) == stamps.get(f"source/{name}")
                for name, place in self.places.items()
            )
        except OSError:
            return False


def _is_read(name: str) -> bool:
    return name == "config.json" or name.endswith(f"{_SUFFIX}.index.json")


def _header(path: Path) -> bytes:
    length = int.from_bytes(read_beginning(path, _LENGTH), "little")
    return read_beginning(path, _LENGTH + length)
