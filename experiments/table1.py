"""How many clicks does MIS need next to supervised, non-deep and other unsupervised methods?

Table 1. What can be had without other people's weights runs here: MIS, the five methods that need no training, MIS's
model trained on the proposals of other methods, and SimpleClick trained on labels. The other supervised rows are the
paper's quotations of published numbers.
"""

from mis_platform.config import Run
from mis_platform.experiment import SUPERVISED, Experiment, Row, changed, four

NO = (None, None)  # not reported
# method: NoC@85 and NoC@90 on GrabCut, Berkeley, SBD, DAVIS
QUOTED = {  # deep, supervised
    "DIOS w/o GC": ((8.02, 12.59), NO, (14.30, 16.79), (12.52, 17.11)),
    "DIOS w/ GC": ((5.08, 6.08), NO, (9.22, 12.80), (9.03, 12.58)),
    "LD": ((3.20, 4.79), NO, (7.41, 10.78), (5.05, 9.57)),
    "BRS": ((2.60, 3.60), (None, 5.08), (6.59, 9.78), (5.58, 8.24)),
    "f-BRS": ((2.30, 2.72), (None, 4.57), (4.81, 7.73), (5.04, 7.41)),
    "FCA-Net": ((None, 2.08), (None, 3.92), NO, (None, 7.57)),
    "IA+SA": ((None, 3.07), (None, 4.94), NO, (5.16, None)),
    "CDNet": ((1.86, 2.18), (1.95, 3.27), (5.18, 7.89), (5.00, 6.89)),
    "RITM": ((1.76, 2.04), (1.87, 3.22), (3.39, 5.43), (4.94, 6.71)),
    "FocalClick": ((1.66, 1.90), (None, 3.14), (4.34, 6.51), (5.02, 7.06)),
    "FocusCut": ((1.46, 1.64), (1.81, 3.01), (3.40, 5.31), (4.85, 6.22)),
    "PseudoClick": ((None, 1.84), (None, 2.98), (None, 5.61), (4.74, 6.16)),
}
WITH_PUBLIC_WEIGHTS = {  # what would run a quoted row, once its authors' weights are at hand
    "f-BRS": "not its ResNet-101; f-BRS-B on RITM's HRNet: mis import sbd_h18_itermask.pth --out fbrs --refine fbrs && "
    "mis eval --model fbrs --dataset grabcut",
    "RITM": "mis import sbd_h18_itermask.pth --out ritm && mis eval --model ritm --dataset grabcut",
}
WITH_PUBLIC_CODE = {  # repositories of the authors; a ClickModel around that code would run the row
    "LD": "isl-org/Intseg",
    "BRS": "wdjang/BRS-Interactive_segmentation",
    "FCA-Net": "frazerlin/fcanet",
    "CDNet": "XavierCHEN34/ClickSEG",
    "FocalClick": "XavierCHEN34/ClickSEG",
    "FocusCut": "frazerlin/focuscut",
}
CLASSICAL = {  # not deep; name: setting, numbers
    "GraphCut": ("graphcut", ((7.98, 10.00), (None, 14.22), (13.60, 15.96), (15.13, 17.41))),
    "Random Walk": ("random_walk", ((11.36, 13.77), (None, 14.02), (12.22, 15.04), (16.71, 18.31))),
    "Geodesic Matting": ("geodesic", ((13.32, 14.57), (None, 15.96), (15.36, 17.60), (18.59, 19.50))),
    "GSC": ("gsc", ((7.10, 9.12), (None, 12.57), (12.69, 15.31), (15.35, 17.52))),
    "ESC": ("esc", ((7.24, 9.20), (None, 12.11), (12.21, 14.86), (15.41, 17.70))),
}
SOURCES = {  # deep, unsupervised: MIS's model trained on the proposals of others; name: setting, numbers
    "TokenCut*": ("tokencut", ((3.04, 5.74), (6.30, 9.97), (10.82, 13.16), (10.56, 15.01))),
    "FreeMask*": ("freemask", ((4.06, 6.10), (5.55, 9.02), (8.61, 12.01), (8.26, 13.05))),
    "DSM*": ("dsm", ((3.64, 4.64), (5.49, 7.75), (8.59, 11.57), (7.08, 10.11))),
}
SIMPLECLICK = ((1.40, 1.54), (1.44, 2.46), (3.28, 5.24), (4.10, 5.48))


def quoted(name: str) -> str:
    if name in WITH_PUBLIC_WEIGHTS:
        return f"paper, Table 1; with its public weights: {WITH_PUBLIC_WEIGHTS[name]}"
    if name in WITH_PUBLIC_CODE:
        about = f"with a class around its authors' code ({WITH_PUBLIC_CODE[name]}; docs/click-models.md)"
        return f"paper, Table 1; {about}: {eval_command(name)}"
    about = "no code of its authors is known here; with a class that rebuilds it (docs/click-models.md)"
    return f"paper, Table 1; {about}: {eval_command(name)}"


def eval_command(name: str) -> str:
    """What scores a row whose network is somebody's own `ClickModel`, here one called like the row."""
    return f"mis eval --method my_methods:{''.join(filter(str.isalnum, name))} --dataset grabcut"


def trained_on(source: str, name: str, numbers: tuple[tuple[float | None, float | None], ...]) -> tuple[Row, Row]:
    """With and without the smoothness loss: which of them the paper trained is not said."""
    run = changed(Run(), **{"target.source": source})
    plain = changed(run, **{"train.smooth_weight": 0})
    return Row(name, run, four(*numbers)), Row(f"{name} w/o smoothness", plain, four(*numbers))


EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 1",
    rows=(
        *(Row(name, Run(), four(*numbers), quoted=quoted(name)) for name, numbers in QUOTED.items()),
        Row("SimpleClick", changed(Run(), **SUPERVISED), four(*SIMPLECLICK)),
        *(Row(name, changed(Run(), method=key), four(*numbers)) for name, (key, numbers) in CLASSICAL.items()),
        *(row for name, (key, numbers) in SOURCES.items() for row in trained_on(key, name, numbers)),
        Row(
            "MIS w/o smoothness",
            changed(Run(), **{"train.smooth_weight": 0}),
            four((2.08, 2.56), (3.40, 5.51), (7.38, 9.92), (6.78, 10.08)),
        ),
        Row("MIS", Run(), four((1.94, 2.32), (3.09, 4.58), (6.91, 9.51), (6.33, 8.44))),
    ),
    default="MIS",
    note="* baselines that the paper made from proposals of other tasks; the way they were trained was not published. "
    "SimpleClick is trained here on the labels of the training photos and scored like MIS (threshold 0.50, not 0.49). "
    "Methods without training are asked at image size, without zoom-in.",
)
