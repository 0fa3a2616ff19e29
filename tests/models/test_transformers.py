"""Models of transformers, made from a configuration: out of a run and in again, by its own functions too."""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import keepstep

TOKENS = torch.arange(12).reshape(2, 6)


def gpt2(seed: int) -> GPT2LMHeadModel:
    """Its head is tied to its embedding."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("size", ["10GB", "8KB"])
def test_from_pretrained_reads_what_a_run_gives(make: Any, size: str, tmp_path: Path) -> None:
    accelerator = keepstep.Accelerator(cpu=True)
    model = accelerator.prepare(make(1))
    expected = logits(model)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        tmp_path / "theirs", is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    accelerator.save_model(model, tmp_path / "ours", max_shard_size=size)
    unwrapped.config.save_pretrained(tmp_path / "ours")
    for directory in ("theirs", "ours"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / directory).eval()
        assert torch.equal(logits(again), expected)
        fresh = make(2)
        keepstep.load_checkpoint_in_model(fresh, tmp_path / directory, device_map={"": "cpu"}, strict=True)
        assert torch.equal(logits(fresh), expected)


def test_a_model_in_parts_generates_what_it_does_in_one_piece(tmp_path: Path) -> None:
    whole = llama(1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected, text = logits(whole), whole.generate(TOKENS, **options)
    keepstep.Accelerator(cpu=True).save_model(whole, tmp_path / "weights")
    with keepstep.init_empty_weights():
        parts = LlamaForCausalLM(whole.config).eval()
    device_map = keepstep.infer_auto_device_map(
        parts, max_memory={"cpu": "18KB"}, no_split_module_classes=["LlamaDecoderLayer"]
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    keepstep.load_checkpoint_and_dispatch(
        parts, tmp_path / "weights", device_map, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(logits(parts), expected)
    assert torch.equal(parts.generate(TOKENS, **options), text)
    keepstep.Accelerator(cpu=True).save_model(parts, tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("weights", "again"))
    assert first == second


def test_nothing_that_is_written_is_a_pickle(tmp_path: Path) -> None:
    accelerator = keepstep.Accelerator(cpu=True)
    accelerator.save([0, 1, 2, 3], tmp_path / "array.pkl")
    assert keepstep.load(tmp_path / "array.pkl") == [0, 1, 2, 3]
    accelerator.save(accelerator.get_state_dict(gpt2(1)), tmp_path / "state.pt")
    assert set(keepstep.load(tmp_path / "state.pt")) == set(gpt2(1).state_dict())
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=r"opcode|pickle|exhausted"):
            list(pickletools.genops(path.read_bytes()))
