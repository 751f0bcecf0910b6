"""The one error of models and their files."""


class ModelError(ValueError):
    """A model can't be loaded as asked: one line that says what, why, and what to do."""
