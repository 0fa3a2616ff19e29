"""The environment is changed for a block and no longer; yes and no are read as by Accelerate."""

from __future__ import annotations

import os

import accelerate.utils as theirs
import pytest
import torch

import keepstep.utils as ours
from keepstep.errors import UsageError


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWN", "before")
    monkeypatch.delenv("NEW", raising=False)
    with pytest.raises(KeyError), ours.patch_environment(known=1, new="x"):  # noqa: PT012
        assert (os.environ["KNOWN"], os.environ["NEW"]) == ("1", "x")
        raise KeyError
    assert os.environ["KNOWN"] == "before"
    assert "NEW" not in os.environ
    everything = dict(os.environ)
    with ours.clear_environment():
        assert not os.environ
        os.environ["NEW"] = "y"
    assert dict(os.environ) == everything


def test_yes_and_no() -> None:
    for text in ("y", "YES", "t", "True", "on", "1", "n", "No", "f", "false", "off", "0"):
        for to_bool in (False, True):
            mine = ours.str_to_bool(text, to_bool)
            assert (mine, type(mine)) == (
                theirs.str_to_bool(text, to_bool),
                type(theirs.str_to_bool(text, to_bool)),
            )
    with pytest.raises(UsageError, match="'perhaps' is neither yes nor no"):
        ours.str_to_bool("perhaps")
    with ours.patch_environment(flag="yes", number="7", choice="bf16"):
        assert ours.parse_flag_from_env("FLAG")
        assert not ours.parse_flag_from_env("ABSENT")
        assert ours.get_int_from_env(["ABSENT", "NUMBER"], 3) == 7
        assert ours.get_int_from_env(["ABSENT"], 3) == 3
        assert (ours.parse_choice_from_env("CHOICE"), ours.parse_choice_from_env("ABSENT")) == ("bf16", "no")


def test_wrappers_come_off() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compiled = torch.compile(inner)
    assert ours.extract_model_from_parallel(inner) is inner
    assert ours.extract_model_from_parallel(compiled) is compiled
    assert ours.extract_model_from_parallel(compiled, keep_torch_compile=False) is inner


def test_seeds() -> None:
    ours.set_seed(3)
    first = torch.rand(2)
    ours.set_seed(3, deterministic=True)
    try:
        assert torch.equal(torch.rand(2), first)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    for bad in (-1, 2**32, 1.5, True):
        with pytest.raises(UsageError, match="expected an integer"):
            ours.set_seed(bad)  # type: ignore[arg-type]


def test_what_is_there() -> None:
    assert ours.is_rich_available()
    assert not ours.is_deepspeed_available() or theirs.is_deepspeed_available()
    for name in ("cuda", "mps", "npu", "xpu", "torch_xla", "pandas", "transformers", "wandb", "peft", "timm"):
        question = f"is_{name}_available"
        assert getattr(ours, question)() is bool(getattr(theirs, question)()), name
    for operation in (">", ">=", "==", "!=", "<=", "<"):
        for version in ("2.9", "2.13.0", "2.13.0rc1", "3", torch.__version__):
            assert ours.is_torch_version(operation, version) == theirs.is_torch_version(operation, version)
    with pytest.raises(UsageError, match="operation is '~='; allowed: >, >="):
        ours.compare_versions("1", "~=", "1")
