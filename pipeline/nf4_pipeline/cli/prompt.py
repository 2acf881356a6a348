"""nf4 prompt ARTIFACT TEXT"""

from __future__ import annotations

import shlex
import sys
from typing import Any, Final

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import named_artifact, without_build
from nf4_pipeline.cli.options import Number, Share, Ui, WholeNumber, output_options
from nf4_pipeline.cli.terminal import say, say_piece

_MOST: Final = 2**31 - 1


@click.command(
    "prompt",
    cls=CommandWithExamples,
    examples=(
        ('nf4 prompt sample "Once upon a time"', "Greedy: the same answer each time."),
        (
            'nf4 prompt sample "Once upon a time" --top-k 10 --num-return-sequences 3 --seed 1',
            "Three answers by chance, the same three for the same seed.",
        ),
    ),
)
@click.argument("artifact", shell_complete=complete_model)
@click.argument("text")
@click.option(
    "--max-length", type=WholeNumber(512, 1, _MOST), help="Prompt and answer together, in tokens."
)
@click.option(
    "--max-new-tokens", type=WholeNumber(100, 1, _MOST), help="Of the answer.  [default: 128]"
)
@click.option("--top-k", type=WholeNumber(50, 1, _MOST), help="Draw from the k likeliest tokens.")
@click.option(
    "--top-p", type=Share(0.9), help="Draw from the likeliest tokens of this probability."
)
@click.option(
    "--temperature",
    type=Number(0.7, 0, 1e6, "0 for the likeliest token each time, or a number above it"),
    help="Of the draws; 0 is greedy.",
)
@click.option(
    "--num-return-sequences",
    type=WholeNumber(3, 1, 1000),
    default=1,
    show_default=True,
    help="How many answers.",
)
@click.option(
    "--seed",
    type=WholeNumber(1, -(2**63), 2**64 - 1, "a whole number"),
    default=0,
    show_default=True,
    help="Of the draws.",
)
@click.option("--revision", help="Branch, tag or commit of a Hub model.  [default: main]")
@click.option("--offline", is_flag=True, help="Take a Hub model as it is cached.")
@click.option("--raw", is_flag=True, help="Do not use the model's chat template.")
@click.option(
    "--device",
    default="auto",
    metavar="auto|cpu|cuda[:N]",
    show_default=True,
    help="Where the model runs.",
)
@output_options
def command(
    ui: Ui,
    artifact: str,
    text: str,
    revision: str | None,
    offline: bool,
    raw: bool,
    device: str,
    **values: Any,
) -> None:
    """Answer TEXT with ARTIFACT.

    ARTIFACT is a model of which there is a build, a tag such as "calibrated", or the path of an
    export or a build; a Hub id, "sample" or a checkpoint without a build is loaded itself (a plain
    one is quantized while loading). Of several builds, the one worked on last answers. Answers are
    greedy unless --top-k, --top-p, --temperature or several answers ask for chance.
    """
    from nf4_pipeline.errors import UsageError
    from nf4_pipeline.machine import check_device_name
    from nf4_pipeline.runtime.generate import Sampling
    from nf4_pipeline.runtime.prompt import ask

    if not text.strip():
        raise UsageError(
            "TEXT is empty, as of a variable that is not set. Give at least one word: nf4 prompt "
            f'{shlex.quote(artifact)} "Hello"'
        )
    check_device_name(device)
    sampling = Sampling(**values)
    streams = not ui.as_json and sampling.num_return_sequences == 1
    chosen = named_artifact(ui, artifact, newest=True)
    reply = ask(
        text,
        without_build(artifact, text) if chosen is None else str(chosen.folder),
        sampling,
        revision=revision,
        offline=offline,
        device=device,
        chat=not raw,
        show=say_piece if streams else None,
        reporter=ui.reporter(),
    )
    answers = reply.answers
    value = {
        "prompt": text,
        "answers": [answer.text for answer in answers],
        "tokens": sum(answer.tokens for answer in answers),
        "seconds": round(answers[0].seconds, 3),
        "device": reply.device,
    }

    def show() -> None:
        if streams:
            say()  # ends the line of the pieces
            return
        for number, answer in enumerate(answers, start=1):
            say(f"[{number}] {answer.text.strip()}", lines=True, limit=sys.maxsize)

    ui.result(value, show)
