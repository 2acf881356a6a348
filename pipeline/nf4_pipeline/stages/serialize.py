"""quantized/ -> export/: the artifact and its manifest. Weights are linked where possible."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.calibration.calibration_facts import CALIBRATION_FILE, public_calibration
from nf4_pipeline.calibration.calibrator import published_tokens
from nf4_pipeline.checkpoint.atomic import link_or_copy, replacing_folder, write_bytes
from nf4_pipeline.checkpoint.digest import json_sha256
from nf4_pipeline.checkpoint.shards import Piece, Shard, name_shards, split_file, write_shard
from nf4_pipeline.engine.quantize_checkpoint import CheckpointPlanner
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.manifest.artifact_files import Weights, assemble_files
from nf4_pipeline.model.unused_tensors import left_out
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import (
    ATTEST,
    DOWNLOAD,
    QUANTIZE,
    SERIALIZE,
    VERIFY,
    QuantizeFacts,
    SerializeFacts,
    source_files,
)
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded
from nf4_pipeline.stages.streamed_source import open_source

CODE_VERSION: Final = 2


@dataclass(frozen=True)
class Serialize:
    """Writes the export folder."""

    build: Build
    recipe: Recipe
    reporter: Reporter = SILENT

    kind: ClassVar = SERIALIZE

    def key(self) -> str:
        """Depends on what quantize wrote, on the small files of the source, and on [serialize].

        Raises:
            BuildError: download or quantize is not done.
        """
        download, quantized = self.build.need(DOWNLOAD), self.build.need(QUANTIZE)
        small = {
            name: digest.sha256
            for name, digest in download.outputs_in("source").items()
            if not name.endswith(".safetensors")
        }
        recipe = self.recipe.as_json()
        parts = {
            "code": CODE_VERSION,
            "quantized": {name: digest.sha256 for name, digest in quantized.outputs.items()},
            "small": small,
            "recipe": recipe["serialize"],
            "quantize_recipe": recipe["quantize"],
        }
        if (calibration := quantized.facts.calibration) is not None:
            parts["calibration"] = public_calibration(calibration).to_json()
        return json_sha256(parts)

    def run(self) -> Record[SerializeFacts]:
        """Does the work.

        Raises:
            BuildError: quantize is not done, what it or download left changed since, the source
                was touched while it was read, or the tokens that quantize calibrated on are gone.
            ResourceError: the disk is too full.
        """
        inputs = self.build.check_inputs(DOWNLOAD), self.build.check_inputs(QUANTIZE, claimed=True)
        download, quantized = self.build.need(DOWNLOAD), self.build.need(QUANTIZE)
        plan = CheckpointPlanner(
            open_source(self.build), download.facts.model, self.recipe.quantize
        ).plan(
            untied=frozenset(quantized.facts.untied),
            sensitive=quantized.facts.kept_modules,
        )
        source = download.facts.source(source_files(download))
        model_class = download.facts.model.class_name

        def work() -> Outcome[SerializeFacts]:
            with replacing_folder(self.build.export) as folder:
                shards = self._place_weights(plan, quantized.facts, folder)
                weights = self._weights(plan, shards, quantized.facts)
                files = assemble_files(self.build.source, source, model_class, self.recipe, weights)
                for name, content in files.small.items():
                    write_bytes(folder / name, content)
                inputs[0].check_untouched()
                linked = inputs[1].check_untouched(linked=True)
                # The earlier export goes now, and with it what was measured of it.
                self.build.forget(ATTEST)
                self.build.forget(VERIFY)
            self.build.renew_stamps(QUANTIZE, linked)
            outputs = {f"export/{name}": digest for name, digest in files.digests.items()}
            return outputs, SerializeFacts(
                totals=files.manifest.totals,
                hidden_modules=plan.hidden_modules,
                left_out=left_out(
                    (tensor.reason, tensor.source.header.nbytes)
                    for tensor in plan.by_action("drop")
                ),
            )

        table = self.recipe.table("serialize")
        return run_recorded(self.build, self.kind, self.key(), work, recipe=table)

    def _weights(self, plan: Plan, shards: list[Shard], quantized: QuantizeFacts) -> Weights:
        calibration = None
        if (facts := quantized.calibration) is not None:
            tokens = published_tokens(self.build.calibration, facts)
            calibration = public_calibration(facts), {CALIBRATION_FILE: tokens}
        return Weights(plan, shards, quantized.relative_rmse, calibration)

    def _place_weights(self, plan: Plan, quantized: QuantizeFacts, folder: Path) -> list[Shard]:
        """The weight files: each quantized file as it is, or cut where it is too large."""
        limit = self.recipe.serialize.max_shard_bytes
        groups = {file: [t.stored for t in tensors] for file, tensors in plan.files().items()}
        sent = self.build.only_sent(QUANTIZE)  # whole: what would be cut is not sent ahead
        pieces = [
            piece
            for file in quantized.files
            for piece in (
                [Piece(self.build.quantized / file, (), whole=True)]
                if f"quantized/{file}" in sent
                else split_file(self.build.quantized / file, limit, groups[file])
            )
        ]
        names = name_shards(len(pieces))
        shards = []
        total = sum(piece.nbytes for piece in pieces if not piece.whole)
        self.check_disk(total)
        with self.reporter.task("reshard", total) as task:
            for name, piece in zip(names, pieces, strict=True):
                target = folder / name
                if piece.whole:
                    if f"quantized/{piece.path.name}" not in sent:
                        link_or_copy(piece.path, target)
                    facts = quantized.files[piece.path.name]
                    shards.append(Shard(name, facts.digest, facts.tensors))
                else:
                    shards.append(write_shard(target, piece, task))
        return shards

    def check_disk(self, needed: int) -> None:
        """Refuses to begin what the disk cannot hold.

        Args:
            needed: bytes of the shards that are cut out of quantized files.

        Raises:
            ResourceError: the disk has too little free space.
        """
        free = shutil.disk_usage(self.build.root).free
        if needed > free:
            raise ResourceError(
                f"{self.build.root} is on a disk with {free / 1e9:.3f} GB free; cutting the "
                f"weights into shards needs {needed / 1e9:.3f} GB. Make space, or leave "
                "--max-shard-size out."
            )
