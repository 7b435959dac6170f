"""Mistakes that a user can make, told apart from faults of the program: the scripts show the former as one sentence."""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch


class UserError(ValueError):
    """Says in one sentence what is wrong and what to do."""


@contextmanager
def user_input():
    """Around a call whose ValueError is about what the user passed: losses, readers, samplers and ranking raise it."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def script(name: str, main: Callable[[], object]) -> None:
    """Runs main() as a command: a user's mistake and what the system refuses end with one sentence, `name: ...`."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        main()
    except BrokenPipeError:  # `| head` has seen enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"{name}: out of memory on the device: try --device cpu")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")
