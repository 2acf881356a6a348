"""Damage to an export: no command that is asked about it says that all is well.

`scripts/campaigns/damage.py` does every damage to every file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nf4_pipeline.recipe import load_recipe

from tests.support.damage import (
    ASKED,
    ATTESTED,
    DAMAGES,
    DOCUMENTS,
    Signed,
    ask_build,
    ask_check,
    ask_push,
    ask_status,
    ask_verify,
    cases,
    damaged,
    make_signed,
)
from tests.support.tiny import copy_of
from tests.support.verified import skip_documents, skip_readers

pytestmark = pytest.mark.usefixtures("workers_here")

ALL = list(cases())
MENDED = [(kind, files[-1]) for kind, (_, files) in DAMAGES.items()]
"""Each damage to one file: to mend it takes longer than to see it."""


RECORDED = ("manifest and record rewritten", "source in manifest and record forged")
"""Nothing tells `build` that serialize did not write this: it verifies anew, and fails."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """No pictures, and no readers in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        skip_documents(patch)
        skip_readers(patch)
        yield


@pytest.fixture(scope="module")
def signed(
    exported_falcon: Path,
    tiny_falcon: Path,
    quick_recipe: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Signed:
    """A whole build, signed."""
    folder = tmp_path_factory.mktemp("signed")
    return make_signed(exported_falcon, tiny_falcon, load_recipe(quick_recipe), folder)


def test_what_nobody_touched_is_ok(signed: Signed, tmp_path: Path) -> None:
    from nf4_pipeline.build_folder import Build

    build = Build(copy_of(signed.root, tmp_path / "build"))
    assert [ask(signed, build, "") for ask in (ask_status, ask_push, ask_check)] == ["ok"] * 3
    assert ask_verify(signed, build, "config.json") == "ok"


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_status_push_and_check_see_it(signed: Signed, tmp_path: Path, kind: str, name: str) -> None:
    build, file = damaged(signed, tmp_path / "build", kind, name)
    said = {command: ASKED[command](signed, build, file) for command in ("status", "push", "check")}
    assert "ok" not in said.values(), said


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_verify_sees_it(signed: Signed, tmp_path: Path, kind: str, name: str) -> None:
    build, file = damaged(signed, tmp_path / "build", kind, name)
    said = ask_verify(signed, build, file)
    if file in (*DOCUMENTS, *ATTESTED):
        assert said == "made anew"
    else:
        assert said in ("fail", "ArtifactError")


@pytest.mark.parametrize(("kind", "name"), MENDED)
def test_build_mends_it_and_says_so(signed: Signed, tmp_path: Path, kind: str, name: str) -> None:
    build, file = damaged(signed, tmp_path / "build", kind, name)
    said = ask_build(signed, build, file)
    if kind in RECORDED:
        assert said == "fail"
    else:
        assert said.startswith("again: ")
