"""Mistakes that a user can make, told apart from faults of the program: the scripts show the former as one sentence."""

from contextlib import contextmanager


class UserError(ValueError):
    """Says in one sentence what is wrong and what to do."""


@contextmanager
def user_input():
    """Around a call whose ValueError is about what the user passed: losses, readers, samplers and ranking raise it."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
