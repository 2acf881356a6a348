"""What an architecture says of the tensors of a checkpoint: plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nf4_pipeline.documents import Document


@dataclass(frozen=True)
class LinearFact(Document):
    """A module that multiplies by a weight.

    Attributes:
        module: its name in the model.
        class_name: its class, such as "FalconLinear".
        kind: "linear", "conv1d" (weight stored [in, out]), "other" (a subclass that does more), or
            "exposed" (the model multiplies by its weight itself, passing the module over).
        stock: True if stock transformers would quantize it, too.
    """

    module: str
    class_name: str
    kind: Literal["linear", "conv1d", "other", "exposed"]
    stock: bool


@dataclass(frozen=True)
class Architecture(Document):
    """What an architecture says of the tensors of a checkpoint.

    Attributes:
        model_type: as in config.json.
        class_name: the causal LM class.
        shapes: every parameter and persistent buffer of the model, by name.
        linears: by the name of the weight parameter.
        head_modules: the output head.
        fp32_modules: name parts of modules that the architecture wants in float32.
        tied: parameter -> the parameter whose values it shares.
        names: name in the checkpoint -> name in the model, or None if the model has no such tensor.
        merged: names in the checkpoint of tensors that transformers merges with others on loading.
        ignorable: names in the checkpoint that the architecture itself passes over.
        optional: names in the model that a checkpoint need not have.
        embedding: the weight of its input embedding; "" if it has none.
        dtype: that config.json names, such as "bfloat16".
        never_cast: names in the model of what transformers does not cast to that dtype.
    """

    model_type: str
    class_name: str
    shapes: dict[str, tuple[int, ...]]
    linears: dict[str, LinearFact]
    head_modules: frozenset[str]
    fp32_modules: tuple[str, ...]
    tied: dict[str, str]
    names: dict[str, str | None]
    merged: frozenset[str]
    ignorable: frozenset[str]
    optional: frozenset[str]
    embedding: str = ""
    dtype: str | None = None
    never_cast: frozenset[str] = frozenset()

    @property
    def embedding_rows(self) -> int | None:
        """How many tokens the model has an embedding for, if that is known."""
        shape = self.shapes.get(self.embedding)
        return shape[0] if shape else None
