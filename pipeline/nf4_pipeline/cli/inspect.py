"""nf4 inspect ARTIFACT"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import artifact_folder
from nf4_pipeline.cli.options import Ui, output_options
from nf4_pipeline.cli.terminal import say

if TYPE_CHECKING:
    from nf4_pipeline.manifest.manifest import Manifest

_WIDEST: Final = 100  # columns of the tree


@click.command(
    "inspect",
    cls=CommandWithExamples,
    examples=(
        ("nf4 inspect artifacts/NAME", "A build: sizes, bits and errors by module."),
        ("nf4 inspect artifacts/NAME/export --tensors", "Also every tensor."),
    ),
)
@click.argument("artifact", shell_complete=complete_model)
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
@output_options
def command(ui: Ui, artifact: str, tensors: bool) -> None:
    """Say what is inside ARTIFACT: sizes, bits per weight, what was left unquantized and why.

    ARTIFACT is a model of which there is a build, a tag such as "calibrated", or the path of an
    export or a build; of several builds, the one worked on last is meant.
    """
    from nf4_pipeline.manifest.read import read_manifest
    from nf4_pipeline.model.check_folder import check_small_files

    folder = artifact_folder(ui, artifact, newest=True)
    check_small_files(folder)
    manifest = read_manifest(folder)
    ui.result(manifest.to_json(), lambda: _show(folder, manifest, tensors))


def _show(folder: Path, manifest: Manifest, tensors: bool) -> None:
    from nf4_pipeline.report.formatting import both_units

    totals, source, counts = manifest.totals, manifest.source, manifest.totals.tensors
    pinned = source.commit or f"content {source.content_sha256[:12]}"
    say(f"{folder}")
    say(f"  model        {manifest.model_class} from {source.repo} at {pinned}")
    say(f"  format       {manifest.format}")
    say(f"  original     {both_units(totals.original_bytes)}")
    say(f"  artifact     {both_units(totals.artifact_bytes)}, {totals.ratio:.1%} of it")
    say(
        f"  bits         {totals.bits_per_weight:.3f} per weight, "
        f"{totals.bits_per_quantized_weight:.3f} per quantized weight"
    )
    say(
        f"  tensors      {counts.quantized} quantized, {counts.kept} kept, {counts.dropped} dropped"
    )
    say("  not quantized:")
    for reason, nbytes in totals.kept_bytes_by_reason.items():
        say(f"    {both_units(nbytes):<28} {reason}")
    for dropped in manifest.dropped:
        say(f"  dropped      {dropped.name}: {dropped.reason}")
    errors = manifest.relative_rmse.values()
    if errors:
        say(f"  weight error {min(errors):.4f} to {max(errors):.4f} relative RMSE per tensor")
    if manifest.hidden_modules:
        say(
            f"  loading      {len(manifest.hidden_modules)} modules are of a class that stock "
            "transformers >= 5.5 passes over; use nf4_pipeline.load (see README.md)"
        )
    from nf4_pipeline.cli.module_tree import lines_of

    say("  modules, with bits per weight and relative RMSE (layers that are alike are one):")
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    for line in lines_of(manifest.tensors, width - 2, sys.stdout.encoding or "ascii"):
        say(f"  {line}")
    for tensor in manifest.tensors if tensors else ():
        what = (
            f"{tensor.dtype}, {tensor.reason}"
            if tensor.relative_rmse is None
            else f"nf4, error {tensor.relative_rmse:.4f}"
        )
        shape = list(tensor.shape)
        say(f"  {tensor.bytes:>14,}  {tensor.name}  {shape}  {what}")
