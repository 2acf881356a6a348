"""The process that runs a checkpoint's tokenizer for calibration; see `tokens_request.py`."""

from __future__ import annotations

from nf4_pipeline.calibration.beginnings import Beginnings
from nf4_pipeline.calibration.tokens import tokens_of_text
from nf4_pipeline.calibration.tokens_request import TokensReply, TokensRequest
from nf4_pipeline.checkpoint.files import is_tokenizer
from nf4_pipeline.errors import SourceError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import Reporter


def run(request: TokensRequest, reporter: Reporter) -> TokensReply:
    """How texts begin, or the tokens of one.

    Raises:
        RecipeError: the text cannot be read, holds less than one sequence, or there is no tokenizer
            for it.
        SourceError: the tokenizer fails, or takes more than any real one.
    """
    tokenizer = None
    if any(is_tokenizer(path.name) for path in request.source.iterdir()):
        tokenizer = LimitedTokenizer.open(request.source, error=SourceError)
    if request.text is None:
        return TokensReply(Beginnings() if tokenizer is None else Beginnings.of(tokenizer))
    rows = tokens_of_text(request.text, tokenizer, request.sequences, request.length)
    return TokensReply(Beginnings(), tuple(tuple(row) for row in rows.tolist()))
