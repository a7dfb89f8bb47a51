"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend: the message is one line that says what to change.

    Command-line programs print the message without a traceback and exit with status 2. Code that
    turns a `ValueError` of other code into something else lets this one pass first.
    """
