"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in a path, a configuration value or a data file, described so that the reader can mend it.

    The message names the thing, says what was expected and what to do. The command line prints it without a traceback.
    """


class BadFileError(UserError):
    """A file of a data set that cannot be used; `kind` says why in a word or two, for counting."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind
