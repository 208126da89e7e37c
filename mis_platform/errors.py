"""Errors that the command line tells apart. Everything else a person can fix is a plain ValueError."""


class DataError(ValueError):
    """A dataset, benchmark or model is missing or broken."""


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is NaN or infinite; the message names step and images."""


class Preempted(BaseException):
    """The machine is about to be taken away (SIGTERM). Like KeyboardInterrupt no Exception: nobody handles it early."""


class FingerprintMismatch(ValueError):
    """An artifact was made with other settings than its address says."""
