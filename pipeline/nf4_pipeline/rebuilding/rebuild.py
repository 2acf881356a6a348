"""Artifacts, one after the other: found, brought, derived again, compared; each has a verdict."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nf4_pipeline import hub
from nf4_pipeline.checkpoint.atomic import check_can_be_made, make_folder
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.errors import (
    AccessError,
    ArtifactError,
    BuildError,
    HubError,
    PipelineError,
    RecipeError,
    ResourceError,
    SourceError,
    StoppedError,
    UnfitFileError,
    UsageError,
    of_installation,
    of_system,
)
from nf4_pipeline.machine import Machine
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.model.tokenizer_probe import EXTRA_NEEDED
from nf4_pipeline.printable import printable
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.provenance.keyless import Instance
from nf4_pipeline.provenance.signing import SIGNATURE_FILE
from nf4_pipeline.rebuilding.accounting import (
    DOCUMENTS,
    account,
    check_manifest_names,
    may_be_read,
)
from nf4_pipeline.rebuilding.claimed_source import NotCheckable, check_source
from nf4_pipeline.rebuilding.documents import Findings, Truth, check_documents
from nf4_pipeline.rebuilding.published import Published, open_published
from nf4_pipeline.rebuilding.results import ClaimedSource, RebuildResult, Rebuilt, Verdict
from nf4_pipeline.rebuilding.signature import why_not_confirmed
from nf4_pipeline.recipe import parse_recipe
from nf4_pipeline.reproduce.calibration import device_for
from nf4_pipeline.reproduce.compare_files import Difference
from nf4_pipeline.reproduce.reproduce import Reproduction, reproduce
from nf4_pipeline.stages.publication import PROVENANCE_FILE

WORK: Final = "nf4-rebuild"
"""The one folder that is made, and emptied, in the folder that a user names."""
_LONGEST_WHY: Final = 600
_MACHINE: Final = Machine()


@dataclass(frozen=True)
class RebuildRequest:
    """What is to be derived again, and what that may take.

    Attributes:
        artifacts: folders, or repos of the Hub as ORG/NAME or ORG/NAME@REVISION.
        work_dir: where all that is needed on the way goes; None for a temporary folder.
        keep: leave there what was fetched, for the next time.
        max_download: bytes that one artifact and its source may have together.
        machine: threads, memory, and where calibrated codes are chosen; its device "auto" means
            what a manifest says.
        trust: a trust configuration of the Sigstore that certifies workflows; None for the public
            one. It is asked only of an artifact whose provenance names a workflow as builder.
    """

    artifacts: Sequence[str]
    work_dir: Path | None = None
    keep: bool = False
    max_download: int = 10**11
    machine: Machine = _MACHINE
    trust: Path | None = None


def rebuild(
    request: RebuildRequest,
    reporter: Reporter = SILENT,
    done: Callable[[Rebuilt], object] = lambda _: None,
) -> list[Rebuilt]:
    """Derives artifacts again. What goes wrong with one is its verdict, and the next one follows.

    Args:
        request: which, and how.
        reporter: told how far it is.
        done: called with each result as soon as it is known.

    Raises:
        AccessError: the folder to work in cannot be made or written to.
        BuildError: another rebuilder works in that folder.
    """
    results = []
    with _work_folder(request) as work, hub.cache_at(work / "hub"):
        for name in dict.fromkeys(request.artifacts):
            reporter.note(f"{name}:")
            result = _Attempt(name, request, work, reporter).run()
            done(result)
            results.append(result)
            if not request.keep:
                _clear(work, keep_source=result.result.source)
    return results


@contextmanager
def _work_folder(request: RebuildRequest) -> Iterator[Path]:
    """A locked folder of our own; what is in it goes in the end."""
    with ExitStack() as stack:
        if request.work_dir is None:
            yield stack.enter_context(TemporaryFolder("rebuild"))
            return
        work = request.work_dir / WORK
        if work.is_symlink():
            raise AccessError(f"{work} is a link. Remove it, or name another --work-dir.")
        check_can_be_made(work)
        make_folder(work)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(
                f"Another rebuilder works in {work}. Wait for it, or name another --work-dir."
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield work
        finally:
            if not request.keep:
                shutil.rmtree(work, ignore_errors=True)


def _clear(work: Path, keep_source: ClaimedSource | None) -> None:
    """Deletes what was fetched, but for the last source: the next artifact may be made from it."""
    kept = None
    if keep_source is not None and keep_source.commit is not None:
        kept = hub.snapshot(keep_source.repo, keep_source.commit).parents[1].name
    for path in (work / "hub").glob("*"):
        if path.name != kept and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


@dataclass
class _Attempt:
    """One artifact; what is known of it grows on the way."""

    name: str
    request: RebuildRequest
    work: Path
    reporter: Reporter
    result: RebuildResult = field(init=False)
    digests: dict[str, FileDigest] = field(default_factory=dict, init=False)
    published: Published | None = field(default=None, init=False)

    def run(self) -> Rebuilt:
        began = time.monotonic()
        self.result = RebuildResult(artifact=self.name, verdict="NOT_CHECKED", why="")
        scratch = self.work / "scratch"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            for folder in ("artifact", "derive"):
                make_folder(scratch / folder)
            self._rebuild(scratch)
        except (StoppedError, KeyboardInterrupt):
            raise
        except NotCheckable as error:
            self._end("NOT_CHECKED", str(error))
        except Exception as error:  # whatever a stranger's file brings about ends here
            self._end(*_verdict_of(error))
        finally:
            with suppress(OSError):
                shutil.rmtree(scratch, ignore_errors=True)
        return self._finished(time.monotonic() - began)

    def _end(self, verdict: Verdict, why: str) -> None:
        """What is said of it; a difference that was found outweighs what could not be looked at."""
        if self.result.differences and verdict == "NOT_CHECKED":
            verdict = "FAILED"
            why = f"{_differ(self.result.differences)} And not all could be checked: {why}"
        text = why.replace(f"{self.work}{os.sep}", "")
        if re.match(r"[a-z]+[ ,]", text):  # a sentence, and not a name
            text = text[0].upper() + text[1:]
        text = printable(text, _LONGEST_WHY)
        self.result = replace(self.result, verdict=verdict, why=text)

    def _finished(self, seconds: float) -> Rebuilt:
        published, result = self.published, replace(self.result, seconds=round(seconds, 3))
        if published is None:
            return Rebuilt(result)
        result = replace(
            result,
            commit=published.commit,
            resource_uri=published.uri(self.digests),
            files=len(published.files),
        )
        attestations = {
            name: self.digests[name].sha256 for name in (PROVENANCE_FILE,) if name in self.digests
        }
        return Rebuilt(result, published.subjects(self.digests), attestations)

    def _rebuild(self, scratch: Path) -> None:
        published = self.published = open_published(self.name, scratch / "artifact", self.reporter)
        manifest = self._read_manifest(published)
        sorted_out = account(published.files, manifest)
        self.result = replace(self.result, differences=_merge(sorted_out.differences))
        source_bytes = self._check_claims(manifest)
        wanted = sorted_out.wanted - self.digests.keys()
        total = source_bytes + sum(published.files[name].size for name in sorted_out.wanted)
        if total > self.request.max_download:
            raise NotCheckable(
                f"artifact and source have {total:,} bytes, and --max-download allows "
                f"{self.request.max_download:,}"
            )
        self.digests |= self._bring(published, wanted)
        made = self._reproduce(published, scratch / "derive")
        found = self._look_at_documents(published, made)
        self.result = replace(
            self.result,
            differences=_merge(self.result.differences, made.differences, found.differences),
            not_derived=tuple(
                sorted(self.digests.keys() - manifest.files.keys() - {MANIFEST_FILE})
            ),
            notes=tuple(found.notes),
            source=ClaimedSource(
                repo=made.source.repo,
                commit=made.source.commit,
                confirmed_by=made.origin.confirmed_by,
            ),
            calibrated_on=made.calibrated_on,
        )
        open_claim = ""
        if found.builder is not None and not self.result.differences:
            open_claim = self._check_builder(published, found.builder, scratch / "signed")
        self._conclude(made, open_claim)

    def _check_builder(self, published: Published, builder: str, scratch: Path) -> str:
        """What is claimed of the builder and not known; "" if its signature says so, too."""
        instance = Instance(self.request.trust)
        why = why_not_confirmed(published.folder, self.digests, builder, scratch, instance)
        if why:
            return f"{PROVENANCE_FILE} says that {builder} built it, which nobody confirms: {why}"
        note = f"Signed by the workflow that {PROVENANCE_FILE} names as its builder: {builder}"
        notes = [n for n in self.result.notes if SIGNATURE_FILE not in n]
        self.result = replace(self.result, notes=(note, *notes))
        return ""

    def _conclude(self, made: Reproduction, open_claim: str) -> None:
        differences = self.result.differences
        if differences:
            caveat = ""
            if made.calibrated_on is not None and made.differences:
                caveat = (
                    f" Codes were chosen again on {made.calibrated_on}; on another model of device "
                    "than the artifact's some may differ."
                )
            self._end("FAILED", _differ(differences) + caveat)
        elif made.origin.is_open:
            self._end(
                "NOT_CHECKED",
                f"all is derived again, and its source is not confirmed: {made.origin.not_checked}",
            )
        elif open_claim:
            self._end("NOT_CHECKED", f"all is derived again, and {open_claim}")
        else:
            self._end("PASSED", f"{made.files} files are derived again, byte for byte.")

    def _read_manifest(self, published: Published) -> Manifest:
        listed = published.files.get(MANIFEST_FILE)
        if listed is None:
            raise ArtifactError(
                f"there is no {MANIFEST_FILE} in it, so it is no artifact of nf4-pipeline."
            )
        if (wrong := may_be_read(MANIFEST_FILE, listed)) is not None:
            raise ArtifactError(f"{MANIFEST_FILE} {wrong.what}.")
        self.digests |= self._bring(published, {MANIFEST_FILE})
        self.result = replace(self.result, manifest_sha256=self.digests[MANIFEST_FILE].sha256)
        manifest = read_manifest(published.folder)
        self.result = replace(
            self.result,
            source=ClaimedSource(
                repo=manifest.source.repo, commit=manifest.source.commit, confirmed_by=None
            ),
        )
        if wrong_name := check_manifest_names(manifest):
            raise ArtifactError(f"{MANIFEST_FILE} {wrong_name}.")
        return manifest

    def _check_claims(self, manifest: Manifest) -> int:
        """What needs no download; how much fetching the source takes."""
        try:
            recipe = parse_recipe(manifest.recipe, MANIFEST_FILE)
        except RecipeError as error:
            raise ArtifactError(
                f"{MANIFEST_FILE} holds a recipe that this version cannot follow: {error}"
            ) from error
        source_bytes = check_source(manifest, self.reporter)
        if recipe.quantize.calibrate and manifest.calibration is not None:
            try:
                device_for(manifest.calibration, self.request.machine.device)
            except (UsageError, ResourceError) as error:
                raise NotCheckable(str(error)) from error
        return source_bytes

    def _bring(self, published: Published, names: Set[str]) -> dict[str, FileDigest]:
        try:
            return published.bring(names, self.reporter)
        except HubError as error:
            raise NotCheckable(f"the Hub does not give it: {error}") from error

    def _reproduce(self, published: Published, scratch: Path) -> Reproduction:
        try:
            return reproduce(
                published.folder, None, self.reporter, self.request.machine, scratch=scratch
            )
        except HubError as error:
            raise NotCheckable(f"the Hub does not give its source: {error}") from error
        except ResourceError as error:  # of this machine: another may have it
            raise NotCheckable(str(error)) from error
        except UsageError as error:  # nobody typed it: the recipe in the manifest asks for it
            raise ArtifactError(f"{MANIFEST_FILE} cannot be followed: {error}") from error

    def _look_at_documents(self, published: Published, made: Reproduction) -> Findings:
        tokenizer, card = made.facts.tokenizer, made.facts.card
        assert card is not None  # a download of this version says it
        truth = Truth(
            made.manifest,
            card,
            tokenizer is not None and tokenizer.template == "works",
            published.repo_id,
        )
        return check_documents(published.folder, self.digests, truth)


def _verdict_of(error: Exception) -> tuple[Verdict, str]:
    """What an error says of an artifact: that it is wrong, or that nobody can tell here."""
    if isinstance(error, SourceError) and EXTRA_NEEDED in str(error):
        return "NOT_CHECKED", str(error)
    if isinstance(error, UnfitFileError | ArtifactError | SourceError | RecipeError):
        return "FAILED", str(error)
    if isinstance(error, PipelineError):
        return "NOT_CHECKED", str(error)
    if (broken := of_installation(error, "rebuild")) is not None:
        return "NOT_CHECKED", str(broken)
    if isinstance(error, OSError | MemoryError):
        return "NOT_CHECKED", str(of_system(error, "rebuild"))
    text = " ".join(str(error).split())[:300]
    return "NOT_CHECKED", (
        f"{type(error).__name__}: {text}. This is a bug in nf4-pipeline, or a file that it should "
        "have refused; please report it."
    )


def _merge(*groups: Sequence[Difference]) -> tuple[Difference, ...]:
    """One difference a file, that of the first group that has one; what tells most comes first."""
    by_file: dict[str, Difference] = {}
    for group in groups:
        for difference in group:
            by_file.setdefault(difference.file, difference)
    return tuple(sorted(by_file.values(), key=_importance))


def _importance(difference: Difference) -> tuple[int, str]:
    """Weights, then other files, then what speaks of them all and differs with them."""
    name = difference.file
    if difference.tensor is not None:
        return 0, name
    return (3 if name in DOCUMENTS else 2 if name == MANIFEST_FILE else 1), name


def _differ(differences: Sequence[Difference]) -> str:
    first = differences[0]
    more = f", and {len(differences) - 1} more differ" if differences[1:] else ""
    place = "" if first.tensor is None else f", first in {first.tensor}"
    if first.offset is not None:
        place += f" at byte {first.offset:,}"
    return f"{first.file} {first.what}{place}{more}."
