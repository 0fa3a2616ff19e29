"""What a user gets wrong when calling a store: told by name and value, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keepstep import Store
from keepstep.checkpoint.saving.environment import without_secrets
from keepstep.errors import BucketError, StoreError, UsageError

STATE = {"w": torch.ones(3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget_bytes": "1G"}, "memory_budget_bytes is '1G'; expected a whole number: at least"),
        ({"scrub_interval_s": "1h"}, "scrub_interval_s is '1h'; expected a number of more than 0"),
        ({"scrub_bytes_per_s": 0}, "scrub_bytes_per_s is 0; expected a number of more than 0"),
        ({"mirror_pending": 0}, "mirror_pending is 0; expected a whole number of at least 1"),
        ({"world": 4}, r"world is 4; expected .* keepstep.world.Ranks\(\)"),
    ],
)
def test_a_wrong_argument_of_a_store_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Store(tmp_path, **options)


@pytest.mark.parametrize("path", ["", "a\0b", b"run", 3, None])
def test_a_path_that_is_none_is_not_the_current_directory(path: Any) -> None:
    with pytest.raises(UsageError, match="expected a directory, or the address of a bucket"):
        Store(path)


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_file_in_the_place_of_a_store_is_named(tmp_path: Path, below: str) -> None:
    in_the_way = tmp_path / "run"
    in_the_way.write_text("mine")
    with pytest.raises(StoreError, match=f"{in_the_way} is there and is no directory"):
        Store(in_the_way / below).save(STATE)
    assert in_the_way.read_text() == "mine"


def test_wrong_arguments_of_calls_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UsageError, match=r"metrics is \[0.5\]; expected names with values"):
        store.save(STATE, metrics=[0.5])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="pinned is 'no'; expected True or False"):
        store.save(STATE, pinned="no")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match='staging is \'fast\'; allowed: "auto", "awaited" or "overlapped"'):
        store.save_in_background(STATE, staging="fast")  # type: ignore[arg-type]
    assert store.list() == []
    with pytest.raises(UsageError, match="only is 3; expected an address or several"):
        store.save(STATE).load(only=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": "60"}, "storage_options timeout_s is '60'; expected more than 0 seconds"),
        ({"retry_timeout_s": -1}, "storage_options retry_timeout_s is -1; expected more than 0 seconds"),
        ({"max_retries": 1.5}, "storage_options max_retries is 1.5; expected a whole number of at least 0"),
        (["key"], "storage_options is a list; expected names with values"),
    ],
)
def test_a_wrong_option_of_a_bucket_is_named(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Store("s3://bucket/run", storage_options=options)


def test_a_login_in_an_endpoint_is_in_no_error() -> None:
    reached = {"access_key_id": "someone", "secret_access_key": "their-secret", "region": "us-east-1"}
    limits = {"max_retries": 0, "retry_timeout_s": 1, "connect_timeout_s": 1}
    store = Store(
        "s3://bucket/run",
        storage_options={"endpoint": "http://me:my-password@127.0.0.1:9", **reached, **limits},
    )
    with pytest.raises(BucketError, match=r"http://\*\*\*@127.0.0.1:9") as caught:
        store.list()
    assert "my-password" not in str(caught.value)


def test_secrets_of_a_command_line_are_in_no_manifest() -> None:
    given = (
        "train.py --aws-secret-access-key S1 --hf_token=S2 --password S3 --verbose aws.secret_key=S4 -lr 0.1 "
        "--token S5 --max-tokens 512 --pad-token <pad> --tokenizer=gpt2 --key q --url s3://me:S6@host/run"
    )
    assert " ".join(without_secrets(given.split(" "))) == (
        "train.py --aws-secret-access-key *** --hf_token=*** --password *** --verbose aws.secret_key=*** "
        "-lr 0.1 --token *** --max-tokens 512 --pad-token <pad> --tokenizer=gpt2 --key q --url "
        "s3://***@host/run"
    )
