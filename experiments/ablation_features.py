"""Which features make merge trees that contain the objects, and do those also train the better model?

The paper uses DINO ViT-S/8 and leaves other extractors to an appendix whose numbers are not known here.
"""

from mis_platform.config import NETWORK_EXTRACTORS, Run
from mis_platform.experiment import Experiment, four, vary

PAPER = {"dino_vits8": four((1.94, 2.32), (3.09, 4.58), (6.91, 9.51), (6.33, 8.44))}

EXPERIMENT = Experiment(
    question=__doc__,
    source="section 3.1",
    rows=vary(Run(), "features.extractor", (*NETWORK_EXTRACTORS, "color_texture"), PAPER),
    default="extractor=dino_vits8",
    measure=("overlap", "clicks"),
    note="color_texture needs no weights; the others are public files that have to be there or on the hub.",
)
