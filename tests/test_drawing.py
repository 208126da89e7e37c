"""The figures of experiments from real artifacts: trees, proposals, a saved model and the clicks on it. No Ray."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mis_platform import drawing, figures, pipeline
from mis_platform.artifacts import Output, Part, Stage, ensure, sha256
from mis_platform.baselines.token_cut import token_cut
from mis_platform.comparison import Outcome, compare
from mis_platform.config import Resources, Run
from mis_platform.data import proposals, trees
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.images import read_image
from mis_platform.data.synthetic import write_benchmark
from mis_platform.experiment import Experiment, Row, changed
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import save_model
from mis_platform.simulation.clicks import Click
from mis_platform.simulation.ward import merge
from mis_platform.stages import evaluate
from mis_platform.storage import Storage

RUN = changed(
    Run(), **{"features.extractor": "color_texture", "eval.max_clicks": 2, "eval.zoom_size": 224, "eval.flip": False}
)
OBJECTS = 3


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("benchmark")
    write_benchmark(folder, count=OBJECTS)
    return open_dataset(f"synthetic:{folder}", None, split="val")


def panels(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def check_nothing_overlaps(figure: Figure) -> None:
    """Neither texts with each other nor a legend with a panel, as drawn."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [axes.title for axes in figure.axes] + [axes.xaxis.label for axes in figure.axes if axes.axison]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    for number, box in enumerate([*boxes, *legends]):
        for other in [*boxes, *legends][number + 1 :]:
            assert not box.overlaps(other)
    for legend in legends:
        assert figure.bbox.x0 <= legend.x0
        assert legend.x1 <= figure.bbox.x1
        for axes in figure.axes:
            assert not legend.overlaps(axes.get_window_extent(renderer))


def finished(stage: Stage, table: pa.Table, root: Storage) -> Storage:
    """The artifact of a stage with this content, as the stage itself would leave it."""

    def run(inputs: dict[str, Storage], out: Storage) -> Output:
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        data = buffer.getvalue().to_pybytes()
        out.write_bytes("part-0.parquet", data)
        part = Part(name="part-0.parquet", rows=len(table), bytes=len(data), sha256=sha256(data), digest=sha256(data))
        return Output(parts=(part,), digest=part.digest)

    return ensure(dataclasses.replace(stage, run=run), root)


def patch_means(image: np.ndarray, patch: int = 16) -> np.ndarray:
    height, width = image.shape[0] // patch, image.shape[1] // patch
    cells = image[: height * patch, : width * patch].reshape(height, patch, width, patch, 3)
    return cells.mean(axis=(1, 3)).astype(np.float32)


def test_figure_5_shows_trees_at_several_levels_and_the_masks_of_other_sources(
    benchmark: Dataset, tmp_path: Path
) -> None:
    root, resources = Storage(str(tmp_path)), Resources()
    other = changed(RUN, **{"target.source": "tokencut"})
    photos = {image_id: read_image(benchmark.image_path(image_id)) for image_id in benchmark.image_ids}
    refused = benchmark.image_ids[0]  # one photo was quarantined by one of the sources
    rows = [trees.tree_row(name, photo.shape[:2], merge(patch_means(photo))) for name, photo in photos.items()]
    finished(pipeline.trees_stage(benchmark, RUN, resources), trees.rows_to_table(rows), root)
    found = {
        name: token_cut(photo, patch_means(photo), RUN.sources.tokencut)
        for name, photo in photos.items()
        if name != refused
    }
    rows = [proposals.proposal_row(name, each) for name, each in found.items()]
    finished(pipeline.proposals_stage(benchmark, other, resources), proposals.rows_to_table(rows), root)

    drawn = drawing.proposals(benchmark, {"MIS": RUN, "TokenCut": other}, resources, root)
    assert list(drawn) == ["synthetic-0.png", "synthetic-1.png"], "only photos that all sources have"
    for figure, name in zip(drawn.values(), benchmark.image_ids[1:], strict=True):
        levels = [f"MIS, {count} regions" for count in drawing.REGIONS]
        assert panels(figure) == ["photo", *levels, f"TokenCut ({len(found[name].masks)})"]
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), photos[name])
        for axes, count in zip(figure.axes[1:], drawing.REGIONS):
            shown = np.asarray(axes.images[0].get_array()).reshape(-1, 3)
            assert 2 <= len(np.unique(shown, axis=0)) <= count
        check_nothing_overlaps(figure)


def test_figure_6_is_a_curve_for_each_row_over_all_objects() -> None:
    rows = (Row("MIS", Run()), Row("w/o smoothness", changed(Run(), **{"train.smooth_weight": 0})))
    ious = np.array([[0.2, 0.4, 0.6], [0.4, 0.9, np.nan]], np.float32)  # the second session stopped
    outcomes = [
        Outcome(rows[0], 0, "done", ious={"grabcut": ious}),
        Outcome(rows[0], 1, "done", ious={"grabcut": ious + 0.1}),
        Outcome(rows[1], 0, "done", ious={"grabcut": ious / 2}),
        Outcome(rows[1], 1, "failed", "no memory"),
    ]
    (name, figure), *rest = drawing.curves(outcomes).items()
    assert (name, rest) == ("grabcut-iou.png", [])
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    np.testing.assert_allclose(lines["MIS"].get_ydata(), [0.35, 0.7, 0.8], atol=1e-6)  # over objects, then seeds
    np.testing.assert_allclose(lines["w/o smoothness"].get_ydata(), [0.15, 0.325, 0.375], atol=1e-6)
    assert list(lines["MIS"].get_xdata()) == [1, 2, 3]
    assert lines["MIS"].get_marker() != lines["w/o smoothness"].get_marker()
    assert (axes.get_xlabel(), axes.get_ylabel()[:8]) == ("number of clicks", "mean IoU")
    check_nothing_overlaps(figure)


def test_figure_7_replays_the_recorded_clicks_on_the_model(benchmark: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(tmp_path / "model", SimpleClick("vit_xt", 224), {"family": "simpleclick"})
    model = Storage(str(tmp_path / "model"))
    job = evaluate.Clicking(benchmark, model, RUN.eval, 224, 1, "cpu")
    scored = job.score(benchmark.image_ids, lambda images, rows: None)
    stage = pipeline.clicks_stage(benchmark, RUN, Resources(), model)
    clicks = finished(stage, pa.Table.from_pylist(scored.rows, schema=job.schema), Storage(str(tmp_path)))

    drawn = drawing.objects([benchmark], model, {benchmark.name: clicks}, RUN, count=2)
    assert list(drawn) == ["synthetic-object-0.png", "synthetic-object-1.png"]
    for figure in drawn.values():
        recorded = [row for row in scored.rows if f"IoU {row['iou']:.3f}" in " ".join(panels(figure))]
        assert recorded, "the IoU in the title is that of the protocol"
        assert panels(figure)[0] == "object"
        assert panels(figure)[-1].startswith("2 clicks")
        check_nothing_overlaps(figure)


@pytest.mark.parametrize("shape", [(120, 180), (180, 120), (300, 90)])
@pytest.mark.parametrize("clicks", [1, 2, 5])
def test_the_legend_of_clicks_never_lies_on_a_photo(shape: tuple[int, int], clicks: int) -> None:
    mask = np.zeros(shape, bool)
    mask[10:40, 10:40] = True
    made = [Click(20, 20 + k, True) for k in range(clicks)]
    figure = figures.clicks_and_masks(
        np.full((*shape, 3), 128, np.uint8), mask.astype(np.int8), made, [mask] * clicks, [0.5] * clicks
    )
    check_nothing_overlaps(figure)


def test_bars_leave_out_rows_without_a_number() -> None:
    rows = (Row("a", Run(), {"grabcut/noc90": 2.0}), Row("b", Run()), Row("c", Run()))
    experiment = Experiment("Which?", rows, "Table 0", default="a")
    ious = np.array([[0.5, 0.95], [0.5, 0.6]], np.float32)
    outcomes = [
        Outcome(rows[0], 0, "done", ious={"grabcut": ious}),
        Outcome(rows[1], 0, "failed", "no memory"),
        Outcome(rows[2], 0, "done", ious={"grabcut": ious[::-1]}),
    ]
    (name, figure), *rest = drawing.bars(compare(experiment, "small", outcomes, {})).items()
    assert (name, rest) == ("grabcut-noc90.png", [])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c"]
    assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == [2.0, 2.0]
    assert "clicks" in axes.get_xlabel()
    check_nothing_overlaps(figure)
