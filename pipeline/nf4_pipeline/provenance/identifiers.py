"""What models, licenses and tools are called in provenance and bills of materials."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Final
from urllib.parse import quote

from nf4_pipeline import __version__
from nf4_pipeline.checkpoint.source_card import SourceCard

_TOOLS: Final = ("numpy", "numba", "safetensors", "torch", "transformers", "bitsandbytes")

_SPDX: Final = {
    name.lower(): name
    for name in (
        "AGPL-3.0 Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0 CC-BY-2.0 CC-BY-3.0 "
        "CC-BY-4.0 CC-BY-NC-2.0 CC-BY-NC-3.0 CC-BY-NC-4.0 CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0 "
        "CC-BY-NC-SA-2.0 CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0 CC-BY-ND-4.0 CC-BY-SA-3.0 CC-BY-SA-4.0 "
        "CC0-1.0 ECL-2.0 EPL-2.0 EUPL-1.1 EUPL-1.2 GPL-2.0 GPL-3.0 ISC LGPL-2.1 LGPL-3.0 MIT "
        "MPL-2.0 MS-PL NCSA ODbL-1.0 OSL-3.0 PDDL-1.0 Unlicense WTFPL Zlib"
    ).split()
}
"""Licenses that both the Hub and SPDX know, which differ in their letters' case alone."""


def model_purl(repo: str, commit: str | None) -> str | None:
    """The package URL of a Hub model at a commit; None for a local folder."""
    return None if commit is None else f"pkg:huggingface/{quote(repo)}@{commit}"


def licenses(card: SourceCard) -> list[dict[str, dict[str, str]]]:
    """What a model's card says of its license, as CycloneDX has it.

    Inherited, never invented: without a word in the card the list is empty.
    """
    entries = []
    for item in card.license:
        known = _SPDX.get(item.lower())
        if known is not None:
            entries.append({"license": {"id": known}})
            continue
        license_ = {"name": (card.license_name if item == "other" else None) or item}
        if card.license_link and card.license_link.startswith("https://"):
            license_["url"] = quote(card.license_link, safe=":/?#[]@!$&'()*+,;=%~-._")
        entries.append({"license": license_})
    return entries


def tool_versions() -> dict[str, str]:
    """The versions of what shapes an artifact's bytes or reads them back."""
    versions = {"nf4-pipeline": __version__, "python": python_version()}
    for name in _TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
