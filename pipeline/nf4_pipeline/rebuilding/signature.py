"""Whether the workflow that provenance names as builder signed the artifact."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from nf4_pipeline.checkpoint.atomic import link_or_copy, make_folder
from nf4_pipeline.errors import PipelineError, SignatureError
from nf4_pipeline.provenance.keyless import Instance, Signer
from nf4_pipeline.provenance.signing import SIGNATURE_FILE, check_identity

ISSUERS: Final = {"github.com": "https://token.actions.githubusercontent.com"}
"""Who vouches for workflows, by their host; any other host does so itself, as GitLab does."""


def why_not_confirmed(
    folder: Path, names: Iterable[str], builder: str, scratch: Path, instance: Instance
) -> str:
    """Why nobody knows that a builder is who it is said to be; "" if it signed all files.

    Args:
        folder: where the artifact's files are, or links to them.
        names: of all files that the artifact has.
        builder: the workflow at its ref.
        scratch: an empty folder, for the files themselves: a signature is of no links.
        instance: the Sigstore that certifies workflows.
    """
    files = set(names)
    if SIGNATURE_FILE not in files:
        return f"there is no {SIGNATURE_FILE}"
    host = urlsplit(builder).hostname or ""
    signer = Signer(builder, ISSUERS.get(host, f"https://{host}"))
    try:
        for name in files:
            target = scratch / name
            make_folder(target.parent)
            link_or_copy((folder / name).resolve(), target)
        check_identity(scratch, signer, instance)
    except SignatureError as error:
        return str(error).replace(f"{scratch}", "it")
    except (PipelineError, OSError) as error:
        return f"its {SIGNATURE_FILE} could not be checked: {error}"
    return ""
