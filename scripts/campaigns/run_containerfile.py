"""The steps of the Containerfile, done without a container engine.

Each stage is a copy of a Debian system that debootstrap made; COPY copies, RUN runs in a chroot
with the stage's environment, folder and user, and at the end the entry point is called as the
image's own user: by default `nf4 build sample`. What an engine would add is not there: no layers,
no namespaces, no digest of the base image. The system is Debian's with Debian's Python, where the
base image has a Python of its own in /usr/local.

    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \\
        bookworm BASE http://deb.debian.org/debian
    python scripts/campaigns/run_containerfile.py BASE WORK [--build-arg NAME=VALUE]...

It needs root, for chroot and for mounting /proc and /dev. Files that the network here asks for,
such as certificates and wheels, are brought in by --bind and named by --env.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from string import Template
from typing import Final

import click

_ROOT: Final = Path(__file__).parents[2]
_PATH: Final = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"


@dataclass(frozen=True)
class Instruction:
    """A line of a Containerfile, continuations joined."""

    word: str
    rest: str


@dataclass
class Stage:
    """What a FROM begins.

    Attributes:
        root: its files.
        variables: ARG and ENV, for what is expanded and run.
        environment: ENV alone, which the image keeps.
    """

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    labels: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def parse(text: str) -> list[Instruction]:
    """Instructions in order; comments, also between continuations, are left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [Instruction(word.upper(), rest.strip()) for word, _, rest in found]


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """With $NAME and ${NAME} replaced where they are known."""
    return Template(text).safe_substitute(variables)


def pairs(text: str) -> dict[str, str]:
    """NAME=VALUE, several in a line."""
    found = [part.partition("=") for part in shlex.split(text)]
    return {name: value for name, _, value in found}


class Builder:
    """Runs instructions.

    Args:
        base: the system that stands for the base image.
        work: where stages are made.
        arguments: of --build-arg.
        binds: folders or files of the host, by their place inside, while commands run.
        environment: more variables while commands run, which no image keeps.
    """

    def __init__(
        self,
        base: Path,
        work: Path,
        arguments: Mapping[str, str],
        binds: Mapping[str, Path],
        environment: Mapping[str, str],
    ) -> None:
        self._base, self._work = base, work
        self._arguments, self._binds, self._environment = arguments, binds, environment
        self._stages: dict[str, Stage] = {}
        self._globals: dict[str, str] = {}
        self._stage: Stage | None = None

    def run(self, instructions: list[Instruction]) -> Stage:
        """The last stage, when all is done."""
        for number, step in enumerate(instructions, 1):
            click.echo(f"step {number}/{len(instructions)}: {step.word} {step.rest[:90]}")
            getattr(self, f"_{step.word.lower()}")(step.rest)
        assert self._stage is not None
        return self._stage

    @property
    def stage(self) -> Stage:
        if self._stage is None:
            raise click.ClickException("an instruction stands before the first FROM")
        return self._stage

    def _from(self, rest: str) -> None:
        image, _, name = expanded(rest, self._globals).partition(" AS ")
        root = self._work / (name or "final")
        subprocess.run(["cp", "-a", "--reflink=auto", self._base, root], check=True)
        python = root / "usr/local/bin/python"  # the one name of the base image that steps use
        if not python.exists():
            python.symlink_to("/usr/bin/python3")
        self._stage = self._stages[name or "final"] = Stage(root)
        click.echo(f"  {self._base} stands for {image}")

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        value = self._arguments.get(name, (shlex.split(default) or [""])[0])
        if self._stage is None:
            self._globals[name] = value
        else:
            self._stage.variables[name] = value

    def _env(self, rest: str) -> None:
        for name, value in pairs(rest).items():
            self.stage.environment[name] = expanded(value, self._variables())

    def _label(self, rest: str) -> None:
        self.stage.labels |= pairs(expanded(rest, self._variables()))

    def _workdir(self, rest: str) -> None:
        self.stage.folder = rest
        self._inside(rest).mkdir(parents=True, exist_ok=True)

    def _user(self, rest: str) -> None:
        self.stage.user = rest

    def _volume(self, rest: str) -> None:
        for place in json.loads(rest):
            if not self._inside(place).is_dir():
                raise click.ClickException(f"VOLUME {place} is no folder of the image")

    def _entrypoint(self, rest: str) -> None:
        self.stage.entrypoint = json.loads(rest)

    def _cmd(self, rest: str) -> None:
        self.stage.command = json.loads(rest)

    def _copy(self, rest: str) -> None:
        *sources, target = shlex.split(rest)
        if sources[0].startswith("--from="):
            root = self._stages[sources.pop(0).removeprefix("--from=")].root
            files = [root / source.lstrip("/") for source in sources]
        else:
            files = [_ROOT / source for source in sources]
        place = self._inside(str(Path(self.stage.folder, target)))
        for file in files:
            if file.is_dir():
                shutil.copytree(file, place, symlinks=True, ignore=_ignored, dirs_exist_ok=True)
            else:
                into = place / file.name if target.endswith("/") or target == "." else place
                shutil.copy2(file, into)

    def _run(self, rest: str) -> None:
        status = self.call(self.stage, ["/bin/sh", "-c", rest], self._variables())
        if status:
            raise click.ClickException(f"RUN ended with {status}: {rest}")

    def _variables(self) -> dict[str, str]:
        return {**self.stage.variables, **self.stage.environment}

    def _inside(self, place: str) -> Path:
        return self.stage.root / place.lstrip("/")

    def call(self, stage: Stage, command: list[str], variables: Mapping[str, str]) -> int:
        """Runs a command in a stage; its exit code."""
        home = {"HOME": "/root" if stage.user == "0:0" else "/home/nf4"}
        environment = {**home, **variables, **self._environment}
        with self._mounted(stage.root):
            # env -i: nothing of the host's environment comes in.
            settings = [f"{name}={value}" for name, value in environment.items()]
            inside = ["/usr/bin/env", "-i", "-C", stage.folder, *settings, *command]
            chroot = ["chroot", f"--userspec={stage.user}", str(stage.root)]
            return subprocess.run([*chroot, *inside], check=False).returncode

    @contextmanager
    def _mounted(self, root: Path) -> Iterator[None]:
        places = {"/proc": Path("/proc"), "/dev": Path("/dev"), **self._binds}
        places["/etc/resolv.conf"] = Path("/etc/resolv.conf")
        with ExitStack() as stack:
            for inside, outside in places.items():
                place = root / inside.lstrip("/")
                if outside.is_dir():
                    place.mkdir(parents=True, exist_ok=True)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.touch()
                subprocess.run(["mount", "--bind", outside, place], check=True)
                stack.callback(subprocess.run, ["umount", "--lazy", place], check=True)
            yield


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What .dockerignore names with **/; a COPY of the repo takes nothing else that it hides."""
    lines = (_ROOT / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    inside_repo = Path(folder).is_relative_to(_ROOT / "pipeline")
    return {n for n in names if inside_repo and any(fnmatch(n, pattern) for pattern in patterns)}


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1)
@click.option("--build-arg", "build_args", multiple=True, help="NAME=VALUE, as an engine takes it.")
@click.option("--bind", "binds", multiple=True, help="HOST:INSIDE, while commands run.")
@click.option("--env", "variables", multiple=True, help="NAME=VALUE, while commands run.")
def main(
    base: Path,
    work: Path,
    arguments: tuple[str, ...],
    build_args: tuple[str, ...],
    binds: tuple[str, ...],
    variables: tuple[str, ...],
) -> None:
    if os.geteuid() != 0:
        raise click.UsageError("chroot and mount need root.")
    if work.exists():
        raise click.UsageError(f"{work} is there already; name a new folder.")
    work.mkdir(parents=True)
    brought = {inside: Path(outside) for outside, _, inside in (b.partition(":") for b in binds)}
    more = dict(part.split("=", 1) for part in variables)
    known = dict(part.split("=", 1) for part in build_args)
    builder = Builder(base.resolve(), work.resolve(), known, brought, more)
    image = builder.run(parse((_ROOT / "Containerfile").read_text("utf-8")))
    for name, value in image.labels.items():
        click.echo(f"label {name}={value}")
    command = [*image.entrypoint, *(arguments or ("build", "sample"))]
    click.echo(f"as {image.user} in {image.folder}: {shlex.join(command)}")
    raise SystemExit(builder.call(image, command, image.environment))


if __name__ == "__main__":
    main()
