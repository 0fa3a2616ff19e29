"""Mangled and hostile files, with a self digest that fits: always a damage error, nothing read outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepstep.checkpoint.format.manifest import BLANK_DIGEST, combine_digests, digest_of
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DigestError,
    FileSizeError,
    ManifestError,
    MismatchError,
    MissingFileError,
    NoValidCheckpointError,
    SchemaVersionError,
    StoreError,
    UnsupportedTypeError,
)

STATE: dict[str, Any] = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(2)},
    "train": {"n": np.arange(3), "step": 1, "x": (1.5, b"b")},
}
STATE["model"]["tied"] = STATE["model"]["w"].t()


def live() -> dict[str, Any]:
    w = torch.zeros(2, 3)
    return {
        "model": {"w": w, "v": torch.zeros(2), "tied": w.t()},
        "train": {"n": np.zeros(3, dtype=np.int64), "step": 0, "x": (1.5, b"b")},
    }


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("original"))
    return store.save(STATE, step=3, metrics={"loss": 1.5}, tags=("t",)).path


@pytest.fixture
def target(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint_0"))


@contextlib.contextmanager
def little_memory(extra_bytes: int = 2 << 30) -> Iterator[None]:
    """Made-up sizes must not be allocated: an attempt fails here, as MemoryError or RuntimeError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def rewrite(directory: Path, change: Callable[[Any, Any], Any]) -> None:
    """Change manifest and state as an attacker would: every digest fits afterwards."""
    manifest = json.loads((directory / "manifest.json").read_text())
    state = json.loads((directory / "state.json").read_text())
    changed = change(manifest, state)
    write_state(directory, manifest, state)
    write_manifest(directory, manifest if changed is None else changed)


def write_state(directory: Path, manifest: Any, state: Any) -> None:
    data = state if isinstance(state, bytes) else json.dumps(state).encode()
    (directory / "state.json").write_bytes(data)
    entry = manifest["files"].get("state.json") if isinstance(manifest.get("files"), dict) else None
    if isinstance(entry, dict) and entry.get("bytes") != "keep":
        entry.update(bytes=len(data), digest=digest_of(data))
    with contextlib.suppress(Exception):
        for name, file in manifest["files"].items():
            if "header_bytes" in file:
                tensors = sorted(
                    (t for t in state["tensors"].values() if t.get("file") == name),
                    key=lambda t: (t["offset"], t["bytes"]),
                )
                header = (directory / name).read_bytes()[: file["header_bytes"]]
                file["digest"] = combine_digests([digest_of(header), *(t["digest"] for t in tensors)])


def write_manifest(directory: Path, manifest: Any) -> None:
    if isinstance(manifest, dict):
        manifest.pop("self_digest", None)
        manifest["self_digest"] = BLANK_DIGEST
        text = json.dumps(manifest, indent=1).encode() + b"\n"
        begin = text.rindex(BLANK_DIGEST.encode())
        text = text[:begin] + digest_of(text).encode() + text[begin + 32 :]
    else:
        text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (directory / "manifest.json").write_bytes(text)


def newest_of(store: Store) -> Checkpoint | None:
    """The newest one; what seems to be of a newer keepstep is no damage, and is not passed over."""
    try:
        return store.latest()
    except StoreError as error:
        if "upgrade keepstep" not in str(error):
            raise
        return None


NEWER = ("schema newer", "state schema newer")
MISFITS = (
    "tree of an unknown kind",
    "array dtype object",
    "array shape huge",
    "array an expanded tensor",
)
"""Beside objects of the right kind, these are seen as another kind first."""


def assert_refused(
    directory: Path,
    kind: type[Exception] = DamagedCheckpointError,
    *,
    misfit: bool = False,
    newer: bool = False,
) -> None:
    """Every way to read it ends in a damage error; every way to look at it says so.

    Args:
        directory: the checkpoint.
        kind: of the error.
        misfit: nothing is wrong with it but that it fits no live objects.
        newer: nothing is wrong with it but that this keepstep is too old.
    """
    ways: list[Callable[[], Any]] = [
        lambda: Checkpoint.open(directory).load(),
        lambda: Checkpoint.open(directory).load(verify=False),
    ]
    if misfit:
        with pytest.raises(MismatchError):
            Checkpoint.open(directory).load_into(live())
    else:
        ways.append(lambda: Checkpoint.open(directory).load_into(live()))
    with little_memory():
        for way in ways:
            with pytest.raises(kind) as caught:
                way()
            assert str(directory) in str(caught.value)
        verify_checkpoint(directory)
        store = Store(directory.parent)
        store.list()
        newest_of(store)
        if newer:
            with pytest.raises(StoreError, match="upgrade keepstep"):
                store.load_latest_into(live())
            assert directory.exists()
        else:
            with pytest.raises(MismatchError if misfit else NoValidCheckpointError):
                store.load_latest_into(live())


def test_the_rewriting_itself_does_no_damage(target: Path) -> None:
    rewrite(target, lambda m, s: None)
    Checkpoint.open(target).load_into(live())
    assert verify_checkpoint(target).sound


def _entry(name: str) -> Callable[[Any], Any]:
    return lambda m: m["files"]["model.safetensors"].__setitem__("x", name)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def rename_file(name: str) -> Callable[[Any, Any], None]:
    def change(m: Any, s: Any) -> None:
        m["files"][name] = m["files"].pop("model.safetensors")
        for tensor in s["tensors"].values():
            if tensor.get("file") == "model.safetensors":
                tensor["file"] = name

    return change


def add_files(*names: str) -> Callable[[Any], None]:
    return lambda m: m["files"].update({name: {"bytes": 0, "digest": digest_of(b"")} for name in names})


def put(*path: Any) -> Callable[[Any], Callable[[Any, Any], None]]:
    """Set a member of the manifest ("m", ...) or of state.json ("s", ...)."""

    def to(value: Any) -> Callable[[Any, Any], None]:
        def change(m: Any, s: Any) -> None:
            node = {"m": m, "s": s}
            keys = list(path)
            for key in keys[:-1]:
                node = node[key]
            if value is ...:
                del node[keys[-1]]
            else:
                node[keys[-1]] = value

        return change

    return to


W = ("s", "tensors", "model/w")
V = ("s", "tensors", "model/v")
TIED = ("s", "tensors", "model/tied")
ENTRY = ("m", "files", "model.safetensors")

HOSTILE: dict[str, Callable[[Any, Any], Any]] = {
    "absolute path": rename_file("/etc/passwd"),
    "parent path": rename_file("../model.safetensors"),
    "parent path inside": rename_file("a/../../b"),
    "subdirectory": rename_file("a/b.safetensors"),
    "dot": rename_file("."),
    "dots": rename_file(".."),
    "hidden": rename_file(".keepstep"),
    "null byte": rename_file("a\x00b"),
    "newline": rename_file("model.safetensors\n"),
    "empty name": rename_file(""),
    "backslash": rename_file("a\\b"),
    "names the manifest": rename_file("manifest.json"),
    "very long name": rename_file("a" * 5000),
    "no state": put("m", "files", "state.json")(...),
    "files a list": put("m", "files")([]),
    "files null": put("m", "files")(None),
    "file entry a list": put(*ENTRY)([]),
    "file size negative": put(*ENTRY, "bytes")(-1),
    "file size huge": put(*ENTRY, "bytes")(1 << 62),
    "file size beyond": put(*ENTRY, "bytes")(1 << 80),
    "file size a float": put(*ENTRY, "bytes")(4096.0),
    "file size a bool": put(*ENTRY, "bytes")(True),
    "file size a string": put(*ENTRY, "bytes")("4128"),
    "header beyond the file": put(*ENTRY, "header_bytes")(1 << 40),
    "header zero": put(*ENTRY, "header_bytes")(0),
    "header null": put(*ENTRY, "header_bytes")(None),
    "header gone": put(*ENTRY, "header_bytes")(...),
    "within a path": put(*ENTRY, "within")("../checkpoint_3"),
    "within a foreign name": put(*ENTRY, "within")("best"),
    "within a number": put(*ENTRY, "within")(3),
    "schema newer": put("m", "schema")(2),
    "schema zero": put("m", "schema")(0),
    "schema a string": put("m", "schema")("1"),
    "schema true": put("m", "schema")(True),
    "state schema newer": put("s", "schema")(99),
    "state schema gone": put("s", "schema")(...),
    "format gone": put("m", "format")(...),
    "format other": put("m", "format")("zip"),
    "step a string": put("m", "step")("3"),
    "step true": put("m", "step")(True),
    "step a float": put("m", "step")(1.5),
    "metrics a list": put("m", "metrics")([]),
    "metric a list": put("m", "metrics", "loss")([1]),
    "metric odd float": put("m", "metrics", "loss")({"$float": []}),
    "metric null": put("m", "metrics", "loss")(None),
    "tags a string": put("m", "tags")("abc"),
    "tag a number": put("m", "tags")([1]),
    "pinned a number": put("m", "pinned")(1),
    "attempt negative": put("m", "attempt")(-1),
    "id a number": put("m", "id")(5),
    "parent a list": put("m", "parent")([]),
    "environment a list": put("m", "environment")([]),
    "id gone": put("m", "id")(...),
    "manifest a list": lambda m, s: [m],
    "manifest a number": lambda m, s: b"5",
    "manifest empty": lambda m, s: b"",
    "manifest no JSON": lambda m, s: b"{",
    "manifest binary": lambda m, s: bytes(range(256)),
    "manifest nested": lambda m, s: b"[" * 100_000,
    "manifest without digest": lambda m, s: b'{"format": "keepstep"}',
    "tensors a list": put("s", "tensors")([]),
    "tensors gone": put("s", "tensors")(...),
    "tree gone": put("s", "tree")(...),
    "tensor entry a list": put(*W)([]),
    "tensor gone": put(*W)(...),
    "dtype unknown": put(*W, "dtype")("float33"),
    "dtype a list": put(*W, "dtype")([]),
    "dtype null": put(*W, "dtype")(None),
    "dtype wider": put(*W, "dtype")("float64"),
    "shape negative": put(*W, "shape")([-2, -3]),
    "shape huge": put(*W, "shape")([1 << 40, 1 << 40]),
    "shape huge and empty": put(*W, "shape")([1 << 62, 0]),
    "shape too many": put(*W, "shape")([1] * 70 + [6]),
    "shape floats": put(*W, "shape")([2.0, 3.0]),
    "shape bools": put(*W, "shape")([True, 6]),
    "shape a string": put(*W, "shape")("23"),
    "shape nested": put(*W, "shape")([[2], [3]]),
    "bytes larger": put(*W, "bytes")(48),
    "bytes negative": put(*W, "bytes")(-24),
    "offset negative": put(*W, "offset")(-1),
    "offset into the header": put(*W, "offset")(0),
    "offset later": put(*W, "offset")(4100),
    "offset beyond": put(*W, "offset")(1 << 61),
    "two at one place": lambda m, s: s["tensors"]["model/v"].update(offset=s["tensors"]["model/w"]["offset"]),
    "a tensor twice": lambda m, s: s["tensors"].update(more=s["tensors"]["model/w"]),
    "file unknown": put(*W, "file")("other.safetensors"),
    "file outside": put(*W, "file")("../../x"),
    "file the state": put(*W, "file")("state.json"),
    "file null": put(*W, "file")(None),
    "file a list": put(*W, "file")([]),
    "digest short": put(*W, "digest")("ab"),
    "digest a list": put(*W, "digest")([]),
    "digest in capitals": put(*W, "digest")("AB" * 16),
    "alias to nowhere": put(*TIED, "alias_of")("model/none"),
    "alias to itself": put(*TIED, "alias_of")("model/tied"),
    "alias to a list": put(*TIED, "alias_of")([]),
    "alias null": put(*TIED, "alias_of")(None),
    "alias beyond": put(*TIED, "offset")(8),
    "alias far beyond": put(*TIED, "offset")(1 << 60),
    "alias odd offset": put(*TIED, "offset")(2),
    "alias stride negative": put(*TIED, "stride")([-1, 1]),
    "alias stride huge": put(*TIED, "stride")([1 << 61, 1]),
    "alias strides too few": put(*TIED, "stride")([1]),
    "alias strides gone": put(*TIED, "stride")(...),
    "alias to an alias": lambda m, s: s["tensors"].update(
        {"more": {**s["tensors"]["model/tied"], "alias_of": "model/tied"}}
    ),
    "tree refers to nothing": put("s", "tree", "model", "w")({"$tensor": "model/none"}),
    "tree refers to a number": put("s", "tree", "model", "w")({"$tensor": 5}),
    "tree refers to a list": put("s", "tree", "model", "w")({"$tensor": []}),
    "tree refers to a dict": put("s", "tree", "model", "w")({"$tensor": {"a": 1}}),
    "tree of an unknown kind": put("s", "tree", "train", "x")({"$eval": "1"}),
    "tree with an unhashable key": put("s", "tree", "train")({"$dict": [[[], 1]]}),
    "tree with an unhashable item": put("s", "tree", "train", "step")({"$set": [[1]]}),
    "tree with a bad float": put("s", "tree", "train", "step")({"$float": "00"}),
    "tree with a bad zone": put("s", "tree", "train", "step")({"$timezone": "America"}),
    "tree pairs of one": put("s", "tree", "train")({"$dict": [[1]]}),
    "tree pairs a number": put("s", "tree", "train")({"$dict": 5}),
    "tree very deep": put("s", "tree", "train", "step")(nested(900)),
    "array from a wide view": put("s", "tree", "train", "n", "$ndarray")("model/tied"),
    "array dtype object": put("s", "tree", "train", "n", "dtype")("O"),
    "array shape huge": put("s", "tree", "train", "n", "shape")([1 << 40]),
    "array dtype gone": put("s", "tree", "train", "n", "dtype")(...),
    "array an expanded tensor": lambda m, s: (
        s["tensors"].update(
            wide={
                "dtype": "float32",
                "shape": [1 << 16, 1 << 16, 3],
                "offset": 0,
                "alias_of": "model/w",
                "stride": [0, 0, 1],
            }
        ),
        s["tree"]["train"]["n"].update({"$ndarray": "wide", "dtype": "<f4", "shape": [1 << 16, 1 << 16, 3]}),
    )[:0],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(target: Path, name: str) -> None:
    def change(m: Any, s: Any) -> Any:
        changed = HOSTILE[name](m, s)
        return None if changed == () else changed

    rewrite(target, change)
    assert_refused(target, misfit=name in MISFITS, newer=name in NEWER)


def deepen(directory: Path, depth: int) -> None:
    """Put a nested list where "@deep@" is; as text, since writing it down takes a stack too."""
    manifest = (directory / "manifest.json").read_bytes()
    state = (directory / "state.json").read_bytes()
    deep = b"[" * depth + b"]" * depth
    changed = state.replace(b'"@deep@"', deep)
    (directory / "state.json").write_bytes(changed)
    manifest = manifest.replace(digest_of(state).encode(), digest_of(changed).encode())
    manifest = manifest.replace(b'"bytes": %d' % len(state), b'"bytes": %d' % len(changed))
    manifest = manifest.replace(b'"@deep@"', deep)
    begin = manifest.rindex(b'"self_digest": "') + 16
    blank = manifest[:begin] + BLANK_DIGEST.encode() + manifest[begin + 32 :]
    (directory / "manifest.json").write_bytes(blank[:begin] + digest_of(blank).encode() + blank[begin + 32 :])


@pytest.mark.parametrize(
    "where", ["step", "metric", "tag", "environment", "format", "tensor", "shape", "tree"]
)
def test_nesting_at_the_edge_of_the_stack(target: Path, original: Path, where: str) -> None:
    """JSON that just fits the parser must not overflow what looks at it afterwards."""
    places: dict[str, Callable[[Any, Any], Any]] = {
        "step": lambda m, s: m,
        "metric": lambda m, s: m["metrics"],
        "tag": lambda m, s: m,
        "environment": lambda m, s: m["environment"],
        "format": lambda m, s: m,
        "tensor": lambda m, s: s["tensors"],
        "shape": lambda m, s: s["tensors"]["model/w"],
        "tree": lambda m, s: s["tree"],
    }
    keys = {"tag": "tags", "metric": "loss", "tensor": "model/w", "tree": "train"}
    for depth in range(600, 1000, 13):
        shutil.rmtree(target)
        shutil.copytree(original, target)
        rewrite(target, lambda m, s: places[where](m, s).update({keys.get(where, where): "@deep@"}))
        deepen(target, depth)
        checkpoint = None
        with contextlib.suppress(DamagedCheckpointError):
            checkpoint = Checkpoint.open(target)
        if checkpoint is not None:
            for way in (checkpoint.load, lambda: checkpoint.load_into(live())):  # noqa: B023
                with contextlib.suppress(DamagedCheckpointError, MismatchError):
                    way()
            with contextlib.suppress(DamagedCheckpointError):
                checkpoint.load(only="model")
        verify_checkpoint(target)
        newest_of(Store(target.parent))


def test_a_newer_schema_says_so(target: Path) -> None:
    rewrite(target, put("m", "schema")(7))
    with pytest.raises(
        SchemaVersionError, match=r"schema version 7; this keepstep reads up to 1: upgrade keepstep"
    ):
        Checkpoint.open(target)


def test_messages_name_file_value_and_way_out(target: Path) -> None:
    rewrite(target, rename_file("../x"))
    with pytest.raises(
        ManifestError, match=r"manifest.json: the file name '../x' is not allowed.*no absolute path"
    ):
        Checkpoint.open(target)


# ------------------------------------------------------------------------------- what is in its place


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


IN_PLACE: dict[str, Callable[[Path], None]] = {
    "a directory": lambda path: path.mkdir(),
    "a fifo": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("file", ["manifest.json", "state.json", "model.safetensors"])
def test_odd_things_in_a_files_place(target: Path, file: str, kind: str) -> None:
    _replace(target / file, IN_PLACE[kind])
    for way in (lambda: Checkpoint.open(target).load(), lambda: Checkpoint.open(target).load_into(live())):
        with pytest.raises(
            FileNotFoundError if (file, kind) == ("manifest.json", "nothing") else DamagedCheckpointError
        ):
            way()
    assert not verify_checkpoint(target).sound
    Store(target.parent).list()
    assert Store(target.parent).latest() is None


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "model.safetensors"])
def test_links_to_the_right_bytes_are_not_followed(target: Path, tmp_path: Path, file: str) -> None:
    (target / file).rename(tmp_path / "elsewhere")
    (target / file).symlink_to(tmp_path / "elsewhere")
    assert_refused(target)
    assert not verify_checkpoint(target).sound


def all_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_every_single_bit_flip_is_found(target: Path) -> None:
    """One bit in every byte of every file, each bit position in turn."""
    assert all_files(target) == ["manifest.json", "model.safetensors", "state.json", "train.safetensors"]
    for name in all_files(target):
        data = (target / name).read_bytes()
        padding = data.rstrip(b" ").__len__() if name.endswith(".safetensors") else len(data)
        for position in range(len(data)):
            if 600 < position < 4000 and name.endswith(".safetensors") and position % 97:
                continue  # a header's padding is all alike
            flipped = bytearray(data)
            flipped[position] ^= 1 << (position % 8)
            (target / name).write_bytes(flipped)
            with pytest.raises(DamagedCheckpointError):
                Checkpoint.open(target).load()
            if position % 5 == 0:
                with pytest.raises(DamagedCheckpointError):
                    Checkpoint.open(target).load_into(live())
                assert not verify_checkpoint(target).sound, (name, position)
        (target / name).write_bytes(data)
        assert padding
    assert verify_checkpoint(target).sound


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -4096])
@pytest.mark.parametrize("file", ["manifest.json", "state.json", "model.safetensors"])
def test_cut_and_extended_files_are_found(target: Path, file: str, cut: int) -> None:
    data = (target / file).read_bytes()
    for changed in (data[:cut], data + data[: abs(cut) + 1], data + b"\n"):
        (target / file).write_bytes(changed)
        kind = DamagedCheckpointError if file == "manifest.json" else FileSizeError
        assert not verify_checkpoint(target).sound
        for way in (
            lambda: Checkpoint.open(target).load(),
            lambda: Checkpoint.open(target).load_into(live()),
        ):
            with pytest.raises(kind, match=file):
                way()


def test_quick_verification_reads_no_data(target: Path) -> None:
    data = bytearray((target / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "model.safetensors").write_bytes(data)
    assert verify_checkpoint(target, quick=True).sound
    report = verify_checkpoint(target)
    assert not report.sound
    assert "model" in report.problems[0]
    (target / "model.safetensors").unlink()
    assert not verify_checkpoint(target, quick=True).sound


def test_verification_reports_all_that_is_wrong(target: Path) -> None:
    data = bytearray((target / "model.safetensors").read_bytes())
    data[4096] ^= 1
    data[-1] ^= 1
    (target / "model.safetensors").write_bytes(data)
    problems = verify_checkpoint(target).problems
    assert len(problems) == 2
    assert "'model/w'" in problems[0]
    assert "'model/v'" in problems[1]


def test_a_header_that_lies_is_found_by_verification(target: Path) -> None:
    """What we read and what other safetensors readers read must be the same."""
    for header in (
        b"[" * 3000,
        b'{"w": {"data_offsets": 5}}',
        b'{"w": 7}',
        b"[]",
        b"\xff",
        b'{"w":{"dtype":"F32"}}',
    ):
        path = target / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes((4088).to_bytes(8, "little") + header.ljust(4088) + data[4096:])
        rewrite(target, lambda m, s: None)
        report = verify_checkpoint(target)
        assert not report.sound
        path.write_bytes(data)


def test_missing_files_have_their_own_error(target: Path) -> None:
    (target / "train.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"the file train.safetensors \(\d+ bytes\) is missing"):
        Checkpoint.open(target).load()


def test_a_changed_manifest_has_its_own_error(target: Path) -> None:
    text = (target / "manifest.json").read_text().replace('"step": 3', '"step": 4')
    (target / "manifest.json").write_text(text)
    with pytest.raises(DigestError, match=r"manifest.json says its digest is"):
        Checkpoint.open(target)


# --------------------------------------------------------------------------------------- at random

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    for key, item in (
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    ):
        found += places(item, (*path, key))
    return found


def mutate(data: st.DataObject, original: Path) -> None:
    with tempfile.TemporaryDirectory() as work:  # pytest's own are told apart by looking through all of them
        mutate_within(Path(work), data, original)


def mutate_within(work: Path, data: st.DataObject, original: Path) -> None:
    target = Path(shutil.copytree(original, work / "checkpoint_0"))

    def change(m: Any, s: Any) -> None:
        both = {"m": m, "s": s}
        for _ in range(data.draw(st.integers(1, 3))):
            candidates = [p for p in places(both) if len(p) > 1]
            put(*data.draw(st.sampled_from(candidates)))(data.draw(json_values | st.just(...)))(m, s)

    rewrite(target, change)
    try:
        loaded = Checkpoint.open(target).load()
        Checkpoint.open(target).load_into(loaded if isinstance(loaded, dict) else {})
    except (DamagedCheckpointError, CheckpointNotFoundError, MismatchError, UnsupportedTypeError):
        pass
    verify_checkpoint(target)
    newest_of(Store(work))


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_changes_never_end_in_another_exception(original: Path, data: st.DataObject) -> None:
    mutate(data, original)


@pytest.mark.soak
@given(st.data())
@settings(max_examples=20_000, derandomize=False, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_changes_for_long(original: Path, data: st.DataObject) -> None:
    mutate(data, original)


def add_directories(*names: Any) -> Callable[[Any], None]:
    return lambda m: m.update(directories=list(names))


HANDED_OVER: dict[str, tuple[Callable[[Any], Any], str]] = {
    "absolute": (add_files("files//etc/passwd"), "an empty part"),
    "parent": (add_files("files/../../b"), "an empty part, '.' or '..'"),
    "dot": (add_files("files/./b"), "an empty part, '.' or '..'"),
    "slash at the end": (add_files("files/b/"), "an empty part"),
    "null byte": (add_files("files/a\x00b"), "a control character"),
    "newline": (add_files("files/a\n"), "a control character"),
    "escape": (add_files("files/\x1b[31m"), "a control character"),
    "C1": (add_files("files/\x9b31m"), "a control character"),
    "no UTF-8": (add_files("files/\udcff"), "it is not UTF-8"),
    "part too long": (add_files("files/" + "\u00fc" * 128), "more than 255 bytes"),
    "too long": (add_files("files" + "/aaaa" * 300), "it has 1505 bytes; allowed: 1024"),
    "other directory": (add_files("file/b"), "a path below files/ is expected"),
    "the directory itself": (add_files("files"), "a path below files/ is expected"),
    "below a file": (add_files("files/a", "files/a/b"), "'files/a' is a file and a directory"),
    "a segment": (
        lambda m: m["files"].update({"files/m": {"bytes": 9, "digest": digest_of(b""), "header_bytes": 8}}),
        "'files/m' is a segment",
    ),
    "directory outside": (add_directories("files/../.."), "an empty part, '.' or '..'"),
    "directory elsewhere": (add_directories("model"), "does not lie below files/"),
    "directory a number": (add_directories(1), "a string is expected"),
    "directories a string": (lambda m: m.update(directories="files"), "'directories' is 'files'"),
    "directory a file": (
        lambda m: (add_files("files/a")(m), add_directories("files/a")(m)),
        "'files/a' is a file and a directory",
    ),
    "segments without a state": (
        lambda m: (add_files("files/a")(m), m["files"].pop("state.json")),
        "does not name state.json",
    ),
    "nothing": (lambda m: m["files"].clear(), "it names no file"),
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_names_of_what_was_handed_over_lead_nowhere_else(target: Path, name: str) -> None:
    """By the manifest alone, before anything is looked for on the disk."""
    change, message = HANDED_OVER[name]
    rewrite(target, lambda m, s: change(m) and None)
    with pytest.raises(ManifestError, match=re.escape(message)):
        read_manifest(target)
    assert_refused(target)
