"""What GitLab CI reads as reports of a job: tests in JUnit's XML, and a file of variables. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final
from xml.etree import ElementTree

from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.printable import printable

_UNSAFE: Final = re.compile(r"[^\w .,:/@+=-]", re.ASCII)
"""What a line of such a file cannot hold, or what a shell that reads it could act on."""

_LONGEST: Final = 500
"""Characters of a value: the whole file may have 5 KB."""


def junit(checks: Sequence[Check]) -> str:
    """Every check as a test: those that failed stand on the page of a merge request."""
    failed = sum(not check.passed for check in checks)
    suite = ElementTree.Element(
        "testsuite", name="nf4 verify", tests=str(len(checks)), failures=str(failed)
    )
    for check in checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname="nf4 verify", name=printable(check.name, 200)
        )
        if not check.passed:
            text = printable(f"{check.found} (expected: {check.expected})")
            ElementTree.SubElement(case, "failure", message=text)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def variables(outputs: Mapping[str, str]) -> str:
    """Outputs as variables of later jobs: "hub-url" is NF4_HUB_URL.

    A value that such a file cannot hold is left out.
    """
    return "".join(
        f"NF4_{name.upper().replace('-', '_')}={value}\n"
        for name, value in outputs.items()
        if not _UNSAFE.search(value) and len(value) <= _LONGEST
    )
