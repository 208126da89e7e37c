"""Where do the clicks fall, what does MIS answer, and where does it fail?

Figure 7. Objects that it gets at once, hard ones, and some that it never gets, which the paper does not show.
"""

from mis_platform.config import Run
from mis_platform.experiment import Experiment, Row, four

EXPERIMENT = Experiment(
    question=__doc__,
    source="Figure 7",
    rows=(Row("MIS", Run(), four((1.94, 2.32), (3.09, 4.58), (6.91, 9.51), (6.33, 8.44))),),
    default="MIS",
    figure="objects",
)
