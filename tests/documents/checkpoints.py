"""The blocks of a guide to checkpoints in Accelerate, with the import line changed.

Each function is a block, run in a directory of its own, by one process or by every rank of two.
"""

from __future__ import annotations

import torch
from tests.documents.filled_in import MyModel, loader, training_parts, weights


def saved_and_restored() -> None:
    from keepstep import Accelerator

    my_model, my_optimizer, _, my_training_dataloader = training_parts()
    my_loss_function, num_epochs = torch.nn.CrossEntropyLoss(), 2
    before = weights(my_model)

    accelerator = Accelerator(project_dir="my/save/path")
    my_scheduler = torch.optim.lr_scheduler.StepLR(my_optimizer, step_size=1, gamma=0.99)
    my_model, my_optimizer, my_training_dataloader = accelerator.prepare(
        my_model, my_optimizer, my_training_dataloader
    )
    accelerator.register_for_checkpointing(my_scheduler)
    accelerator.save_state()
    device = accelerator.device
    my_model.to(device)
    for _epoch in range(num_epochs):
        for batch in my_training_dataloader:
            my_optimizer.zero_grad()
            inputs, targets = batch
            inputs = inputs.to(device)
            targets = targets.to(device)
            outputs = my_model(inputs)
            loss = my_loss_function(outputs, targets)
            accelerator.backward(loss)
            my_optimizer.step()
        my_scheduler.step()
    assert not torch.equal(weights(my_model), before)
    assert my_scheduler.last_epoch == 2

    # The guide has "checkpointing" in this path, where nobody writes; its own text says "checkpoints".
    accelerator.load_state("my/save/path/checkpoints/checkpoint_0")
    assert torch.equal(weights(my_model), before)
    assert my_scheduler.last_epoch == 0


def misspelt_directory_is_named() -> None:
    from keepstep import Accelerator
    from keepstep.errors import CheckpointNotFoundError

    accelerator = Accelerator(project_dir="my/save/path")
    accelerator.prepare(MyModel())
    accelerator.save_state()
    try:
        accelerator.load_state("my/save/path/checkpointing/checkpoint_0")
    except CheckpointNotFoundError as error:
        assert "checkpointing/checkpoint_0" in str(error)  # noqa: PT017 (no pytest in the ranks)
    else:
        raise AssertionError("it was found")


def on_from_the_middle_of_an_epoch() -> None:
    from keepstep import Accelerator

    accelerator = Accelerator(project_dir="my/save/path")
    train_dataloader = accelerator.prepare(loader(440, batch_size=2))
    whole = len(train_dataloader)
    for count, _ in enumerate(train_dataloader, 1):
        if count == 100:
            accelerator.save_state("my_state")
            break

    accelerator.load_state("my_state")
    skipped_dataloader = accelerator.skip_first_batches(train_dataloader, 100)
    first, second = [], []
    for batch in skipped_dataloader:
        first.append(batch)  # noqa: PERF402 (the guide has a loop)
    for batch in train_dataloader:
        second.append(batch)  # noqa: PERF402
    assert (len(first), len(second)) == (whole - 100, whole)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second[100:], strict=True))
