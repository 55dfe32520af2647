"""Every op: what torch checks, what its shape function promises, what Inductor makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import kvfx
from kvfx.errors import PolicyError
from kvfx.geometry import Causal, Site
from kvfx.kernels.dense import reference as dense
from kvfx.op_table import BACKENDS, OPS
from kvfx.ops import backend_for, backend_of, constraint, define_op, name_of, overload, score_op
from kvfx.policies import KIVI, CacheLatent, Full, WindowRing
from kvfx.policies.flat_dense import FlatDense
from kvfx.testing.tiny import left_padded, tiny_llama

BATCH, KV_HEADS, HEADS, WIDTH, ROWS, CAPACITY = 2, 2, 6, 32, 5, 96
SLOTS = KV_HEADS * CAPACITY
CPU = torch.device("cpu")
SITE = Site(0, "s", HEADS, KV_HEADS, WIDTH, WIDTH, 0.2, Causal(), None, torch.float32, CPU)
STORES = {
    "dense": Full(),
    "flat": FlatDense(),
    "ring": WindowRing(CAPACITY),
    "kivi": KIVI(group_size=32, residual=32, mode="window"),
}


def rows(heads: int = KV_HEADS, count: int = ROWS) -> Tensor:
    return torch.randn(BATCH, heads, count, WIDTH)


def positions(count: int = ROWS) -> Tensor:
    return torch.arange(count).expand(BATCH, count).contiguous() + 7


def keep(count: int = ROWS) -> Tensor:
    return torch.ones(BATCH, KV_HEADS, count, dtype=torch.bool)


def filled(room: str) -> list[Tensor]:
    """Buffers that hold a few entries."""
    store = STORES[room]
    buffers = [b.allocate(BATCH, CAPACITY, CPU) for b in store.buffers(SITE).values()]
    which = keep(7) if store.rows == "keep" else positions(7) - 7
    overload(f"store_{room}", "reference")(
        rows(count=7), rows(count=7), which, *buffers, **store.attributes(SITE)
    )
    return buffers


def room_samples(room: str) -> dict:
    """Arguments of the ops of a store's room."""
    store = STORES[room]

    def which(count):
        return keep(count) if store.rows == "keep" else positions(count)

    def several():
        return (rows(), rows(), which(ROWS), *filled(room))

    def one():
        return (rows(count=1), rows(count=1), which(1), *filled(room))

    attributes = store.attributes(SITE)
    scaled = {"scale": 0.2, **attributes}
    found = {
        f"store_{room}": (several, attributes),
        f"append_{room}": (one, attributes),
        f"attend_{room}": (lambda: (rows(HEADS, 1), positions(1), *filled(room)), scaled),
        f"extend_{room}": (
            lambda: (rows(HEADS), rows(), rows(), positions(), *filled(room)),
            scaled,
        ),
        f"load_{room}": (lambda: tuple(filled(room)), attributes),
        f"flush_{room}": (lambda: tuple(filled(room)), attributes),
    }
    return {name: sample for name, sample in found.items() if name in OPS}


def latent() -> list[Tensor]:
    """Buffers of rows that all heads share, as wide as `rows`."""
    site = replace(SITE, latent=(WIDTH - 8, 8))
    return [b.allocate(BATCH, CAPACITY, CPU) for b in CacheLatent().buffers(site).values()]


def counts() -> Tensor:
    return torch.full((BATCH, KV_HEADS), 3)


def scores(count: int = ROWS) -> Tensor:
    return torch.rand(BATCH, KV_HEADS, count)


def targets() -> Tensor:
    """Every second row takes in the one before it."""
    return (torch.arange(ROWS) // 2 * 2 + 1).clamp(max=ROWS - 1).expand(BATCH, KV_HEADS, -1).clone()


SAMPLES = {
    "attention": (
        lambda: (rows(HEADS), rows(), rows(), None, positions()),
        {"scale": 0.2, "kv_repeat": 3},
    ),
    "attend_prompt": (
        lambda: (rows(HEADS), rows(), rows(), positions()),
        {"scale": 0.2, "window": 3},
    ),
    "live_rows": (lambda: (positions(),), {"kv_heads": KV_HEADS}),
    "live_entries": (lambda: (rows(), counts().int()), {}),
    "score_window": (lambda: (rows(HEADS, 3), rows(), keep()), {"scale": 0.2, "window": 2}),
    "score_columns": (lambda: (rows(HEADS), rows(), keep()), {"scale": 0.2}),
    "score_key_norm": (lambda: (rows(), keep()), {}),
    "score_key_difference": (lambda: (rows(), keep()), {}),
    "store_latent": (lambda: (rows(1), keep(), *latent()), {}),
    "append_latent": (lambda: (rows(1, 1), keep(1), *latent()), {}),
    "store_entries": (lambda: (scores(), keep(), counts().int(), scores(CAPACITY)), {}),
    "extend_entries": (
        lambda: (scores(CAPACITY + ROWS), keep(), counts().int(), scores(CAPACITY)),
        {},
    ),
    "compact_entries": (lambda: (keep(CAPACITY), scores(CAPACITY)), {}),
    "share_heads": (lambda: (scores(),), {}),
    "snapshot": (lambda: (scores(),), {}),
    "smooth": (lambda: (scores(),), {"kernel": 3, "mode": "max"}),
    "compact_dense": (
        lambda: (keep(CAPACITY), torch.rand(8), *filled("dense")),
        {"style": "half"},
    ),
    "entry_shift": (lambda: (keep(), positions(), counts().int()), {}),
    "rotate": (
        lambda: (rows(HEADS), counts()[..., None].expand(-1, -1, ROWS), torch.rand(8)),
        {"style": "half"},
    ),
    "allocate_uniform": (
        lambda: (torch.tensor([5, 9]),),
        {"kv_heads": KV_HEADS, "fraction": 0.5, "entries": 0, "least": 1},
    ),
    "hold_back": (lambda: (keep(), counts()), {"interval": 1}),
    "attend_scored_dense": (
        lambda: (
            rows(HEADS, 1),
            positions(1),
            torch.rand(BATCH, KV_HEADS, CAPACITY),
            *filled("dense"),
        ),
        {"scale": 0.2},
    ),
    "attend_scored_kivi": (
        lambda: (
            rows(HEADS, 1),
            positions(1),
            torch.rand(BATCH, KV_HEADS, CAPACITY + 64),
            *filled("kivi"),
        ),
        {"scale": 0.2, **STORES["kivi"].attributes(SITE)},
    ),
    "attend_masked": (
        lambda: (
            rows(HEADS),
            rows(),
            rows(),
            torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool).tril(),
            *room_samples("dense")["store_dense"][0]()[3:],
        ),
        {"scale": 0.2},
    ),
    "store_masked": room_samples("dense")["store_dense"],
    "select_recent": (lambda: (keep(), counts()), {"sinks": 1}),
    "select_top": (
        lambda: (torch.rand(BATCH, KV_HEADS, ROWS), keep(), counts()),
        {"sinks": 1, "recent": 1},
    ),
    "refine_crush": (
        lambda: (scores(), keep(), keep(), None),
        {
            "sinks": 1,
            "recent": 1,
            "share": 0.0,
            "ratio": 0.5,
            "anchor": "mean",
            "bits": "half",
            "pick": "linspace",
            "page": 1,
            "seed": 0,
        },
    ),
    "allocate_heads": (
        lambda: (scores(), keep(), counts()),
        {"sinks": 1, "recent": 1, "share": 0.0, "floor": 0.2},
    ),
    "probe": (
        lambda: (rows(HEADS, 9), rows(count=9), rows(count=9), scores(9)),
        {
            "scale": 0.2,
            "rows": 4,
            "steps": 8,
            "fractions": [0.25, 0.5],
            "bits": [8, 2],
            "group_size": 4,
            "rank": 3,
        },
    ),
    "probe_similarity": (lambda: (rows()[:, 0], rows()[:, 1]), {}),
    "scatter_rows": (
        lambda: (rows(), rows(), positions(), rows(count=CAPACITY), rows(count=CAPACITY)),
        {},
    ),
    "attend_rows": (
        lambda: (rows(HEADS), positions(), rows(count=CAPACITY), rows(count=CAPACITY)),
        {"scale": 0.2, "window": 3},
    ),
    "column_attention": (
        lambda: (rows(HEADS), rows(count=CAPACITY), positions()),
        {"scale": 0.2, "window": 3},
    ),
    "row_deviation": (lambda: (rows(), rows(count=CAPACITY), positions()), {"norm": "l1"}),
    "weigh_rows": (lambda: (scores(), scores(CAPACITY), positions()), {}),
    "choose_rows": (
        lambda: (scores()[:, 0], keep()[:, 0], keep()[:, 0], torch.empty(ROWS + 1)),
        {},
    ),
    "take_rows": (lambda: (rows(), positions() - 7), {"axis": 2}),
    "take_positions": (lambda: (positions(), positions() - 7), {}),
    "share_entries": (
        lambda: (torch.tensor([5, 9]),),
        {
            "kv_heads": KV_HEADS,
            "fraction": 0.5,
            "entries": 0,
            "protected": 1,
            "least": 2,
            "shares": [0.5, 1.5, 1.0],
            "layer": 1,
        },
    ),
    "allocate_prefix": (
        lambda: (torch.rand(3, BATCH, ROWS), keep()[:, 0], torch.tensor([7, 9])),
        {"sinks": 1, "recent": 1, "share": 0.0, "least": 1},
    ),
    "allocate_mass": (
        lambda: (scores(), keep()),
        {"threshold": 0.9, "sinks": 1, "recent": 1, "least": 1},
    ),
    "allocate_dbudget": (lambda: (scores(), keep()), {"threshold": 0.01, "sinks": 1}),
    "allocate_again": (
        lambda: (counts(), torch.tensor([[9], [9]]), torch.tensor([18, 27])),
        {},
    ),
    "select_chunks": (lambda: (scores(), keep(), counts()), {"chunk": 2, "recent": 1}),
    "query_statistics": (
        lambda: (rows(HEADS), positions(), torch.rand(8)),
        {"style": "half", "sinks": 1, "future": 4},
    ),
    "score_expected": (
        lambda: (
            torch.randn(BATCH, HEADS, WIDTH),
            torch.rand(BATCH, HEADS, WIDTH, WIDTH),
            rows(),
            rows(),
            keep(),
        ),
        {"scale": 0.2, "epsilon": 0.0, "spread": True, "value_norm": True},
    ),
    "average_attention": (lambda: (scores(), keep(), None), {}),
    "position_rows": (lambda: (positions(),), {"kv_heads": KV_HEADS}),
    "append_entries": (lambda: (scores(1), keep(1), counts().int(), scores(CAPACITY)), {}),
    "merge_sets": (
        lambda: (rows(), scores(), keep(), counts()),
        {"threshold": None, "sinks": 1, "recent": 0.1, "heavy": 0.1, "linkage": "chain"},
    ),
    "merge_next": (lambda: (keep(), keep()), {}),
    "merge_nearest": (
        lambda: (rows(), keep(), keep(), torch.rand(BATCH, KV_HEADS)),
        {"past": 0.5, "present": 0.5},
    ),
    "lead_rows": (lambda: (targets(),), {}),
    "target_shift": (lambda: (targets(), positions()[:, None].expand(-1, KV_HEADS, -1)), {}),
    "merge_numbers": (lambda: (scores(), targets()), {}),
    "merge_votes": (lambda: (targets(), None), {}),
    "merge_gaussian": (
        lambda: (rows(), rows(), targets(), None),
        {"sigma": "dist", "width": 5.0, "scaled": False},
    ),
    "merge_weighted": (lambda: (rows(), rows(), targets(), scores()), {}),
    "merge_similar": (lambda: (rows(), rows(), targets()), {}),
    "merge_ahead": (
        lambda: (rows(), rows(), keep(), keep(), scores(), None),
        {"targets": 2, "seed": 1},
    ),
    "attend_scored_flat": (
        lambda: (rows(HEADS, 1), positions(1), torch.rand(BATCH, SLOTS), *filled("flat")),
        {"scale": 0.2},
    ),
    "live_entries_flat": (lambda: (filled("flat")[0], *filled("flat")[2:]), {}),
    "compact_flat": (lambda: (keep(SLOTS), torch.rand(8), *filled("flat")), {"style": "half"}),
    "load_entries_flat": (lambda: (torch.rand(BATCH, SLOTS), *filled("flat")[2:]), {}),
    "store_entries_flat": (
        lambda: (scores(), keep(), *filled("flat")[2:], torch.rand(BATCH, SLOTS)),
        {},
    ),
    "extend_entries_flat": (
        lambda: (scores(SLOTS + ROWS), keep(), *filled("flat")[2:], torch.rand(BATCH, SLOTS)),
        {},
    ),
    "append_entries_flat": (
        lambda: (scores(1), keep(1), *filled("flat")[2:], torch.rand(BATCH, SLOTS)),
        {},
    ),
    "compact_entries_flat": (
        lambda: (keep(SLOTS), *filled("flat")[2:], torch.rand(BATCH, SLOTS)),
        {},
    ),
    "linear": (lambda: (rows()[:, 0], torch.randn(9, WIDTH), torch.randn(9)), {}),
    **room_samples("dense"),
    **room_samples("flat"),
    **room_samples("ring"),
    **room_samples("kivi"),
}
BUILT_IN = tuple(OPS)


@score_op
def largest_key(q, k, v, live):
    """Rank tokens by the length of their key."""
    return k.float().norm(dim=-1)


def test_every_op_has_a_sample():
    assert set(BUILT_IN) == set(SAMPLES)


# every overload that runs
RUNNING = [(name, backend) for name in SAMPLES for backend in OPS[name].backends]
IDS = [f"{name}.{backend}" for name, backend in RUNNING]


def device_of(backend: str) -> str:
    """Where a backend runs here: kernels on a GPU if there is one, interpreted otherwise."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def given_to(name: str, backend: str) -> tuple[tuple, dict]:
    """Operands on the device of the backend, and attributes."""
    arguments, attributes = SAMPLES[name]
    device = device_of(backend)
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in arguments()), attributes


@pytest.mark.parametrize(("name", "backend"), RUNNING, ids=IDS)
def test_torch_accepts_the_op(name, backend):
    given, attributes = given_to(name, backend)
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(overload(name, backend), given, attributes, test_utils=checks)


WRITING = ("store", "append", "flush", "compact", "scatter")


def described(value: object) -> object:
    """dtype, shape and memory layout of a result."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return tuple(map(described, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("name", "backend"), RUNNING, ids=IDS)
def test_the_shape_function_tells_the_truth(name, backend):
    given, attributes = given_to(name, backend)
    mode = torch._subclasses.FakeTensorMode()
    fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given]
    with mode:
        promised = overload(name)(*fakes, **attributes)
    found = overload(name, backend)(*given, **attributes)
    expected, actual = described(promised), described(found)
    if OPS[name].traced and backend == "reference":
        # the compiler sees through the op: layout is what it finds there
        expected, actual = (tuple(x[:2]) if x is not None else None for x in (expected, actual))
    assert actual == expected


@pytest.mark.parametrize(("name", "backend"), RUNNING, ids=IDS)
def test_schemas_mark_what_is_written(name, backend):
    """Operands that the schema does not mark stay as they are, and marked ones are written."""
    given, attributes = given_to(name, backend)
    before = [x.clone() if isinstance(x, Tensor) else x for x in given]
    overload(name, backend)(*given, **attributes)
    schema = overload(name, backend)._schema
    for argument, old, new in zip(schema.arguments, before, given, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if not written and isinstance(new, Tensor):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    mutable = name.split("_")[0] in WRITING or name.startswith(
        ("extend_entries", "attend_scored", "merge_nearest")
    )
    assert schema.is_mutable is mutable
    assert overload(name)._schema.is_mutable is mutable


@pytest.mark.parametrize("room", STORES)
def test_rooms_take_the_buffers_of_their_store(room):
    """Same names, same order: the contract between a policy and its room."""
    names = list(STORES[room].buffers(SITE))
    for op in (f"store_{room}", f"append_{room}", f"attend_{room}", f"extend_{room}"):
        taken = [argument.name for argument in overload(op)._schema.arguments]
        first = taken.index(names[0])
        assert taken[first : first + len(names)] == names


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("room", STORES)
def test_decode_compiles_and_counts_on(room, backend):
    """Three steps of append and attend, compiled: buffers and outputs are those of the
    reference.
    """
    store, device = STORES[room], device_of(backend)

    def step(backend, q, k, v, position_ids, which, *buffers):
        attributes = store.attributes(SITE)
        append, attend = (overload(f"{verb}_{room}", backend) for verb in ("append", "attend"))
        append(k, v, which, *buffers, **attributes)
        return attend(q, position_ids, *buffers, scale=0.2, **attributes)

    fast = compiled(lambda *given: step(backend, *given))
    expected_buffers = filled(room)
    fast_buffers = [x.clone().to(device) for x in expected_buffers]
    for at in range(3):
        at_position = positions(1) + at
        which = keep(1) if store.rows == "keep" else at_position
        given = (rows(HEADS, 1), rows(count=1), rows(count=1), at_position, which)
        expected = step("reference", *given, *expected_buffers)
        out = fast(*(x.to(device) for x in given), *fast_buffers)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
        for a, b in zip(fast_buffers, expected_buffers, strict=True):
            torch.testing.assert_close(a.cpu(), b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("room", STORES)
def test_no_clone_of_the_cache(room, backend):
    """Decode writes one row in place: Inductor allocates nothing of the cache's size."""
    from torch._inductor.utils import run_and_get_code

    store, device = STORES[room], torch.device(device_of(backend))
    append, attend = (overload(f"{verb}_{room}", backend) for verb in ("append", "attend"))
    attributes, capacity = store.attributes(SITE), 1024

    def step(q, k, v, position_ids, which, *buffers):
        append(k, v, which, *buffers, **attributes)
        return attend(q, position_ids, *buffers, scale=0.2, **attributes)

    torch._dynamo.reset()
    buffers = [b.allocate(BATCH, capacity, device) for b in store.buffers(SITE).values()]
    addresses = [x.data_ptr() for x in buffers]
    which = keep(1) if store.rows == "keep" else positions(1)
    given = (rows(HEADS, 1), rows(count=1), rows(count=1), positions(1), which)
    fast = torch.compile(step, fullgraph=True, dynamic=False)
    _, (code, *_) = run_and_get_code(fast, *(x.to(device) for x in given), *buffers)
    allocated = [
        torch.Size(map(int, re.findall(r"\d+", shape))).numel()
        for shape in re.findall(r"= empty_strided\w*\(\(([\d, ]*)\)", code)
    ]
    assert max(allocated, default=0) < sum(x.numel() for x in buffers) / 2
    assert [x.data_ptr() for x in buffers] == addresses


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["live_rows", "entry_shift", "rotate", "select_recent", "smooth", "linear"]
)
def test_traced_ops_compile(name):
    arguments, attributes = SAMPLES[name]
    given = arguments()
    op = overload(name, "reference")
    fast = compiled(lambda *args: op(*args, **attributes))
    torch.testing.assert_close(fast(*given), op(*given, **attributes), rtol=1e-4, atol=1e-5)


def test_names_and_backends():
    assert name_of(torch.ops.kvfx.attend_dense.reference) == "attend_dense"
    assert name_of(torch.ops.aten.add.Tensor) is None
    assert name_of("kvfx") is None
    assert backend_of(torch.ops.kvfx.attend_dense.reference) == "reference"
    assert backend_of(overload("attend_dense")) == "default"
    assert "reference" in BACKENDS


def test_an_abstract_op_does_not_run():
    with pytest.raises(NotImplementedError):
        overload("live_rows")(positions(), kv_heads=2)


def test_a_user_registers_a_score():
    k, live = rows(), keep()
    score = overload("largest_key", "reference")(None, k, k, live)
    assert torch.equal(score, k.norm(dim=-1))
    assert largest_key(None, k, k, live) is not None
    torch.library.opcheck(
        overload("largest_key", "reference"),
        (rows(HEADS), k, k, live),
        test_utils=["test_schema", "test_faketensor"],
    )


def test_defining_a_score_again_replaces_it():
    k = rows()
    live = torch.ones(k.shape[:3], dtype=torch.bool)
    for value in (1.0, 2.0):

        @score_op
        def constant_score(q, k, v, live, value=value):
            return torch.full(k.shape[:3], value)

        assert torch.equal(
            overload("constant_score", "reference")(None, k, k, live),
            torch.full(k.shape[:3], value),
        )


def test_a_score_cannot_take_the_name_of_an_op():
    def rotate(q, k, v, live):
        return k.float().sum(-1)

    with pytest.raises(PolicyError, match="kvfx has an op 'rotate' already"):
        score_op(rotate)


ONE = "(Tensor x) -> Tensor"


def same(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def doubled(x: Tensor) -> Tensor:
    return x + x


def test_a_user_defines_an_op():
    define_op("user_doubled", ONE, doubled, same)
    op = overload("user_doubled", "reference")
    assert torch.equal(op(torch.ones(3)), torch.full((3,), 2.0))
    torch.library.opcheck(op, (rows(),), test_utils=["test_schema", "test_faketensor"])
    with torch._subclasses.FakeTensorMode():
        assert overload("user_doubled")(torch.ones(3)).shape == (3,)
    assert OPS["user_doubled"].definition == f"{__name__}:doubled"
    assert backend_for("user_doubled", "triton") == "reference"


@pytest.mark.parametrize("traced", [False, True])
def test_compilers_see_through_what_is_traced(traced):
    define_op(f"user_traced_{traced}", ONE, doubled, same, traced=traced)
    op = overload(f"user_traced_{traced}", "reference")
    called = [node.target for node in make_fx(op)(torch.ones(3)).graph.nodes]
    assert (op in called) is not traced
    assert (torch.ops.aten.add.Tensor in called) is traced


def test_defining_an_op_again_replaces_its_functions():
    for size in (3, 4):
        define_op(
            "user_sized",
            ONE,
            lambda x, size=size: x.new_ones(size),
            lambda x, size=size: x.new_empty(size),
        )
        assert torch.equal(overload("user_sized", "reference")(rows()), torch.ones(size))
        with torch._subclasses.FakeTensorMode():
            assert overload("user_sized")(torch.ones(2)).shape == (size,)


@pytest.mark.parametrize(
    ("schema", "traced", "triton", "said"),
    [
        ("(Tensor y) -> Tensor", False, "", r"schema '\(Tensor x\) -> Tensor', and is now with"),
        (ONE, True, "", "traced False, and is now with True"),
        (ONE, False, "a:b", r"backends \('reference',\), and is now with"),
    ],
    ids=["schema", "traced", "backends"],
)
def test_torch_keeps_what_an_op_was_defined_as(schema, traced, triton, said):
    define_op("user_kept", ONE, doubled, same)
    before = OPS["user_kept"]
    with pytest.raises(PolicyError, match=f"kvfx.user_kept was defined with {said}.*another name"):
        define_op("user_kept", schema, doubled, same, traced=traced, triton=triton)
    assert OPS["user_kept"] is before


def test_an_op_of_kvfx_is_not_replaced():
    with pytest.raises(PolicyError, match="kvfx has an op 'attend_dense' already"):
        define_op("attend_dense", OPS["attend_dense"].schema, dense.attend, same)


def test_a_schema_that_torch_cannot_read():
    with pytest.raises(PolicyError, match=r"is not a schema of torch:\s+unknown type specifier"):
        define_op("user_misread", "(Tensorr x) -> Tensor", doubled, same)
    assert "user_misread" not in OPS
    define_op("user_misread", ONE, doubled, same)
    assert overload("user_misread", "reference")(torch.ones(1)) == 2


def test_an_op_that_nobody_defined():
    with pytest.raises(PolicyError, match=r"there is no op kvfx\.attend_nowhere: define it"):
        overload("attend_nowhere")


LAUNCHERS = """
def constraint(function, x):
    return None if x.dim() == 1 else f"{function} takes one axis, not {x.dim()}"

def doubled(x):
    return 2 * x + 0.5
"""


def test_launchers_of_a_user(tmp_path, monkeypatch):
    (tmp_path / "user_launchers.py").write_text(LAUNCHERS)
    monkeypatch.syspath_prepend(tmp_path)
    define_op("user_launched", ONE, doubled, same, triton="user_launchers:doubled")
    assert backend_for("user_launched", "triton") == "triton"
    assert constraint("user_launched", "triton", (torch.ones(3),), {}) is None
    assert constraint("user_launched", "triton", (rows(),), {}) == "doubled takes one axis, not 4"
    assert overload("user_launched", "triton")(torch.ones(1)) == 2.5
    assert overload("user_launched", "reference")(torch.ones(1)) == 2


@dataclass(frozen=True)
class Outside(Full):
    """Dense entries in a room that kvfx does not have."""

    room: ClassVar[str] = "outside"


@pytest.mark.parametrize(
    ("dense_policy", "policy"),
    [
        (Full(), Outside()),
        (kvfx.SnapKV(budget=30, window=16, interval=7), None),
        (kvfx.KVMerger(budget=30, value_scale="votes", interval=7), None),
    ],
    ids=["alone", "evicting", "merging"],
)
def test_a_room_from_outside(dense_policy, policy):
    """Ops that a user defines, named by a store of theirs: the same logits, bit for bit."""
    for verb in ("store", "append", "attend", "attend_scored", "extend", "load", "compact"):
        op = OPS[f"{verb}_dense"]
        # moving entries has a room of its own
        definition = getattr(dense, verb, None) or torch.ops.kvfx.compact_dense.reference
        define_op(f"{verb}_outside", op.schema, definition, op.shape, traced=op.traced)
    model = tiny_llama(layers=1)
    found, expected = (
        answers(kvfx.compress(model, choice, compile=False, verify=False))
        for choice in (policy or dense_policy | Outside(), dense_policy)
    )
    assert torch.equal(found, expected)


def answers(fast) -> Tensor:
    """Logits of a padded prompt, of decoded rows, and of a second turn."""
    prompt = left_padded([50, 33])
    cache = fast(**prompt).past_key_values
    ids = torch.arange(24).reshape(2, 12)
    steps = [fast(ids[:, [at]], past_key_values=cache).logits for at in range(9)]
    return torch.cat([*steps, fast(ids, past_key_values=cache).logits], 1)
