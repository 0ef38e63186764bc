"""The command `heterodox`, and `python -m heterodox`."""

import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

from heterodox.cli.main import app
from heterodox.cli.shared import UsageError, usage_line
from heterodox.core.errors import HeterodoxError
from heterodox.training.interrupt import follow_parent


def main() -> None:
    """Entry point: errors that the user can mend become one line and exit code 2."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    follow_parent()
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        _refuse(usage_line(error))
    except HeterodoxError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:
        if isinstance(error, _Terminated) or _raised_by(error).partition(".")[0] in ("click", "typer"):
            raise
        _refuse(f"a plug-in ended the process by sys.exit({error.code!r}); a part raises RecipeError instead")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _refuse(f"{error.filename or 'the system'}: {error.strerror or error}", error)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            _report_bug()
        _refuse(f"not enough memory: {str(error).strip().splitlines()[0]}; `heterodox plan` says what a recipe needs")
    except Exception:
        _report_bug()
    else:
        sys.exit(code)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _refuse(reason: str, error: OSError | None = None) -> NoReturn:
    if error is not None and not error.filename:  # no file that the user named: ours
        _report_bug()
    print(f"heterodox: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


def _raised_by(error: BaseException) -> str:
    """Return the name of the module that raised `error`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "") if trace else ""


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def _report_bug() -> NoReturn:
    """Print the traceback, and say that it is not the user's fault."""
    traceback.print_exc()
    print("heterodox: this is a bug of heterodox, not yours: please report it with the lines above", file=sys.stderr)
    sys.exit(1)


class _Terminated(SystemExit):
    """The end of the process by a signal."""


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave by way of every `finally`: the terminal gets its cursor back, other ranks a closed connection."""
    raise _Terminated(128 + number)


if __name__ == "__main__":
    main()
