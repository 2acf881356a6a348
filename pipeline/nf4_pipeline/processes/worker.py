"""What a worker is: a function in a module of its own that a fresh process runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, get_type_hints

from nf4_pipeline.documents import Document
from nf4_pipeline.processes.messages import Limits

Request = TypeVar("Request", bound=Document)
Reply = TypeVar("Reply", bound=Document)

_SECRET_NAMES: Final = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|APIKEY|CONNECTION_?STRING|NETRC|PGPASS|KRB5CC"
    r"|(^|_)(KEYS?|PASS|PAT|PWD|CREDS?|AUTH|BEARER|COOKIES?|SESSION|JWT|DSN|SAS)(_|$)|[A-Z]KEY$",
    re.IGNORECASE,
)
_NO_SECRETS: Final = frozenset({"PWD", "OLDPWD", "TOKENIZERS_PARALLELISM"})
_SECRET_VALUES: Final = re.compile(
    r"://[^/\s@]*:[^/\s@]*@"  # an address with a password in it, such as of a proxy or a database
    r"|\b(hf_|api_org_|gh[opsur]_|github_pat_|glpat-|sk-|xox[a-z]-)[A-Za-z0-9_-]{16}"
    r"|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[A-Za-z0-9_-]{16,}\.|-----BEGIN "
)

_SET: Final = {
    "RUST_BACKTRACE": "0",  # the last words of a library should say why, not where
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_OIDC_RESOURCE": "",  # nor an identity to exchange for a token
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONOPTIMIZE": "",  # transformers reads its own docstrings, and -OO takes them away
}
"""For every child. None has anything to ask of a Hub, whatever a stranger's file names."""


@dataclass(frozen=True)
class Environment:
    """The environment variables that a worker sees. None of them is a secret.

    Attributes:
        keep: names of those that it inherits; None for all.
        add: further ones.
    """

    keep: frozenset[str] | None = None
    add: Mapping[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """What is left of this process's own environment, and what is added."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if (self.keep is None or name in self.keep) and not is_secret(name, value)
        }
        return inherited | _SET | dict(self.add)


def is_secret(name: str, value: str) -> bool:
    """True of an environment variable that a child should not see: by its name, or by its value.

    Args:
        name: of the variable.
        value: of it.
    """
    if _SECRET_VALUES.search(value):
        return True
    return name not in _NO_SECRETS and bool(_SECRET_NAMES.search(name))


@dataclass(frozen=True)
class Worker(Generic[Request, Reply]):
    """A function that is run in a process of its own; `child.start` does it.

    Attributes:
        module: holds the function, `run(request: Request, reporter: Reporter) -> Reply`. Only the
            child imports it, so it may import what is heavy.
        reply: class of the reply.
        limits: what it may take.
        environment: what it sees of this process's environment.
    """

    module: str
    reply: type[Reply]
    limits: Limits = field(default_factory=Limits)
    environment: Environment = field(default_factory=Environment)

    @property
    def command(self) -> list[str]:
        """What the parent starts."""
        return command(self.module)


@dataclass(frozen=True)
class Script(Generic[Request, Reply]):
    """A file that is run in a process of its own and imports nothing of this package.

    It keeps to the protocol by itself: reads an envelope from stdin, ends when its parent does,
    and writes messages to stdout, the reply last.

    Attributes:
        path: the file.
        reply: class of the reply.
        limits: only the time by the clock; a script sets no limits itself.
        environment: what it sees of this process's environment.
        python: the interpreter.
    """

    path: Path
    reply: type[Reply]
    limits: Limits = field(default_factory=Limits)
    environment: Environment = field(default_factory=Environment)
    python: Path = field(default_factory=lambda: Path(sys.executable))

    @property
    def command(self) -> list[str]:
        """What the parent starts."""
        return [str(self.python), "-P", str(self.path)]


def command(module: str) -> list[str]:
    """What runs a worker by its module."""
    return [sys.executable, "-P", "-m", "nf4_pipeline.processes.child_side", module]


def load_function(module: str) -> tuple[Callable[..., Document], type[Document]]:
    """The function of a worker module and the class of its requests, which its type hint names."""
    function: Any = import_module(module).run
    return function, get_type_hints(function)["request"]
