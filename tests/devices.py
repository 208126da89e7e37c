"""Which tests may see GPUs: those that are marked so. All others are about a machine without any, to the bit."""

import re


def wants_gpus(marks: str) -> bool:
    """Whether an expression for `pytest -m` asks for tests that are marked `gpu`."""
    return re.search(r"(?<!not )\bgpu\b", marks) is not None
