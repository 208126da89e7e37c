"""Everything that reads what others may have written: changed at random, it is read or refused, and nothing else.

A few hundred cases of each by default; nightly a hundred thousand of each. Photos, annotations, archives, pickles and
weights have their own such tests beside their readers.
"""

import hashlib
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mis_platform.artifacts import MANIFEST, Part, check_identity, read_manifest
from mis_platform.config import Resources, Run, fingerprint, override
from mis_platform.data.proposals import ProposalReader, Proposals, decode_mask, proposal_row
from mis_platform.data.proposals import rows_to_table as proposals_to_table
from mis_platform.data.trees import TreeReader, rows_to_table, tree_from_row, tree_row
from mis_platform.errors import FingerprintMismatch
from mis_platform.evaluation.noc import summarize
from mis_platform.model.weights import eval_config, licence_of, parse_config
from mis_platform.report import read_score
from mis_platform.simulation.ward import merge
from mis_platform.storage import Storage
from mis_platform.verification import verify

Case = Callable[[random.Random], object]

ODD = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, -0.5),
    *("", "x", "../../x", "\0", "é\n", [], {}, [[]], [None], {"a": 1}),
]


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes overwritten, cut out, doubled, or the end cut off."""
    result = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(result) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(result):
            result[at] = rng.choice((0, 1, 34, 48, 91, 123, 125, 127, 128, 255, rng.randrange(256)))
        elif kind == 1:
            del result[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            result[at:at] = result[at : at + rng.randrange(1, 9)]
        elif rng.randrange(4) == 0:
            del result[at:]
    return bytes(result)


def changed_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it replaced by something odd, taken out, or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: changed_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return [*value[:at], *value[at : at + 1] * rng.choice((0, 2)), *value[at + 1 :]]
        return [*value[:at], changed_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def trees() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    grids = [(2, 3), (4, 4), (1, 5)]
    made = [merge(rng.normal(size=(h * w, 4)).astype(np.float32), (h, w)) for h, w in grids]
    return [tree_row(f"photo-{k}", (40, 50), tree) for k, tree in enumerate(made)]


def plain_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in rows]


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def manifest_of(content: bytes, rows: int, **more: Any) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    part = vars(Part(name="part.parquet", rows=rows, bytes=len(content), sha256=digest, digest=digest))
    about = {"stage": "trees", "version": 1, "config": {"a": {"b": 1}}, "inputs": {}, "fingerprint": "0" * 16}
    return {**about, "digest": digest, "parts": [part], "summary": {}, "information": {}, **more}


def write(folder: Path, manifest: bytes, content: bytes) -> Storage:
    (folder / MANIFEST).write_bytes(manifest)
    (folder / "part.parquet").write_bytes(content)
    return Storage(str(folder))


# -- the cases -------------------------------------------------------------------------------------------------------


class Known:
    """As much of a stage as `check_identity` looks at."""

    name, fingerprint = "trees", "0" * 16

    def identity(self) -> dict[str, Any]:
        return {"stage": "trees", "version": 1, "config": {"a": {"b": 1}}, "inputs": {}}


def manifests(folder: Path) -> Case:
    content = parquet(rows_to_table(trees()))
    whole = manifest_of(content, 3)
    text = json.dumps(whole).encode()

    def case(rng: random.Random) -> object:
        changed = json.dumps(changed_value(whole, rng)).encode() if rng.random() < 0.7 else changed_bytes(text, rng)
        storage = write(folder, changed, content)
        check_identity(Known(), read_manifest(storage))  # type: ignore[arg-type]
        reader = TreeReader(storage)
        return [reader.tree(image_id) for image_id in reader.image_ids]

    return case


def tree_parts(folder: Path) -> Case:
    """Parts that were changed together with their checksum; `mis verify` looks at each and raises nothing."""
    content = parquet(rows_to_table(trees()))
    address = fingerprint(Known().identity())
    (folder / "trees" / address).mkdir(parents=True)

    def case(rng: random.Random) -> object:
        changed = changed_bytes(content, rng)
        manifest = json.dumps(manifest_of(changed, 3, fingerprint=address)).encode()
        storage = write(folder / "trees" / address, manifest, changed)
        verdict = verify(Storage(str(folder)))
        assert verdict.parts == 1
        assert all("\n" not in problem.what for problem in verdict.problems)
        reader = TreeReader(storage)
        return [reader.tree(image_id) for image_id in reader.image_ids]

    return case


def proposal_parts(folder: Path) -> Case:
    masks = np.random.default_rng(0).random((3, 5, 7)) > 0.5
    rows = [proposal_row(f"photo-{k}", Proposals(masks[:k], np.ones(k, np.float32))) for k in range(3)]
    content = parquet(proposals_to_table(rows))

    def case(rng: random.Random) -> object:
        changed = changed_bytes(content, rng)
        storage = write(folder, json.dumps(manifest_of(changed, 3)).encode(), changed)
        reader = ProposalReader(storage)
        return [reader.masks(image_id) for image_id in reader.image_ids]

    return case


def tree_rows(folder: Path) -> Case:
    rows = plain_rows(trees())

    def case(rng: random.Random) -> object:
        row = dict(rng.choice(rows))
        name = rng.choice(("children", "costs", "grid_height", "grid_width", "image_height"))
        if isinstance(row[name], list):
            values = list(row[name])
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(values))
                odd = rng.choice((-1, 0, 1, 2, 7, 31, 2**31 - 1, values[0]))
                values[at : at + 1] = rng.choice(([odd], [], [odd, odd]))
                values = values or [0]
            row[name] = values
        else:
            row[name] = rng.choice((-1, 0, 1, 2, 5, 2**31 - 1))
        return tree_from_row(row).validate()

    return case


def mask_runs(folder: Path) -> Case:
    def case(rng: random.Random) -> object:
        runs = [rng.choice((0, 1, 5, 12, -1, 2**31 - 1)) for _ in range(rng.randrange(6))]
        mask = decode_mask(np.array(runs, np.int32), rng.choice((1, 3, 4)), rng.choice((1, 4)))
        assert mask.dtype == bool
        return mask

    return case


def click_tables(folder: Path) -> Case:
    columns = {
        "dataset": ["a"] * 6,
        "image_id": ["x", "x", "x", "y", "y", "y"],
        "object_id": ["1"] * 6,
        "click": [1, 2, 3, 1, 2, 3],
        "iou": [0.1, 0.5, 0.9, 0.2, 0.2, 0.2],
        "ms": [1.0] * 6,
    }

    def case(rng: random.Random) -> object:
        rows = [rng.randrange(6) for _ in range(rng.randrange(8))] if rng.random() < 0.5 else list(range(6))
        table = {name: [values[row] for row in rows] for name, values in columns.items()}
        for _ in range(rng.randrange(3)):
            if rows:
                name = rng.choice(("click", "iou", "ms"))
                table[name][rng.randrange(len(rows))] = rng.choice((-1, 0, 1, 2, 20, 21, 10**9))
        summary = summarize(pa.table(table), max_clicks=20)
        assert math.isfinite(summary.seconds)
        return summary

    return case


def click_manifests(folder: Path) -> Case:
    names = {"dataset": ["a"] * 2, "image_id": ["x", "x"], "object_id": ["1", "1"], "click": [1, 2]}
    content = parquet(pa.table({**names, "iou": [0.5, 0.9], "ms": [1.0, 1.0]}))
    whole = manifest_of(content, 2, summary={"protocol": {"max_clicks": 2, "fingerprint": "x"}, "excluded": []})

    def case(rng: random.Random) -> object:
        return read_score(write(folder, json.dumps(changed_value(whole, rng)).encode(), content), "model")

    return case


def model_configs(folder: Path) -> Case:
    whole = {"variant": "vit_b", "image_size": [224, 448], "family": "simpleclick", "run": {"model": {"init": "mae"}}}
    whole |= {"eval": {"zoom_size": 448, "flip": True}, "source": {"file": "x"}, "licence": "x"}
    text = json.dumps(whole).encode()

    def case(rng: random.Random) -> object:
        changed = json.dumps(changed_value(whole, rng)).encode() if rng.random() < 0.6 else changed_bytes(text, rng)
        config = parse_config(changed, "config.json")
        assert isinstance(licence_of(config), str)
        return eval_config(config)

    return case


def settings(folder: Path) -> Case:
    names = ["sampling.alpha", "lamda", "train.epochs", "train.decay_epochs", "eval_datasets", "features.weights", "x"]
    values = ["1.5", "nan", "1e400", '"10"', "[1, 2]", "{}", "null", "", "[[[[", "!!python/object:x", "\t", "0.9"]

    def case(rng: random.Random) -> object:
        text = f"{rng.choice(names)}{rng.choice('= ')}{rng.choice(values)}"
        if rng.random() < 0.5:
            text = changed_bytes(text.encode(), rng).decode("utf8", "replace")
        return override(rng.choice((Run(), Resources())), [text.replace("\n", " ")])  # it is repeated in the message

    return case


CASES = (
    *(manifests, tree_parts, proposal_parts, tree_rows, mask_runs),
    *(click_tables, click_manifests, model_configs, settings),
)


def hold(case: Case, count: int, seed: int, seconds: float = 60.0) -> tuple[int, int]:
    """How many cases were refused and how many there were, at most `count`, for about `seconds`.

    An exception of any other kind, or a message of several lines, is a failure.
    """
    refused, began = 0, time.monotonic()
    for number in range(count):
        try:
            case(random.Random(seed * 10**9 + number))
        except (ValueError, FingerprintMismatch) as error:
            refused += 1
            if "\n" in str(error).strip():
                raise AssertionError(f"case {number} is told in several lines: {error}") from error
        except Exception as error:
            raise AssertionError(f"case {number} ended in {type(error).__name__}: {error}") from error
        if time.monotonic() - began > seconds:
            return refused, number + 1
    return refused, count


@pytest.mark.parametrize("cases", CASES, ids=lambda cases: cases.__name__)
def test_what_was_changed_is_read_or_refused(cases: Callable[[Path], Case], tmp_path: Path) -> None:
    refused, count = hold(cases(tmp_path), 150, seed=0, seconds=10)
    assert refused > count / 10


def shorter_lists(content: bytes) -> list[bytes]:
    """A Parquet file with each list of whole numbers in its footer, in turn, one entry shorter than it should be."""
    length = int.from_bytes(content[-8:-4], "little")
    body, footer = content[: -8 - length], content[-8 - length : -8]
    places = [k for k in range(len(footer) - 1) if footer[k] in (0x26, 0x36, 0x46) and footer[k + 1] < 128]
    shorter = [
        footer[:k] + bytes([footer[k] - 16]) + footer[k + 2 :] for k in places
    ]  # Thrift: count and type, then it
    return [body + each + len(each).to_bytes(4, "little") + b"PAR1" for each in shorter]


def test_a_footer_that_contradicts_itself_does_not_end_the_process(tmp_path: Path) -> None:
    """pyarrow's own look at such a column is an abort(), so another process looks here."""
    (tmp_path / "parts.json").write_text(
        json.dumps([each.hex() for each in shorter_lists(parquet(rows_to_table(trees())))])
    )
    script = """
import json, sys
from mis_platform.data.trees import decode
told = []
for part in json.load(open(sys.argv[1])):
    try:
        decode(bytes.fromhex(part))
    except ValueError as error:
        told.append(str(error))
print(sum("histogram size mismatch" in each for each in told), len(told))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "parts.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    contradictory, refused = map(int, done.stdout.split())
    assert 0 < contradictory <= refused


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cases", CASES, ids=lambda cases: cases.__name__)
def test_a_hundred_thousand_changes(cases: Callable[[Path], Case], tmp_path: Path) -> None:
    """Or ten minutes of them."""
    refused, count = hold(cases(tmp_path), 100_000, seed=1, seconds=600)
    assert refused > count / 10
