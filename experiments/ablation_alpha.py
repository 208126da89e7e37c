"""How deep into the merge tree should proposals be drawn?

Table 4. At alpha = 0 only the two children of the root are drawn; alpha = 0.9 is MIS as published.
"""

from mis_platform.config import Run
from mis_platform.experiment import Experiment, four, vary

PAPER = {
    0.0: four((2.12, 2.48), (3.89, 5.52), (8.71, 10.87), (7.84, 9.92)),
    0.8: four((1.94, 2.40), (3.08, 4.99), (7.03, 9.62), (6.36, 8.57)),
    0.9: four((1.94, 2.32), (3.09, 4.58), (6.91, 9.51), (6.33, 8.44)),
    0.95: four((2.22, 2.62), (3.19, 4.89), (6.91, 9.52), (6.09, 8.54)),
}

EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 4",
    rows=vary(Run(), "sampling.alpha", PAPER, PAPER),
    default="alpha=0.9",
)
