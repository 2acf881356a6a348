"""Folders of the host of the command, as a task of another node finds them."""

from __future__ import annotations

import socket
from pathlib import Path

from nf4_pipeline.errors import ResourceError


def check_seen(*folders: Path, otherwise: str) -> None:
    """Refuses to work on a node that does not see what the command sees.

    Args:
        folders: that must be there, with what links in them lead to.
        otherwise: what else the user may do than let all nodes see the folders.

    Raises:
        ResourceError: a folder, or what a link in it leads to, is not there on this node.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ResourceError(
                f"{folder} is not there on {socket.gethostname()}: all nodes of the Ray cluster "
                "must see the build folder and the source by the same paths. Name a --build-dir on "
                f"a file system that they share, or {otherwise}."
            )
        if link := dangling(folder):
            raise ResourceError(
                f"{link} leads to {link.readlink()}, which is not there on {socket.gethostname()}: "
                "all nodes of the Ray cluster must see the source by the same path. Set HF_HOME to "
                "a folder on a file system that they share and run the same command again; a model "
                f"that is a folder must lie on such a one. Or {otherwise}."
            )


def dangling(folder: Path) -> Path | None:
    """A link in a folder that leads to nothing on this node; None if there is none."""
    found = folder.iterdir() if folder.is_dir() else ()
    return next((path for path in found if path.is_symlink() and not path.exists()), None)
