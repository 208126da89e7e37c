"""Bottom-up merging: Ward's method on a 4-connected patch grid (Algorithm 1, Equations 1-4).

The two adjacent regions whose union adds least to the summed squared error are merged, until one is left. The order of
merges is that of a float64 implementation, near-ties included, at the price of float32. Notable choices:

* **Filter and refine.** A cost is known as an interval, from float32 centres or from the costs before a merge; only if
  that cannot tell which cost is the least one, from the patches themselves in float64.
* **All costs of a union at once.** Bounds could spare a few per cent of the distances; they cost more than those, in
  roots and in branches that cannot be predicted. Rows of centres are fetched while the lists of neighbours are joined.
* **One candidate per region.** The newer region of each adjacent pair owns the pair. A tournament tree over the regions
  holds the best pair of each; a pair that is gone is noticed when it comes up, and replaced then.
* **Matches without branches.** Key and slot of a match are one integer, so that the winner is a minimum: the branches
  of a comparison cannot be predicted, and cost a quarter of the time. Only equal keys are looked at more closely.
* **Nothing is allocated while merging.** Both neighbours list the same pair; a union chains the lists of its parts.

A region is named by its slot, one of its patches, which also is its row of `centres`.
"""

import math
import threading
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mis_platform.simulation.tree import MergeTree

ROUNDOFF = 2.0**-24  # of float32, relative
LANES = 8  # partial sums that a compiler keeps at least when it vectorises a float32 sum
LARGEST_NORM = 1e15  # of a feature, so that no cost overflows float32
ALIGNMENT = 64  # bytes: a cache line, so that no vector load crosses one
KEY_BITS = np.uint64(0xFFFFFFFF00000000)  # of a ticket: the upper half of a cost; the lower half holds the slot
NO_TICKET = np.uint64(1 << 63)  # or larger: of a slot without an edge, above the bits of any cost
ROWS_AHEAD = 4  # of the features, fetched while the first costs are computed
ROWS_APART = 64  # 256 bytes at least: what is read right behind a row being written keeps a loop from being vectorised
LINES_AHEAD = 24  # of a row: 384 channels. A loop up to its end costs half of the gain; what is beyond does no harm

_EDGE = np.dtype(
    [
        ("lower", np.float64),  # bounds of the cost (Equation 4)
        ("upper", np.float64),
        ("ends", np.int32),  # exclusive-or of both slots: with one of them it gives the other
        ("owner", np.int32),  # slot of the newer region, -1 for an edge that is gone
    ],
    align=True,
)
_REGION = np.dtype(
    [
        ("size", np.float64),  # patches
        ("error", np.float64),  # bound on the distance between the float32 centre and the true one
        ("second", np.float64),  # second-least lower bound of the edges it owns
        ("key", np.float64),  # its ticket's, whole
        ("best", np.int32),  # edge with the least one
        ("node", np.int32),  # in the tree
        ("first", np.int32),  # its list of entries; entries 2e and 2e+1 stand for edge e, one in each list
        ("last", np.int32),
        ("next_patch", np.int32),  # chain of the patches of a region, starting at its slot
        ("last_patch", np.int32),
        ("mark", np.int32),  # while two regions merge: the edge whose cost is to be computed, else -1
    ],
    align=True,
)


class _State(NamedTuple):
    """What the merging works on; N patches, E pairs of neighbours."""

    features: np.ndarray  # float32 [N, C], never changed
    centres: np.ndarray  # float32 [N + ROWS_APART, C], one per slot; the last one stands for what is outside the grid
    edges: np.ndarray  # _EDGE [E]
    following: np.ndarray  # int32 [2E], next entry of the same list, -1 at the end
    regions: np.ndarray  # _REGION [N]
    tournament: np.ndarray  # uint64 [2 * capacity], tickets: place i has children 2i, 2i+1; slot s is at capacity + s
    exact: np.ndarray  # float64 [2, C], the last centres computed from patches: of an owner and of the other end
    exact_node: np.ndarray  # int32 [2], whose they are


# Counting references to these arrays inside would cost a tenth of the time, and so would calls that hand them over:
# hence no reference counts (all memory belongs to `merge`), and the steps are written into the kernels.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
_kernel = njit(nogil=True, cache=True, **_OPTIONS)
_step = njit(inline="always", **_OPTIONS)
_vector_loop = njit(fastmath={"reassoc", "contract"}, **_OPTIONS)


def merge(features: np.ndarray, grid: tuple[int, int] | None = None) -> MergeTree:
    """The merge tree of patch features (Algorithm 1).

    features: float32 [N, C], patches in row-major order, or [grid_height, grid_width, C]; finite, norms below 1e15.
    grid: (height, width) in patches; may be left out for three-dimensional features.
    Equal costs: the pair whose newer node is older goes first, then the one whose older node is.
    Raises ValueError for a shape that does not fit the grid and for NaN or infinite features.
    """
    features, grid = _checked(features, grid)
    state = _new_state(features, 2 * len(features) - grid[0] - grid[1])
    radius = _lay_grid(state, *grid)
    if not radius < LARGEST_NORM:
        raise ValueError(f"features must be finite, with norms below {LARGEST_NORM:g}; some are NaN or larger")
    children, costs = np.empty((len(features) - 1, 2), np.int32), np.empty(len(features) - 1, np.float32)
    _merge_all(state, radius, children, costs)
    return MergeTree(children=children, costs=costs, grid=grid)


def warm_up() -> None:
    """Compiles (or loads from numba's cache) what `merge` needs, so that the first photo is as fast as the others."""
    merge(np.arange(12, dtype=np.float32).reshape(2, 3, 2) ** 2)


def _checked(features: np.ndarray, grid: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    features = np.asarray(features)
    if features.ndim == 3:
        grid = features.shape[:2] if grid is None else grid
        if tuple(grid) != features.shape[:2]:
            raise ValueError(f"features of shape {features.shape} do not lie on a {grid[0]}x{grid[1]} grid")
        features = features.reshape(-1, features.shape[2])
    if features.ndim != 2 or grid is None:
        raise ValueError(f"features must be [N, C] with a grid, or [height, width, C]; got shape {features.shape}")
    if len(features) != grid[0] * grid[1] or features.size == 0:
        raise ValueError(f"a {grid[0]}x{grid[1]} grid needs one feature row per patch, got shape {features.shape}")
    return np.require(features, np.float32, ["C", "W"]), (int(grid[0]), int(grid[1]))


def _new_state(features: np.ndarray, num_edges: int) -> _State:
    """Memory alone; `_lay_grid` fills it."""
    count, dimensions = features.shape
    capacity = 1 << (count - 1).bit_length()
    return _State(
        features=features,
        centres=_aligned_empty(count + ROWS_APART, dimensions),
        edges=np.empty(num_edges, _EDGE),
        following=np.empty(2 * num_edges, np.int32),
        regions=np.empty(count, _REGION),
        tournament=np.empty(2 * capacity, np.uint64),
        exact=np.empty((2, dimensions)),
        exact_node=np.full(2, -1, np.int32),
    )


_memory = threading.local()


def _aligned_empty(rows: int, columns: int) -> np.ndarray:
    """Uninitialised float32 [rows, columns] that starts on a cache line, in memory that this thread used before.

    Megabytes fresh from the system cost a page fault for every four kilobytes, together an eighth of a merging.
    """
    size = rows * columns * 4
    buffer: np.ndarray | None = getattr(_memory, "buffer", None)
    if buffer is None or not size + ALIGNMENT <= len(buffer) <= 4 * size + ALIGNMENT:
        buffer = _memory.buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(rows, columns)


@_step
def _append(state: _State, slot: int, entry: int) -> None:
    """Adds an entry to the list of a region."""
    region = state.regions[slot]
    if region.first < 0:
        region.first = entry
    else:
        state.following[region.last] = entry
    region.last = entry
    state.following[entry] = -1


@intrinsic
def _prefetch(_typing_context: Any, rows: Any, row: Any) -> Any:
    """Has the start of rows[row] fetched into the cache, without waiting: LLVM can, but numba has no name for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, row_type = signature.args
        array = context.make_array(array_type)(context, builder, arguments[0])
        place = [context.cast(builder, arguments[1], row_type, types.intp), context.get_constant(types.intp, 0)]
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        start = builder.bitcast(cgutils.get_item_pointer(context, builder, array_type, array, place), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        how = [number(0), number(3), number(1)]  # to read, into all levels, data
        for line in range(LINES_AHEAD):
            builder.call(fetch, [builder.gep(start, [number(line * ALIGNMENT)]), *how])
        return context.get_dummy_value()

    return types.void(rows, row), generate


@_step
def _prefetch_row(rows: np.ndarray, row: int) -> None:
    """Short rows are not worth it: few bytes, and all of them are in the second-level cache anyway."""
    if rows.shape[1] >= 128:
        _prefetch(rows, row)  # type: ignore[call-arg]  # numba passes the typing context


@_vector_loop
def _copy_row(source: np.ndarray, target: np.ndarray, row: int, left: int, above: int) -> tuple[float, float, float]:
    """Copies a row. Returns its squared norm, NaN or infinite if any value is, and squared distances to two rows."""
    norm = to_left = to_above = np.float32(0)
    for k in range(source.shape[1]):
        value = source[row, k]
        target[row, k] = value  # before all reads: earlier rows may then be read in whole vectors
        norm += value * value
        difference = value - target[left, k]
        to_left += difference * difference
        difference = value - target[above, k]
        to_above += difference * difference
    return np.float64(norm), np.float64(to_left), np.float64(to_above)


@_vector_loop
def _squared_distance(centres: np.ndarray, a: int, b: int) -> float:
    total = np.float32(0)
    for k in range(centres.shape[1]):
        difference = centres[a, k] - centres[b, k]
        total += difference * difference
    return np.float64(total)


@_vector_loop
def _move_centre(centres: np.ndarray, a: int, b: int, weight: float) -> None:
    """Equation 3, written so that equal centres stay exactly equal."""
    share = np.float32(weight)
    for k in range(centres.shape[1]):
        centres[a, k] += (centres[b, k] - centres[a, k]) * share


@_step
def _weight(size_a: float, size_b: float) -> float:
    return size_a * size_b / (size_a + size_b)


@_step
def _round_cost(state: _State, edge: np.record) -> None:
    """Equation 4 in float32. The sum is off by its roundings, the centres by their own errors."""
    slot_a, slot_b = edge.owner, edge.ends ^ edge.owner
    a, b = state.regions[slot_a], state.regions[slot_b]
    squared = _squared_distance(state.centres, slot_a, slot_b)
    error = a.error + b.error
    doubt = _sum_error(state) * squared + error * (2 * math.sqrt(squared) + error)
    weight = _weight(a.size, b.size)
    edge.lower = weight * max(squared - doubt, 0.0)
    edge.upper = weight * (squared + doubt)


@_step
def _sum_error(state: _State) -> float:
    """Bound on the relative error of a float32 sum over channels: one rounding per term of a lane."""
    return ROUNDOFF * (state.centres.shape[1] / LANES + LANES + 2)


@_step
def _exact_cost(state: _State, edge: np.record) -> None:
    """Equation 4 in float64, from the patches themselves."""
    slot_a, slot_b = edge.owner, edge.ends ^ edge.owner
    _keep_exact_centre(state, slot_a, 0)
    _keep_exact_centre(state, slot_b, 1)
    squared = _exact_distance(state.exact)
    edge.lower = edge.upper = squared * _weight(state.regions[slot_a].size, state.regions[slot_b].size)


@_step
def _keep_exact_centre(state: _State, slot: int, row: int) -> None:
    """Puts the centre of a region into a row of `exact`, unless it is there: a run of ties is about one region."""
    if state.exact_node[row] != state.regions[slot].node:
        _exact_centre(state.features, state.regions, slot, state.exact, row)
        state.exact_node[row] = state.regions[slot].node


@_vector_loop
def _exact_centre(features: np.ndarray, regions: np.ndarray, slot: int, target: np.ndarray, row: int) -> None:
    """Mean feature of the patches of a region, in float64."""
    for k in range(features.shape[1]):
        target[row, k] = 0.0
    patch = slot
    while patch >= 0:
        for k in range(features.shape[1]):
            target[row, k] += features[patch, k]
        patch = regions[patch].next_patch
    for k in range(features.shape[1]):
        target[row, k] /= regions[slot].size


@_vector_loop
def _exact_distance(exact: np.ndarray) -> float:
    """Squared distance between both rows."""
    total = 0.0
    for k in range(exact.shape[1]):
        difference = exact[0, k] - exact[1, k]
        total += difference * difference
    return total


@_step
def _combine_costs(
    edge_a: np.record, edge_b: np.record, joined: np.record, size_a: float, size_b: float, size: float
) -> None:
    """Cost between a union and a neighbour of both its parts, from those of the parts (Lance and Williams 1967)."""
    share_a, share_b, share = size_a + size, size_b + size, size_a + size_b + size
    lower = (share_a * edge_a.lower + share_b * edge_b.lower - size * joined.upper) / share
    edge_a.upper = (share_a * edge_a.upper + share_b * edge_b.upper - size * joined.lower) / share
    edge_a.lower = max(lower, 0.0)


@_step
def _choose_best(state: _State, slot: int) -> float:
    """Finds the best edge that `slot` owns and the second-best lower bound.

    Returns the lower bound of the best one, infinite if there is none.
    """
    best, lowest, second = -1, np.inf, np.inf
    entry = state.regions[slot].first
    while entry >= 0:
        edge = state.edges[entry >> 1]
        lower = edge.lower if edge.owner == slot else np.inf
        best, lowest, second = _better(state, slot, best, lowest, second, entry >> 1, lower)
        entry = state.following[entry]
    state.regions[slot].best = best
    state.regions[slot].second = second
    return lowest


@_step
def _better(
    state: _State, slot: int, best: int, lowest: float, second: float, candidate: int, lower: float
) -> tuple[int, float, float]:
    """Best edge of a slot, its lower bound and the second-best one, with a candidate; branches for ties only."""
    edges, regions = state.edges, state.regions
    second = min(second, max(lower, lowest))
    tie = lower == lowest and best >= 0
    if tie and regions[edges[candidate].ends ^ slot].node < regions[edges[best].ends ^ slot].node:
        best = candidate
    best = candidate if lower < lowest else best
    return best, min(lower, lowest), second


@_step
def _ticket(slot: int, key: float) -> np.uint64:
    """Orders slots as their keys do, but for the lower half of the bits: floats not below zero sort as integers do.

    Without an edge (an infinite key) the slot is in the upper half, so that such tickets differ there and never tie.
    """
    if key == np.inf:
        return NO_TICKET | np.uint64(slot << 32)
    return (np.float64(key).view(np.uint64) & KEY_BITS) | np.uint64(slot)


@_step
def _slot(ticket: np.uint64) -> Any:
    return np.int64(ticket & ~KEY_BITS)


@_step
def _winner(state: _State, first: np.uint64, second: np.uint64) -> np.uint64:
    """The ticket with the lower key; where tickets cannot tell, by the whole keys and then by node."""
    if (first ^ second) & KEY_BITS != 0:
        return min(first, second)
    a, b = state.regions[_slot(first)], state.regions[_slot(second)]
    return first if a.key < b.key or (a.key == b.key and a.node < b.node) else second


@_step
def _play(state: _State, slot: int, key: float) -> None:
    """Gives `slot` a new key and replays its matches, all of them: an early end would be one more branch."""
    tournament = state.tournament
    place = tournament.size // 2 + slot
    state.regions[slot].key = key
    winner = _ticket(slot, key)
    while place > 1:
        tournament[place] = winner
        winner = _winner(state, winner, tournament[place ^ 1])
        place >>= 1
    tournament[1] = winner


@_step
def _runner_up(tournament: np.ndarray) -> float:
    """A bound below the keys of all slots but the winner: the best of those that lost against it."""
    least = NO_TICKET
    place = tournament.size // 2 + _slot(tournament[1])
    while place > 1:
        least = min(least, tournament[place ^ 1])
        place >>= 1
    return np.inf if least == NO_TICKET else np.uint64(least & KEY_BITS).view(np.float64)


@_kernel
def _lay_grid(state: _State, height: int, width: int) -> float:
    """One region per patch, one edge per pair of 4-neighbours, owned by the later patch, and the first tournament.

    Returns the largest norm of a feature, NaN or infinite if any value is.
    """
    tournament, count, outside = state.tournament, height * width, len(state.centres) - 1
    capacity = tournament.size // 2
    largest, edge = 0.0, 0
    for slot in range(count):
        left = slot - 1 if slot % width > 0 else outside
        above = slot - width if slot >= width else outside
        _prefetch_row(state.features, min(slot + ROWS_AHEAD, count - 1))
        # What is outside holds anything, and is not looked at: a loop for all three costs less than choices.
        norm, to_left, to_above = _copy_row(state.features, state.centres, slot, left, above)
        if not norm <= largest:  # also true for NaN
            largest = norm
        if not np.isfinite(largest):
            return largest
        region = state.regions[slot]
        region.size, region.error = 1, 0
        region.node = region.last_patch = slot
        region.first = region.last = region.next_patch = region.mark = -1
        best, key, second = -1, np.inf, np.inf
        for other, squared in ((left, to_left), (above, to_above)):
            if other != outside:
                _lay_edge(state, edge, slot, other, squared)
                best, key, second = _better(state, slot, best, key, second, edge, state.edges[edge].lower)
                edge += 1
        region.best, region.key, region.second = best, key, second
        tournament[capacity + slot] = _ticket(slot, key)
    for slot in range(count, capacity):
        tournament[capacity + slot] = _ticket(slot, np.inf)
    for place in range(capacity - 1, 0, -1):
        tournament[place] = _winner(state, tournament[2 * place], tournament[2 * place + 1])
    return math.sqrt(largest)


@_step
def _lay_edge(state: _State, number: int, slot: int, other: int, squared: float) -> None:
    """An edge between two patches: the cost of Equation 4 with sizes of one and exact centres."""
    edge = state.edges[number]
    edge.ends, edge.owner = slot ^ other, slot
    doubt = _sum_error(state) * squared
    edge.lower, edge.upper = 0.5 * (squared - doubt), 0.5 * (squared + doubt)
    _append(state, slot, 2 * number)
    _append(state, other, 2 * number + 1)


@_step
def _cheapest(state: _State) -> int:
    """The slot whose best edge is certainly the cheapest of all."""
    while True:
        slot = _slot(state.tournament[1])
        edge = state.edges[state.regions[slot].best]
        if edge.owner == slot:
            rival = min(state.regions[slot].second, _runner_up(state.tournament))
            if edge.lower == edge.upper or edge.upper < rival:
                return slot
            _exact_cost(state, edge)
        _play(state, slot, _choose_best(state, slot))


@_step
def _join_neighbours(state: _State, a: int, b: int, joined: np.record) -> None:
    """Gives `a` the edges of `b`; `joined` was the edge between the two.

    The costs of neighbours of both follow from those before. All other neighbours stay marked with their edge.
    """
    edges, following, regions = state.edges, state.following, state.regions
    joined.owner = -1
    _mark_neighbours(state, a)
    entry = regions[b].first
    while entry >= 0:
        next_entry = following[entry]
        edge = edges[entry >> 1]
        if edge.owner >= 0:
            other = regions[edge.ends ^ b]
            if other.mark >= 0:
                _combine_costs(edges[other.mark], edge, joined, regions[a].size, regions[b].size, other.size)
                edge.owner = other.mark = -1
            else:
                other.mark = entry >> 1
                edge.ends ^= a ^ b
                _append(state, a, entry)
                _prefetch_row(state.centres, edge.ends ^ a)
        entry = next_entry


@_step
def _mark_neighbours(state: _State, slot: int) -> None:
    """Marks the neighbours of a region with their edges, and drops edges that are gone from its list."""
    entry = state.regions[slot].first
    state.regions[slot].first = -1
    while entry >= 0:
        next_entry = state.following[entry]
        edge = state.edges[entry >> 1]
        if edge.owner >= 0:
            other = edge.ends ^ slot
            state.regions[other].mark = entry >> 1
            _append(state, slot, entry)
            _prefetch_row(state.centres, other)
        entry = next_entry


@_step
def _evaluate_neighbours(state: _State, slot: int) -> None:
    """Gives a union its edges for its own, and those to marked neighbours their costs."""
    entry = state.regions[slot].first
    while entry >= 0:
        edge = state.edges[entry >> 1]
        edge.owner = slot
        other = state.regions[edge.ends ^ slot]
        if other.mark >= 0:
            other.mark = -1
            _round_cost(state, edge)
        entry = state.following[entry]


@_step
def _join_patches(state: _State, a: int, b: int, distance: float, radius: float) -> None:
    """Makes slot `a` the union of `a` and `b`: centre and its error bound, size, patches."""
    kept, gone = state.regions[a], state.regions[b]
    weight = gone.size / (kept.size + gone.size)
    _move_centre(state.centres, a, b, weight)
    kept.error += weight * (gone.error - kept.error) + ROUNDOFF * (radius + 3 * weight * distance)
    kept.size += gone.size
    state.regions[kept.last_patch].next_patch = b
    kept.last_patch = gone.last_patch


@_kernel
def _merge_all(state: _State, radius: float, children: np.ndarray, costs: np.ndarray) -> None:
    """Algorithm 1 into children int32 [N-1, 2] and costs float32 [N-1]; radius: largest norm of a feature."""
    regions = state.regions
    for step in range(costs.size):
        a = _cheapest(state)
        edge = state.edges[regions[a].best]
        b = edge.ends ^ a
        children[step, 0], children[step, 1] = regions[b].node, regions[a].node  # the owner `a` is the newer one
        costs[step] = (edge.lower + edge.upper) / 2
        distance = math.sqrt(edge.upper / _weight(regions[a].size, regions[b].size))
        _prefetch_row(state.centres, a)
        _prefetch_row(state.centres, b)
        _play(state, b, np.inf)
        _join_neighbours(state, a, b, edge)
        _join_patches(state, a, b, distance, radius)
        regions[a].node = costs.size + 1 + step
        _evaluate_neighbours(state, a)
        _play(state, a, _choose_best(state, a))
