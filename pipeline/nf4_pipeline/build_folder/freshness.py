"""Whether a stage is done, stale or missing, and whether its outputs are what it left."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from nf4_pipeline.build_folder.record import Facts, Record
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp, digest_file
from nf4_pipeline.checkpoint.folder_advice import dead_link
from nf4_pipeline.errors import BuildError
from nf4_pipeline.progress import Reporter

_GONE: Final = "is gone"


@dataclass(frozen=True)
class State:
    """Whether a stage is done, and if not, why.

    `stamps` are those of its outputs, if it is done, from before they were hashed.
    """

    status: Literal["done", "stale", "missing"]
    why: str
    stamps: dict[str, FileStamp] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """The outputs of a stage, as another one found them before it read them.

    Attributes:
        root: the build folder.
        stage: the one that left them.
        stamps: by path in the build folder.
    """

    root: Path
    stage: str
    stamps: dict[str, FileStamp]

    def check_untouched(self, *, linked: bool = False) -> dict[str, FileStamp]:
        """Holds them against what they were, after they have been read.

        Args:
            linked: hard links to them were made meanwhile, which changes their times of change.

        Returns:
            Their stamps now.

        Raises:
            BuildError: one of them was touched in the meantime, so what was read of it may be of
                neither state.
        """
        stamps: dict[str, FileStamp] = {}
        for name, before in self.stamps.items():
            path = self.root / name
            try:
                now = stamps[name] = FileStamp.of(path)
                touched = (replace(now, ctime_ns=before.ctime_ns) if linked else now) != before
            except OSError:
                touched = True
            if touched:
                raise BuildError(
                    f"{path.resolve()} was changed or touched while it was read: expected it to "
                    f"stay as `{self.stage}` recorded it. Nothing that was made of it counts. Let "
                    "it rest, then run the same command again."
                )
        return stamps


Holds = Callable[[str, FileDigest], bool]
"""Whether a file of a build stands, as it was left, at the URL of which the folder is a copy."""


def find_state(
    root: Path,
    record: Record[Facts] | None,
    key: str,
    reporter: Reporter,
    *,
    check: bool,
    holds: Holds = lambda name, digest: False,
) -> State:
    """Whether a stage is done.

    Args:
        root: the build folder.
        record: of the stage, if there is one.
        key: that the stage would have now.
        reporter: told how far the hashing is.
        check: hash all of its outputs to know; else those that were touched since they were hashed.
        holds: whether an output that is not here stands elsewhere; it is not fetched to know.
    """
    if record is None:
        return State("missing", "not run yet")
    if record.key != key:
        return State("stale", "its inputs, its recipe or this program changed since")
    touched, stamps = {}, {}
    for name, expected in record.outputs.items():
        if problem := _find_problem(root / name, name):
            if problem == _GONE and holds(name, expected):
                continue
            return State("stale", f"{name} {problem}")
        stamps[name] = FileStamp.of(root / name)
        if check or stamps[name] != record.stamps.get(name):
            touched[name] = expected
    if not touched:
        here = len(stamps) == len(record.outputs)
        why = "outputs are untouched since they were hashed"
        return State("done", why if here else "outputs are kept elsewhere", stamps)
    total = sum(digest.size for digest in touched.values())
    with reporter.task(f"check {record.kind.stage}", total) as task:
        for name, expected in touched.items():
            path = root / name
            if path.stat().st_size != expected.size or digest_file(path, task) != expected:
                return State("stale", f"{name} is not what the stage wrote")
    return State("done", "outputs hash as recorded", stamps)


def check_outputs(
    root: Path,
    record: Record[Facts],
    stamps_of_hashed: Mapping[str, FileStamp],
    elsewhere: Collection[str] = (),
) -> Inputs:
    """Refuses outputs that changed since their stage wrote them.

    A file that has the stamp that it had when it was hashed is not hashed again; any other is.

    Args:
        root: the build folder.
        record: of the stage.
        stamps_of_hashed: by path in the build folder; of files whose hash is known.
        elsewhere: paths of files that need not be here.

    Returns:
        What to hold them against once they have been read.

    Raises:
        BuildError: a file that the stage left is gone, has other bytes, or has become a link.
    """
    stage = record.kind.stage
    stamps = {}
    for name, expected in record.outputs.items():
        path = root / name
        if name.startswith("source/") and (link := dead_link(path)) is not None:
            raise BuildError(link)
        problem = _find_problem(path, name)
        if problem == _GONE and name in elsewhere:
            continue
        if problem is None:
            stamps[name] = FileStamp.of(path)
            if stamps[name] == stamps_of_hashed.get(name):
                continue
            if digest_file(path) != expected:
                problem = f"changed since `{stage}` recorded it"
        if problem is not None:
            raise BuildError(
                f"{path} {problem}: expected {expected.size:,} bytes with sha256 "
                f"{expected.sha256[:12]}…, as `{stage}` left there. Run `nf4 {stage}` again."
            )
    return Inputs(root, stage, stamps)


def _find_problem(path: Path, name: str) -> str | None:
    """What is wrong with an output, as far as that shows without reading it."""
    # Only download leaves links: what any other points at can change unseen.
    if path.is_symlink() and not name.startswith("source/"):
        return "is a link"
    return None if path.is_file() else _GONE
