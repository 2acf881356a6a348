"""export/ against source/: gates, both models in fresh processes, the verdict, the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Final

from nf4_pipeline import __version__
from nf4_pipeline.build_folder import Build, Inputs, Record
from nf4_pipeline.calibration.calibrator import codes_before_learning
from nf4_pipeline.checkpoint.atomic import json_bytes, write_bytes
from nf4_pipeline.checkpoint.digest import (
    FileDigest,
    FileStamp,
    digest_file,
    json_sha256,
)
from nf4_pipeline.checkpoint.files import CARD_FILE, entries, is_tokenizer
from nf4_pipeline.checkpoint.plain_file import check_plain
from nf4_pipeline.cluster.ray_tasks import address_of, connected
from nf4_pipeline.errors import ArtifactError, ResourceError
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.machine import Machine, kind_of_device
from nf4_pipeline.manifest.manifest import Manifest, Source
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.processes.in_process import is_in_process
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.provenance.signing import SIGNATURE_FILE
from nf4_pipeline.readers.read import Export, OwnReading, Readers
from nf4_pipeline.recipe import Recipe, VerifyRecipe
from nf4_pipeline.records import ATTEST, DOWNLOAD, SERIALIZE, VERIFY, source_files
from nf4_pipeline.report.page import report_page
from nf4_pipeline.report.pictures import PICTURES, pictures
from nf4_pipeline.resource_usage import available_memory, measured
from nf4_pipeline.runtime.loader import pick_device
from nf4_pipeline.stages.other_artifact import OtherArtifact
from nf4_pipeline.stages.remade import whole_export
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded
from nf4_pipeline.stages.streamed_source import StreamedSource
from nf4_pipeline.verification.assemble_document import assemble_measured, assemble_stopped
from nf4_pipeline.verification.check_files import (
    CheckedFiles,
    check_files,
    check_manifest,
    check_remade,
    check_source,
)
from nf4_pipeline.verification.check_model import report_unloadable
from nf4_pipeline.verification.document import (
    VERIFICATION_FILE,
    MeasuredVerification,
    Verification,
)
from nf4_pipeline.verification.eval_text import RANDOM, Text, read_text
from nf4_pipeline.verification.launch import Examination, Workers
from nf4_pipeline.verification.messages import Baselines, SavedCodes
from nf4_pipeline.verification.on_ray import compare_on_ray
from nf4_pipeline.verification.prompts import (
    LARGEST,
    REFERENCE,
    Prompt,
    asked_with,
    read_prompts,
    unreadable,
)

CODE_VERSION: Final = 8
REPORT_FILE: Final = "report.html"
_WRITTEN: Final = {VERIFICATION_FILE, REPORT_FILE} | {
    picture.file for picture in PICTURES.values() if picture.file
}
_SPARE: Final = 2 * 2**30
"""Bytes that a model takes beside its weights while it computes."""

_USED: Final = ("torch", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class Verify:
    """Verifies an export and writes what came of it beside it.

    The verdict "fail" is recorded like any other; the caller decides what follows from it.

    Attributes:
        build: the build folder.
        recipe: prompts, text and limits.
        machine: the device.
        reporter: told how far it is.
        against: an artifact of the same source to compare this one with; None for none.
        workers: the processes that verify, if they were started before.
    """

    build: Build
    recipe: Recipe
    machine: Machine
    reporter: Reporter = SILENT
    against: str | None = None
    workers: Workers | None = None

    kind: ClassVar = VERIFY

    def key(self) -> str:
        """Depends on the export, the source, [verify], what is asked, and the kind of device.

        A comparison with another artifact that was made once stays valid until another one is
        wanted.

        Raises:
            BuildError: download or serialize is not done.
            RecipeError: the prompts or the text cannot be read.
        """
        against = self._manifest_of_other()
        record = self.build.record(VERIFY) if against is None else None
        if record and isinstance(record.facts, MeasuredVerification) and record.facts.against:
            against = record.facts.against.manifest_sha256
        return self._key(against, self.build.need(SERIALIZE).outputs_in("export"))

    def _key(self, against: str | None, export: Mapping[str, FileDigest]) -> str:
        """The key of a verdict about files; by their names in the export."""
        download = self.build.need(DOWNLOAD)
        recipe = {**self.recipe.as_json()["verify"]}
        # What the files hold matters, not where they lie.
        del recipe["prompts"], recipe["eval_text"]
        return json_sha256(
            {
                "code": CODE_VERSION,
                "source": download.facts.content_sha256,
                "export": {name: digest.sha256 for name, digest in export.items()},
                "recipe": recipe,
                "prompts": digest_file(self.prompts_path()).sha256,
                "text": self._text().sha256,
                "device": kind_of_device(self.machine.device),
                "against": against,
            }
        )

    def _device(self) -> str:
        """What is verified on: "cpu" or "cuda:N"; torch is only asked where it must be."""
        device = self.machine.device
        return pick_device(device) if kind_of_device(device) != "cpu" else "cpu"

    def _fits_together(self, manifest: Manifest, device: str) -> bool:
        """Whether both models may be in memory at the same time, and the artifact once more."""
        if is_in_process() or self.machine.device_memory:
            return False
        in_16_bit = sum(digest.size for digest in manifest.source.files.values())
        in_4_bit = sum(digest.size for digest in manifest.files.values())
        if device == "cpu":  # each is on the disk's side of memory, too
            return 2 * (in_16_bit + 2 * in_4_bit) + _SPARE < (available_memory() or 0)
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return bool(in_16_bit + 2 * in_4_bit + 3 * _SPARE < free)

    @property
    def _other(self) -> OtherArtifact | None:
        """The artifact to compare with, if there is one."""
        return None if self.against is None else OtherArtifact.named(self.against)

    def _manifest_of_other(self) -> str | None:
        other = self._other
        return None if other is None else other.manifest_sha256

    def prompts_path(self) -> Path:
        """The user's prompts, or those of the sample, or those for any model.

        Raises:
            RecipeError: the recipe names a file that does not exist, is no plain file, or is too
                large.
        """
        if self.recipe.verify.prompts:
            path = Path(self.recipe.verify.prompts)
            try:
                check_plain(path, LARGEST)
            except OSError as error:
                raise unreadable(path, error) from error
            return path
        if self.build.need(DOWNLOAD).facts.is_sample:
            from nf4_pipeline.sample import QUESTIONS

            return QUESTIONS
        return REFERENCE

    def run(self) -> Record[Verification]:
        """Does the work, whatever an earlier run found; its verdict goes first.

        Raises:
            ArtifactError: the export is no artifact, or the one to compare with is not of its
                source.
            BuildError: the source changed since it was downloaded, or source or export were touched
                while they were read.
            SourceError: the source does not load.
            ResourceError: there is no such device, too little memory on it, or the cluster cannot
                be reached, or lost too many workers.
            UsageError: a Ray cluster is asked for, and Ray is not installed.
            VerificationError: a process that loads a model died.
            HubError: the source is streamed, and the Hub does not give what it lists.
        """
        if self.workers is not None:
            return self._run(self.workers)
        with Workers(self.machine.device) as workers:
            return self._run(workers)

    def _run(self, workers: Workers) -> Record[Verification]:
        against = self._manifest_of_other()
        self._key(against, {})  # prompts, text or device that are not there are known now
        self.build.need(SERIALIZE)
        self.build.fetch(SERIALIZE)
        source = self.build.check_inputs(DOWNLOAD)
        try:
            manifest = read_manifest(self.build.export)
        except ArtifactError:
            self._forget_verdict()
            raise
        if (other := self._other) is not None:
            other.check_source(source_files(self.build.need(DOWNLOAD)), self.reporter)
        self._forget_verdict()
        workers.begin()
        with whole_export(self.build, self.recipe, self.machine, self.reporter) as (folder, made):
            return self._judge(folder, made, manifest, source, against, workers)

    def _judge(
        self,
        folder: Path,
        made: int,
        manifest: Manifest,
        source: Inputs,
        against: str | None,
        workers: Workers,
    ) -> Record[Verification]:
        """Judges the export.

        Args:
            folder: where all of its files are.
            made: how many of them were made again for this.
            manifest: of it.
            source: as download left it.
            against: as for `_key`.
            workers: the processes that verify.
        """
        with measured() as checking:
            export = _stamps(folder)
            files = self._check_files(folder, made, manifest)

        def work() -> Outcome[Verification]:
            verification = replace(
                self._verify(folder, manifest, files.checks, workers),
                date=datetime.now(UTC).date().isoformat(),
            )
            source.check_untouched()
            export.check_untouched()
            with self.reporter.task("draw the report", None):
                documents = self._documents(manifest, verification)
            for name, content in documents.items():
                write_bytes(self.build.export / name, content)
            outputs = {
                f"export/{name}": FileDigest.of(content) for name, content in documents.items()
            }
            return outputs, verification

        return run_recorded(
            self.build,
            self.kind,
            self._key(against, files.digests),
            work,
            recipe=self.recipe.table("verify"),
            before=checking,
            inputs={f"export/{name}": digest for name, digest in files.digests.items()},
            child_peak=_peak_memory,
        )

    def _forget_verdict(self) -> None:
        """Takes away what an earlier run said of the export, and what attest said of that.

        No verdict lies beside files that it may not be about; what somebody changed in it is gone,
        too, and said.
        """
        for kind in (ATTEST, VERIFY):
            record = self.build.record(kind)
            for name, digest in (record.outputs_in("export") if record else {}).items():
                path = self.build.export / name
                plain = path.is_file() and not path.is_symlink()
                if not plain or digest_file(path) != digest:
                    self.reporter.note(
                        f"export/{name} is not what `{kind.stage}` left there: it is made anew."
                    )
                path.unlink(missing_ok=True)
            self.build.forget(kind)
        for name in (*_WRITTEN, CARD_FILE):
            (self.build.export / name).unlink(missing_ok=True)

    def _check_files(self, export: Path, made: int, manifest: Manifest) -> CheckedFiles:
        """Hashes what lies in the export, and holds it against manifest, record and source."""
        recorded = self.build.need(SERIALIZE).outputs_in("export")[MANIFEST_FILE]
        files = check_files(export, manifest, self.reporter, others=(MANIFEST_FILE, SIGNATURE_FILE))
        checks = [
            check_manifest(files.digests[MANIFEST_FILE], recorded),
            check_source(manifest.source, self._source()),
            *files.checks,
        ]
        if made:  # said, since other bytes are judged than those that were sent
            sent = self.build.only_sent(SERIALIZE)
            differ = [n for n, d in sent.items() if files.digests.get(n[len("export/") :]) != d]
            checks.append(check_remade(made, differ))
        # A signature signs what is judged here, and comes later.
        judged = {n: digest for n, digest in files.digests.items() if n != SIGNATURE_FILE}
        return CheckedFiles(checks, judged)

    def _documents(self, manifest: Manifest, verification: Verification) -> dict[str, bytes]:
        """The verification, for machines and for people, by file name."""
        return {
            VERIFICATION_FILE: json_bytes(verification.to_json()),
            **pictures(manifest, verification),
            REPORT_FILE: report_page(manifest, verification).encode(),
        }

    def _verify(
        self, export: Path, manifest: Manifest, checks: Sequence[Check], workers: Workers
    ) -> Verification:
        """Both models; if a check of the files failed, nothing is learned of them."""
        recipe = self.recipe.verify
        versions = _versions()
        if not all(check.passed for check in checks):
            return assemble_stopped(checks, recipe, versions)
        prompts = self._prompts()
        asked = Examination(
            source=self.build.source,
            device=self._device(),
            device_memory=self.machine.device_memory,
            prompts=prompts,
            max_new_tokens=recipe.max_new_tokens,
            text=self._text(),
            tokens=recipe.eval_tokens,
        )
        together = self._fits_together(manifest, asked.device)
        with ExitStack() as stack:
            if (streamed := StreamedSource.of(self.build, self.reporter)) is not None:
                source_folder, served = stack.enter_context(streamed.served())
                asked = replace(asked, source=source_folder, served=served)
            folder = stack.enter_context(TemporaryFolder("scores"))
            own, others = folder / "own.npz", folder / "others.npz"
            baselines = self.baselines(manifest)
            try:
                asked = self._dealt_out(asked, export, baselines, folder)
            except ArtifactError as error:
                return assemble_stopped([*checks, report_unloadable(str(error))], recipe, versions)
            readers = stack.enter_context(
                Readers(
                    _read(export, manifest),
                    asked.device,
                    folder,
                    workers.stock,
                    self.reporter,
                    beside=together,
                )
            )
            try:
                source, artifact = asked.ask_both(
                    export,
                    own,
                    workers,
                    self.reporter,
                    baselines=baselines,
                    logits=readers.own_logits,
                    together=together,
                )
            except ArtifactError as error:
                return assemble_stopped([*checks, report_unloadable(str(error))], recipe, versions)
            found = readers.results(
                OwnReading(
                    version=__version__,
                    layers=artifact.memory.linear4bit,
                    lost=[*artifact.missing, *artifact.unexpected],
                    dtype=artifact.device.dtype,
                )
            )
            verification = assemble_measured(
                manifest, checks, prompts, source, artifact, recipe, versions, found
            )
            if (other := self._other) is not None:
                against = other.compare(asked, own, others, self._source(), self.reporter)
                verification = replace(verification, against=against)
        return verification

    def _dealt_out(
        self, asked: Examination, export: Path, baselines: Baselines, folder: Path
    ) -> Examination:
        """The same, with the comparison done by tasks of a Ray cluster, if there are several."""
        address = self.machine.ray_address
        if self.machine.engine != "ray":
            return asked
        why = None
        if self.build.is_copy or asked.served is not None:
            why = "other nodes do not see what is compared"
        elif asked.device == "cpu" and address_of(address) is None:
            why = "its processors are all that a cluster started for it would have"
        if why is not None:
            self.reporter.detail(f"The models are compared by one process of this host: {why}.")
            return asked
        request = asked.artifact_request(export, folder / "own.npz", baselines)
        with (
            self.reporter.task("compare on Ray", None),
            connected(address) as cluster,
        ):
            asked = replace(asked, shares=compare_on_ray(request, cluster, folder))
        if not asked.shares:
            self.reporter.detail(
                "The models are compared by one process of this host: the cluster has room for one "
                "task of that."
            )
        return asked

    def baselines(self, manifest: Manifest) -> Baselines:
        """Round to nearest, unless the artifact is that, and the codes that learning began with."""
        if manifest.rounding == "nearest":
            return Baselines()
        saved = None
        if manifest.calibration is not None and manifest.calibration.learning is not None:
            files = codes_before_learning(self.build.calibration)
            saved = {
                tensor.module: SavedCodes(file=files[tensor.name], weight=tensor.name)
                for tensor in manifest.tensors
                if tensor.quantized and tensor.module is not None and tensor.name in files
            }
        return Baselines(nearest=_modules_kept_by_budget(manifest), before_learning=saved or None)

    def _source(self) -> Source:
        """As download pinned it: what the manifest should say."""
        download = self.build.need(DOWNLOAD)
        return download.facts.source(source_files(download))

    def _prompts(self) -> tuple[Prompt, ...]:
        if self.build.need(DOWNLOAD).facts.streamed:
            self.reporter.note(
                "The source is streamed: each token that it answers would fetch all of it again, "
                "so no prompt is asked. The models are compared on the text."
            )
            return ()
        if self._has_tokenizer():
            tokenizer = self.build.need(DOWNLOAD).facts.tokenizer
            return asked_with(tokenizer, read_prompts(self.prompts_path()))
        self.reporter.note(
            "This checkpoint has no tokenizer: no prompt can be answered, and the models are "
            "compared on random token ids."
        )
        return ()

    def _text(self) -> Text:
        """The user's text, or that of the sample, or the one for any model."""
        if not self._has_tokenizer():
            return Text(RANDOM, {})
        if self.recipe.verify.eval_text:
            return read_text(Path(self.recipe.verify.eval_text))
        if self.build.need(DOWNLOAD).facts.is_sample:
            from nf4_pipeline.sample import TEXT

            domains = {"stories and questions": TEXT.read_text("utf-8")}
            return Text("the sample's own", domains, is_public=True)
        return read_text(None)

    def _has_tokenizer(self) -> bool:
        record = self.build.need(DOWNLOAD)
        if record.facts.tokenizer is not None:
            return record.facts.tokenizer.status == "loads"
        return any(is_tokenizer(name) for name in record.outputs_in("source"))


def _stamps(export: Path) -> Inputs:
    """An export as it is before it is read."""
    stamps = {
        f"{export.name}/{name}": FileStamp.of(path)
        for name, path in entries(export).items()
        if path.is_file()
    }
    return Inputs(export.parent, "serialize", stamps)


def _read(export: Path, manifest: Manifest) -> Export:
    """What the manifest says of an export to those who read it."""
    quantized = [tensor for tensor in manifest.tensors if tensor.quantized]
    return Export(
        folder=export,
        model_class=manifest.model_class,
        hidden_modules=manifest.hidden_modules,
        modules=[tensor.module for tensor in quantized if tensor.module is not None],
        shapes={tensor.name: tensor.shape for tensor in quantized},
    )


def check_texts(recipe: VerifyRecipe) -> None:
    """Refuses prompts and texts of the user that cannot be read, before hours of work.

    Raises:
        RecipeError: a file that the recipe names cannot be read, or holds something else.
    """
    if recipe.prompts:
        read_prompts(Path(recipe.prompts))
    if recipe.eval_text:
        read_text(Path(recipe.eval_text))


def check_gpu(machine: Machine) -> None:
    """Refuses to begin if a GPU is required and there is none.

    Raises:
        ResourceError: a GPU is required to verify, and torch can use none.
    """
    if machine.require_gpu and pick_device(machine.device) == "cpu":
        raise ResourceError(
            "A GPU is required to verify (--require-gpu) and this machine has none that torch can "
            "use. Leave the option out to verify on the CPU."
        )


def _peak_memory(verification: Verification) -> int:
    """Of the processes that loaded the models."""
    if not isinstance(verification, MeasuredVerification):
        return 0
    models, comparison = verification.models, verification.comparison
    parts = (models.in_16_bit, models.in_4_bit, comparison)
    return max(part.peak_memory_bytes for part in parts)


def _modules_kept_by_budget(manifest: Manifest) -> tuple[str, ...]:
    """The modules that round to nearest would have in 4 bit and this artifact has not."""
    kept = {entry.module for entry in manifest.calibration.kept} if manifest.calibration else set()
    plain = [tensor.module for tensor in manifest.tensors if not tensor.quantized]
    return tuple(module for module in plain if module in kept)


def _versions() -> dict[str, str]:
    """Of everything that a figure may depend on."""
    used = {name: version(name) for name in _USED}
    return {"nf4-pipeline": __version__, "python": platform.python_version(), **used}
