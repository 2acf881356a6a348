"""Keys, and one change to a signed artifact, undone afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

TAMPERINGS: Final = ("flip a bit", "add a file", "remove a file", "rename a file")

_NAMES: Final = "abcdefghijklmnopqrstuvwxyz0123456789._-"


@contextmanager
def tamper(artifact: Path, kind: str, dice: random.Random) -> Iterator[str]:
    """Changes one thing in a folder while the body runs.

    Args:
        artifact: the folder.
        kind: one of `TAMPERINGS`.
        dice: decides which file, and how.

    Yields:
        What was done, in words.
    """
    path = dice.choice(sorted(p for p in artifact.rglob("*") if p.is_file()))
    fresh = path.with_name(_fresh_name(path, dice))
    if kind == "flip a bit":
        bit = dice.randrange(8 * path.stat().st_size)
        _flip(path, bit)
        yield f"bit {bit} of {path.name}"
        _flip(path, bit)
    elif kind == "add a file":
        fresh.write_bytes(dice.randbytes(dice.randrange(100)))
        yield f"added {fresh.name}"
        fresh.unlink()
    else:
        gone = artifact.parent / f".{path.name}.away"
        path.rename(fresh if kind == "rename a file" else gone)
        yield f"{kind}: {path.name}"
        (fresh if kind == "rename a file" else gone).rename(path)


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def _fresh_name(path: Path, dice: random.Random) -> str:
    """A name that is not taken: another letter in the same, a dot file, or a shard more."""
    while True:
        name = dice.choice(
            [
                path.name + dice.choice(_NAMES),
                "." + "".join(dice.choices(_NAMES, k=8)),
                "".join(dice.choices(_NAMES[:36], k=12)) + path.suffix,
                path.stem.upper() + path.suffix,
            ]
        )
        if not path.with_name(name).exists():
            return name


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A fresh private and public key, as PEM files."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public
