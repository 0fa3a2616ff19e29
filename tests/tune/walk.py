"""A population of walkers, of which the slow ones take over from the fast ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keepstep import tune
from keepstep.tune.schedulers import PopulationBasedTraining


class Walk(tune.Trainable):
    """Goes on by `config["rate"]` a step."""

    def setup(self, config: dict[str, Any]) -> None:
        self.x = 0.0

    def step(self) -> dict[str, float]:
        self.x += self.config["rate"]
        return {"x": self.x}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "x").write_text(str(self.x))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.x = float(Path(checkpoint, "x").read_text())


def population(*, synch: bool = False) -> PopulationBasedTraining:
    """Half of the walkers take over from the others, every two steps."""
    return PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        quantile_fraction=0.5,
        hyperparam_mutations={"rate": tune.uniform(0, 1)},
        synch=synch,
    )
