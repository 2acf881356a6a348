"""nf4 quantize"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import build_for, named_build
from nf4_pipeline.cli.options import (
    Ui,
    build_dir_option,
    output_options,
    recipe_options,
    replace_option,
    run_one_stage,
    show_stage,
)
from nf4_pipeline.cli.terminal import say
from nf4_pipeline.documents import Document

if TYPE_CHECKING:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.recipe import PartialRecipe
    from nf4_pipeline.selection import Plan


@click.command(
    "quantize",
    cls=CommandWithExamples,
    examples=(
        (
            "nf4 quantize --dry-run",
            "The newest build: what would become of each tensor, and the size to the byte.",
        ),
        ("nf4 quantize sample --calibrate self", "With codes chosen from what the model computes."),
        (
            "nf4 quantize --part 3/8",
            "The third of eight parts, for as many machines; --merge completes the stage.",
        ),
    ),
)
@click.argument("model", required=False, shell_complete=complete_model)
@click.option("--dry-run", is_flag=True, help="Print the plan; read and write no weights.")
@click.option(
    "--part",
    metavar="I/N",
    help="Make the I-th of N parts alone, such as 3/8; others can make theirs at the same time.",
)
@click.option(
    "--merge", is_flag=True, help="Check that all parts are there, and complete the stage."
)
@build_dir_option
@replace_option
@recipe_options("quantize")
@output_options
def command(
    ui: Ui,
    recipe: PartialRecipe,
    machine: Machine,
    model: str | None,
    dry_run: bool,
    part: str | None,
    merge: bool,
    build_dir: Path | str | None,
    replaces: bool,
) -> None:
    """Turn the linear layers of a downloaded checkpoint into NF4 codes.

    MODEL is what the build was started with, a tag such as "calibrated", or a path; without it,
    the build worked on last is meant. Of a model, each recipe has a build of its own.
    """
    if part is not None or merge:
        if dry_run or replaces or machine.engine != "local" or (part is not None and merge):
            raise click.UsageError(
                "--part and --merge go with none of each other, --dry-run, --replace and --engine."
            )
        build = build_for(ui, "quantize", model, build_dir, recipe)
        _run_parts(ui, build, part, recipe, machine)
        return
    if not dry_run:
        build = build_for(ui, "quantize", model, build_dir, recipe)
        run_one_stage("quantize", ui, build, recipe, machine, replaces=replaces)
        return
    from nf4_pipeline.builds import complete_recipe
    from nf4_pipeline.stages.quantize import Quantize

    build = named_build(ui, model, build_dir, newest=True, needs="download")
    stage = Quantize(build, complete_recipe(build, recipe, before="quantize"), machine)
    plan = stage.plan()
    stage.check_disk(plan)
    ui.result(PlanDocument.of(plan).to_json(), lambda: _show(plan))


def _run_parts(
    ui: Ui, build: Build, part: str | None, recipe: PartialRecipe, machine: Machine
) -> None:
    """Makes a part, or merges all of them if None is named."""
    from nf4_pipeline.engine.parts import Part
    from nf4_pipeline.progress import LOADING

    wanted = None if part is None else Part.parse(part)
    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.job import merge_parts, run_part

    if wanted is None:
        result = merge_parts(build, recipe, machine, reporter)
    else:
        result = run_part(build, wanted, recipe, machine, reporter)
    show_stage(ui, "quantize" if wanted is None else f"quantize {wanted}", build, result)


@dataclass(frozen=True, kw_only=True)
class PlannedTensor(Document):
    """What would happen to one tensor, as `nf4 quantize --dry-run --json` says it."""

    name: str
    source_name: str
    file: str
    action: str
    reason: str
    shape: tuple[int, ...]
    source_bytes: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PlanDocument(Document):
    """A plan, as `nf4 quantize --dry-run --json` says it; `files` have their sizes in bytes."""

    files: dict[str, int]
    skip_modules: tuple[str, ...]
    hidden_modules: tuple[str, ...]
    tensors: tuple[PlannedTensor, ...]

    @classmethod
    def of(cls, plan: Plan) -> PlanDocument:
        return cls(
            files={file: layout.nbytes for file, layout in plan.layouts().items()},
            skip_modules=tuple(plan.skip_modules),
            hidden_modules=tuple(plan.hidden_modules),
            tensors=tuple(
                PlannedTensor(
                    name=tensor.name,
                    source_name=tensor.source.name,
                    file=tensor.source.file,
                    action=tensor.action,
                    reason=tensor.reason,
                    shape=tuple(tensor.shape),
                    source_bytes=tensor.source.header.nbytes,
                    bytes=sum(stored.nbytes for stored in tensor.stored),
                )
                for tensor in plan.tensors
            ),
        )


def _show(plan: Plan) -> None:
    from nf4_pipeline.report.formatting import both_units

    for action, verb in (("quantize", "quantized"), ("keep", "kept"), ("drop", "dropped")):
        groups: dict[str, list[int]] = {}
        for tensor in plan.tensors:
            if tensor.action == action:
                groups.setdefault(tensor.reason, []).append(tensor.source.header.nbytes)
        for reason, sizes in sorted(groups.items()):
            say(f"  {verb:<10} {len(sizes):>5} tensors  {both_units(sum(sizes)):<28} {reason}")
    say("  files, to the byte:")
    for file, layout in plan.layouts().items():
        say(f"  {layout.nbytes:>18,}  {file}")
    total = sum(layout.nbytes for layout in plan.layouts().values())
    say(f"  {total:>18,}  in all")
