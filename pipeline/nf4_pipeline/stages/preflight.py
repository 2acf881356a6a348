"""What can be known of a checkpoint before its first weight is read: headers, model, tokenizer.

A child process builds the model and loads the tokenizer while this one hashes. What it finds wrong
ends the hashing at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from nf4_pipeline.checkpoint.folder_advice import adapter_advice
from nf4_pipeline.checkpoint.skeleton import make_skeleton
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.checkpoint.strip_prefix import check_prefix
from nf4_pipeline.errors import PipelineError, SourceError
from nf4_pipeline.hub.remote import RemoteModel
from nf4_pipeline.model import check_folder
from nf4_pipeline.model.architecture import Architecture
from nf4_pipeline.model.config import check_not_quantized, read_config
from nf4_pipeline.model.fit import check_fit
from nf4_pipeline.model.probe import Probe
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts
from nf4_pipeline.model.unused_tensors import Unused
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.progress import Task
from nf4_pipeline.records import Reading


@dataclass(frozen=True)
class Findings:
    """What is known of a checkpoint whose weights were not read.

    Attributes:
        architecture: what transformers says of its model.
        tokenizer: its tokenizer.
        unused: tensors that the model has no place for.
    """

    architecture: Architecture
    tokenizer: TokenizerFacts
    unused: tuple[Unused, ...]

    def renamed(self, seen: Path, folder: str) -> Findings:
        """These, in words about the folder that was meant instead of the one that was seen."""
        tokenizer = replace(
            self.tokenizer,
            problem=self.tokenizer.problem.replace(str(seen), folder),
            template_problem=self.tokenizer.template_problem.replace(str(seen), folder),
        )
        return replace(self, tokenizer=tokenizer)


def check_small_files(folder: Path, model: RemoteModel | None = None) -> None:
    """What can be known without the weights being there.

    Args:
        folder: the checkpoint.
        model: what the Hub lists, if it is from there.

    Raises:
        SourceError: the folder is no checkpoint, or a file in it is not what its name says.
        AlreadyQuantizedError: its config says that it is quantized.
    """
    config = check_folder.check_small_files(folder)
    repo = None if model is None else model.repo_id
    others = () if model is None else {file.path for file in model.files}
    check_not_quantized(config, None, folder, repo=repo, others=others)
    whole = (folder / "adapter_config.json").is_file() and list(folder.glob("adapter_model.*"))
    if whole:
        raise SourceError(
            f"{adapter_advice(folder)} (A whole model lies beside it: if that is to be quantized "
            "as it is, take adapter_config.json out of the folder.)"
        )


def check_headers(folder: Path) -> None:
    """What can be known from the headers of the weights, without asking transformers.

    Raises:
        SourceError: weights are missing, malformed or pointers, or do not fit config.json.
        AlreadyQuantizedError: the tensors are those of a quantized model.
    """
    check_not_quantized(read_config(folder), check_folder.check_headers(folder), folder)


def look(folder: Path, reading: Reading) -> Findings:
    """What can be known of a checkpoint whose tokenizer may still lack files.

    Raises:
        SourceError: the weights are malformed or not those of config.json's model, or lack the
            prefix that is to be stripped.
        AlreadyQuantizedError: the tensors are those of a quantized model.
    """
    check_headers(folder)
    if reading.strip_prefix:
        check_prefix(open_checkpoint(folder), reading.strip_prefix)
    preflight = Preflight(
        folder,
        reading.allow_unused,
        fits=not reading.strip_prefix,  # its tensors have other names than the model's
        has_tokenizer=False,
    )
    return preflight.wait()


def look_ahead(
    folder: Path,
    small: Iterable[str],
    weights: Mapping[str, tuple[bytes, int]],
    reading: Reading,
) -> Findings:
    """What `look` finds, of weights of which only the headers are there.

    Args:
        folder: where the small files are, and the weights will be.
        small: names of those that are there.
        weights: the first bytes of each file of weights with its header in them, and its size.
        reading: how the tensors are understood.

    Raises:
        SourceError: as `look` does.
    """
    with TemporaryFolder("look") as made:
        make_skeleton(made, folder, small, weights)
        try:
            return look(made, reading).renamed(made, str(folder))
        except PipelineError as error:
            raise type(error)(str(error).replace(str(made), str(folder))) from None


class Preflight:
    """Looks at a checkpoint in a child process, while this one does something else.

    Args:
        folder: the checkpoint; `check_small_files` and `check_headers` passed.
        allow_unused: patterns of tensors that may be left out.
        fits: whether its tensors should be those of its model.
        has_tokenizer: whether all files of its tokenizer are there, so that it should load.
    """

    def __init__(
        self,
        folder: Path,
        allow_unused: Sequence[str] = (),
        *,
        fits: bool = True,
        has_tokenizer: bool = True,
    ) -> None:
        self._folder = folder
        self._allow_unused = allow_unused
        self._fits, self._has_tokenizer = fits, has_tokenizer
        self._probe = Probe(folder)
        self._found: Findings | None = None
        self._failure: PipelineError | None = None
        self._lock = Lock()

    @contextmanager
    def beside(self, task: Task) -> Iterator[Task]:
        """A task that ends as soon as the child has found something wrong; then so does the child.

        Args:
            task: the one to advance.
        """
        preflight = self

        class Watched:
            def advance(self, amount: int) -> None:
                preflight.poll()
                task.advance(amount)

        try:
            yield Watched()
        except BaseException:
            self._probe.cancel()
            raise

    def poll(self) -> None:
        """Judges what the child found, if it has answered.

        Raises:
            SourceError: as `wait` does.
        """
        if self._found is None and (self._failure is not None or self._probe.is_replying):
            self.wait()

    def wait(self) -> Findings:
        """What was found.

        Raises:
            SourceError: config.json makes no causal LM, or the weights are not those of its model,
                or the tokenizer does not load.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._found is None:
                try:
                    self._found = self._judge()
                except PipelineError as error:
                    self._failure = error
                    raise
            return self._found

    def _judge(self) -> Findings:
        reply = self._probe.wait()
        unused: tuple[Unused, ...] = ()
        if self._fits:
            checkpoint = open_checkpoint(self._folder)
            unused = check_fit(checkpoint, reply.architecture, self._allow_unused)
        if self._has_tokenizer:
            reply.tokenizer.check()
        return Findings(reply.architecture, reply.tokenizer, unused)
