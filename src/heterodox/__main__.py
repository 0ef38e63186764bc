"""The command `heterodox`, and `python -m heterodox`."""

import os
import signal
import sys
from types import FrameType

from heterodox.cli import app
from heterodox.core.errors import HeterodoxError


def main() -> None:
    """Entry point: errors that the user can mend become one line and exit code 2."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except HeterodoxError as error:
        print(f"heterodox: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave by way of every `finally`: the terminal gets its cursor back, other ranks a closed connection."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
