"""The blocks of a quick tour of Accelerate, with the import line changed and missing names filled in.

Each function is a block, run in a directory of its own, by one process or by every rank of two.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.documents.filled_in import (
    SAMPLES,
    Accuracy,
    CustomObject,
    MyModel,
    args,
    load_dataset,
    loader,
    training_parts,
    weights,
)


def loop_in_four_lines() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    model = MyModel()
    optim = torch.optim.Adam(model.parameters())
    dataset = load_dataset("my_dataset")
    data = torch.utils.data.DataLoader(dataset, shuffle=True)
    before = weights(model)
    model, optim, data = accelerator.prepare(model, optim, data)
    model.train()
    for _epoch in range(2):
        for source, targets in data:
            optim.zero_grad()
            output = model(source)
            loss = F.cross_entropy(output, targets)
            accelerator.backward(loss)
            optim.step()
    assert len(data) == SAMPLES // accelerator.num_processes
    assert not torch.equal(weights(model), before)
    everywhere = accelerator.gather(weights(model)[None])
    assert torch.equal(everywhere, everywhere[:1].expand_as(everywhere))


def prepared_one_by_one() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    model, optim, scheduler, data = training_parts()
    model, optim, data = accelerator.prepare(model, optim, data)
    scheduler = accelerator.prepare(scheduler)
    validation_dataloader = accelerator.prepare(loader())
    split = Accelerator(split_batches=True)
    in_parts = split.prepare(loader())
    # Ranks take whole batches, or parts of each: the length says which.
    assert len(validation_dataloader) == -(-6 // accelerator.num_processes)
    assert len(in_parts) == 6
    assert len(next(iter(in_parts))[0]) == 4 // accelerator.num_processes


def evaluation_on_all_ranks() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    metric = Accuracy()
    model, validation_dataloader = accelerator.prepare(MyModel(), loader())
    for source, targets in validation_dataloader:
        predictions = model(source)
        all_predictions, all_targets = accelerator.gather_for_metrics((predictions, targets))
        metric.add_batch(all_predictions, all_targets)
    alone = Accuracy()
    for source, targets in loader():
        alone.add_batch(MyModel()(source), targets)
    assert (metric.seen, metric.right) == (SAMPLES, alone.right)


def evaluation_cut_by_hand() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    model, eval_dataloader = accelerator.prepare(MyModel(), loader())
    predictions: Any = []
    labels: Any = []
    for source, targets in eval_dataloader:
        with torch.no_grad():
            output = model(source)
        predictions.append(accelerator.gather(output).cpu().numpy())
        labels.append(accelerator.gather(targets).cpu().numpy())
    predictions = np.concatenate(predictions)
    labels = np.concatenate(labels)
    predictions = predictions[: len(eval_dataloader.dataset)]
    labels = labels[: len(eval_dataloader.dataset)]
    assert (labels == load_dataset("my_dataset").tensors[1].numpy()).all()
    assert predictions.shape == (SAMPLES, 3)


def evaluation_on_the_main_process() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    model = accelerator.prepare(MyModel())
    seen = 0
    if accelerator.is_main_process:
        for source, _targets in loader():
            seen += len(accelerator.unwrap_model(model)(source.to(accelerator.device)))
    assert seen == (SAMPLES if accelerator.process_index == 0 else 0)


def padded_before_it_is_gathered() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    rank = accelerator.process_index
    padded = accelerator.pad_across_processes(torch.full((2, 3 + rank), rank), dim=1)
    gathered = accelerator.gather(padded)
    assert gathered.shape == (2 * accelerator.num_processes, 2 + accelerator.num_processes)


def type_of_hardware() -> None:
    from keepstep import Accelerator, DistributedType

    accelerator = Accelerator()
    if accelerator.distributed_type == DistributedType.TPU:
        raise AssertionError("there is none")
    assert accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)


def one_progress_bar() -> None:
    from tqdm.auto import tqdm

    from keepstep import Accelerator

    accelerator = Accelerator()
    progress_bar = tqdm(range(args.max_train_steps), disable=not accelerator.is_local_main_process)
    assert progress_bar.disable == (accelerator.local_process_index != 0)
    assert len(list(progress_bar)) == 5
    accelerator.print(f"said once, not by {accelerator.process_index + 1}")


def ranks_wait_for_each_other() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    if accelerator.is_main_process:
        time.sleep(0.5)
        Path("slept").touch()
    else:
        print("I'm waiting for the main process to finish its sleep...")
    accelerator.wait_for_everyone()
    print("Everyone is here")
    assert Path("slept").exists()


def save_model_and_load_it_unwrapped() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    model = accelerator.prepare(MyModel())
    save_directory = "exported"
    accelerator.wait_for_everyone()
    accelerator.save_model(model, save_directory)
    assert Path(save_directory, "model.safetensors").exists()

    # The tutorial goes on with a pickled file, as older scripts have left: loading it is torch's business.
    if accelerator.is_main_process:
        torch.save(MyModel().state_dict(), Path(save_directory, "pytorch_model.bin"))
    accelerator.wait_for_everyone()
    unwrapped_model = accelerator.unwrap_model(model)
    path_to_checkpoint = os.path.join(save_directory, "pytorch_model.bin")
    unwrapped_model.load_state_dict(torch.load(path_to_checkpoint))


def wrapped_and_unwrapped() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    model = accelerator.prepare(MyModel())
    wrapped = model.__class__.__name__
    model = accelerator.unwrap_model(model)
    assert wrapped == ("MyModel" if accelerator.num_processes == 1 else "DistributedDataParallel")
    assert model.__class__.__name__ == "MyModel"


def sharded_export() -> None:
    from keepstep import Accelerator, load_checkpoint_in_model

    accelerator = Accelerator()
    model, save_directory, device = accelerator.prepare(MyModel()), "exported", accelerator.device
    accelerator.wait_for_everyone()
    accelerator.save_model(model, save_directory, max_shard_size="1GB", safe_serialization=True)
    unwrapped_model = MyModel()
    torch.nn.init.zeros_(unwrapped_model.inner.weight)
    load_checkpoint_in_model(unwrapped_model, save_directory, device_map={"": device})
    assert torch.equal(weights(unwrapped_model), weights(MyModel()))


def transformers_model() -> None:
    from transformers import AutoModel, BertConfig, BertModel

    from keepstep import Accelerator

    accelerator = Accelerator()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 20, "max_position_embeddings": 8}
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            small = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
            BertModel(small).save_pretrained("bert-base-cased")
    model = AutoModel.from_pretrained("bert-base-cased")
    model = accelerator.prepare(model)
    unwrapped_model = accelerator.unwrap_model(model)
    unwrapped_model.save_pretrained(
        "path/to/my_model_directory",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
    )
    accelerator.wait_for_everyone()
    read = AutoModel.from_pretrained("path/to/my_model_directory")
    assert torch.equal(weights(read), weights(unwrapped_model))


def state_out_and_in() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    model, optimizer, lr_scheduler, _ = training_parts()
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    accelerator.save_state(output_dir="my_checkpoint")
    before = weights(model)
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    lr_scheduler.step()
    accelerator.load_state("my_checkpoint")
    assert torch.equal(weights(model), before)
    assert optimizer.param_groups[0]["lr"] == 0.05


def numbered_states() -> None:
    from keepstep import Accelerator
    from keepstep.utils import ProjectConfiguration

    naming = ProjectConfiguration(project_dir="project", automatic_checkpoint_naming=True)
    accelerator = Accelerator(project_config=naming)
    model = accelerator.prepare(MyModel())
    before = weights(model)
    accelerator.save_state()
    accelerator.save_state()
    with torch.no_grad():
        accelerator.unwrap_model(model).inner.weight.zero_()
    accelerator.load_state()
    assert torch.equal(weights(model), before)
    assert {p.name for p in Path("project/checkpoints").iterdir()} >= {"checkpoint_0", "checkpoint_1"}


def objects_of_ones_own() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    obj = CustomObject()
    accelerator.register_for_checkpointing(obj)
    accelerator.save_state("checkpoint.pt")
    obj.best = 0.9
    accelerator.load_state("checkpoint.pt")
    assert obj.best == 0.5


def half_precision() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator(mixed_precision="fp16")
    model, optimizer, lr_scheduler, data = accelerator.prepare(*training_parts())
    source, targets = next(iter(data))
    with accelerator.autocast():
        output = accelerator.unwrap_model(model).inner(source)
    assert output.dtype == torch.float16
    accelerator.backward(F.cross_entropy(model(source), targets))
    optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        lr_scheduler.step()
    assert not accelerator.optimizer_step_was_skipped
    accelerator.backward(model(source).sum() * float("inf"))
    optimizer.step()
    assert accelerator.optimizer_step_was_skipped


def clipped_gradients() -> None:
    from keepstep import Accelerator

    max_grad_norm, clip_value, loss_func = 0.1, 0.01, torch.nn.CrossEntropyLoss()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, scheduler, dataloader = training_parts()
    dataloader, model, optimizer, scheduler = accelerator.prepare(dataloader, model, optimizer, scheduler)
    before = weights(model)
    for input, target in dataloader:  # noqa: A001
        optimizer.zero_grad()
        output = model(input)
        loss = loss_func(output, target)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            assert norm > 0
            accelerator.clip_grad_value_(model.parameters(), clip_value)
            assert all(p.grad.abs().max() <= clip_value for p in model.parameters())
        optimizer.step()
    assert not torch.equal(weights(model), before)


def accumulated_gradients() -> None:
    from keepstep import Accelerator

    loss_function = torch.nn.CrossEntropyLoss()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, scheduler, training_dataloader = training_parts()
    model, optimizer, training_dataloader = accelerator.prepare(model, optimizer, training_dataloader)
    stepped = []
    for input, label in training_dataloader:  # noqa: A001
        before = weights(model)
        with accelerator.accumulate(model):
            predictions = model(input)
            loss = loss_function(predictions, label)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        stepped.append(not torch.equal(weights(model), before))
    # Six batches on one process, three on each of two: the last one closes a window of its own.
    assert stepped == {1: [False, True] * 3, 2: [False, True, True]}[accelerator.num_processes]


def every_argument_and_property() -> None:
    from keepstep import Accelerator
    from keepstep.utils import GradientAccumulationPlugin, ProjectConfiguration

    accelerator = Accelerator(
        device_placement=True,
        split_batches=False,
        mixed_precision=None,
        gradient_accumulation_steps=1,
        cpu=False,
        deepspeed_plugin=None,
        fsdp_plugin=None,
        megatron_lm_plugin=None,
        rng_types=["torch", "generator"],
        log_with=None,
        project_dir="project",
        project_config=ProjectConfiguration(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2),
        dispatch_batches=None,
        even_batches=True,
        step_scheduler_with_optimizer=True,
        kwargs_handlers=None,
        dynamo_backend=None,
    )
    ranks = accelerator.num_processes
    assert accelerator.device == torch.device("cpu")
    assert accelerator.use_distributed == (ranks > 1)
    assert accelerator.local_process_index == accelerator.process_index < ranks
    assert accelerator.mixed_precision == accelerator.state.mixed_precision == "no"
    assert (accelerator.sync_gradients, accelerator.optimizer_step_was_skipped) == (True, False)


def memory_given_back() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator()
    model, optimizer, scheduler, _ = training_parts()
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.free_memory()
    del model, optimizer, scheduler
    model = accelerator.prepare(MyModel())  # another training may begin
    assert accelerator.unwrap_model(model)


def any_object_as_a_file() -> None:
    from keepstep import Accelerator, load

    accelerator = Accelerator()
    arr = [0, 1, 2, 3]
    accelerator.save(arr, "array.pkl")
    accelerator.wait_for_everyone()
    assert load("array.pkl") == arr
