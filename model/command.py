"""What our commands have in common: one line for an error of ours, a status that scripts can read."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from model.errors import UsegError

Work = Callable[[argparse.Namespace], dict[str, Any] | None]
"""A subcommand, set as the parser's default `work`: options to the result that is printed; None where another process
tells it."""
BROKEN = "skipped"
"""The key under which a result lists inputs that were skipped."""
REFUSED = "refused"
"""The key under which a result lists why what was examined did not pass."""


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, interrupted: str) -> int:
    """Run the chosen subcommand and print its result as JSON.

    Exit status: 0 done, 1 an error on one line, 2 wrong usage, 3 done but for inputs that were skipped (the result
    lists them), 4 what was examined did not pass (with the reasons on one line), 130 interrupted (`interrupted` tells
    what that means).
    """
    options = parser.parse_args(arguments)
    work: Work = options.work
    try:
        result = work(options)
    except (UsegError, OSError) as error:
        return _tell(parser, str(error), 1)
    except ModuleNotFoundError as error:
        return _tell(parser, f"needs {error.name}: install the training stack (`make test`, or the extra `train`)", 1)
    except KeyboardInterrupt:
        return _tell(parser, f"interrupted; {interrupted}", 130)
    if result is None:
        return 0
    print(json.dumps(result, indent=2))
    if reasons := result.get(REFUSED):
        return _tell(parser, f"refused: {'; '.join(reasons)}", 4)
    return 3 if result.get(BROKEN) else 0


def positive(text: str) -> int:
    """For argparse: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def flag(name: str) -> str:
    """The option that sets a field."""
    return "--" + name.replace("_", "-")


def _tell(parser: argparse.ArgumentParser, message: str, status: int) -> int:
    print(f"{parser.prog}: {message}", file=sys.stderr)
    return status
