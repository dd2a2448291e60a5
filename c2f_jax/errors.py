"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in a path, a configuration value or a data file, described so that the reader can mend it.

    The message names the thing, says what was expected and what to do. The command line prints it without a traceback.
    """
