"""Mistakes a user can make, told in one line: what is wrong, where, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

EXIT_CODE = 2


class UserError(ValueError):
    """Bad input. The message is one line that names what is wrong, where, and what to do; nothing on disk has changed."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def run_cli(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command-line `main(argv)`; a `UserError` becomes one line on stderr and exit code 2, without a traceback."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    sys.exit(code)
