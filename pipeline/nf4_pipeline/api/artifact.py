"""An artifact: what it is, and what can be done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

from nf4_pipeline.api.interrupts import interruptible
from nf4_pipeline.api.options import PathName, RecipeLike, make_machine, make_recipe, make_target
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.documents import DocumentError
from nf4_pipeline.errors import ArtifactError, BuildError, CheckpointError
from nf4_pipeline.manifest.manifest import Manifest, Totals
from nf4_pipeline.progress import ProgressCallback, reporting_to
from nf4_pipeline.verification.document import (
    VERIFICATION_FILE,
    MeasuredVerification,
    Verification,
    parse_verification,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.fidelity.metrics import Fidelity
    from nf4_pipeline.fidelity.verdict import Verdict
    from nf4_pipeline.records import PushFacts
    from nf4_pipeline.runtime.loader import LoadOptions
    from nf4_pipeline.runtime.prompt import PromptOptions
    from nf4_pipeline.stages.push import Upload


@dataclass(frozen=True, repr=False)
class Artifact:
    """An artifact on disk, as it was when this object was made.

    Attributes:
        path: the export folder, which is what can be published.
        build_dir: the build folder that it lies in; None if it lies in none, as a downloaded one.
        manifest: what it holds and what it was made from.
        verification: what was measured of it; None if it was not verified.
    """

    path: Path
    build_dir: Path | None
    manifest: Manifest = field(hash=False)
    verification: Verification | None = field(hash=False)

    @classmethod
    def open(cls, artifact: PathName | None = None) -> Artifact:
        """Reads what an artifact says of itself; its weights are not looked at.

        Args:
            artifact: an export folder; a build folder, or the model or the tag of a build under
                ./artifacts, whose export is meant; None for the build worked on last.

        Raises:
            UsageError: the name can be no name.
            BuildError: there is no build of that name.
            ArtifactError: the folder holds no artifact, or its manifest or its verification is
                not valid.
            CheckpointError: a file leads out of the folder, or is not what its name says.
        """
        from nf4_pipeline.manifest.read import read_manifest
        from nf4_pipeline.model.check_folder import check_small_files

        path = _find(artifact)
        check_small_files(path)
        build_dir = path.parent if (path.parent / "records").is_dir() else None
        return cls(path, build_dir, read_manifest(path), _read_verification(path))

    @property
    def verdict(self) -> Verdict | None:
        """ "pass" or "fail"; None if it was not verified."""
        return None if self.verification is None else self.verification.verdict

    @property
    def fidelity(self) -> Fidelity | None:
        """How far it is from the 16-bit model; None if that was not measured."""
        found = self.verification
        return found.fidelity if isinstance(found, MeasuredVerification) else None

    @property
    def sizes(self) -> Totals:
        """Its sizes in bytes and bits per weight, and those of its source."""
        return self.manifest.totals

    def __fspath__(self) -> str:
        """Its path, so that it can stand where a path can."""
        return str(self.path)

    def __repr__(self) -> str:
        return (
            f"Artifact({str(self.path)!r}, verdict={self.verdict!r}, "
            f"artifact_bytes={self.sizes.artifact_bytes:,}, "
            f"original_bytes={self.sizes.original_bytes:,})"
        )

    def verify(
        self,
        *,
        recipe: RecipeLike | None = None,
        prompts: PathName | None = None,
        eval_text: PathName | None = None,
        eval_tokens: int | None = None,
        against: PathName | None = None,
        device: str = "auto",
        require_gpu: bool = False,
        device_memory: str | int | None = None,
        engine: str = "local",
        ray_address: str | None = None,
        progress: ProgressCallback | None = None,
    ) -> Artifact:
        """Reloads it in a fresh process and holds it against its 16-bit source.

        What speaks of the verification (card, report, provenance) is written again, too.

        Args:
            recipe: as `build` takes it; only its table [verify] counts.
            prompts: a JSONL file of {"prompt", "expect", "chat"} to ask both models.
            eval_text: a text file on which both models are compared.
            eval_tokens: how many tokens of that text, at most.
            against: another artifact of the same source, by path, model or tag, compared on the
                same text.
            device: "auto", "cpu", "cuda" or "cuda:N".
            require_gpu: fail at once where there is no GPU.
            device_memory: bytes of the device that may be used, as a number or such as "8GB"; None
                for all that is free.
            engine: "local", or "ray": tasks of a Ray cluster compare it with the 16-bit model, on
                a share of the text each, where that has several GPUs or, without, several nodes
                and a `ray_address`. The figures are the same.
            ray_address: of the cluster, as `build` takes it.
            progress: called with each `ProgressEvent`.

        Returns:
            The artifact with what was measured, whether its verdict is "pass" or "fail".

        Raises:
            BuildError: the artifact lies in no build folder, so that its source is not at hand; an
                earlier stage is not done; or another process works there.
            ArtifactError: a file of it is not what an earlier stage left.
            ResourceError: memory, the device that was asked for, or the cluster is lacking.
            UsageError: an option means nothing, or Ray is asked for and not installed;
                `RecipeError` for the recipe.
            KeyboardInterrupt: the user stopped it.
        """
        options = make_recipe(recipe, prompts=prompts, eval_text=eval_text, eval_tokens=eval_tokens)
        machine = make_machine(
            device=device,
            require_gpu=require_gpu,
            device_memory=device_memory,
            engine=engine,
            ray_address=ray_address,
        )
        build = self._build("verify")
        from nf4_pipeline.job import run_stage

        other = None if against is None else _find_other(fspath(against), build)
        with interruptible(), reporting_to(progress) as reporter:
            run_stage(build, "verify", options, machine, reporter, against=other)
        return Artifact.open(self.path)

    @overload
    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        create_pr: bool = False,
        force: bool = False,
        allow_unverified: bool = False,
        dry_run: Literal[False] = False,
        progress: ProgressCallback | None = None,
    ) -> PushFacts: ...

    @overload
    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        create_pr: bool = False,
        force: bool = False,
        allow_unverified: bool = False,
        dry_run: Literal[True],
        progress: ProgressCallback | None = None,
    ) -> Upload: ...

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        create_pr: bool = False,
        force: bool = False,
        allow_unverified: bool = False,
        dry_run: bool = False,
        progress: ProgressCallback | None = None,
    ) -> PushFacts | Upload:
        """Publishes it on the Hub in one commit, and proves what the Hub holds.

        The token comes from HF_TOKEN or `hf auth login`, or in CI from a trusted publisher. While
        bytes are sent, huggingface_hub shows bars of its own on stderr, unless
        HF_HUB_DISABLE_PROGRESS_BARS is set.

        Args:
            repo_id: ORG/NAME; made if there is no such repo.
            private: visibility of the repo; None for private if it is made, else as it is.
            create_pr: propose the change as a pull request.
            force: also over what somebody else pushed meanwhile.
            allow_unverified: also if the verdict is "fail"; the card on the Hub will say so.
            dry_run: only say what would be uploaded; the Hub is not asked.
            progress: called with each `ProgressEvent`.

        Returns:
            What the Hub holds, with commit, address and proof; with `dry_run`, what it would hold.

        Raises:
            BuildError: the artifact lies in no build folder, verify is not done, or another
                process works there.
            VerificationError: the verdict is not "pass", and that is not allowed.
            ArtifactError: a file of it changed, came or went since it was verified.
            ConflictError: somebody else pushed to the repo, and `force` is not set.
            HubError: the Hub refuses, does not answer, or does not hold what was sent.
            UsageError: the repo is not called ORG/NAME.
        """
        target = make_target(repo_id, private=private, create_pr=create_pr, force=force)
        build = self._build("push")
        from nf4_pipeline.stages.push import Push

        with interruptible(), reporting_to(progress) as reporter:
            push = Push(build, target, reporter, allow_unverified)
            return push.plan() if dry_run else push.run().facts

    def prompt(
        self, query: str | Sequence[Mapping[str, str]], **options: Unpack[PromptOptions]
    ) -> list[str]:
        """Answers a query with it; `nf4_pipeline.prompt` says what the options are."""
        from nf4_pipeline.runtime.prompt import prompt

        return prompt(query, self.path, **options)

    def load(self, **options: Unpack[LoadOptions]) -> PreTrainedModel:
        """Loads it, ready to generate; `nf4_pipeline.load` says what the options are."""
        from nf4_pipeline.runtime.loader import load

        return load(self.path, **options)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads its tokenizer; see `nf4_pipeline.load_tokenizer`."""
        from nf4_pipeline.runtime.loader import load_tokenizer

        return load_tokenizer(self.path)

    def _build(self, doing: str) -> Build:
        """The build that it lies in.

        Raises:
            BuildError: the artifact lies in no build folder.
        """
        from nf4_pipeline.build_folder import Build

        if self.build_dir is None:
            raise BuildError(
                f"{self.path} lies in no build folder, and {doing} needs its records and its "
                "source. Name the export of a build. What came from elsewhere is derived again, "
                "and compared, by: nf4 reproduce."
            )
        return Build(self.build_dir)


def _find(artifact: str | PathLike[str] | None) -> Path:
    """The export folder that is meant."""
    from nf4_pipeline.builds import find_artifact, find_build, no_build
    from nf4_pipeline.checkpoint.model_name import is_hub_id
    from nf4_pipeline.runtime.artifact import is_model

    if artifact is None:
        return find_build(None, newest=True, needs="serialize").listed.root / "export"
    name = fspath(artifact)
    found = find_artifact(name, newest=True)
    if found is not None:
        if not is_model(found.folder):
            raise ArtifactError(f"{found.folder} holds no model: there is no config.json in it.")
        return found.folder
    if is_hub_id(name):
        raise ArtifactError(
            f"{name} is no folder, and there is no build of it. An artifact on the Hub is loaded "
            f"by nf4_pipeline.load, or fetched by: hf download {name} --local-dir DIR."
        )
    raise no_build(name)


def _find_other(name: str, own: Build) -> str:
    """The artifact to compare with, or the name itself, which verify will know or refuse."""
    from nf4_pipeline.builds import find_other

    found = find_other(name, own)
    return name if found is None else str(found.folder)


def _read_verification(path: Path) -> Verification | None:
    file = path / VERIFICATION_FILE
    if not file.is_file():
        return None
    try:
        return parse_verification(read_json(file))
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    except DocumentError as error:
        raise ArtifactError(f"{file} is no valid verification at {error}") from error
