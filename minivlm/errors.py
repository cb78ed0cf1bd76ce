"""The error that ends a job with its message alone. Below everything, so that a command line need import no more."""


class JobError(RuntimeError):
    """A job cannot go on; the message says all: what is wrong and what to type next."""
