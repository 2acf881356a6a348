"""transformers and PEFT as readers: starts their script, and judges what it found."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.processes import parent_side as child
from nf4_pipeline.processes.worker import Script
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.readers.document import Outcome, ReaderResult
from nf4_pipeline.readers.logits import BOUNDS, distance
from nf4_pipeline.readers.own import names_wrong

SCRIPT: Final = Path(__file__).with_name("stock_reader.py")


@dataclass(frozen=True)
class StockRequest(Document):
    """What the script is asked; see there.

    Attributes:
        artifact: the export folder.
        device: "cpu" or "cuda:N".
        threads: that torch may use; None for what it takes by itself.
        lines: Python to run before loading.
        logits: where they are left (.npy); None not to compute any.
        lora: whether PEFT is tried as well.
    """

    artifact: str
    device: str
    threads: int | None
    lines: str | None
    logits: str | None
    lora: bool


@dataclass(frozen=True)
class LoraReply(Document):
    """One step of LoRA: version of PEFT (None: not installed), what went wrong, the loss."""

    peft: str | None
    error: str | None
    loss: float | None


@dataclass(frozen=True)
class StockReply(Document):
    """What the script found.

    Attributes:
        transformers: its version, like the two that follow.
        error: what went wrong while loading or computing, in one line.
        linear4bit: the 4-bit layers.
        missing: names that the files did not give.
        unexpected: names that the model has no place for.
        seconds: from the first import on.
        lora: None if it was not asked, or not reached.
    """

    transformers: str
    torch: str
    bitsandbytes: str
    error: str | None
    linear4bit: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    seconds: float
    lora: LoraReply | None


READER: Final = Script[StockRequest, StockReply](SCRIPT, StockReply)


def awkward_layers(shapes: Iterable[tuple[int, ...]], device: str) -> int:
    """How many layers bitsandbytes cannot compute, or computes wrongly, on this device.

    Args:
        shapes: of the quantized weights, [out_features, in_features].
        device: "cpu" or "cuda:N".
    """
    return sum(device == "cpu" and (out % 32 != 0 or inner % 64 != 0) for out, inner in shapes)


class StockReader:
    """The script at work. Leaving its `with` ends it.

    Args:
        request: what it is asked. `logits` must be None if a layer is awkward (`awkward_layers`).
        awkward: how many are.
        waiting: its process, if it was started before.
    """

    def __init__(
        self,
        request: StockRequest,
        *,
        awkward: int = 0,
        waiting: child.Waiting[StockRequest, StockReply] | None = None,
    ) -> None:
        lora = request.lora and not awkward
        self._request = replace(request, lora=lora, logits=None if awkward else request.logits)
        self._awkward = awkward
        self._lora_wanted = request.lora
        begin = waiting.start if waiting else partial(child.start, READER)
        self._child = begin(self._request)

    def __enter__(self) -> StockReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()

    def results(
        self,
        expected: Sequence[str],
        own_logits: Path,
        dtype: str,
        *,
        promised: bool,
        version: str | None,
        reporter: Reporter = SILENT,
    ) -> list[ReaderResult]:
        """Waits for it, and judges.

        Args:
            expected: the 4-bit layers of the manifest.
            own_logits: what `write_logits` left for our loader's model.
            dtype: what that model computes in, such as "bfloat16".
            promised: whether the card promises transformers alone.
            version: of transformers, said if the process dies.
            reporter: told that this is waited for.

        Returns:
            The row of transformers, and that of PEFT if it was asked for.

        Raises:
            ResourceError: the process was killed, or the machine lacks something that it needs.
        """
        died = ""
        try:
            with reporter.task("load with stock transformers", 1, unit="models") as task:
                reply = self._child.wait()
                task.advance(1)
        except child.ChildFailed as error:
            died = f"its process died with status {error.status}: {error.cause}"
            if not self._request.lora:
                if error.status == -signal.SIGKILL:
                    raise ResourceError(
                        f"The process that loads {self._request.artifact} with transformers was "
                        "killed: as a rule, memory ran out. End other programs, then run "
                        "`nf4 verify` again."
                    ) from error
                return [_row("transformers", version, promised, "failed", died)]
            # Whoever died, transformers gets another chance without PEFT.
            alone = StockReader(replace(self._request, lora=False), awkward=self._awkward)
            with alone:
                stock = alone.results(
                    expected, own_logits, dtype, promised=promised, version=version
                )
            return [*stock, _row("peft", None, False, "failed", died)]
        return [
            self._judge(reply, expected, own_logits, dtype, promised),
            *([self._judge_peft(reply)] if self._lora_wanted else []),
        ]

    def _judge(
        self,
        reply: StockReply,
        expected: Sequence[str],
        own_logits: Path,
        dtype: str,
        promised: bool,
    ) -> ReaderResult:
        lost = [*reply.missing, *reply.unexpected]
        wrong = reply.error or names_wrong(reply.linear4bit, expected, lost)
        apart: float | None = None
        outcome: Outcome = "passed"
        why = "loads and computes as our loader does"
        if self._request.logits is None:
            outcome = "loaded only"
            why = (
                f"bitsandbytes {reply.bitsandbytes} computes layers like {self._awkward} of these "
                "wrongly on a CPU; verify on a GPU to compare logits"
            )
        elif not wrong:
            apart, bound = distance(Path(self._request.logits), own_logits), BOUNDS[dtype]
            if apart is None:
                wrong = "its logits are not finite, or of another shape"
            elif apart > bound:
                wrong = f"its logits are {apart:.3g} from our loader's; {bound:g} is allowed"
        return ReaderResult(
            name="transformers",
            version=reply.transformers,
            promised=promised,
            outcome="failed" if wrong else outcome,
            why=wrong or why,
            layers=len(reply.linear4bit) if reply.linear4bit else None,
            logits_distance=None if apart is None else float(f"{apart:.3g}"),
        )

    def _judge_peft(self, reply: StockReply) -> ReaderResult:
        found, layers = reply.lora, len(reply.linear4bit)
        if found is None:
            why = "transformers itself failed" if reply.error else "bitsandbytes cannot compute it"
            return _row("peft", None, False, "not tried", why)
        if found.peft is None:
            return _row("peft", None, False, "not tried", "peft is not installed")
        if found.error is None and not finite(found.loss):
            return _row("peft", found.peft, False, "failed", f"the loss is {found.loss}", layers)
        if found.error is not None:
            return _row("peft", found.peft, False, "failed", found.error, layers)
        why = f"a step of LoRA on {layers} layers ran; the loss is {found.loss:.3f}"
        return _row("peft", found.peft, False, "passed", why, layers)


def finite(value: Any) -> bool:
    """Whether a number is one."""
    return isinstance(value, int | float) and abs(value) < float("inf")


def _row(
    name: str,
    version: str | None,
    promised: bool,
    outcome: Outcome,
    why: str,
    layers: int | None = None,
) -> ReaderResult:
    return ReaderResult(
        name=name,
        version=version,
        promised=promised,
        outcome=outcome,
        why=why,
        layers=layers,
        logits_distance=None,
    )
