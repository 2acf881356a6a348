"""Each file of an artifact is derived, a document that belongs to it, or a difference. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nf4_pipeline.checkpoint.files import CARD_FILE, PICKLE_FILE, is_legal
from nf4_pipeline.checkpoint.untrusted import size_limit
from nf4_pipeline.hub.replies import ReplyError, check_name
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.provenance.signing import SIGNATURE_FILE
from nf4_pipeline.rebuilding.published import Listed
from nf4_pipeline.report.pictures import PICTURES
from nf4_pipeline.reproduce.compare_files import Difference
from nf4_pipeline.stages.publication import BOM_FILE, PROVENANCE_FILE
from nf4_pipeline.stages.verify import REPORT_FILE
from nf4_pipeline.verification.document import VERIFICATION_FILE

GIT_FILE: Final = ".gitattributes"
ATTESTED: Final = frozenset(
    {
        CARD_FILE,
        BOM_FILE,
        VERIFICATION_FILE,
        REPORT_FILE,
        *(picture.file for picture in PICTURES.values() if picture.file),
    }
)
"""Documents that nf4 writes beside what it derives; provenance.json names each that is there."""
DOCUMENTS: Final = ATTESTED | {PROVENANCE_FILE, SIGNATURE_FILE, GIT_FILE}
"""All that may stand beside what the manifest lists, but for texts with terms (`is_legal`)."""

POLICY: Final[dict[str, Any]] = {"documents": sorted(DOCUMENTS), "legal": True, "version": 1}
"""What the rules come down to, for the hash in a summary."""

LARGEST_JSON: Final = 32 * 2**20
_CODE: Final = (".py", ".pyc", ".so", ".sh", ".ipynb", ".dll", ".exe")


@dataclass(frozen=True)
class Account:
    """What is to be thought of each file before a byte of it is read.

    Attributes:
        wanted: files to be brought.
        differences: what is wrong with the others.
    """

    wanted: frozenset[str]
    differences: tuple[Difference, ...]


def may_be_read(name: str, listed: Listed) -> Difference | None:
    """What is wrong with a document's size or kind; None if it may be read."""
    if listed.problem:
        return Difference(name, listed.problem)
    limit = min(size_limit(name), LARGEST_JSON) if name.endswith(".json") else size_limit(name)
    if listed.size > limit:
        return Difference(name, f"has {listed.size:,} bytes; no real one has more than {limit:,}")
    return None


def check_manifest_names(manifest: Manifest) -> str:
    """Which name in a manifest leads elsewhere, or could; "" if each can be a file of a repo."""
    for name in (*manifest.files, *manifest.source.files, *_stored_in(manifest)):
        try:
            check_name(name)
        except ReplyError as error:
            return str(error)
    return ""


def _stored_in(manifest: Manifest) -> set[str]:
    return {part.file for tensor in manifest.tensors for part in tensor.stored}


def account(files: Mapping[str, Listed], manifest: Manifest) -> Account:
    """Sorts the files of an artifact.

    Args:
        files: all that it holds.
        manifest: as the artifact has it; its names are checked.
    """
    differences: dict[str, Difference] = {}
    wanted: set[str] = set()
    twins = _twins(files)

    def is_known(name: str) -> bool:
        return name in manifest.files or name in DOCUMENTS or name == MANIFEST_FILE

    for name, listed in files.items():
        if name in twins and not (is_known(name) and not is_known(twins[name])):
            what = f"is called as {twins[name]!r} is, but for case: one file on many disks"
            differences[name] = Difference(name, what)
        elif name in manifest.files:
            expected = manifest.files[name].size
            if listed.problem:
                differences[name] = Difference(name, listed.problem)
            elif listed.size != expected:
                what = f"has {listed.size:,} bytes, and the manifest lists {expected:,}"
                differences[name] = Difference(name, what)
            else:
                wanted.add(name)
        elif name in DOCUMENTS or name == MANIFEST_FILE or is_legal(name):
            wrong = may_be_read(name, listed)
            if wrong is None:
                wanted.add(name)
            else:
                differences[name] = wrong
        else:
            differences[name] = Difference(name, _unknown(name, listed))
    for name in manifest.files.keys() - files.keys():
        differences[name] = Difference(name, "is missing")
    return Account(frozenset(wanted), tuple(differences.values()))


def _unknown(name: str, listed: Listed) -> str:
    what = "is not in the manifest, and no document that nf4 writes"
    if name.endswith(_CODE):
        what += "; it is code"
    elif PICKLE_FILE.fullmatch(name) or name.endswith((".pt", ".pth", ".pkl", ".bin", ".ckpt")):
        what += "; if it is a pickle, opening it runs code"
    return f"{what} ({listed.problem})" if listed.problem else what


def _twins(files: Mapping[str, Listed]) -> dict[str, str]:
    """Files of which there is another one where upper and lower case are the same."""
    places: dict[str, list[str]] = {}
    for name in files:
        places.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in places.values()
        if len(names) > 1
        for name in names
    }
