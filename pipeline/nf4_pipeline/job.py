"""The main job: download, quantize, serialize, verify, attest; nothing valid is redone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from nf4_pipeline.build_folder import Build, Record, State
from nf4_pipeline.build_folder.sent import forget_sent
from nf4_pipeline.build_folder.variant import SHAPING_TABLES
from nf4_pipeline.builds import check_spec, complete_recipe, keep_spec, spec_of
from nf4_pipeline.calibration.calibrator import text_path
from nf4_pipeline.cluster.ray_tasks import check_installed
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import (
    BuildError,
    HubError,
    RecipeError,
    StoppedError,
    StoreError,
    UsageError,
    is_of_machine,
    of_system,
)
from nf4_pipeline.machine import Machine, check_device
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.progress import Stage as ShownStage
from nf4_pipeline.provenance.summary import Rebuild
from nf4_pipeline.recipe import TABLES, PartialRecipe, Recipe
from nf4_pipeline.records import (
    ATTEST,
    DOWNLOAD,
    KINDS,
    QUANTIZE,
    SERIALIZE,
    VERIFY,
    Reading,
    part_records,
    source_files,
    strangers,
)
from nf4_pipeline.stages.attest import Attest
from nf4_pipeline.stages.download import Download, Downloaded
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.forecast import Forecast, forecast
from nf4_pipeline.stages.push import Push
from nf4_pipeline.stages.quantize import Quantize, count_finished_files
from nf4_pipeline.stages.quantize_on_ray import QuantizeOnRay, refuse_calibrated_at_url
from nf4_pipeline.stages.quantize_parts import MergeParts, QuantizePart, refuse_to_divide
from nf4_pipeline.stages.run_recorded import Stage
from nf4_pipeline.stages.serialize import Serialize
from nf4_pipeline.stages.upload_ahead import UploadAhead
from nf4_pipeline.stages.verify import Verify, check_gpu, check_texts
from nf4_pipeline.verification.document import Verification
from nf4_pipeline.verification.launch import Workers

if TYPE_CHECKING:
    from nf4_pipeline.hub import Target

STAGES: Final = ("download", "quantize", "serialize", "verify", "attest")
"""Of a build, in their order."""


_PATIENCE: Final = 5.0  # seconds
_PATIENCE_WITH_TASKS: Final = 30.0  # seconds


@dataclass(frozen=True)
class StageResult:
    """A stage of a build, and whether it had to run.

    Attributes:
        record: what it left.
        ran: False if an earlier result was still valid.
    """

    record: Record[Any]
    ran: bool


def make_stages(
    build: Build,
    recipe: Recipe,
    machine: Machine,
    reporter: Reporter = SILENT,
    against: str | None = None,
    workers: Workers | None = None,
    repo_id: str | None = None,
    rebuilt: Rebuild | None = None,
) -> dict[str, Stage]:
    """The stages behind `download`, by name, in their order.

    Args:
        build: the build folder.
        recipe: everything that shapes bytes and verdict.
        machine: what the work may use.
        reporter: told how far it is.
        against: an artifact of the same source that verify compares this one with; None for none.
        workers: the processes that verify, if they were started before.
        repo_id: the Hub repo that attest names; see `Attest`.
        rebuilt: the summary that attest names; see `Attest`.
    """
    quantize = Quantize(build, recipe, machine, reporter)
    return {
        "quantize": _by_engine(quantize),
        "serialize": Serialize(build, recipe, reporter),
        "verify": Verify(build, recipe, machine, reporter, against, workers),
        "attest": Attest(build, repo_id, rebuilt),
    }


def _by_engine(quantize: Quantize) -> Stage:
    """The stage, as its machine wants it run."""
    return QuantizeOnRay(quantize) if quantize.machine.engine == "ray" else quantize


def run_build(
    request: DownloadRequest,
    recipe: Recipe,
    machine: Machine,
    reporter: Reporter,
    output: Target | None = None,
) -> tuple[Build, dict[str, StageResult]]:
    """Runs the main job.

    Args:
        request: the model, and where its build folder shall be.
        recipe: everything that shapes bytes and verdict; what the request says of the tensors
            counts where it does not.
        machine: what the work may use.
        reporter: told how far it is.
        output: where finished files go while others are made, and where one commit names them if
            the verdict is "pass"; None to publish nothing.

    Returns:
        The build folder, and the result of each stage by name; "push" is one of them if there was
        one.

    Raises:
        UsageError: source or output shall be streamed, and the build folder is a URL.
    """
    if request.url is not None and (request.stream or output is not None):
        raise UsageError(
            f"{request.url}: --stream-source and --stream-output keep notes of their own on this "
            "disk, with which no other machine could go on. Leave them out, or name a folder as "
            "--build-dir."
        )
    check_device(machine.device)
    check_gpu(machine)
    # What cannot be read is known before any byte.
    text_path(recipe.quantize)
    check_texts(recipe.verify)
    request, recipe = _agreed(request, recipe)
    _check_engine(recipe, machine, request.url)
    of = len(STAGES) + (output is not None)
    with ExitStack() as stack:
        ahead = None
        if output is not None:
            with translate_errors("download"):
                request.check_names()  # before a repo is made
            ahead = UploadAhead(output, recipe.serialize.max_shard_bytes, reporter)
            stack.enter_context(ahead)
        workers = stack.enter_context(Workers(machine.device))
        # They import what verify needs while the source is hashed, quantized and written.
        build, record, ran = run_download(request, reporter, workers.begin, of=of)
        results = {"download": StageResult(record, ran)}
        repo_id = None if output is None else output.repo_id
        stages = make_stages(build, recipe, machine, reporter, workers=workers, repo_id=repo_id)
        if ahead is not None:
            # Where several processes make files, none of them knows how much room there is.
            ahead.follow(build, makes_room=machine.engine == "local")
            quantize = Quantize(build, recipe, machine, reporter, ahead)
            stages["quantize"] = _by_engine(quantize)
        with translate_errors("build", build), build.locked(_patience(machine)):
            keep_spec(build, recipe, SHAPING_TABLES, replaces=request.replaces)
            if ahead is None:  # files that are on the Hub alone shall be here again
                forget_sent(build.root)
            for name in stages:
                results[name] = _ensure(
                    build, stages, name, recipe, reporter, check=request.check, of=of
                )
                if ahead is not None and name == "quantize":
                    outputs = results[name].record.outputs
                    ahead.add_staying({build.root / path: d for path, d in outputs.items()})
        if ahead is not None and results["verify"].record.facts.verdict == "pass":
            ahead.drain()
            results["push"] = _push_all(build, stages, recipe, ahead, reporter, of)
    return build, results


def _push_all(
    build: Build,
    stages: Mapping[str, Stage],
    recipe: Recipe,
    ahead: UploadAhead,
    reporter: Reporter,
    number: int,
) -> StageResult:
    """Pushes; once more, if the Hub refused since it has lost files that lie nowhere else."""
    try:
        return _push(build, ahead.target, reporter, number)
    except HubError as error:
        with translate_errors("push", build):
            lost = ahead.find_lost()
        if not lost:
            raise
        reporter.note(
            f"The Hub has lost {lost} of the files that it had received, which are made and sent "
            f"again. It said: {error}"
        )
    with translate_errors("build", build), build.locked():
        _ensure(build, stages, "quantize", recipe, reporter, of=number)
    ahead.drain()
    return _push(build, ahead.target, reporter, number)


def _push(build: Build, output: Target, reporter: Reporter, number: int) -> StageResult:
    with translate_errors("push", build), reporter.stage("push", number, number) as shown:
        record = Push(build, output, reporter).run()
        shown.finish(ran=record.facts.committed, nbytes=record.facts.total_bytes)
    return StageResult(record, record.facts.committed)


def _agreed(request: DownloadRequest, recipe: Recipe) -> tuple[DownloadRequest, Recipe]:
    """Both, with what each says of how tensors are read; where both do, the recipe counts."""
    recipe = request.reading.into(recipe)
    return replace(request, reading=Reading.of(recipe.quantize), recipe=recipe), recipe


def plan_build(
    request: DownloadRequest,
    recipe: Recipe,
    machine: Machine,
    reporter: Reporter,
    *,
    sends: bool = False,
) -> Forecast:
    """What `run_build` would read, write and take; see `forecast`."""
    check_device(machine.device)
    text_path(recipe.quantize)
    request, recipe = _agreed(request, recipe)
    with translate_errors("download"):
        return forecast(request, recipe, machine, reporter, sends=sends)


def run_download(
    request: DownloadRequest,
    reporter: Reporter,
    begin: Callable[[], None] = lambda: None,
    *,
    of: int = 1,
) -> Downloaded:
    """Runs `Download`, and says what the system refuses as an error of ours.

    Args:
        request: what is wanted.
        reporter: told how far it is.
        begin: called if there is something to do.
        of: how many stages the job has.
    """
    with translate_errors("download"):
        request.check_names()
    with translate_errors("download"), reporter.stage("download", 1, of) as shown:
        downloaded = Download(request, reporter, begin).run()
        shown.finish(ran=downloaded.ran, nbytes=downloaded.record.total_bytes)
    return downloaded


def run_stage(
    build: Build,
    name: str,
    recipe: Recipe | PartialRecipe,
    machine: Machine,
    reporter: Reporter,
    *,
    against: str | None = None,
    replaces: bool = False,
    repo_id: str | None = None,
    rebuilt: Rebuild | None = None,
) -> StageResult:
    """Runs one stage of an existing build, unless its result is still valid.

    Verify always runs: whoever asks for it alone wants to know what lies there now. What attest
    speaks of is hashed, too, before anything is said of it. Where attest was done, it is done again
    after verify has passed, since card and provenance speak of the verdict.

    Args:
        build: the build folder.
        name: of the stage.
        recipe: what was said of it; tables of earlier stages that were not said are those that the
            build was made with.
        machine: what the work may use.
        reporter: told how far it is.
        against: as in `make_stages`.
        replaces: the build may become one of another recipe.
        repo_id: as in `make_stages`.
        rebuilt: as in `make_stages`.

    Raises:
        BuildError: there is no such build, another process works there, an earlier stage is not
            done, or the build is one of another recipe.
    """
    with translate_errors(name, build):
        _check_begun(build, name, machine, reporter)
        if name == "verify":
            check_gpu(machine)
    with translate_errors(name, build), build.locked(_patience(machine)):
        whole = complete_recipe(build, recipe, before=name)
        _check_engine(whole, machine, build.url, quantizes=name == "quantize")
        if name == "serialize" and build.record(QUANTIZE) is None and part_records(build):
            _merge(build, whole, machine, reporter)
        if name in SHAPING_TABLES:
            build.need(DOWNLOAD if name == "quantize" else QUANTIZE)
            keep_spec(build, whole, (name,), replaces=replaces)
        attested = build.record(ATTEST)
        stages = make_stages(
            build, whole, machine, reporter, against, repo_id=repo_id, rebuilt=rebuilt
        )
        if name == "attest":
            for kind in (SERIALIZE, VERIFY):
                build.check_inputs(kind, claimed=True)
            if found := strangers(build):
                raise BuildError(
                    f"{build.export / found[0]} was left by no stage. Run `nf4 build`."
                )
        result = _ensure(build, stages, name, whole, reporter, anew=name == "verify")
        passed = name == "verify" and result.record.facts.verdict == "pass"
        if passed and attested is not None:  # card and provenance speak of the verdict
            facts = attested.facts
            kept = make_stages(
                build, whole, machine, reporter, repo_id=facts.repo_id, rebuilt=facts.rebuilt
            )
            _ensure(build, kept, "attest", whole, reporter)
        return result


def run_part(
    build: Build,
    part: Part,
    recipe: PartialRecipe,
    machine: Machine,
    reporter: Reporter,
) -> StageResult:
    """Makes a part of quantized/, unless it is there; beside other parts, in one build or several.

    Args:
        build: the build folder, in which download is done.
        part: which.
        recipe: as in `run_stage`.
        machine: what the work may use.
        reporter: told how far it is.

    Raises:
        BuildError: there is no such build, it is one of another recipe, download is not done, or
            another process works there at something else.
    """
    with translate_errors("quantize", build):
        _check_begun(build, "quantize", machine, reporter)
        whole = complete_recipe(build, recipe, before="quantize")
        refuse_to_divide(build, whole)
        _decide_together(build, whole)
    stage = QuantizePart(Quantize(build, whole, machine, reporter), part)
    with translate_errors("quantize", build), reporter.stage(f"quantize {part}") as shown:
        record, ran = stage.ensure()
        shown.finish(ran=ran, nbytes=record.total_bytes)
    return StageResult(record, ran)


def merge_parts(
    build: Build, recipe: PartialRecipe, machine: Machine, reporter: Reporter
) -> StageResult:
    """Completes the record of quantize where all its parts are done; quantizes nothing.

    Args:
        build: the build folder.
        recipe: as in `run_stage`.
        machine: what the work may use.
        reporter: told how far it is.

    Raises:
        BuildError: there is no such build, it is one of another recipe, another process works
            there, or a part is missing or is not as it was left.
    """
    with translate_errors("quantize", build):
        _check_begun(build, "quantize", machine, reporter)
    with translate_errors("quantize", build), build.locked():
        whole = complete_recipe(build, recipe, before="quantize")
        build.need(DOWNLOAD)
        keep_spec(build, whole, ("quantize",))
        return _merge(build, whole, machine, reporter)


def _merge(build: Build, recipe: Recipe, machine: Machine, reporter: Reporter) -> StageResult:
    stages = {"quantize": MergeParts(Quantize(build, recipe, machine, reporter))}
    return _ensure(build, stages, "quantize", recipe, reporter)


def _check_begun(build: Build, name: str, machine: Machine, reporter: Reporter) -> None:
    if not build.root.is_dir():
        raise BuildError(f"{build.root}: no such build. Start one: nf4 build MODEL.")
    build.pull(reporter)
    if (machine.engine, name) != ("ray", "quantize"):  # the one stage that runs elsewhere alone
        check_device(machine.device)


def _check_engine(
    recipe: Recipe, machine: Machine, url: str | None, *, quantizes: bool = True
) -> None:
    """Refuses what Ray cannot do before anything is changed."""
    if machine.engine == "ray":
        if quantizes:
            refuse_calibrated_at_url(recipe, url)
        check_installed()


def _patience(machine: Machine) -> float:
    """Seconds to wait for a lock: the tasks of a driver that was killed live a little longer."""
    return _PATIENCE_WITH_TASKS if machine.engine == "ray" else 0.0


def _decide_together(build: Build, recipe: Recipe) -> None:
    """Notes what a build is for, which only one process can do; the others find it noted."""
    build.need(DOWNLOAD)
    end = time.monotonic() + _PATIENCE
    while True:
        spec = spec_of(build, recipe)
        if spec is not None and "quantize" in spec.decided:
            check_spec(build, spec, recipe, ("quantize",))
            return
        try:
            with build.locked():
                keep_spec(build, recipe, ("quantize",))
            return
        except BuildError:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)


def _ensure(
    build: Build,
    stages: Mapping[str, Stage],
    name: str,
    recipe: Recipe,
    reporter: Reporter,
    *,
    anew: bool = False,
    check: bool = True,
    of: int = 1,
) -> StageResult:
    """Runs a stage if it is not done, or if it shall run anew; the build folder must be locked.

    A verdict is repeated only where the stage before has just been found to be done: its key holds
    the hashes of what was judged, and serialize's files hash so, or are untouched since they did.
    Without `check`, what was not touched is not hashed.
    """
    stage = stages[name]
    number = STAGES.index(name) + 1 if of > 1 else 1
    with translate_errors(name, build), reporter.stage(name, number, of) as shown:
        if check and of > 1:  # what is hashed must be here
            build.fetch(stage.kind)
        if not anew:
            state = _check_state(build, stage, reporter, check=check)
            if state.status == "done":
                build.renew_stamps(stage.kind, state.stamps)
                record = build.need(stage.kind)
                _finish(shown, build, record, ran=False)
                return StageResult(_refresh_recipe(build, record, recipe), ran=False)
            if state.status == "stale":
                reporter.note(f"{name}: {state.why}; done again.")
        if name == "serialize":
            _refuse_stale_weights(build, stages["quantize"])
        resumes = count_finished_files(build) > 0
        record = stage.run()
        _finish(shown, build, record, ran=True, whole=not resumes)
        return StageResult(record, ran=True)


def _finish(
    shown: ShownStage, build: Build, record: Record[Any], *, ran: bool, whole: bool = True
) -> None:
    """Says what came of a stage: its verdict, or the bytes that it read or left.

    Args:
        shown: the stage, as it is shown.
        build: where.
        record: what it left.
        ran: as in `StageResult`.
        whole: nothing of what it made stood there before.
    """
    if isinstance(record.facts, Verification):
        shown.finish(ran=ran, verdict=record.facts.verdict)
    elif record.kind is QUANTIZE:
        files = source_files(build.need(DOWNLOAD))
        read = sum(d.size for name, d in files.items() if name.endswith(".safetensors"))
        shown.finish(ran=ran, nbytes=read, has_rate=whole)
    else:
        shown.finish(ran=ran, nbytes=record.total_bytes)


def _refuse_stale_weights(build: Build, quantize: Stage) -> None:
    """An artifact holds the weights that its recipe makes, or it is not written."""
    if build.need(QUANTIZE).key != quantize.key():
        raise BuildError(
            f"{build.root}: what `quantize` wrote is stale (its source or its recipe changed). "
            "Run `nf4 quantize` again, or `nf4 build`."
        )


def _refresh_recipe(build: Build, record: Record[Any], recipe: Recipe) -> Record[Any]:
    """The record of a finished stage, with the table that led to it this time.

    The same text may lie elsewhere by now, and older records have no table.
    """
    stage = record.kind.stage
    table = recipe.table(stage) if stage in TABLES else {}
    if record.recipe != table:
        record = replace(record, recipe=table)
        build.write_record(record)
    return record


@contextmanager
def translate_errors(doing: str, build: Build | None = None) -> Iterator[None]:
    """Turns what the system refuses, and an interrupt, into errors that say how to go on.

    Args:
        doing: the stage.
        build: where; None while there is none yet.

    Raises:
        ResourceError: the disk is full, memory or threads ran out, or something may not be read or
            written.
        StoppedError: the user pressed Ctrl-C.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        raise of_system(error, doing) from error
    except RuntimeError as error:
        if is_of_machine(error):
            raise of_system(error, doing) from error
        raise
    except KeyboardInterrupt:
        raise StoppedError(f"Stopped in {doing}. {_say_what_is_kept(build)}") from None


def _say_what_is_kept(build: Build | None) -> str:
    if build is None:
        return "What was fetched is kept. Run the same command again to continue there."
    done = [stage for stage, kind in KINDS.items() if build.record(kind) and stage != "push"]
    kept = ", ".join(done) or "nothing"
    files = count_finished_files(build)
    if "quantize" not in done and files:
        kept += f", and {files} quantized files"
    return f"Kept in {build.root}: {kept}. Run the same command again to continue there."


def states(
    build: Build,
    recipe: Recipe | PartialRecipe,
    machine: Machine,
    reporter: Reporter = SILENT,
) -> dict[str, State]:
    """The state of every stage of a build, and why. None is done after one that is not.

    Tables of the recipe that were not said are those that the build was made with.
    """
    record = build.record(DOWNLOAD)
    state = (
        build.state(DOWNLOAD, record.key, reporter) if record else State("missing", "not run yet")
    )
    if record and state.status == "done" and record.facts.streamed:
        nbytes = sum(digest.size for digest in record.facts.streamed.values())
        state = replace(state, why=f"{state.why}; {nbytes / 1e9:.3f} GB of weights stay on the Hub")
    by_stage = {"download": state}
    previous = "download"
    stages = make_stages(build, complete_recipe(build, recipe), machine, reporter)
    for name, stage in stages.items():
        if state.status == "done":
            state = _state(build, stage, reporter)
        elif build.record(stage.kind) is None:
            state = State("missing", "not run yet")
        else:
            state = State("stale", f"{previous} is {state.status}")
        by_stage[name] = state
        previous = name
    return by_stage


def _state(build: Build, stage: Stage, reporter: Reporter) -> State:
    try:
        return _check_state(build, stage, reporter)
    except (RecipeError, StoreError) as error:  # a text that it names is gone; or a store is
        return State("stale", str(error))


def _check_state(build: Build, stage: Stage, reporter: Reporter, *, check: bool = True) -> State:
    """The state of a stage; serialize owns its folder, in which nothing else may lie."""
    state = build.state(stage.kind, stage.key(), reporter, check=check)
    if state.status == "missing" and stage.kind is QUANTIZE and (parts := part_records(build)):
        done = Counter(part.of for part in parts)
        return replace(
            state, why=", ".join(f"{n} of {of} parts are done" for of, n in done.items())
        )
    if state.status == "done" and stage.kind is SERIALIZE and (found := strangers(build)):
        return State("stale", f"export/{found[0]} was left by no stage")
    return state
