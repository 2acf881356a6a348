"""Card, provenance and bill of materials of an artifact, held against what was derived.

What they say of source, recipe, files and license follows from the manifest and the source; what
was measured follows from nothing here, and is only held to be said alike everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nf4_pipeline import __version__
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.files import CARD_FILE
from nf4_pipeline.checkpoint.plain_file import read_plain, read_text
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.checkpoint.source_card import SourceCard, parse_card
from nf4_pipeline.checkpoint.untrusted import size_limit
from nf4_pipeline.documents import DocumentError, schema_check
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.printable import printable
from nf4_pipeline.provenance.bom import bill_of_materials
from nf4_pipeline.provenance.signing import SIGNATURE_FILE
from nf4_pipeline.provenance.statement import SCHEMA_FILE, statement
from nf4_pipeline.provenance.summary import Rebuild
from nf4_pipeline.rebuilding.accounting import ATTESTED, GIT_FILE
from nf4_pipeline.report.model_card import model_card
from nf4_pipeline.reproduce.compare_files import Difference
from nf4_pipeline.stages.publication import BOM_FILE, PROVENANCE_FILE
from nf4_pipeline.stages.verify import REPORT_FILE
from nf4_pipeline.verification.document import (
    VERIFICATION_FILE,
    MeasuredVerification,
    Verification,
    parse_verification,
)

_OWN_PACKAGE: Final = "nf4-pipeline"
_SHOWN: Final = 80  # characters of a value in a message
_NAMED_REPO: Final = re.compile(r"^hf download ([\w.-]+/[\w.-]+) --local-dir ", re.M | re.A)
_REBUILT: Final = re.compile(
    r"^\*\*Verified reproducible\*\* by `([^`\n]{1,1000})` on ([0-9TZ:-]{10,20}): "
    r"\[summary\]\(<([^>\n]{1,2000})>\)",
    re.M,
)
_WORKFLOW: Final = re.compile(
    r"(https://[\w.-]+/[\w.-]+/[\w./-]+?)(?:/\.github/|//)[\w./-]+@[\w./-]+"
)
_RUN: Final = re.compile(r"(https://[\w.-]+/[\w.-]+/[\w./-]+?)/(?:actions/runs|-/pipelines)/[0-9]+")
_PROGRAM: Final = re.compile(r"\s((?:filter|diff|merge)=(?!lfs(?:\s|$))\S*)")
_ACTS: Final = re.compile(rb"<\s*(?:script|iframe|object|embed|base)\b", re.I)
_BASE_MODEL: Final = re.compile(r"^([\"']?)base_model\1[ \t]*:[ \t]*(.*)$", re.M)


@dataclass(frozen=True)
class Truth:
    """What is known of an artifact by deriving it.

    Attributes:
        manifest: as source and recipe make it.
        card: what the source's own card says.
        chat: the tokenizer has a chat template that works.
        repo_id: where the artifact was found; None for a folder.
    """

    manifest: Manifest
    card: SourceCard
    chat: bool
    repo_id: str | None


@dataclass
class Findings:
    """What came of looking at the documents; all of it grows while that is done.

    Attributes:
        differences: what is wrong.
        notes: what a reader of the verdict should know.
        builder: who provenance.json says made it, if that is not somebody who ran the program.
    """

    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    builder: str | None = None

    def differs(self, file: str, what: str) -> None:
        self.differences.append(Difference(file, what))


def check_documents(folder: Path, digests: Mapping[str, FileDigest], truth: Truth) -> Findings:
    """Looks at the documents that are there.

    Args:
        folder: where they are, of known sizes.
        digests: of every file that was brought.
        truth: what they must agree with.
    """
    found = Findings()
    tools: dict[str, str] = {}
    if PROVENANCE_FILE in digests:
        tools = _check_provenance(folder, digests, truth.manifest, found)
    elif BOM_FILE in digests:
        found.differs(PROVENANCE_FILE, f"is missing, and {BOM_FILE} is written with it")
    else:
        found.notes.append(f"There is no {PROVENANCE_FILE}.")
    if BOM_FILE in digests:
        _check_bom(folder, digests, truth, found)
    elif PROVENANCE_FILE in digests:
        found.differs(BOM_FILE, f"is missing, and {PROVENANCE_FILE} is written with it")
    verification = _read_verification(folder, digests, truth.manifest, found)
    if CARD_FILE in digests:
        _check_card(folder, truth, verification, tools.get(_OWN_PACKAGE), found)
    if SIGNATURE_FILE in digests:
        found.notes.append(
            f"{SIGNATURE_FILE} was not looked at: nf4 check does, with the signer's public key."
        )
    if GIT_FILE in digests:
        _check_attributes(folder, found)
    if REPORT_FILE in digests:
        if _ACTS.search(read_plain(folder / REPORT_FILE, size_limit(REPORT_FILE))):
            found.differs(REPORT_FILE, "holds what a browser runs; no report does")
        found.notes.append("The report and its pictures were not drawn again.")
    return found


def _check_attributes(folder: Path, found: Findings) -> None:
    """What git is told to do with files: LFS, and nothing else that runs a program."""
    try:
        lines = read_text(folder / GIT_FILE, size_limit(GIT_FILE)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found.differs(GIT_FILE, f"cannot be read: {_short(str(error))}")
        return
    for line in lines:
        if not line.lstrip().startswith("#") and (odd := _PROGRAM.search(line)):
            found.differs(GIT_FILE, f"asks for {_short(odd[1])}; only LFS belongs there")
            return


def _check_provenance(
    folder: Path, digests: Mapping[str, FileDigest], manifest: Manifest, found: Findings
) -> dict[str, str]:
    """Holds the statement against the one that this artifact has; returns the versions in it."""
    value = _json(folder, PROVENANCE_FILE, found)
    if value is None:
        return {}
    subjects = {
        name: digest
        for name, digest in digests.items()
        if name in manifest.files or name in ATTESTED or name == MANIFEST_FILE
    }
    details = _inside(value, "predicate", "runDetails")
    said_tools = _inside(details, "builder", "version")
    times = _inside(details, "metadata")
    tools = {str(name): str(version) for name, version in said_tools.items()}
    found.builder = _workflow(_inside(details, "builder").get("id"), times.get("invocationId"))
    expected = statement(
        manifest,
        subjects,
        said_tools,
        started=str(times.get("startedOn")),
        finished=str(times.get("finishedOn")),
    )
    if found.builder is not None:
        run = expected["predicate"]["runDetails"]
        run["builder"]["id"] = found.builder
        run["metadata"]["invocationId"] = times["invocationId"]
    _check_subjects(value.pop("subject", None), subjects, found)
    del expected["subject"]
    if (place := first_difference(expected, value)) is not None:
        found.differs(PROVENANCE_FILE, place)
    else:
        _check_schema(folder, found)
    return tools


def _workflow(builder: Any, run: Any) -> str | None:
    """The builder, if it is named as the workflow of a public CI run is."""
    if not isinstance(builder, str) or not isinstance(run, str):
        return None
    named, ran = _WORKFLOW.fullmatch(builder), _RUN.fullmatch(run)
    return builder if named and ran and named[1] == ran[1] else None


def _check_subjects(said: Any, subjects: Mapping[str, FileDigest], found: Findings) -> None:
    listed: dict[str, Any] = {}
    for entry in said if isinstance(said, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            listed[entry["name"]] = entry.get("digest")
    if not isinstance(said, list) or len(listed) != len(said):
        found.differs(PROVENANCE_FILE, "lists subjects that are none, or one twice")
        return
    for name in sorted(listed.keys() - subjects.keys()):
        found.differs(name, f"is missing, or not what it was: {PROVENANCE_FILE} names it")
    for name, digest in sorted(subjects.items()):
        if name not in listed:
            found.differs(name, f"is here, and {PROVENANCE_FILE}, which names every file, does not")
        elif listed[name] != {"sha256": digest.sha256}:
            what = f"has sha256 {digest.sha256}, and {PROVENANCE_FILE} says {_short(listed[name])}"
            found.differs(name, what)


def _check_schema(folder: Path, found: Findings) -> None:
    import fastjsonschema

    try:
        schema_check(SCHEMA_FILE)(read_json(folder / PROVENANCE_FILE))
    except fastjsonschema.JsonSchemaValueException as error:
        where = "/".join(error.path[1:]) or "top level"
        what = error.message.removeprefix(error.name or "").strip()
        found.differs(PROVENANCE_FILE, f"at {where[:200]}: it {_short(what)}")


def _check_bom(
    folder: Path, digests: Mapping[str, FileDigest], truth: Truth, found: Findings
) -> None:
    value = _json(folder, BOM_FILE, found)
    if value is None or MANIFEST_FILE not in digests:
        return
    expected = bill_of_materials(truth.manifest, digests[MANIFEST_FILE].sha256, truth.card)
    try:  # who wrote it, in which version, changes nothing of what it lists
        version = value["metadata"]["tools"]["components"][0]["version"]
        expected["metadata"]["tools"]["components"][0]["version"] = str(version)
    except (LookupError, TypeError):
        pass
    if (place := first_difference(expected, value)) is not None:
        found.differs(BOM_FILE, place)


def _read_verification(
    folder: Path, digests: Mapping[str, FileDigest], manifest: Manifest, found: Findings
) -> Verification | None:
    if VERIFICATION_FILE not in digests:
        found.notes.append(f"There is no {VERIFICATION_FILE}: nobody says what was measured.")
        return None
    value = _json(folder, VERIFICATION_FILE, found)
    if value is None:
        return None
    try:
        verification = parse_verification(value)
    except DocumentError as error:
        found.differs(VERIFICATION_FILE, f"is none of this version, at {_short(str(error))}")
        return None
    if isinstance(verification, MeasuredVerification):
        sizes, totals = verification.sizes.to_json(), manifest.totals.to_json()
        wrong = [name for name in sizes.keys() & totals.keys() if sizes[name] != totals[name]]
        for name in sorted(wrong)[:1]:
            what = f"says {_short(sizes[name])} of {name}; it is {_short(totals[name])}"
            found.differs(VERIFICATION_FILE, what)
    if verification.verdict != "pass":
        found.notes.append("Its own verdict, of what was measured, is no pass.")
    found.notes.append(
        f"What {VERIFICATION_FILE} says was measured was not measured again: nf4 verify does."
    )
    return verification


def _check_card(
    folder: Path,
    truth: Truth,
    verification: Verification | None,
    version: str | None,
    found: Findings,
) -> None:
    try:
        text = read_text(folder / CARD_FILE, size_limit(CARD_FILE))
    except (OSError, UnicodeDecodeError) as error:
        found.differs(CARD_FILE, f"cannot be read: {_short(str(error))}")
        return
    if (link := _rebuilt_in(text)) is not None:
        found.notes.append(f"The card refers to a summary by {link.verifier}, at {link.url}.")
    wrong = list(_contradictions(text, truth))
    for what in wrong[:1]:
        found.differs(CARD_FILE, what)
    if verification is None or wrong:
        if not wrong:
            found.notes.append(f"The text of {CARD_FILE} was not looked at.")
        return
    try:
        written = {
            repo_id: model_card(
                truth.manifest,
                verification,
                truth.card,
                repo_id=repo_id,
                chat=truth.chat,
                rebuilt=link,
            )
            for repo_id in dict.fromkeys((truth.repo_id, None, *_repos_in(text)))
        }
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        found.differs(VERIFICATION_FILE, f"holds figures that are none: {_short(str(error))}")
        return
    for repo_id, card in written.items():
        if card == text:
            if repo_id not in (None, truth.repo_id) and truth.repo_id is not None:
                found.notes.append(f"The card is that of {repo_id}.")
            return
    if version == __version__:
        nearest = min(written.values(), key=lambda card: -_equal_lines(card, text))
        line = _equal_lines(nearest, text)
        lines = text.split("\n")
        what = f"line {line + 1} is not what {VERIFICATION_FILE} and the source's card make of it"
        found.differs(CARD_FILE, f"{what}: {_short(lines[line] if line < len(lines) else '')}")
    else:
        who = f"version {printable(version, 40)} of {_OWN_PACKAGE}" if version else "nobody known"
        found.notes.append(
            f"{CARD_FILE} was written by {who}: its text was not looked at beyond license, "
            "language and base model."
        )


def _contradictions(text: str, truth: Truth) -> Iterable[str]:
    """What the metadata of a card says otherwise than the source does."""
    said, true = parse_card(text).metadata(), truth.card.metadata()
    for key in ("license", "license_name", "license_link", "language"):
        if key in said and said[key] != true.get(key):
            yield f"says {key}: {_short(said[key])}; the source's card says {_short(true.get(key))}"
    source = truth.manifest.source
    head = text[: text.find("\n---", 4)] if text.startswith("---") else ""
    for match in _BASE_MODEL.finditer(head):
        named = match[2].strip().strip("'\"")
        if source.commit is None or named != source.repo:
            named = named or "a list"
            yield f"says base_model: {_short(named)}; it was made from {source.repo}"


def _repos_in(text: str) -> list[str]:
    """The repo that a card's commands download, if it names one."""
    match = _NAMED_REPO.search(text)
    return [match[1]] if match else []


def _rebuilt_in(text: str) -> Rebuild | None:
    match = _REBUILT.search(text)
    return Rebuild(verifier=match[1], verified=match[2], url=match[3]) if match else None


def _equal_lines(one: str, other: str) -> int:
    """How many lines two texts begin with alike."""
    count = 0
    for mine, theirs in zip(one.split("\n"), other.split("\n"), strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def first_difference(expected: Any, found: Any, at: str = "") -> str | None:
    """Where two JSON values differ first, in words; None if they are equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in (*expected, *(key for key in found if key not in expected)):
            inside = f"{at}.{key}" if at else str(key)
            if key not in found:
                return f"lacks {_short(inside)}"
            if key not in expected:
                return f"has {_short(inside)}, which does not belong there"
            if (place := first_difference(expected[key], found[key], inside)) is not None:
                return place
        return None
    if isinstance(expected, list | tuple) and isinstance(found, list):
        for number, (one, other) in enumerate(zip(expected, found, strict=False)):
            if (place := first_difference(one, other, f"{at}[{number}]")) is not None:
                return place
        if len(expected) != len(found):
            return f"has {len(found)} entries at {_short(at)}, expected {len(expected)}"
        return None
    if expected == found and type(expected) is type(found):
        return None
    return f"says {_short(found)} at {printable(at, 200)}, expected {_short(expected)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)[: 4 * _SHOWN]
    return printable(text, _SHOWN)


def _inside(value: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _json(folder: Path, name: str, found: Findings) -> dict[str, Any] | None:
    try:
        return read_json(folder / name, finite=True)
    except CheckpointError as error:
        what = str(error).replace(f"{folder}/", "")
        found.differs(name, f"cannot be read as JSON: {_short(what)}")
        return None
