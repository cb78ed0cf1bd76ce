"""The errors of the data layer: one for data as a whole, one for a single row."""


class DataError(ValueError):
    """Data cannot be used as it is; the message names file and row and says what to do."""


class RowError(ValueError):
    """One row cannot be used; the text is the reason."""
