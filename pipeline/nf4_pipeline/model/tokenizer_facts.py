"""What is known of a checkpoint's tokenizer before its first weight is read: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import SourceError


@dataclass(frozen=True)
class TokenizerFacts(Document):
    """A tokenizer as transformers loads it, or why it does not.

    Attributes:
        status: "loads", "none" (there is none), "code" (it needs code of its own, which is never
            run) or "fails".
        class_name: of the tokenizer; "" if it does not load.
        asked: names of all files that transformers asks for to make it, sorted.
        files: those of them that are in the folder.
        problem: why it does not load, or may not be used with this model; "" if it may.
        template: its chat template: "none", "works" on a plain user turn, or "fails".
        template_problem: why it fails.
        beyond: tokens whose id is beyond the embedding's rows, and that no plain text makes.
    """

    status: Literal["loads", "none", "code", "fails"]
    class_name: str = ""
    asked: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    problem: str = ""
    template: Literal["none", "works", "fails"] = "none"
    template_problem: str = ""
    beyond: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuses a tokenizer that will not do.

        Raises:
            SourceError: the tokenizer does not load, or makes tokens that the model has no row for.
        """
        if self.problem and self.status != "code":
            raise SourceError(self.problem)

    def notes(self, source: str) -> list[str]:
        """What a person should know before hours of work.

        Args:
            source: name of the model.
        """
        said = []
        if self.status == "code":
            said.append(
                f"Warning: {self.problem} The artifact will have no tokenizer; it is to be taken "
                f"from {source}. The models are compared on random token ids."
            )
        if self.template == "fails":
            said.append(
                f"Warning: the chat template fails on a plain user turn: {self.template_problem}. "
                "Prompts are put without it; it travels as it is."
            )
        if self.beyond:
            more = f" and {len(self.beyond) - 3} more" if self.beyond[3:] else ""
            said.append(
                f"Warning: the tokens {', '.join(self.beyond[:3])}{more} have ids beyond the rows "
                "of the embedding, so that a text with one of them cannot be read by the model."
            )
        return said
