"""Does drawing proposals from the top down beat drawing nodes uniformly, or proposals of other methods?

Table 5, and the rows of Table 1 whose proposals come from elsewhere.
"""

from mis_platform.config import Run
from mis_platform.experiment import Experiment, Row, four, vary

PAPER = {
    "uniform": four((3.84, 4.32), (4.42, 6.20), (7.11, 9.95), (7.71, 10.10)),
    "top_down": four((1.94, 2.32), (3.09, 4.58), (6.91, 9.51), (6.33, 8.44)),
}
# The same model trained on proposals of one granularity.
OTHERS = {
    "TokenCut*": four((3.04, 5.74), (6.30, 9.97), (10.82, 13.16), (10.56, 15.01)),
    "FreeMask*": four((4.06, 6.10), (5.55, 9.02), (8.61, 12.01), (8.26, 13.05)),
    "DSM*": four((3.64, 4.64), (5.49, 7.75), (8.59, 11.57), (7.08, 10.11)),
}


def quoted(name: str) -> str:
    return f"paper, Table 1; runs as a row of that: mis run sweep table1 --only '{name}'"


EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 5",
    rows=(
        *vary(Run(), "sampling.strategy", PAPER, PAPER),
        *(Row(name, Run(), numbers, quoted=quoted(name)) for name, numbers in OTHERS.items()),
    ),
    default="strategy=top_down",
    note="Which nodes the paper's uniform sampling draws from is not published: here inner nodes and the root, with "
    "the same filter on small proposals.",
)
