"""A file of a new checkpoint may be a hard link to one of an older one; what can't be linked is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keepstep import Store
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.files import LocalFiles


def test_a_linked_file_is_the_same_file_and_stays_when_the_first_goes(tmp_path: Path) -> None:
    first = Store(tmp_path).save({"model": torch.arange(8.0)})
    backend = LocalBackend(LocalFiles(), tmp_path)
    workspace = backend.reserve()
    workspace.open()
    committed = first.manifest.files["model.safetensors"]
    assert workspace.link("model.safetensors", first.name, "model.safetensors", committed) is None
    linked = next(tmp_path.glob("*.tmp-*")) / "model.safetensors"
    assert linked.samefile(first.path / "model.safetensors")
    Store(tmp_path).delete(first)
    assert linked.stat().st_size == committed.bytes
    workspace.discard()


@pytest.mark.parametrize("spoil", ["gone", "size", "link", "directory gone"])
def test_what_is_no_plain_file_of_that_size_is_not_linked(tmp_path: Path, spoil: str) -> None:
    first = Store(tmp_path).save({"model": torch.arange(8.0)})
    file = first.path / "model.safetensors"
    committed = first.manifest.files[file.name]
    if spoil == "gone":
        file.unlink()
    elif spoil == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif spoil == "size":
        file.write_bytes(b"longer" + file.read_bytes())
    elif spoil == "directory gone":
        Store(tmp_path).delete(first)
    workspace = LocalBackend(LocalFiles(), tmp_path).reserve()
    workspace.open()
    with pytest.raises(FileNotFoundError):
        workspace.link("model.safetensors", first.name, file.name, committed)
    workspace.discard()
