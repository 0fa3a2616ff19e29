"""Population Based Training against random search: a small CNN learns handwritten digits, at equal budget.

    python examples/tune_digits_pbt.py --out runs/digits

Both train as many trials for as many epochs, and begin with the same configurations; one of them lets bad
trials go on from good ones' checkpoints. Kill it at any instant and start it again with the same command: it
goes on where it stood. Needs scikit-learn, for the digits.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from keepstep import tune
from keepstep.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler

TRAINED, BATCH = 400, 32
SPACE = {"lr": tune.loguniform(1e-4, 1e-1), "momentum": tune.uniform(0.0, 0.95)}


def digits() -> tuple[Tensor, Tensor]:
    """Images of 8 x 8, and which digit each shows, in a mixed order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return pixels[order], torch.tensor(labels)[order]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip


def train(config: dict[str, Any]) -> None:
    """One trial: an epoch at a time, with a checkpoint after each."""
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    images, labels = digits()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=config["momentum"])
    epoch = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        state = checkpoint.load()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        # The checkpoint may be another trial's, and the configuration a new one.
        optimizer.param_groups[0].update(lr=config["lr"], momentum=config["momentum"])
        epoch = state["epoch"]
    while epoch < config["epochs"]:
        order = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(epoch))
        for batch in torch.split(order, BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(images[batch]), labels[batch]))
            optimizer.step()
        epoch += 1
        with torch.no_grad():
            logits = model(images[TRAINED:])
        metrics = {
            "loss": F.cross_entropy(logits, labels[TRAINED:]).item(),
            "accuracy": (logits.argmax(1) == labels[TRAINED:]).float().mean().item(),
        }
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        tune.report(metrics, checkpoint=state)


def bounded(config: dict[str, Any]) -> dict[str, Any]:
    """A factor may lead out of the search space; a momentum of 1 or more never forgets."""
    return {**config, "momentum": min(config["momentum"], 0.95)}


def best_of(scheduler: TrialScheduler, name: str, seed: int, arguments: argparse.Namespace) -> Any:
    """The best last result of a population."""
    results = tune.Tuner(
        train,
        param_space={**SPACE, "seed": seed, "epochs": arguments.epochs},
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", num_samples=arguments.trials, scheduler=scheduler, seed=seed
        ),
        run_config=tune.RunConfig(
            name=f"{name}_{seed}",
            storage_path=arguments.out,
            executor=arguments.executor,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    return results.get_best_result().metrics


def main() -> None:
    parser = argparse.ArgumentParser(description="Population Based Training against random search")
    parser.add_argument("--out", type=Path, required=True, help="directory of the experiments")
    parser.add_argument("--trials", type=int, default=6, help="trials of each experiment")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each trial")
    parser.add_argument("--seeds", type=int, default=5, help="how often all of it is done")
    parser.add_argument("--executor", default="inline", help="inline: in this process; local: in others")
    arguments = parser.parse_args()
    print("seed   random search      PBT                (loss, accuracy on 1397 digits)")
    wins = 0
    for seed in range(arguments.seeds):
        pbt = PopulationBasedTraining(
            "training_iteration",
            perturbation_interval=1,
            hyperparam_mutations=dict(SPACE),
            perturbation_factors=(2.0, 0.5),
            quantile_fraction=0.34,
            custom_explore_fn=bounded,
        )
        drawn = best_of(FIFOScheduler(), "random", seed, arguments)
        found = best_of(pbt, "pbt", seed, arguments)
        wins += found["loss"] < drawn["loss"]
        told = "   ".join(f"{m['loss']:.4f}   {m['accuracy']:.4f}" for m in (drawn, found))
        print(f"{seed:4}   {told}", flush=True)
    print(f"PBT found the lower loss in {wins} of {arguments.seeds}")


if __name__ == "__main__":
    main()
