"""The two ways in which a command ends badly."""


class UserError(Exception):
    """The call or the configuration is wrong: one line that says what, where and what to do. Exit code 2, nothing started."""


class RunError(Exception):
    """The run itself failed: one line that says what was lost and where to look. Exit code 1."""
