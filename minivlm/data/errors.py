"""The one error type of the data layer."""


class DataError(ValueError):
    """Data cannot be used as it is; the message names file and row and says what to do."""
