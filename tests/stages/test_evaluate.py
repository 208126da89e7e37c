"""Scoring on a cluster: the rows of one process, however many workers, and again after a kill."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from mis_platform.artifacts import Output, Part, Stage, combine_digests, sha256, write_manifest
from mis_platform.config import ClassicalConfig, EvalConfig, Resources
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.schemas import CLICKS, TREES
from mis_platform.data.trees import rows_to_table, tree_row
from mis_platform.errors import DataError
from mis_platform.evaluation.protocol import Sample, evaluate, evaluate_click_model, protocol_fingerprint
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import load_model, save_model
from mis_platform.simulation import ward
from mis_platform.simulation.tree import MergeTree
from mis_platform.stages import evaluate as stage
from mis_platform.storage import Storage

CONFIG = EvalConfig(max_clicks=3)
ZOOM = 224  # pixels
IMAGES = 10
EMPTY = "photo-04"  # its mask has no pixel


def make_benchmark(folder: Path) -> Dataset:
    """Ellipses of noise on noise; one mask is empty, one photo has two objects."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.default_rng(5)
    y, x = np.ogrid[:60, :80]
    for k in range(IMAGES):
        inside = ((y - 30 - k) / (9 + k)) ** 2 + ((x - 35 + k) / (12 + k)) ** 2 <= 1
        photo = rng.integers(0, 120, (60, 80, 3), np.uint8) + 130 * inside[..., None].astype(np.uint8)
        Image.fromarray(photo).save(folder / "images" / f"photo-{k:02d}.png")
        mask = 255 * inside.astype(np.uint8)
        name = f"photo-{k:02d}"
        if name == EMPTY:
            mask[:] = 0
        if k == 7:
            Image.fromarray(255 - mask).save(folder / "masks" / f"{name}_2.png")
            name += "_1"
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return open_dataset(f"folder:{folder}", split="val")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_benchmark(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A small model whose answers depend on photo and clicks, saved at another size than it is scored at."""
    torch.manual_seed(0)
    model = SimpleClick("vit_xt", 448)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.06)
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, model, {})
    return Storage(str(directory))


def job_of(benchmark: Dataset, model_dir: Storage) -> stage.Clicking:
    return stage.Clicking(benchmark, model_dir, CONFIG, ZOOM, batch=1, device="cpu")


def rows_in(out: Storage, output: Output) -> list[dict[str, object]]:
    return [
        row
        for part in sorted(output.parts, key=lambda part: part.name)
        for row in pq.read_table(pa.BufferReader(out.read_bytes(part.name))).to_pylist()
    ]


def without_times(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name != "ms"} for row in rows]


def silent(images: int, rows: int) -> None:
    pass


# -- parts -----------------------------------------------------------------------------------------------------------


def click_row(image_id: str, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {"dataset": "d", "image_id": image_id, "object_id": "1", "click": 1, "y": 2.0, "x": 3.0}
    return row | {"positive": True, "iou": float(np.float32(0.9)), "ms": 7.0} | changes


@pytest.mark.parametrize(("change", "same"), [({"ms": 8.0}, True), ({"iou": 0.5}, False), ({"x": 3.5}, False)])
def test_a_digest_covers_all_but_the_times(change: dict[str, object], same: bool) -> None:
    assert (stage.row_digest(click_row("a")) == stage.row_digest(click_row("a", **change))) is same


def test_a_part_remembers_its_photos_also_those_without_rows(
    tmp_path: Path, benchmark: Dataset, model_dir: Storage
) -> None:
    out, ids = Storage(str(tmp_path)), benchmark.image_ids
    scored = stage.Scored([click_row(ids[3]), click_row(ids[5])], [f"{ids[4]}, object 1: empty"])
    written = stage.write_part(job_of(benchmark, model_dir), ids[3:6], scored, out)
    assert written.part.rows == 2
    assert written.part.name.startswith("clicks-000003-")
    assert written.part.sha256 == sha256((tmp_path / written.part.name).read_bytes())
    (found,) = stage.finished_parts(out, "clicks", CLICKS, ids)
    assert found == written
    assert pq.read_schema(tmp_path / written.part.name).equals(CLICKS)


def test_what_a_restart_cannot_use_is_removed(tmp_path: Path, benchmark: Dataset, model_dir: Storage) -> None:
    out, ids, job = Storage(str(tmp_path)), benchmark.image_ids, job_of(benchmark, model_dir)
    whole = stage.write_part(job, ids[:2], stage.Scored([click_row(ids[0])], []), out)
    overlapping = stage.write_part(job, ids[1:4], stage.Scored([click_row(ids[2])], []), out)
    cut = stage.write_part(job, ids[4:6], stage.Scored([click_row(ids[4])], []), out)
    data = (tmp_path / cut.part.name).read_bytes()
    (tmp_path / cut.part.name).write_bytes(data[: len(data) // 2])
    changed = stage.write_part(job, ids[6:8], stage.Scored([click_row(ids[6])], []), out)
    table = pq.read_table(tmp_path / changed.part.name)
    other = pa.Table.from_pylist([click_row(ids[6], iou=0.1)], schema=CLICKS)
    pq.write_table(other.replace_schema_metadata(table.schema.metadata), tmp_path / changed.part.name)
    (tmp_path / ".tmp-leftover").write_bytes(b"x")
    (tmp_path / "clicks-empty.parquet").write_bytes(b"")
    assert stage.finished_parts(out, "clicks", CLICKS, ids) == [whole]
    assert overlapping.part.name != whole.part.name
    assert os.listdir(tmp_path) == [whole.part.name]


# -- overlaps --------------------------------------------------------------------------------------------------------


def features_of(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    return cv2.resize(image, grid[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)


@pytest.fixture(scope="module")
def trees(benchmark: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Trees over the mean colours of 6x8 patches for all photos but the last."""
    out = Storage(str(tmp_path_factory.mktemp("trees")))
    rows = []
    for image_id in benchmark.image_ids[:-1]:
        image = np.asarray(Image.open(benchmark.image_path(image_id)))
        rows.append(tree_row(image_id, image.shape[:2], ward.merge(features_of(image, (6, 8)))))
    sink = pa.BufferOutputStream()
    pq.write_table(rows_to_table(rows), sink)
    data = sink.getvalue().to_pybytes()
    out.write_bytes("trees-0.parquet", data)
    part = Part(name="trees-0.parquet", rows=len(rows), bytes=len(data), sha256=sha256(data), digest="0")
    whole = Stage(name="trees", version=1, config={}, run=lambda inputs, out: Output(parts=(), digest="0"))
    write_manifest(whole, Output(parts=(part,), digest="0"), out)
    assert pq.read_schema(tmp_path_of(out) / "trees-0.parquet").equals(TREES)
    return out


def tmp_path_of(storage: Storage) -> Path:
    assert storage.local is not None
    return storage.local


def best_by_drawing(tree: MergeTree, mask: np.ndarray) -> float:
    """The best IoU, each node drawn with OpenCV."""
    leaves = [{leaf} for leaf in range(tree.num_leaves)]
    for first, second in tree.children:
        leaves.append(leaves[first] | leaves[second])
    best = 0.0
    for node in leaves:
        patches = np.isin(np.arange(tree.num_leaves), list(node)).reshape(tree.grid).astype(np.uint8)
        drawn = cv2.resize(patches, mask.shape[::-1], interpolation=cv2.INTER_NEAREST) == 1
        best = max(best, (drawn & (mask == 1)).sum() / (drawn | (mask == 1)).sum())
    return float(best)


def test_overlaps_are_those_of_drawn_nodes(benchmark: Dataset, trees: Storage) -> None:
    scored = stage.Overlapping(benchmark, trees, are_trees=True).score(benchmark.image_ids, silent)
    assert len(scored.rows) == IMAGES - 1  # one empty, one without a tree, one photo with two objects
    assert scored.excluded == [
        f"{EMPTY}, object 1: no pixel of the object",
        "photo-09: its photo was refused, it has no proposals",
    ]
    for row in scored.rows:
        image_id = str(row["image_id"])
        image = np.asarray(Image.open(benchmark.image_path(image_id)))
        tree = ward.merge(features_of(image, (6, 8)))
        (mask,) = [each.mask for each in benchmark.read_objects(image_id) if each.object_id == row["object_id"]]
        assert row["best_iou"] == pytest.approx(best_by_drawing(tree, mask), abs=1e-6)
        assert row["area"] == pytest.approx((mask == 1).mean())


@pytest.mark.ray
def test_overlaps_on_the_cluster(benchmark: Dataset, trees: Storage, tmp_path: Path, ray_cluster: None) -> None:
    out = Storage(str(tmp_path))
    output = stage.evaluate_proposals(benchmark, trees, True, Resources(eval_workers=2), out)
    alone = stage.Overlapping(benchmark, trees, are_trees=True).score(benchmark.image_ids, silent).rows
    rows = rows_in(out, output)
    floats = ("best_iou", "area", "proposal_area")
    assert [{**row, **{name: float(np.float32(row[name])) for name in floats}} for row in alone] == rows
    photos = {row["image_id"]: (row["proposals"], float(np.float32(row["proposal_area"]))) for row in alone}
    assert len(photos) < len(alone), "one has two objects"
    assert output.summary["proposals"] == round(float(np.mean([count for count, _ in photos.values()])), 2)
    assert output.summary["median_proposal_area"] == round(float(np.median([area for _, area in photos.values()])), 4)
    ious = [float(str(row["best_iou"])) for row in rows]
    assert output.summary["objects"] == IMAGES - 1
    assert output.summary["mean_best_overlap"] == round(float(np.mean(ious)), 4)
    assert output.summary["median_best_overlap"] == round(float(np.median(ious)), 4)
    assert output.summary["share_above_0.7"] == round(sum(iou > 0.7 for iou in ious) / len(ious), 4)
    assert output.summary["share_of_photos_without"] == 0
    assert len(output.summary["excluded"]) == 2
    assert {name: str(kind) for name, kind in zip(stage.OVERLAPS.names, stage.OVERLAPS.types)} == {
        **{"dataset": "string", "image_id": "string", "object_id": "string"},
        **{"best_iou": "float", "node": "int32", "area": "float", "proposals": "int32", "proposal_area": "float"},
    }


# -- clicks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(benchmark: Dataset, model_dir: Storage) -> list[dict[str, object]]:
    """The rows of the protocol in this process, one object after the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network = stage._network(model_dir, ZOOM, "cpu")
    samples = [
        Sample(
            "folder", image_id, np.asarray(Image.open(benchmark.image_path(image_id))), benchmark.read_objects(image_id)
        )
        for image_id in benchmark.image_ids
    ]
    rows = list(evaluate(network, samples, CONFIG, zoom_size=ZOOM, batch=1, on_excluded=lambda excluded: None))
    torch.set_num_threads(threads)
    return pa.Table.from_pylist(rows, schema=CLICKS).to_pylist()


def test_the_network_is_resized_to_what_it_is_scored_at(model_dir: Storage) -> None:
    assert load_model(tmp_path_of(model_dir)).image_size == (448, 448)
    network = stage._network(model_dir, ZOOM, "cpu")
    assert network.image_size == (ZOOM, ZOOM)
    assert not network.training


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "batch"), [(1, 8), (2, 1)])
def test_any_number_of_workers_gives_the_rows_of_one_process(
    benchmark: Dataset,
    model_dir: Storage,
    alone: list[dict[str, object]],
    workers: int,
    batch: int,
    tmp_path: Path,
    ray_cluster: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = Storage(str(tmp_path))
    resources = Resources(eval_workers=workers, eval_batch=batch, use_gpu=False)
    output = stage.evaluate_model(benchmark, model_dir, CONFIG, ZOOM, resources, out)
    rows = rows_in(out, output)
    assert without_times(rows) == without_times(alone)
    assert output.digest == combine_digests([stage.row_digest(row) for row in alone])
    assert len({(row["image_id"], row["object_id"]) for row in rows}) == IMAGES
    assert len({row["iou"] for row in rows}) > IMAGES  # the model does react
    assert all(float(str(row["ms"])) > 0 for row in rows)
    assert output.summary["excluded"] == [f"{EMPTY}, object 1: no pixel of the object"]
    assert output.summary["protocol"]["fingerprint"] == protocol_fingerprint(CONFIG, ZOOM)
    assert output.summary["protocol"]["zoom_size"] == ZOOM
    assert output.summary["protocol"]["max_clicks"] == 3
    assert f"clicks of folder: {IMAGES}/{IMAGES} images" in capfd.readouterr().err


@pytest.mark.ray
def test_a_killed_evaluation_goes_on_where_it_was(
    benchmark: Dataset, model_dir: Storage, alone: list[dict[str, object]], tmp_path: Path, ray_cluster: None
) -> None:
    import ray

    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_evaluate import CONFIG, ZOOM, open_dataset, stage, Resources, Storage
benchmark = open_dataset("folder:{benchmark.root}", split="val")
stage.CHUNK_IMAGES = 2
resources = Resources(eval_workers=1, use_gpu=False)
stage.evaluate_model(benchmark, Storage({model_dir.uri!r}), CONFIG, ZOOM, resources, Storage({str(tmp_path)!r}))
"""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    killed = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("clicks-*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    _, noise = killed.communicate()
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("clicks-*.parquet")}
    assert 1 <= len(kept) < IMAGES // 2, noise

    out = Storage(str(tmp_path))
    output = stage.evaluate_model(benchmark, model_dir, CONFIG, ZOOM, Resources(use_gpu=False), out)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert without_times(rows_in(out, output)) == without_times(alone)
    assert output.digest == combine_digests([stage.row_digest(row) for row in alone])


@dataclass(frozen=True)
class Dying(stage.Overlapping):
    """Its worker dies once, in the middle of the second chunk."""

    scar: Path

    def score(self, image_ids: Sequence[str], tell: stage.Tell) -> stage.Scored:
        if self.dataset.image_ids[8] in image_ids and not self.scar.exists():
            self.scar.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(image_ids, tell)


@pytest.mark.ray
def test_a_worker_that_dies_is_replaced(
    benchmark: Dataset, trees: Storage, tmp_path: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    out = Storage(str(tmp_path / "out"))
    job = Dying(benchmark, trees, True, tmp_path / "scar")
    found = stage._score(job, 8, Resources(eval_workers=1), 0, out)
    assert job.scar.exists()
    assert [each.image_ids for each in found] == [benchmark.image_ids[:8], benchmark.image_ids[8:]]
    assert sum(each.part.rows for each in found) == IMAGES - 1


@dataclass(frozen=True)
class Hanging(stage.Overlapping):
    """The worker of the first chunk stops for ever, and says which process it is."""

    scar: Path

    def score(self, image_ids: Sequence[str], tell: stage.Tell) -> stage.Scored:
        if self.dataset.image_ids[0] in image_ids and not self.scar.exists():
            self.scar.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().score(image_ids, tell)


@pytest.mark.ray
@pytest.mark.slow
def test_the_chunk_of_a_worker_that_hangs_is_taken_over(
    benchmark: Dataset, trees: Storage, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "SILENT_SECONDS", 1.0)
    job = Hanging(benchmark, trees, True, tmp_path / "scar")
    try:
        found = stage._score(job, 5, Resources(eval_workers=2), 0, Storage(str(tmp_path / "out")))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.scar.read_text()), signal.SIGKILL)
    assert [each.image_ids for each in found] == [benchmark.image_ids[:5], benchmark.image_ids[5:]]
    assert sum(each.part.rows for each in found) == IMAGES - 1


@pytest.mark.ray
def test_errors_arrive_as_they_were_raised(model_dir: Storage, tmp_path: Path, ray_cluster: None) -> None:
    broken = make_benchmark(tmp_path / "broken")
    (tmp_path / "broken" / "images" / "photo-02.png").write_bytes(b"not a picture")
    out = Storage(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"^folder: photo photo-02 cannot be used: NOT_AN_IMAGE"):
        stage.evaluate_model(broken, model_dir, CONFIG, ZOOM, Resources(eval_workers=1, use_gpu=False), out)
    with pytest.raises(ValueError, match="the cluster has no GPU"):
        stage.evaluate_model(broken, model_dir, CONFIG, ZOOM, Resources(use_gpu=True), out)


@pytest.mark.ray
def test_a_benchmark_of_empty_masks_has_no_score(
    benchmark: Dataset, model_dir: Storage, trees: Storage, tmp_path: Path, ray_cluster: None
) -> None:
    empty = replace(benchmark, samples=tuple(each for each in benchmark.samples if each.image_id == EMPTY))
    out = Storage(str(tmp_path))
    scored = stage.Scored([], [f"{EMPTY}, object 1: no pixel of the object"])
    stage.write_part(job_of(empty, model_dir), [EMPTY], scored, out)
    with pytest.raises(DataError, match="no object to score"):
        stage.evaluate_model(empty, model_dir, CONFIG, ZOOM, Resources(use_gpu=False), out)
    stage.write_part(stage.Overlapping(empty, trees, are_trees=True), [EMPTY], scored, out)
    with pytest.raises(DataError, match="no object with a proposal"):
        stage.evaluate_proposals(empty, trees, True, Resources(), out)


def test_a_directory_without_a_model_is_refused(benchmark: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^\S+ holds no model: config.json is missing$"):
        job_of(benchmark, Storage(str(tmp_path))).score(benchmark.image_ids, silent)


@pytest.mark.ray
def test_a_worker_that_cannot_be_placed_is_not_waited_for(
    benchmark: Dataset, trees: Storage, tmp_path: Path, ray_cluster: None
) -> None:
    """Somebody else holds half of the CPUs for ever; the chunks go to the workers that there is room for."""

    class Holder:
        def here(self) -> bool:
            return True

    cpus = int(ray.cluster_resources()["CPU"])
    if cpus < 2:
        pytest.skip("needs two CPUs: one to be held, one to work")
    holders = [ray.remote(Holder).options(num_cpus=1).remote() for _ in range(max(1, cpus // 2))]
    try:
        assert ray.get([holder.here.remote() for holder in holders], timeout=60)
        job = stage.Overlapping(stage._absolute(benchmark), trees, are_trees=True)
        found = stage._score(job, 1, Resources(eval_workers=cpus), 0, Storage(str(tmp_path / "out")))
        assert len(found) == len(benchmark)
    finally:
        for holder in holders:
            ray.kill(holder)


# -- methods that need no training -----------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_method_is_asked_on_the_cluster(benchmark: Dataset, ray_cluster: None, tmp_path: Path) -> None:
    out = Storage(str(tmp_path / "out"))
    output = stage.evaluate_method(benchmark, "geodesic", ClassicalConfig(), CONFIG, Resources(eval_workers=2), out)
    model = stage.build_click_model("geodesic", ClassicalConfig())
    samples = (
        Sample(
            benchmark.name,
            image_id,
            np.asarray(Image.open(benchmark.image_path(image_id))),
            benchmark.read_objects(image_id),
        )
        for image_id in benchmark.image_ids
    )
    alone = list(evaluate_click_model(model, samples, CONFIG))
    assert [
        {**row, "iou": float(row["iou"]), "y": float(row["y"]), "x": float(row["x"])} for row in without_times(alone)
    ] == without_times(rows_in(out, output))
    assert output.summary["protocol"]["family"] == "geodesic"
    assert output.summary["excluded"] == [f"{EMPTY}, object 1: no pixel of the object"]


OWN = """
import numpy as np

class Everything:
    def set_image(self, image):
        self.size = image.shape[:2]

    def predict(self, clicks, previous):
        return np.full(self.size, 1, np.float32)

class Nothing:
    pass

class Wanting(Everything):
    def __init__(self, weights):
        pass

class Weightless(Everything):
    def __init__(self):
        open("no-such-weights.pth")

class Failing(Everything):
    def predict(self, clicks, previous):
        raise RuntimeError("out of memory")
"""


def test_a_class_of_ones_own_is_addressed_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_click_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = stage.build_click_model("own_click_model:Everything", ClassicalConfig())
    model.set_image(np.zeros((4, 5, 3), np.uint8))
    assert model.predict([], np.zeros((4, 5), np.float32)).all()
    identity = stage.method_identity("own_click_model:Everything", ClassicalConfig())
    assert identity == {"name": "own_click_model:Everything", "source": sha256(OWN.encode())}
    with pytest.raises(ValueError, match="a ClickModel needs set_image"):
        stage.build_click_model("own_click_model:Nothing", ClassicalConfig())
    with pytest.raises(ValueError, match="has no attribute 'Missing'"):
        stage.build_click_model("own_click_model:Missing", ClassicalConfig())
    with pytest.raises(ValueError, match="the module must be importable"):
        stage.build_click_model("no_such_module:Model", ClassicalConfig())


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_broken_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_broken_model"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Wanting", r"missing 1 required positional argument: 'weights'"),
        ("Weightless", r"FileNotFoundError: .*no-such-weights.pth' \(.*own_broken_model.py, line 20\)"),
    ],
)
def test_a_class_that_cannot_be_built(own_module: str, name: str, said: str) -> None:
    method = f"{own_module}:{name}"
    with pytest.raises(ValueError, match=f"method={method}: its constructor, called without arguments: .*{said}"):
        stage.build_click_model(method, ClassicalConfig())


@pytest.mark.parametrize("text", ["1 / 0", "def (", "open('nothing-here')"])
def test_a_module_that_fails_when_it_is_imported(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_failing_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"method=own_failing_module:Model: .*; the module must be importable"):
        stage.method_identity("own_failing_module:Model", ClassicalConfig())


def test_an_error_of_ones_own_class_is_one_of_the_data(benchmark: Dataset, own_module: str) -> None:
    job = stage.Answering(benchmark, f"{own_module}:Failing", ClassicalConfig(), CONFIG)
    image_id = next(each for each in benchmark.image_ids if each != EMPTY)
    with pytest.raises(DataError, match=rf"{image_id}, object .*:Failing.predict: RuntimeError: out of memory"):
        job.score([image_id], lambda images, rows: None)


def test_settings_of_a_classical_method_are_its_identity() -> None:
    one = stage.method_identity("esc", ClassicalConfig())
    assert one["settings"]["seed_radius"] == ClassicalConfig().seed_radius
    assert one != stage.method_identity("esc", ClassicalConfig(seed_radius=3))
    assert one != stage.method_identity("gsc", ClassicalConfig())
