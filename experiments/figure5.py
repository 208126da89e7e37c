"""What do the proposals of MIS look like, from coarse to fine, and those of other methods?

Figure 5. The regions of a few photos at several granularities, and how well the best of them match the objects.
"""

from mis_platform.config import Run
from mis_platform.experiment import Experiment, Row, changed

EXPERIMENT = Experiment(
    question=__doc__,
    source="Figure 5",
    rows=(
        Row("MIS", Run()),
        *(
            Row(name, changed(Run(), **{"target.source": source}))
            for name, source in (("TokenCut", "tokencut"), ("FreeMask", "freemask"), ("DSM", "dsm"))
        ),
    ),
    default="MIS",
    measure=("overlap",),
    figure="proposals",
    note="The paper shows pictures only; it gives no overlap.",
)
