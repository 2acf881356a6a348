"""The main job: download, quantize, serialize, verify, attest; nothing valid is redone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build, Record, State
from nf4_pipeline.errors import BuildError, RecipeError, StoppedError, of_system
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.recipe import TABLES, Recipe, parse_recipe
from nf4_pipeline.stages import Settings, attest, calibrate, download, quantize, serialize, verify

Runner = Callable[[Build, Settings, Reporter], Record]
Key = Callable[[Build, Settings], str]

RUNNERS: Final[dict[str, tuple[Key, Runner]]] = {
    "quantize": (quantize.key, quantize.run),
    "serialize": (serialize.key, serialize.run),
    "verify": (verify.key, verify.run),
    "attest": (attest.key, attest.run),
}


@dataclass(frozen=True)
class StageResult:
    """A stage of a build, and whether it had to run.

    Attributes:
        record: what it left.
        ran: False if an earlier result was still valid.
    """

    record: Record
    ran: bool


def run_build(
    model: str,
    artifacts: Path,
    settings: Settings,
    reporter: Reporter,
    *,
    revision: str | None = None,
    build_dir: Path | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
) -> tuple[Build, dict[str, StageResult]]:
    """Runs the main job.

    Args:
        model: Hub id, local folder, or "sample".
        artifacts: the folder that holds builds.
        settings: recipe, device and the like.
        reporter: told how far it is.
        revision: of a Hub model.
        build_dir: the build folder, if not the default one.
        offline: take a Hub model as it is cached.
        allow_pickle: convert weights that are pickles, where there are no others.

    Returns:
        The build folder, and the result of each stage by name.
    """
    verify.check_gpu(settings)
    recipe = settings.recipe.quantize
    calibrate.text_path(recipe)  # one that is not there is known before any byte
    build, record, ran = run_download(
        model,
        artifacts,
        reporter,
        revision=revision,
        build_dir=build_dir,
        offline=offline,
        allow_pickle=allow_pickle,
        allow_unused=recipe.allow_unused,
        strip_prefix=recipe.strip_prefix,
    )
    results = {"download": StageResult(record, ran)}
    with faults("build", build), build.locked():
        for stage in RUNNERS:
            results[stage] = ensure(build, stage, settings, reporter)
    return build, results


def run_download(
    model: str,
    artifacts: Path,
    reporter: Reporter,
    *,
    revision: str | None = None,
    build_dir: Path | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    allow_unused: Sequence[str] = (),
    strip_prefix: str = "",
) -> tuple[Build, Record, bool]:
    """Runs `stages.download.run`, and says what the system refuses as an error of ours."""
    with faults("download"):
        return download.run(
            model,
            artifacts,
            reporter,
            revision=revision,
            build_dir=build_dir,
            offline=offline,
            allow_pickle=allow_pickle,
            allow_unused=allow_unused,
            strip_prefix=strip_prefix,
        )


def run_stage(build: Build, stage: str, settings: Settings, reporter: Reporter) -> StageResult:
    """Runs one stage of an existing build, unless its result is still valid."""
    with faults(stage, build):
        if not build.root.is_dir():
            raise BuildError(f"{build.root}: no such build. Start one: nf4 build MODEL.")
        if stage == "verify":
            verify.check_gpu(settings)
    with faults(stage, build), build.locked():
        settings = as_built(build, settings, before=stage)
        return ensure(build, stage, settings, reporter)


def as_built(build: Build, settings: Settings, before: str | None = None) -> Settings:
    """Settings with the recipe that a build was made with, where no other was given.

    So that `nf4 serialize` and `nf4 status` need not be told again what `nf4 build` was told.

    Args:
        build: whose records hold the tables.
        settings: what was given.
        before: the stage that comes next; its own table and those behind it stay as they are.
            None for every table.
    """
    recipe = settings.recipe
    for name in TABLES:
        if name == before:
            break
        record = build.record(name)
        if name not in settings.given and record is not None and record.recipe:
            try:
                table = parse_recipe({name: record.recipe}, f"the record of {name}")
            except RecipeError:  # of another version; the key will say that the stage is stale
                continue
            recipe = replace(recipe, **{name: getattr(table, name)})
    return replace(settings, recipe=_as_downloaded(build, recipe))


def _as_downloaded(build: Build, recipe: Recipe) -> Recipe:
    """A recipe that understands the checkpoint's tensors as `nf4 download` was told to."""
    record = build.record("download")
    told = {
        name: value
        for name, value in (record.facts if record else {}).get("reading", {}).items()
        if value and not getattr(recipe.quantize, name)
    }
    if not told:
        return recipe
    told = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
    return replace(recipe, quantize=replace(recipe.quantize, **told))


def ensure(build: Build, stage: str, settings: Settings, reporter: Reporter) -> StageResult:
    """Runs a stage if it is not done; the build folder must be locked."""
    key, run = RUNNERS[stage]
    with faults(stage, build):
        if build.state(stage, key(build, settings), reporter).status == "done":
            return StageResult(_told_anew(build, build.need(stage), settings), ran=False)
        return StageResult(run(build, settings, reporter), ran=True)


def _told_anew(build: Build, record: Record, settings: Settings) -> Record:
    """The record of a finished stage, with the table that led to it this time.

    The same text may lie elsewhere by now, and older records have no table.
    """
    table = settings.recipe.table(record.stage) if record.stage in TABLES else {}
    if record.recipe != table:
        record = replace(record, recipe=table)
        build.write_record(record)
    return record


@contextmanager
def faults(doing: str, build: Build | None = None) -> Iterator[None]:
    """Turns what the system refuses, and an interrupt, into errors that say how to go on.

    Args:
        doing: the stage.
        build: where; None while there is none yet.

    Raises:
        ResourceError: the disk is full, memory ran out, or something may not be read or written.
        StoppedError: the user pressed Ctrl-C.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        raise of_system(error, doing) from error
    except KeyboardInterrupt:
        raise StoppedError(f"Stopped in {doing}. {_kept(build)}") from None


def _kept(build: Build | None) -> str:
    if build is None:
        return "What was fetched is kept. Run the same command again to continue there."
    done = [stage for stage in ("download", *RUNNERS) if build.record(stage) is not None]
    kept = ", ".join(done) or "nothing"
    files = quantize.finished_files(build)
    if "quantize" not in done and files:
        kept += f", and {files} quantized files"
    return f"Kept in {build.root}: {kept}. Run the same command again to continue there."


def states(build: Build, settings: Settings, reporter: Reporter = SILENT) -> dict[str, State]:
    """The state of every stage of a build, and why. None is done after one that is not.

    Tables of the recipe that were not given are those that the build was made with.
    """
    found: dict[str, State] = {}
    record = build.record("download")
    found["download"] = (
        build.state("download", record.key, reporter) if record else State("missing", "not run yet")
    )
    previous = "download"
    settings = as_built(build, settings)
    for stage, (key, _) in RUNNERS.items():
        if found[previous].status == "done":
            found[stage] = _state(build, stage, key, settings, reporter)
        elif build.record(stage) is None:
            found[stage] = State("missing", "not run yet")
        else:
            found[stage] = State("stale", f"{previous} is {found[previous].status}")
        previous = stage
    return found


def _state(build: Build, stage: str, key: Key, settings: Settings, reporter: Reporter) -> State:
    try:
        return build.state(stage, key(build, settings), reporter)
    except RecipeError as error:  # a text that it names is gone
        return State("stale", str(error))
