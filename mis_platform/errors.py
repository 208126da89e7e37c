"""Errors that the command line tells apart. Everything else a person can fix is a plain ValueError."""


class DataError(ValueError):
    """A dataset, benchmark or model is missing or broken."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


class FingerprintMismatch(ValueError):
    """An artifact was made with other settings than its address says."""
