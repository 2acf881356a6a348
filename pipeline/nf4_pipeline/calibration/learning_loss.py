"""What codes learn from: KL(16 bit || 4 bit) over the whole vocabulary, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from typing import Final, TypeVar

import torch

from nf4_pipeline.calibration.latents import LearnedWeight
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.progress import Reporter

_AT_ONCE: Final = {"cpu": 2**22, "cuda": 2**26}
"""Predictions that are compared at once, in float32."""
_NO_SUCH: Final = "does not have a deterministic implementation"

Part = TypeVar("Part")
Computed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""What was computed from a part of a step, the gradient of the loss by it, and what it was computed
from, if the gradient by that is wanted."""


def gradient_of_kl(own: torch.Tensor, expected: torch.Tensor, tokens: int) -> torch.Tensor:
    """The gradient of the mean KL by the 4-bit model's logits.

    Args:
        own: logits of the 4-bit model, [..., vocabulary].
        expected: those of the 16-bit one.
        tokens: of the whole step.
    """
    gradient = torch.empty(own.shape, dtype=own.dtype, device=own.device)
    for theirs, mine, into in _pieces(expected, own.detach(), gradient):
        into.copy_((mine.float().softmax(-1) - theirs.float().softmax(-1)).div_(tokens))
    return gradient


def sum_of_kl(own: torch.Tensor, expected: torch.Tensor) -> float:
    """Nats, over all tokens; arguments as of `gradient_of_kl`."""
    total = torch.zeros((), dtype=torch.float64, device=own.device)
    for theirs, mine in _pieces(expected, own):
        p, q = theirs.float().log_softmax(-1), mine.float().log_softmax(-1)
        total += (p.exp() * (p - q)).sum(-1).sum(dtype=torch.float64)
    return float(total)


class Gradients:
    """Adds gradients to the momentum of weights.

    Args:
        device: of the weights.
        pool: where parts are computed side by side on a CPU.
        reporter: told if gradients may be others each time.

    Attributes:
        repeatable: False once something was found that has no deterministic gradient.
        proven: whether a whole step was done; until then, what fails is the model's fault.
    """

    def __init__(self, device: torch.device, pool: Executor, reporter: Reporter) -> None:
        self._device = device
        self._reporter = reporter
        self.pool = pool
        self.repeatable = True
        self.proven = False

    def add(
        self,
        weights: Sequence[LearnedWeight],
        parts: Iterable[Part],
        compute: Callable[[Part], Computed],
        *,
        fades: bool = True,
    ) -> list[torch.Tensor]:
        """Adds those of all parts of a step, one after the other.

        Args:
            weights: those that something is computed with.
            parts: of the step.
            compute: what is done with each.
            fades: momentum does before; not if it has got gradients of this step already.

        Returns:
            For each part the gradient by what it was computed from, if that is wanted.

        Raises:
            CheckpointError: something in the model has no gradient, or fails before a first step
                is done.
        """
        parts = list(parts)
        before: list[list[torch.Tensor]] = []  # what is gone back to, if not to zero
        if not fades and not self.proven:
            before = [[total.clone() for total in weight.sums()] for weight in weights]
        for weight in weights if fades else ():
            weight.decay()
        try:
            return self._added(weights, parts, compute)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or self.proven:
                raise
            if _NO_SUCH not in str(error):
                raise CheckpointError(
                    "The gradients of this model cannot be computed "
                    f"({str(error).splitlines()[0][:200]}), so its codes cannot learn. Leave "
                    "--effort out."
                ) from error
            why = str(error).splitlines()[0][:120]
        self._reporter.note(
            "A part of this model has no deterministic gradient on this device, so that a "
            f"second run may learn other codes: {why}"
        )
        self.allow_others()
        for number, weight in enumerate(weights):
            for place, total in enumerate(weight.sums()):
                if fades:
                    total.zero_()
                else:
                    total.copy_(before[number][place])
        return self._added(weights, parts, compute)

    def allow_others(self) -> None:
        """From now on, gradients may be others each time."""
        self.repeatable = False
        torch.use_deterministic_algorithms(True, warn_only=True)

    def _added(
        self,
        weights: Sequence[LearnedWeight],
        parts: Sequence[Part],
        compute: Callable[[Part], Computed],
    ) -> list[torch.Tensor]:
        parameters = [weight.module.weight for weight in weights]
        if self._device.type != "cpu":
            with ExitStack() as hooks:
                for weight, parameter in zip(weights, parameters, strict=True):
                    hooks.callback(parameter.register_hook(weight.watch).remove)
                    parameter.grad = weight.momentum  # added to in place
                    hooks.callback(setattr, parameter, "grad", None)
                found = [_backward(*compute(part)) for part in parts]
                return [origin for origin in found if origin is not None]

        def gradients(part: Part) -> tuple[torch.Tensor | None, ...]:
            own, gradient, origin = compute(part)
            wanted = parameters if origin is None else [origin, *parameters]
            found: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
                own, wanted, gradient, allow_unused=True
            )
            return (None, *found) if origin is None else found

        origins: list[torch.Tensor] = []
        # Added one after the other, whichever comes first.
        for origin, *own in self.pool.map(gradients, parts):
            if origin is not None:
                origins.append(origin)
            for weight, added in zip(weights, own, strict=True):
                if added is not None:
                    weight.add(added)
        return origins


def _backward(
    own: torch.Tensor, gradient: torch.Tensor, origin: torch.Tensor | None
) -> torch.Tensor | None:
    torch.autograd.backward(own, gradient)
    return None if origin is None else origin.grad


def _pieces(*logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Some tokens at a time of tensors [..., vocabulary], as views [tokens, vocabulary]."""
    words = logits[0].shape[-1]
    rows = max(1, _AT_ONCE[logits[0].device.type] // words)
    return zip(*(torch.split(each.reshape(-1, words), rows) for each in logits), strict=True)
