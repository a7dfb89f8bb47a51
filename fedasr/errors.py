"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can mend: the message is one line that says what to change.

    Command-line programs print the message without a traceback and exit with status 2.
    """
