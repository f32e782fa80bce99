"""The exception that a user can cause. Scripts turn it into a line on stderr and exit status 2."""


class UserError(Exception):
    """Something outside the code is wrong. The message says what, and how to mend it, in one line."""


class MissingFile(UserError):
    """A folder, or a repository on the hub, is there but does not have the file."""
