"""Every Parquet schema of the platform. Plain Arrow types, so that any Parquet reader understands the files."""

import pyarrow as pa

TREES_VERSION = 1
_VERSION_KEY = b"mis_platform.trees"


def _list_of(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value, nullable=False))


def _required(*columns: tuple[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=False) for name, kind in columns]


# One row per image. The grid has N = grid_height * grid_width patches, row-major; node N+k is the k-th merge.
TREES = pa.schema(
    _required(
        ("image_id", pa.string()),
        ("image_height", pa.int32()),  # pixels, after EXIF rotation
        ("image_width", pa.int32()),
        ("grid_height", pa.int32()),  # patches
        ("grid_width", pa.int32()),
        ("children", _list_of(pa.int32())),  # 2(N-1) values: MergeTree.children row by row
        ("costs", _list_of(pa.float32())),  # N-1 values: Ward cost of each merge
    ),
    metadata={_VERSION_KEY: str(TREES_VERSION).encode()},
)

# One row per photo: the masks of TokenCut, Deep Spectral Methods or FreeMask. A method may find none.
PROPOSALS = pa.schema(
    _required(
        ("image_id", pa.string()),
        ("image_height", pa.int32()),  # pixels, after EXIF rotation
        ("image_width", pa.int32()),
        ("scores", _list_of(pa.float32())),  # K values: the method's confidence in each mask, 1 if it has none
        ("areas", _list_of(pa.int32())),  # K values: pixels
        # K lists of run lengths as in uncompressed RLE of COCO: column by column, zeros and ones in turn, zeros first.
        ("masks", _list_of(_list_of(pa.int32()))),
    )
)

# One row per image that was refused.
QUARANTINE = pa.schema(
    _required(
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("stage", pa.string()),  # "decode", "features", "merge"
        ("reason", pa.string()),  # name of a Reason
        ("message", pa.string()),
    )
)

# One row per click of an evaluation.
CLICKS = pa.schema(
    _required(
        ("dataset", pa.string()),
        ("image_id", pa.string()),
        ("object_id", pa.string()),
        ("click", pa.int32()),  # 1..20
        ("y", pa.float32()),  # pixels, the origin is the top left
        ("x", pa.float32()),
        ("positive", pa.bool_()),
        ("iou", pa.float32()),  # after this click, in [0, 1]
        ("ms", pa.float32()),  # milliseconds the click took
    )
)

# One row per benchmark object: how well the proposals of its photo could name it.
OVERLAPS = pa.schema(
    _required(
        ("dataset", pa.string()),
        ("image_id", pa.string()),
        ("object_id", pa.string()),
        ("best_iou", pa.float32()),  # the best IoU any proposal reaches, in [0, 1]
        ("node", pa.int32()),  # the first that reaches it: a node of the tree or the number of a mask; -1 for none
        ("area", pa.float32()),  # share of the photo that the object covers
        ("proposals", pa.int32()),  # of the photo; of a tree, the nodes above the paper's 5 % of its patches
        ("proposal_area", pa.float32()),  # their median share of the photo; NaN without any
    )
)


def check_version(schema: pa.Schema) -> None:
    """Raises ValueError when a file of trees states a version that cannot be read here.

    One that states none has the columns of version 1: Ray Data drops a schema's metadata.
    """
    text = (schema.metadata or {}).get(_VERSION_KEY, b"1").decode(errors="replace")
    if text != str(TREES_VERSION):
        raise ValueError(f"trees of version {text}; this version of mis_platform reads version {TREES_VERSION}")
