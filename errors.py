"""The one exception for what a user can get wrong."""


class UserError(Exception):
    """A mistake that the user can mend; the message names the cause, the value and the remedy.

    Libraries raise it where the cause is; scripts print it as one line and exit with status 1.
    """
