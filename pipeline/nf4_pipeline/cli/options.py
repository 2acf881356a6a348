"""Options that commands share, and what they become: a request, a recipe, a machine."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from nf4_pipeline.checkpoint.named_path import is_url, problem_of
from nf4_pipeline.cli.help import complete_model
from nf4_pipeline.cli.terminal import say, say_json

if TYPE_CHECKING:
    from nf4_pipeline.build_folder import Build, Record
    from nf4_pipeline.job import StageResult
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.progress import Reporter
    from nf4_pipeline.provenance.summary import Rebuild
    from nf4_pipeline.recipe import PartialRecipe

ARTIFACTS: Final = Path("artifacts")
_VERIFIED: Final = ("verdict", "checks", "fidelity", "domains", "accuracy", "against")
"""What a stage command says of verification.json."""

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class NamedPath(click.Path):
    """A path that the system can be asked for; it need not exist."""

    def __init__(self, *, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):  # as of a variable that is not set; not the working folder
            self.fail("it is empty.", param, ctx)
        if (problem := problem_of(os.fspath(value))) is not None:
            self.fail(f"{os.fspath(value)[:80]!r} can be no path: {problem}.", param, ctx)
        try:
            # A shell leaves "~" where it stands behind "--option=" or in quotes.
            return super().convert(_expanded(value), param, ctx)
        except OSError as error:  # such as a link to itself
            self.fail(f"{str(value)!r}: {error.strerror}.", param, ctx)


def _expanded(value: Any) -> Any:
    """A path with the user's home folder in the place of "~", if there is one."""
    if value is not None and os.fspath(value).startswith("~"):
        with suppress(RuntimeError):  # there is no such user, and so no such file
            return str(Path(value).expanduser())
    return value


class BuildPlace(NamedPath):
    """A build folder, or the URL of one, which stays a text."""

    def __init__(self) -> None:
        super().__init__(file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_url(value):
            return value
        from nf4_pipeline.object_store.address import check_path

        check_path(os.fspath(value))
        return super().convert(value, param, ctx)


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions alone
    """A number from a range; of what is none, the message shows the range and one that is.

    Args:
        example: a value that makes sense.
        least: the smallest.
        most: the largest; None for no limit.
        expected: what to say that is expected, where the limits do not tell it.
    """

    name = "number"

    def __init__(
        self, example: float, least: float, most: float | None = None, expected: str = ""
    ) -> None:
        self.example = example
        self.least = least
        self.most = most
        to = f" to {most:,}" if most is not None and most < _BEYOND else ""
        self.expected = expected or f"a {self.name} from {least:,}{to}"

    def read(self, text: str) -> float:
        """The number that a text is.

        Raises:
            ValueError: the text is no number of this kind.
        """
        return float(text)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        option = max(param.opts, key=len) if param is not None else "It"
        try:
            number = self.read(value)
        except ValueError:
            number = math.nan
        if number >= self.least and (self.most is None or number <= self.most):
            return number
        # An int may be too large to be a float.
        is_none = isinstance(number, float) and math.isnan(number)
        said = repr(value[:80]) if is_none else value[:80]
        raise click.UsageError(
            f"{option} is {said}; expected {self.expected}, such as {option} {self.example}"
            f"{self.hint(number)}",
            ctx,
        )

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N"

    def hint(self, number: float) -> str:
        """What to say of a number that is out of the range, after an example."""
        return ""


class WholeNumber(Number):
    """A whole number from a range."""

    name = "whole number"

    def read(self, text: str) -> int:
        return int(text)


class Share(Number):
    """A number above 0 and at most 1, which some give in per cent."""

    def __init__(self, example: float) -> None:
        super().__init__(example, sys.float_info.min, 1, "a number above 0 and at most 1")

    def hint(self, number: float) -> str:
        return f"; {number:g} % is {number / 100:g}" if 2 <= number <= 100 else ""


_BEYOND: Final = 10**6  # a limit that nobody meets is not shown
THREADS: Final = WholeNumber(4, 0, 1024)


def output_options(command: Command) -> Command:
    """--json, -q and -v; the command gets a `ui`."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON result on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress; warnings only.")
    @click.option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Every check with what it expects; also what libraries underneath log.",
    )
    @wraps(command)
    def wrapped(as_json: bool, quiet: bool, verbose: bool, **values: Any) -> Any:
        if not verbose:
            from nf4_pipeline.quiet_libraries import quiet_libraries

            quiet_libraries()
        return command(ui=Ui(as_json, quiet, verbose), **values)

    return wrapped


def build_dir_option(command: Command) -> Command:
    """--build-dir."""
    return click.option(
        "--build-dir",
        type=BuildPlace(),
        metavar="DIRECTORY|URL",
        help="The build folder, or a URL such as s3://bucket/folder, of which a copy is kept under "
        "artifacts/.  [default: artifacts/<org>--<name>@<sha12>/, with a tag of any recipe but the "
        "default]",
    )(command)


def sigstore_options(command: Command) -> Command:
    """--trust-config and --staging: which Sigstore."""
    command = click.option(
        "--staging", is_flag=True, help="Sigstore's instance for tests; nobody should trust it."
    )(command)
    return click.option(
        "--trust-config",
        envvar="NF4_TRUST_CONFIG",
        type=NamedPath(dir_okay=False),
        help="Another Sigstore, by its client trust configuration (JSON); or in NF4_TRUST_CONFIG, "
        "for runs that nobody types.  [default: the public one]",
    )(command)


def replace_option(command: Command) -> Command:
    """--replace; the command gets `replaces`."""
    return click.option(
        "--replace",
        "replaces",
        is_flag=True,
        help="The build folder may become a build of another recipe or source; what is in it goes.",
    )(command)


def download_options(command: Command) -> Command:
    """MODEL, where it is and how it is read; the command gets a `request`."""

    @click.argument("model", shell_complete=complete_model)
    @click.option("--revision", help="Branch, tag or commit of a Hub model.  [default: main]")
    @click.option(
        "--offline", is_flag=True, help="Take a Hub model as it is cached; says which commit."
    )
    @click.option(
        "--allow-pickle",
        is_flag=True,
        help="Also pytorch_model*.bin: scanned, then converted in a process of its own.",
    )
    @click.option(
        "--allow-unhashed",
        is_flag=True,
        help="Also files for which the Hub lists no hash: nothing can tell whether they are right, "
        "and record, manifest and card say so.",
    )
    @click.option(
        "--check",
        is_flag=True,
        help="Hash everything again, also what looks untouched since it was hashed.",
    )
    @click.option(
        "--allow-unused",
        multiple=True,
        metavar="PATTERN",
        help="Tensors that the model has no place for and that may be left out, such as score or "
        "*.k_scale; may be given several times.",
    )
    @click.option(
        "--strip-prefix",
        default="",
        metavar="PREFIX",
        help="What a wrapper left before the names of tensors, such as _orig_mod. or module.; a "
        "copy without it is made in the build folder.",
    )
    @click.option(
        "--stream-source",
        is_flag=True,
        help="Weights of a Hub model that are not cached stay on the Hub: they come in stretches "
        "while they are quantized, and again, block by block, to be compared with the result.",
    )
    @build_dir_option
    @replace_option
    @wraps(command)
    def wrapped(
        model: str,
        revision: str | None,
        offline: bool,
        allow_pickle: bool,
        allow_unhashed: bool,
        check: bool,
        allow_unused: tuple[str, ...],
        strip_prefix: str,
        stream_source: bool,
        build_dir: Path | str | None,
        replaces: bool,
        **values: Any,
    ) -> Any:
        from nf4_pipeline.api.options import make_request

        request = make_request(
            model,
            revision=revision,
            offline=offline,
            allow_pickle=allow_pickle,
            allow_unhashed=allow_unhashed,
            check=check,
            allow_unused=allow_unused,
            strip_prefix=strip_prefix,
            build_dir=build_dir,
            replaces=replaces,
            stream_source=stream_source,
        )
        return command(request=request, **values)

    return wrapped


_RECIPE: Final[Decorator] = click.option(
    "--recipe",
    type=NamedPath(dir_okay=False),
    help="TOML file with everything that shapes bytes and verdict.",
)
_SHAPING: Final[dict[str, tuple[Decorator, ...]]] = {
    "quantize": (
        click.option(
            "--calibrate",
            metavar="self|FILE",
            callback=lambda _context, _option, value: _expanded(value),
            help="Choose codes and scales from the model's activations: on tokens that it writes "
            "itself, or on a text or JSONL file. A minute or two more on a GPU; a sixth to a third "
            "of the loss of rounding to nearest.",
        ),
        click.option(
            "--extra-bytes",
            metavar="PERCENT",
            help="With --calibrate: leave the layers that lose most in 16 bit, for so many more "
            "bytes, such as 5%.",
        ),
        click.option(
            "--effort",
            metavar="high",
            help="With --calibrate: codes then learn from the 16-bit model. Minutes to half an "
            "hour on a GPU that holds the model twice and as much again, longer on a smaller one; "
            "nearly half less loss than by calibration alone, on a CPU a tenth.",
        ),
    ),
    "serialize": (
        click.option(
            "--max-shard-size",
            metavar="SIZE",
            help='Of one weight file, such as "500MB".  [default: 1GB, which is also the most]',
        ),
    ),
    "verify": (
        click.option(
            "--prompts",
            type=NamedPath(dir_okay=False),
            help='JSONL of {"prompt", "expect", "chat"}, instead of those that come with nf4.',
        ),
        click.option(
            "--eval-text",
            type=NamedPath(dir_okay=False),
            help="Text on which both models are compared, instead of the one that comes with nf4.",
        ),
        click.option(
            "--eval-tokens",
            type=WholeNumber(8192, 2, 10**9),
            metavar="N",
            help="Tokens of it, at most.  [default: 8192]",
        ),
    ),
}
"""What shapes the result of a stage, in the place of what the recipe says."""

_COMPUTES: Final = (
    '"cuda" quantizes and calibrates on all GPUs of the host, and verifies on the first.'
)
_JUDGES: Final = "Of the verdict: one from another kind of device is stale."


def _device(what: str) -> Decorator:
    return click.option(
        "--device", default="auto", metavar="auto|cpu|cuda[:N]", show_default=True, help=what
    )


_DEALT_OUT: Final = {
    "quantize": "quantize a file each",
    "verify": "compare the models on a share of the text each",
}
"""What tasks of a cluster do of a stage."""


def _engine(stages: Sequence[str]) -> tuple[Decorator, ...]:
    done = " and ".join(_DEALT_OUT[stage] for stage in stages)
    return (
        click.option(
            "--engine",
            default="local",
            type=click.Choice(["local", "ray"]),
            show_default=True,
            help=f"Where it is done. With ray, tasks of a Ray cluster {done}. The results are the "
            "same.",
        ),
        click.option(
            "--ray-address",
            metavar="ADDRESS",
            help='Of the cluster, such as 10.0.0.1:6379; "auto" for the one that this host is a '
            "node of.  [default: RAY_ADDRESS, or else one is started for this run]",
        ),
    )


_MACHINE: Final[dict[str, tuple[Decorator, ...]]] = {
    "quantize": (
        click.option(
            "--workers",
            default=0,
            type=THREADS,
            metavar="N",
            help="Threads that quantize.  [default: CPUs + 1, or 8 a GPU]",
        ),
        click.option(
            "--memory-budget",
            default="256MiB",
            metavar="SIZE",
            show_default=True,
            help="For the engine's buffers.",
        ),
    ),
    "verify": (
        click.option("--require-gpu", is_flag=True, help="Verifying without a GPU is a failure."),
        click.option(
            "--device-memory",
            metavar="SIZE",
            help='How much of the device verifying may use, such as "8GB".  [default: all]',
        ),
    ),
}


def recipe_options(*stages: str) -> Decorator:
    """What shapes a build and how it is made; the command gets a `recipe` and a `machine`.

    Args:
        stages: those that the command runs. Each brings what shapes its result and what it takes
            of the machine; without any there are --recipe and --device alone.
    """
    shaping = [option for stage in stages for option in _SHAPING.get(stage, ())]
    taking = [option for stage in stages for option in _MACHINE.get(stage, ())]
    computes = bool(taking) or not stages
    if dealt_out := [stage for stage in stages if stage in _DEALT_OUT]:
        taking += _engine(dealt_out)
    device = _device(_COMPUTES if stages else _JUDGES)
    options = [_RECIPE, *shaping, *([device] if computes else []), *taking]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def wrapped(**values: Any) -> Any:
            from nf4_pipeline.api.options import make_machine, make_recipe
            from nf4_pipeline.errors import RecipeError

            of_machine = {name: values.pop(name) for name in _TAKEN & set(values)}
            of_recipe = {name: values.pop(name) for name in _SAID & set(values)}
            machine = make_machine(**of_machine)
            try:
                said = make_recipe(**of_recipe)
            except RecipeError as error:
                raise RecipeError(_by_option(str(error), of_recipe)) from error
            return command(recipe=said, machine=machine, **values)

        decorated: Command = wrapped
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def _by_option(text: str, said: Mapping[str, Any]) -> str:
    """A message about a key of a recipe, with the name of the option that was typed for it."""
    for key in (key for key, value in said.items() if value is not None and key != "recipe"):
        for table in _SHAPING:
            text = text.replace(f"{table}.{key} ", f"--{key.replace('_', '-')} ")
    for key, unit in (("extra_bytes", "%"), ("effort", "")):  # options that need another one
        option = f"--{key.replace('_', '-')}"
        if said.get(key) is not None and text.startswith(f"{option} needs"):
            text = text.replace("quantize.calibrate, ", "--calibrate, ")
            typed = f"{option} {str(said[key]).strip('% ')}{unit}"
            text = text.replace(
                'Add calibrate = "self", or leave it out.',
                f"Write: --calibrate self {typed}. Or leave {option} out.",
            )
    return text


_SAID: Final = {
    *("recipe", "calibrate", "extra_bytes", "effort", "max_shard_size"),
    *("prompts", "eval_text", "eval_tokens"),
}
_TAKEN: Final = {
    *("device", "require_gpu", "workers", "memory_budget", "device_memory"),
    *("engine", "ray_address"),
}


class Ui:
    """Where a command's words go: results to stdout, everything else to stderr."""

    def __init__(self, as_json: bool, quiet: bool, verbose: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose

    def reporter(self) -> Reporter:
        """Of the whole command; to be made once."""
        from nf4_pipeline.cli.reporting import make_reporter

        return make_reporter(quiet=self.quiet, verbose=self.verbose)

    def result(self, value: Any, show: Callable[[], None]) -> None:
        """Prints the result: as JSON if that was asked for, else as `show` does."""
        if self.as_json:
            say_json(value)
        else:
            show()


def run_one_stage(
    name: str,
    ui: Ui,
    build: Build,
    recipe: PartialRecipe,
    machine: Machine,
    *,
    against: str | None = None,
    replaces: bool = False,
    repo_id: str | None = None,
    rebuilt: Rebuild | None = None,
) -> Record[Any]:
    """Runs one stage of an existing build and says what came of it; returns its record."""
    from nf4_pipeline.progress import LOADING

    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.job import run_stage

    result = run_stage(
        build,
        name,
        recipe,
        machine,
        reporter,
        against=against,
        replaces=replaces,
        repo_id=repo_id,
        rebuilt=rebuilt,
    )
    show_stage(ui, name, build, result)
    return result.record


def show_stage(ui: Ui, name: str, build: Build, result: StageResult) -> None:
    """Says what came of a stage."""
    from nf4_pipeline.verification.document import Verification

    record = result.record
    value = {
        "build": str(build.root),
        "stage": name,
        "ran": result.ran,
        "seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory,
        "outputs": {name: digest.to_json() for name, digest in record.outputs.items()},
    }
    if isinstance(record.facts, Verification):
        document = record.facts.to_json()
        value |= {name: document[name] for name in _VERIFIED if name in document}

    def show() -> None:
        done = f"in {record.seconds:.1f} s" if result.ran else "was done, still valid"
        say(f"{name}: {done}; {len(record.outputs)} files, {record.total_bytes:,} bytes")
        say(f"build:  {shlex.quote(build.shown)}")

    ui.result(value, show)
