"""Any state -> typed JSON and tensors -> the same state, and what is refused."""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import json
import math
import pathlib
import struct
import zoneinfo
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoint.equality import assert_same

from keepstep.errors import (
    StateStructureError,
    TensorNotSavableError,
    UnsupportedTypeError,
    UsageError,
)
from keepstep.tree import decode, flatten, leaf, register_codec, select, tensors_in, unflatten


def through_json(state: Any) -> Any:
    flat = flatten(state)
    tensors = {one.address: one.tensor.clone() for one in flat.leaves}
    assert len(tensors) == len(flat.leaves), "addresses are unique"
    text = json.dumps(flat.tree, allow_nan=False)
    return unflatten(json.loads(text), tensors.__getitem__)


def nan_with(payload: int) -> float:
    return struct.unpack(">d", struct.pack(">Q", payload))[0]


EXAMPLES: dict[str, Any] = {
    "ints": [0, -1, 2**53, 2**53 + 1, -(2**53) - 1, 2**64, -(10**4000), 10**5000],
    "floats": [0.0, -0.0, 1e-320, 1.7976931348623157e308, 0.1, math.inf, -math.inf],
    "nans": [math.nan, -math.nan, nan_with(0x7FF8000000000001), nan_with(0xFFF8000000ABCDEF)],
    "complex": [1 + 2j, complex(-0.0, math.nan), complex(math.inf, -0.0)],
    "bools and none": [True, False, None],
    "strings": ["", "ä", "\ud800", "a\udfffb", "\x00\x1f", "$tensor", "\U0001f600", "\u2028"],
    "bytes": [b"", bytes(range(256)), bytearray(b"xy")],
    "sets": [set(), {1, "a", None, (1, 2)}, frozenset({b"x", 2.5}), {frozenset({1}), True}],
    "tuples": [(), (1,), ((1, (2, [3])), [])],
    "dates": [dt.date(1, 1, 1), dt.date(9999, 12, 31)],
    "times": [dt.time(1, 2, 3, 4), dt.time(2, 30, fold=1), dt.time(1, tzinfo=dt.UTC)],
    "timedeltas": [dt.timedelta.min, dt.timedelta.max, dt.timedelta(microseconds=-1)],
    "datetimes": [
        dt.datetime(2020, 1, 1),  # noqa: DTZ001 - without a zone, on purpose
        dt.datetime(2020, 1, 1, 1, 2, 3, 4, tzinfo=dt.UTC),
        dt.datetime(2020, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1),
        dt.datetime(2020, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=0),
        dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-3, microseconds=7))),
        dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1), "CET")),
    ],
    "zones": [dt.UTC, dt.timezone(dt.timedelta(minutes=90)), dt.timezone(dt.timedelta(hours=1), "x")],
    "paths": [
        pathlib.Path("/a/b"),
        pathlib.Path(),
        pathlib.PurePosixPath("x"),
        pathlib.PureWindowsPath("C:\\x"),
    ],
    "torch": [
        torch.float8_e4m3fn,
        torch.qint8,
        torch.device("cuda:3"),
        torch.device("cpu"),
        torch.Size([1, 0, 2]),
    ],
    "numpy dtypes": [
        np.dtype("float32"),
        np.dtype(">i4"),
        np.dtype("<M8[ns]"),
        np.dtype("U7"),
        np.dtype("bool"),
    ],
    "int keys": {0: "a", 1: "b", -5: "c", 2**70: "d"},
    "mixed keys": {0: "int", "0": "str", None: 1, (1, "a"): 2, 1.5: 3, b"k": 4, frozenset({1}): 5},
    "dollar keys": {"$tensor": 1, "$": 2, "$dict": [[1, 2]]},
    "dollar later": {"a": 1, "$b": 2},
    "nested keys": {((1, 2), ("x", (None,))): {(): 1}},
    "nan key": {math.inf: 1, -0.0: 2},
    "numpy key": {np.int64(3): 1, np.float32(0.5): 2, np.str_("x"): 3},
    "ordered": collections.OrderedDict([("b", 1), ("a", 2), (3, 4)]),
    "counter": collections.Counter("abracadabra"),
    "defaultdicts": [
        collections.defaultdict(int, {"a": 1}),
        collections.defaultdict(None, {2: 1}),
        collections.defaultdict(list, {(1,): [1]}),
        collections.defaultdict(dict),
    ],
    "deques": [collections.deque([1, 2], maxlen=3), collections.deque()],
    "empty containers": [{}, [], (), set(), collections.OrderedDict()],
    "same object twice": [[1], [1]],
}

NUMPY: dict[str, Any] = {
    "kinds": [np.arange(6).astype(kind).reshape(2, 3) for kind in "?bBhHiIlLqQefdgFDG"],
    "big-endian": [
        np.arange(6, dtype=">i4"),
        np.array([1.5, math.nan], dtype=">f8"),
        np.array(7, dtype=">c16"),
    ],
    "dates": [
        np.array(["2020-01-01", "NaT"], dtype="M8[D]"),
        np.array([1, -1], dtype="m8[ns]"),
        np.datetime64("NaT"),
    ],
    "strings": [np.array(["", "ä", "abc"]), np.array([b"x", b"yz"]), np.zeros((2, 0), dtype="U3")],
    "0-d": [np.array(5), np.array(1.5, dtype=">f4"), np.array("abc")],
    "empty": [np.zeros((0, 3)), np.zeros((3, 0), dtype=np.int8), np.zeros(0, dtype=">f8")],
    "views": [np.arange(12).reshape(3, 4).T, np.arange(10)[::-2], np.broadcast_to(np.int16(3), (2, 2))],
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "scalars": [
        np.float32(0.1),
        np.int8(-1),
        np.bool_(True),
        np.complex64(1j),
        np.longdouble("1.1"),
        np.uint64(2**64 - 1),
    ],
    "text scalars": [np.str_("ä"), np.bytes_(b"x\x01"), np.str_(""), np.bytes_(b"")],
    "zero ends": [np.bytes_(b"a\x00"), np.str_("a\x00")],
    "date scalars": [np.datetime64("2020-01-01T00:00:01"), np.timedelta64(5, "s"), np.timedelta64("NaT")],
    "void": [np.void(b"abc"), np.zeros(3, dtype="V5")],
    "nan payload": np.array([nan_with(0x7FF8000000000123), -0.0]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_plain_values_come_back_exactly(name: str) -> None:
    assert_same(through_json({"x": EXAMPLES[name]}), {"x": EXAMPLES[name]})
    assert_same(through_json(EXAMPLES[name]), EXAMPLES[name])


@pytest.mark.parametrize("name", NUMPY)
def test_numpy_values_come_back_exactly(name: str) -> None:
    assert_same(through_json({"x": NUMPY[name]}), {"x": NUMPY[name]})


def test_a_read_only_array_and_a_memmap_come_back(tmp_path: pathlib.Path) -> None:
    frozen = np.arange(5)
    frozen.flags.writeable = False
    mapped = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    back = through_json([frozen, mapped])
    assert_same(back[0], np.arange(5))
    assert_same(back[1], np.array([1, 2, 3], dtype=np.float32))


def test_ordered_dict_keeps_the_metadata_of_modules() -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    back = through_json(state)
    assert_same(back, state)
    assert back._metadata[""]["version"] == 2


def test_tensor_names_are_those_of_the_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    flat = flatten({"model": model})
    assert [one.name for one in flat.leaves] == list(model.state_dict())
    assert {one.group for one in flat.leaves} == {"model"}


def test_addresses_that_read_alike_stay_apart() -> None:
    one, two, three, four = (torch.tensor(float(i)) for i in range(4))
    state = {0: one, "0": two, "a": {"b": {"c": three}, "b.c": four}, "a/b": {"c": one}, "": {"": two}}
    assert_same(through_json(state), state)


class _Shell:
    """A live object whose state is what it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_live_objects_are_asked_for_their_state() -> None:
    assert_same(through_json({"a": _Shell({"x": 1, "y": [_Shell((2,))]})}), {"a": {"x": 1, "y": [(2,)]}})
    assert through_json(_Shell(5)) == 5


class _Plain:
    def __repr__(self) -> str:
        return "<a plain thing>"


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    "value",
    [
        _Plain(),
        _Unprintable(),
        object(),
        lambda: None,
        _Shell,
        range(3),
        slice(1),
        memoryview(b"x"),
        collections.ChainMap({}),
        type("Text", (str,), {})("x"),
        type("Number", (int,), {})(3),
        type("Table", (dict,), {})(),
        collections.namedtuple("Pair", "a b")(1, 2),  # noqa: PYI024
        np.array([object()], dtype=object),
        np.zeros(2, dtype=[("a", "i4")]),
        np.zeros(2, dtype=[("b", "f8")]).view(np.recarray),
        np.ma.masked_array([1], mask=[True]),
        np.array(["x"], dtype=np.dtypes.StringDType()),
        np.dtype([("a", "i4")]),
        np.dtype("O"),
        np.dtype((np.int32, (2,))),
        torch.Generator(),
        torch.strided,
        collections.defaultdict(lambda: 0),
        {torch.zeros(1): 1},
        {_Shell({"a": 1}): 1},
        {(1, _Shell(2)): 1},
        {_Shell({"a": 1})},
        {(1, _Shell([]))},
    ],
    ids=lambda value: type(value).__name__,
)
def test_unknown_types_are_refused_with_place_and_ways_out(value: Any) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"'run/a.3.b'|run/a.3.b") as caught:
        flatten({"run": {"a": {3: {"b": value}}}})
    assert isinstance(caught.value, TypeError)


def test_the_message_for_an_unknown_type_tells_the_ways_out() -> None:
    with pytest.raises(UnsupportedTypeError) as caught:
        flatten({"run": {"thing": _Plain()}})
    text = str(caught.value)
    for part in (
        "'run/thing'",
        "_Plain",
        "<a plain thing>",
        "load_state_dict",
        "register_codec",
        "never pickles",
    ):
        assert part in text


def test_time_zones_of_other_kinds_are_refused() -> None:
    class Zone(dt.tzinfo):
        def utcoffset(self, when: Any) -> dt.timedelta:
            return dt.timedelta(0)

    with pytest.raises(UnsupportedTypeError, match=r"time zone is a .*Zone"):
        flatten(dt.datetime(2020, 1, 1, tzinfo=Zone()))


def test_cycles_are_refused() -> None:
    loop: list[Any] = []
    loop.append({"again": loop})
    with pytest.raises(StateStructureError, match=r"contains itself at 'a/0.again'"):
        flatten({"a": loop})
    shell = _Shell(None)
    shell.state = {"me": shell}
    with pytest.raises(StateStructureError, match=r"contains itself"):
        flatten(shell)


def test_the_same_container_twice_is_no_cycle() -> None:
    shared = {"x": 1}
    assert_same(through_json({"a": shared, "b": shared}), {"a": {"x": 1}, "b": {"x": 1}})


WRAPS = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"a": inner},
    "int dict": lambda inner: {1: inner},
    "ordered": lambda inner: collections.OrderedDict(a=inner),
    "defaultdict": lambda inner: collections.defaultdict(int, a=inner),
    "deque": lambda inner: collections.deque([inner]),
    "object": _Shell,
}


@pytest.mark.parametrize("kind", WRAPS)
def test_depth_to_the_limit_works_and_beyond_is_refused(kind: str) -> None:
    state: Any = 7
    for _ in range(leaf.MAX_DEPTH):
        state = WRAPS[kind](state)
    through_json(state)
    for depth in (1, 150):
        deeper = state
        for _ in range(depth):
            deeper = WRAPS[kind](deeper)
        with pytest.raises(StateStructureError, match=r"deeper than 100"):
            flatten(deeper)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (lambda: torch.empty(3, device="meta"), "meta device.*to_empty"),
        (lambda: torch.eye(2).to_sparse(), "torch.sparse_coo.*to_dense"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch.sparse_csr.*to_dense"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized.*int_repr"),
        (lambda: torch.ones(2).as_subclass(type("Sub", (torch.Tensor,), {})), "as_subclass"),
        (torch.nn.parameter.UninitializedParameter, "UninitializedParameter"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "cannot save"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
            "cannot save",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_bytes_are_refused(tensor: Any, why: str) -> None:
    with pytest.raises(TensorNotSavableError, match=why) as caught:
        flatten({"model": {"layer": {"weight": tensor()}}})
    assert "model/layer.weight" in str(caught.value)


class _Celsius:
    def __init__(self, degrees: float, curve: torch.Tensor) -> None:
        self.degrees = degrees
        self.curve = curve


@pytest.fixture
def _own_codecs() -> Iterator[None]:
    registries = (leaf.codecs_by_type, leaf.codecs_by_name)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_own_codecs")
def test_a_codec_teaches_a_type() -> None:
    register_codec(
        _Celsius, "celsius", lambda c: {"d": c.degrees, "c": c.curve}, lambda s: _Celsius(s["d"], s["c"])
    )
    back = through_json({"t": [_Celsius(1.5, torch.arange(3))]})["t"][0]
    assert (back.degrees, back.curve.tolist()) == (1.5, [0, 1, 2])
    with pytest.raises(UsageError, match=r"'celsius' is taken by .*_Celsius"):
        register_codec(_Plain, "celsius", str, str)
    flat = flatten(_Celsius(1.5, torch.arange(3)))
    leaf.codecs_by_name.clear()
    with pytest.raises(UnsupportedTypeError, match=r"'celsius', which is not registered"):
        unflatten(flat.tree, lambda _: torch.zeros(3))


# ------------------------------------------------------------------------------------- what is read

HOSTILE: list[Any] = [
    {"$nothing": 1},
    {"$int": []},
    {"$int": "zz"},
    {"$float": "00"},
    {"$float": []},
    {"$float": "nan"},
    {"$complex": 1},
    {"$complex": [[], 1]},
    {"$bytes": "!!"},
    {"$bytes": 5},
    {"$bytearray": {}},
    {"$datetime": "x", "zone": None, "fold": 0},
    {"$datetime": "2020-01-01", "zone": "../../etc/passwd", "fold": 0},
    {"$datetime": "2020-01-01", "zone": "/etc/passwd", "fold": 0},
    {"$datetime": "2020-01-01", "zone": "America", "fold": 0},
    {"$datetime": "2020-01-01", "zone": "\x00", "fold": 0},
    {"$datetime": "2020-01-01", "zone": "x" * 5000, "fold": 0},
    {"$datetime": "2020-01-01", "zone": [], "fold": 0},
    {"$datetime": "2020-01-01", "zone": 1e300, "fold": 0},
    {"$datetime": "2020-01-01", "zone": None, "fold": 9},
    {"$datetime": "2020-01-01"},
    {"$date": 5},
    {"$time": "25:00", "zone": None, "fold": 0},
    {"$timedelta": [10**12, 0, 0]},
    {"$timedelta": "x"},
    {"$timezone": 1e9},
    {"$path": 5},
    {"$path": ["/etc"]},
    {"$dtype": "system"},
    {"$dtype": []},
    {"$device": "moon 3"},
    {"$size": "x"},
    {"$size": 5},
    {"$dict": 5},
    {"$dict": [[1]]},
    {"$dict": [[[], 1]]},
    {"$dict": [[{"$set": []}, 1]]},
    {"$ordered": [1]},
    {"$defaultdict": [], "factory": "os.system"},
    {"$defaultdict": [], "factory": []},
    {"$defaultdict": []},
    {"$counter": [[{}, 1]]},
    {"$set": [[]]},
    {"$set": [{"a": 1}]},
    {"$set": None},
    {"$frozenset": [{"$set": []}]},
    {"$deque": [], "maxlen": -1},
    {"$deque": [], "maxlen": "x"},
    {"$deque": []},
    {"$tuple": 5},
    {"$tensor": "nowhere"},
    {"$tensor": []},
    {"$tensor": None},
    {"$ndarray": "a", "dtype": "f4", "shape": [10**9, 10**9]},
    {"$ndarray": "a", "dtype": "O", "shape": [1]},
    {"$ndarray": "a", "dtype": "i4,i4", "shape": [1]},
    {"$ndarray": "a", "dtype": [["x", "i4"]], "shape": [1]},
    {"$ndarray": "a", "dtype": "f4", "shape": "x"},
    {"$ndarray": "a", "dtype": "V0", "shape": [0]},
    {"$ndarray": "a", "dtype": "(9,9)f4", "shape": [1]},
    {"$ndarray": "a", "shape": [1]},
    {"$numpy_scalar": "", "dtype": "f4"},
    {"$numpy_scalar": "AAAA", "dtype": "O"},
    {"$numpy_scalar": "AAAA", "dtype": "x9"},
    {"$numpy_scalar": 5, "dtype": "f4"},
    {"$numpy_dtype": "O"},
    {"$numpy_dtype": {"names": ["a"], "formats": ["i4"]}},
    {"$codec": []},
    {"$codec": "x"},
    {"$object": "os.system"},
]


@pytest.mark.parametrize("node", HOSTILE, ids=lambda node: json.dumps(node)[:40])
def test_what_flatten_cannot_have_made_is_a_value_error(node: Any) -> None:
    tensors = {"a": torch.zeros(3)}
    with pytest.raises((ValueError, UnsupportedTypeError)):
        unflatten({"x": [node]}, tensors.__getitem__)


def test_a_tree_deeper_than_the_stack_is_a_value_error() -> None:
    for kind in ("list", "$tuple"):
        node: Any = 1
        for _ in range(100_000):
            node = [node] if kind == "list" else {"$tuple": [node]}
        with pytest.raises(ValueError, match=r"nested deeper"):
            unflatten(node, lambda _: torch.zeros(1))
        while isinstance(node, dict | list):  # taken apart by hand: freeing it recursively is not the point
            node = node["$tuple"][0] if isinstance(node, dict) else node[0]


# ------------------------------------------------------------------------------------------ select


def selected(state: Any, *patterns: str) -> Any:
    flat = flatten(state)
    tensors = {one.address: one.tensor for one in flat.leaves}
    return unflatten(select(flat.tree, patterns), tensors.__getitem__)


def test_select_takes_addresses_and_globs() -> None:
    state = {"model": {"h.0.w": 1, "h.1.w": 2}, "opt": {"state": {0: {"m": 3}, 1: {"m": 4}}, "n": [5, 6]}}
    assert selected(state, "model") == {"model": {"h.0.w": 1, "h.1.w": 2}}
    assert selected(state, "model/h.0.w") == {"model": {"h.0.w": 1}}
    assert selected(state, "model/h.*.w", "opt/state.1") == {
        "model": {"h.0.w": 1, "h.1.w": 2},
        "opt": {"state": {1: {"m": 4}}},
    }
    assert selected(state, "opt/n.1") == {"opt": {"n": [5, 6]}}
    assert selected(state, "*") == state


def test_select_looks_into_live_objects() -> None:
    model = torch.nn.Linear(2, 3)
    chosen = selected({"model": model, "x": 1}, "model/bias")
    assert list(chosen) == ["model"]
    assert list(chosen["model"]) == ["bias"]


def test_a_pattern_that_matches_nothing_is_an_error_that_names_the_root() -> None:
    with pytest.raises(UsageError, match=r"its root holds: model, opt"):
        selected({"model": 1, "opt": 2}, "modle")


def test_tensors_in_finds_all() -> None:
    flat = flatten({"a": [torch.zeros(1), {1: np.zeros(2)}], "b": (torch.ones(1),)})
    assert sorted(tensors_in(flat.tree)) == sorted(one.address for one in flat.leaves)


# -------------------------------------------------------------------------------------- hypothesis

plain_values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**200), max_value=2**200)
    | st.floats()
    | st.complex_numbers()
    | st.text(alphabet=st.characters(exclude_categories=()))
    | st.binary()
    | st.datetimes(timezones=st.none() | st.timezones() | st.just(dt.UTC))
    | st.timedeltas()
    | st.dates()
    | st.times()
)
keys = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.floats(allow_nan=False)
    | st.binary(max_size=3),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=2),
    max_leaves=3,
)
small_tensors = st.builds(
    lambda shape, dtype: torch.randint(0, 2, shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
states = st.recursive(
    plain_values | small_tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict)
        | st.lists(inner, max_size=3).map(lambda v: collections.deque(v, maxlen=5))
        | st.sets(keys, max_size=3)
    ),
    max_leaves=12,
)


@given(states)
def test_any_state_comes_back_exactly(state: Any) -> None:
    assert_same(through_json(state), state)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*decode.KINDS, "zone", "fold", "dtype", "shape", "a"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(json_values)
def test_any_json_is_read_or_refused_as_a_value_error(node: Any) -> None:
    with contextlib.suppress(ValueError, UnsupportedTypeError):
        unflatten(node, {"a": torch.zeros(3)}.__getitem__)
