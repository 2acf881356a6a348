"""source/ -> a part of quantized/, by one of several processes; and all parts -> one record.

Each part makes files of its own and leaves a partial record. Parts may run in one build folder that
several machines see, or in a folder of their own each, whose `quantized/` and `records/` are then
brought together.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final

from nf4_pipeline.build_folder import Build, Record, RecordKind
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import BuildError, UsageError
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import (
    DOWNLOAD,
    QUANTIZE,
    PartFacts,
    QuantizeFacts,
    part_kind,
    part_records,
)
from nf4_pipeline.resource_usage import Usage
from nf4_pipeline.stages.folder_progress import watched
from nf4_pipeline.stages.quantize import FACTS_SUFFIX, Quantize
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded

_MOST_NAMED: Final = 5
_MOMENT: Final = 5.0
"""Seconds to wait for another part that notes what the build is for, alone in it while it does."""


@dataclass(frozen=True)
class QuantizePart:
    """Makes the files of one part; what every process does that quantizes beside others.

    Attributes:
        whole: the stage that it is a part of.
        part: which.
        untied: tied tensors that differ; None where nobody looked yet.
        patience: seconds to wait for another process that makes one of the files.
    """

    whole: Quantize
    part: Part
    untied: frozenset[str] | None = None
    patience: float = 0.0

    @property
    def kind(self) -> RecordKind[PartFacts]:
        return part_kind(self.part)

    def key(self) -> str:
        """That of the whole stage: parts with the same one belong together.

        Raises:
            BuildError: download is not done.
        """
        return self.whole.key()

    def ensure(self) -> tuple[Record[PartFacts], bool]:
        """Does the work in a folder that others work in, too; nothing if it is done.

        Returns:
            What it left, and whether it had to run.

        Raises:
            BuildError: as of `run`, or another process works in the folder at something else.
            SourceError: the checkpoint is not usable.
            ResourceError: the disk is too full, or there is too little memory.
            UsageError: the memory budget is too small.
            PlanMismatchError: the bytes written are not the bytes planned.
        """
        build = self.whole.build
        with build.shared(_MOMENT):
            if build.state(self.kind, self.key(), self.whole.reporter).status == "done":
                return build.need(self.kind), False
            return self.run(), True

    def run(self) -> Record[PartFacts]:
        """Does the work.

        Raises:
            BuildError: download is not done, the source changed since or while it was read, or
                another process is making one of the files.
            SourceError: the checkpoint is not usable.
            ResourceError: the disk is too full, or there is too little memory.
            HubError: the source is streamed, and the Hub does not give what it lists.
            UsageError: the memory budget is too small.
            PlanMismatchError: the bytes written are not the bytes planned.
        """
        whole = self.whole
        source = whole.build.check_inputs(DOWNLOAD)
        planner = whole.planner()
        untied = whole.known_untied() if self.untied is None else self.untied
        if untied is None:
            untied = planner.find_untied(whole.reporter)
        plan = planner.plan(untied=untied)
        sizes = {file: layout.nbytes for file, layout in plan.layouts().items()}
        names = self.part.share(sizes)

        def work() -> Outcome[PartFacts]:
            with (
                whole.build.making(names, self.patience),
                watched(whole.build, self.key(), sizes, whole.reporter, own=names),
            ):
                files = whole.make_files(plan, planner, names, source)
            outputs = {f"quantized/{name}": facts.digest for name, facts in files.items()}
            for name in (f"quantized/{file}{FACTS_SUFFIX}" for file in files):
                outputs[name] = digest_file(whole.build.root / name)
            return outputs, PartFacts(part=self.part.number, of=self.part.of, untied=plan.untied)

        table = whole.recipe.table("quantize")
        return run_recorded(whole.build, self.kind, self.key(), work, recipe=table)


def refuse_to_divide(build: Build, recipe: Recipe) -> None:
    """Refuses to make one of several parts of what processes that share nothing cannot divide.

    Raises:
        UsageError: the recipe is a calibrated one, or the weights of the source stay on the Hub.
        BuildError: download is not done.
    """
    if recipe.quantize.calibrate:
        raise UsageError(
            "--part: calibrated codes are chosen in one walk through the model, which cannot "
            "be divided. Leave --part out, or --calibrate."
        )
    if build.need(DOWNLOAD).facts.streamed:
        raise UsageError(
            "--part: the weights of this build are streamed from the Hub, and each part would "
            "fetch files that others fetch, too. Leave --part out; or build without "
            "--stream-source where several machines share the work."
        )


@dataclass(frozen=True)
class MergeParts:
    """Completes the record of a build whose parts are all done; quantizes nothing.

    Attributes:
        whole: the stage that they are parts of.
    """

    whole: Quantize

    kind: ClassVar = QUANTIZE

    def key(self) -> str:
        """That of the whole stage.

        Raises:
            BuildError: download is not done.
        """
        return self.whole.key()

    def run(self, before: Usage | None = None) -> Record[QuantizeFacts]:
        """Does the work: every file of every part is hashed.

        Args:
            before: what was spent on the parts, as far as that is known.

        Raises:
            BuildError: a part is missing, belongs to another source or recipe, or a file that it
                made is gone or has other bytes.
            SourceError: the checkpoint is not usable.
        """
        build = self.whole.build
        records = part_records(build)
        own = {part: record for part, record in records.items() if record.key == self.key()}
        if not own:
            foreign = f" ({_named(records)} there is of another source or recipe)" * bool(records)
            quantize = f"nf4 quantize {shlex.quote(build.shown)}"
            raise BuildError(
                f"{build.shown} has no parts to merge: --part made none of its source and recipe "
                f"yet{foreign}. On one machine no parts are needed: {quantize}. For three: "
                f"{quantize} --part 1/3 and so on, and --merge at the end."
            )
        counts = {part.of: sum(other.of == part.of for other in own) for part in own}
        of = max(counts, key=lambda of: (counts[of] / of, of))
        missing = [Part(of, number) for number in range(1, of + 1) if Part(of, number) not in own]
        if missing:
            strangers = [part for part in missing if part in records]
            why = f" ({_named(strangers)} there is of another source or recipe)" * bool(strangers)
            raise BuildError(
                f"{build.shown} holds {counts[of]} of {of} parts; {_named(missing)} are missing"
                f"{why}. Run `nf4 quantize --part {missing[0]}`, or bring what it left in "
                "quantized/ and records/ here."
            )
        made_by = {
            name.removeprefix("quantized/"): part
            for part, record in own.items()
            if part.of == of
            for name in record.outputs
        }

        def refuse(names: Collection[str]) -> None:
            parts = sorted({made_by[name] for name in names if name in made_by})
            by = f"made by part {_named(parts)}, " if parts else ""
            raise BuildError(
                f"{build.quantized / min(names)}, {by}is not there as that part left it, with its "
                f".facts.json beside it; {len(names)} files in all. Bring both files here, or run "
                f"`nf4 quantize --part {parts[0] if parts else f'1/{of}'}` again."
            )

        return self.whole.run(refuse, before)


def _named(parts: Collection[Part]) -> str:
    """Parts for people, the first few of them."""
    first = ", ".join(map(str, sorted(parts)[:_MOST_NAMED]))
    more = len(parts) - _MOST_NAMED
    return f"{first} and {more} more" if more > 0 else first
