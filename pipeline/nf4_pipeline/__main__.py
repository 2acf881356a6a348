"""The command `nf4`, and `python -m nf4_pipeline`.

Ctrl-C is listened to before anything else is imported, which takes longer than a key press.
"""

import os
import signal

_STOPPED = b"\nStopped. Nothing was begun; run the same command again.\n"


def _stop(*_: object) -> None:
    try:
        os.write(2, _STOPPED)
    finally:
        os._exit(130)


def main() -> None:
    """Runs the command line."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a job in the background
        signal.signal(signal.SIGINT, _stop)
    from nf4_pipeline.cli import main as run

    run()


if __name__ == "__main__":
    main()
