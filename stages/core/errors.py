"""The one kind of exception that a person can put right."""


class UserError(Exception):
    """A mistake in what a stage was given: the message says what was found, expected, and to do.

    Stages show it as one message without a traceback and end with exit code 1.
    """
