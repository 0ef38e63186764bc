"""The command `heterodox`, and `python -m heterodox`."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from heterodox.cli import app
from heterodox.cli_shared import UsageError, usage_line
from heterodox.core.errors import HeterodoxError


def main() -> None:
    """Entry point: errors that the user can mend become one line and exit code 2."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        _refuse(usage_line(error))
    except HeterodoxError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        sys.exit(code)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _refuse(reason: str) -> NoReturn:
    print(f"heterodox: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave by way of every `finally`: the terminal gets its cursor back, other ranks a closed connection."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
