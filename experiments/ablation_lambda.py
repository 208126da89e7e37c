"""How strong should the smoothness constraint be?

Table 3. lambda = 10 is MIS as published.
"""

from mis_platform.config import Run
from mis_platform.experiment import Experiment, four, vary

PAPER = {
    0: four((2.08, 2.56), (3.40, 5.51), (7.38, 9.92), (6.78, 10.08)),
    3: four((2.02, 2.50), (3.07, 5.04), (6.84, 9.33), (6.32, 8.78)),
    5: four((1.94, 2.34), (3.01, 4.71), (6.79, 9.39), (6.39, 8.55)),
    10: four((1.94, 2.32), (3.09, 4.58), (6.91, 9.51), (6.33, 8.44)),
    15: four((2.12, 2.50), (3.25, 5.13), (7.12, 9.85), (6.71, 9.10)),
}

EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 3",
    rows=vary(Run(), "train.smooth_weight", PAPER, PAPER, label="lambda"),
    default="lambda=10",
)
