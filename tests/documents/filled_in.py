"""What tutorials leave out: small real models, data, metrics and a progress bar's arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

SAMPLES = 22
label_to_id = {"cat": 0, "dog": 1, "fox": 2}
args = SimpleNamespace(max_train_steps=5)


class MyModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.inner = torch.nn.Linear(4, 8)
        self.outer = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)))


class CustomObject:
    """Has what `register_for_checkpointing` asks for."""

    def __init__(self) -> None:
        self.best = 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


class Accuracy:
    """Counts what `add_batch` is given, as metrics of the `evaluate` package do."""

    def __init__(self) -> None:
        self.seen = self.right = 0

    def add_batch(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self.seen += len(references)
        self.right += int((predictions.argmax(dim=-1) == references).sum())


def load_dataset(name: str, samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(len(name))
    inputs = torch.randn(samples, 4, generator=generator)
    return TensorDataset(inputs, inputs.argmax(dim=-1) % 3)


def loader(samples: int = SAMPLES, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(load_dataset("my_dataset", samples), batch_size=batch_size)


def training_parts() -> tuple[Any, Any, Any, Any]:
    """A model, an optimizer, a scheduler and a loader, none of them prepared."""
    model = MyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    return model, optimizer, scheduler, loader()


def weights(model: torch.nn.Module) -> torch.Tensor:
    """A copy of all parameters in one row."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


class Pets(Dataset[Any]):
    """Images and labels in dicts, as the animals of the tutorial are."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(3, (count,), generator=generator)
        noise = torch.rand(count, 3, 6, 6, generator=generator)
        self.images = noise + self.labels[:, None, None, None] * 0.5

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


def get_dataloaders(batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(Pets(32, seed=1), batch_size=batch_size, shuffle=True, drop_last=True)
    return train, DataLoader(Pets(10, seed=2), batch_size=batch_size)


class SmallCNN(torch.nn.Module):
    """Has the attributes of a timm model that the tutorial uses."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.default_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        self.features = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, num_classes)

    def get_classifier(self) -> torch.nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.features(x))).mean(dim=(2, 3)))


def create_model(name: str, pretrained: bool, num_classes: int) -> SmallCNN:
    return SmallCNN(num_classes)
