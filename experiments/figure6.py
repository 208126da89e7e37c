"""How does the IoU grow with the number of clicks?

Figure 6. No session stops early: every object gets 20 clicks, so that the mean after each click is over all objects.
"""

from mis_platform.config import Run
from mis_platform.experiment import SUPERVISED, Experiment, Row, changed, four

CLASSICAL = {
    "GraphCut": "graphcut",
    "Random Walk": "random_walk",
    "Geodesic Matting": "geodesic",
    "GSC": "gsc",
    "ESC": "esc",
}
TO_THE_END = changed(Run(), **{"eval.fixed_clicks": True, "eval.max_clicks": 20})

EXPERIMENT = Experiment(
    question=__doc__,
    source="Figure 6",
    rows=(
        Row("MIS", TO_THE_END, four((1.94, 2.32), (3.09, 4.58), (6.91, 9.51), (6.33, 8.44))),
        Row(
            "MIS w/o smoothness",
            changed(TO_THE_END, **{"train.smooth_weight": 0}),
            four((2.08, 2.56), (3.40, 5.51), (7.38, 9.92), (6.78, 10.08)),
        ),
        Row("SimpleClick", changed(TO_THE_END, **SUPERVISED)),
        *(Row(name, changed(TO_THE_END, method=method)) for name, method in CLASSICAL.items()),
    ),
    default="MIS",
    figure="curves",
    note="The paper prints curves without numbers; the numbers here are those of its Tables 1 and 3.",
)
