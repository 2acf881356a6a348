"""An export whose weights lie at the Hub alone: made again in memory, for as long as verify reads.

No commit names them yet, so nobody can fetch them from there. Rounded to nearest, the same source
gives the same bytes: they are made as quantize made them, and hashed like any that lie here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.files import entries
from nf4_pipeline.checkpoint.sink import Sink
from nf4_pipeline.checkpoint.writer import writing
from nf4_pipeline.engine.quantize_checkpoint import CheckpointPlanner, QuantizationRun
from nf4_pipeline.engine.scheduler import Output, QuantizedFile
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.machine import Machine
from nf4_pipeline.processes.temporary import IN_MEMORY, TemporaryFolder
from nf4_pipeline.progress import Reporter
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, QUANTIZE, SERIALIZE
from nf4_pipeline.resource_usage import available_memory, free_space
from nf4_pipeline.stages.rounding_choice import rounding_for
from nf4_pipeline.stages.streamed_source import StreamedSource, open_source


def check_room(nbytes: int) -> None:
    """Refuses what memory has no room for.

    Args:
        nbytes: of the weights that will be made again there.

    Raises:
        ResourceError: there is no folder in memory, or too little room in it.
    """
    free = free_space(IN_MEMORY) if IN_MEMORY.is_dir() else 0
    free = min(free, available_memory() or free)
    if nbytes > free:
        raise ResourceError(
            "--stream-source with --stream-output: no disk keeps the result, so verify holds it "
            f"in memory: {nbytes / 1e9:.3f} GB in {IN_MEMORY}, where {free / 1e9:.3f} GB are free. "
            "Make room there (a container: docker run --shm-size), or leave --stream-output out: "
            "then the result stays on the disk, and `nf4 push` sends it."
        )


@contextmanager
def whole_export(
    build: Build, recipe: Recipe, machine: Machine, reporter: Reporter
) -> Iterator[tuple[Path, int]]:
    """The export with all of its files, and how many of them were made again for this.

    It is the folder of the build itself, if all of them lie there; else a copy in memory, which
    goes when the body ends.

    Args:
        build: whose `serialize` is done.
        recipe: that it was quantized by.
        machine: what the work may use.
        reporter: told how far it is.

    Raises:
        ResourceError: memory has no room for them.
        HubError: the source is streamed, and the Hub does not give what it lists.
        CheckpointError: the source cannot be read.
    """
    absent = build.only_sent(SERIALIZE)
    if not absent:
        yield build.export, 0
        return
    reporter.note(
        f"{len(absent)} files of weights are at the Hub alone: they are made again in {IN_MEMORY}, "
        "and are what is verified."
    )
    if not IN_MEMORY.is_dir():
        check_room(sum(digest.size for digest in absent.values()))
    with TemporaryFolder("stream", IN_MEMORY, str(build.root.resolve())) as place:
        check_room(sum(digest.size for digest in absent.values()))  # what a killed run left is gone
        folder = place / "export"
        for name, path in entries(build.export).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name, follow_symlinks=False)
        names = {digest: Path(name).name for name, digest in absent.items()}
        files = build.need(QUANTIZE).facts.files
        _make(
            {n: folder / names[f.digest] for n, f in files.items() if f.digest in names},
            build,
            recipe,
            machine,
            reporter,
        )
        yield folder, len(absent)


def _make(
    targets: dict[str, Path], build: Build, recipe: Recipe, machine: Machine, reporter: Reporter
) -> None:
    """Makes files of quantized/ elsewhere.

    Args:
        targets: their names there -> where each is to stand.
        build: as for `whole_export`, like the others.
    """
    checkpoint, facts = open_source(build), build.need(QUANTIZE).facts
    planner = CheckpointPlanner(checkpoint, build.need(DOWNLOAD).facts.model, recipe.quantize)
    plan = planner.plan(untied=frozenset(facts.untied), sensitive=facts.kept_modules)
    rounding = rounding_for(machine.device, checkpoint.nbytes, reporter)
    run = QuantizationRun(checkpoint, plan, rounding, machine)
    layouts, tensors = plan.layouts(), plan.files()
    outputs = [Output(name, tensors[name], layouts[name]) for name in targets]

    def opener(output: Output) -> AbstractContextManager[Sink]:
        return writing(targets[output.name], output.layout)

    def done(name: str, made: QuantizedFile) -> None:
        pass  # verify hashes it

    streamed = StreamedSource.of(build, reporter)
    if streamed is None:
        run.make("make again", outputs, opener, done, reporter)
        return
    with run.shown("make again", outputs, reporter) as task:
        for output in outputs:
            streamed.make_again(run, output, opener, done, task)
