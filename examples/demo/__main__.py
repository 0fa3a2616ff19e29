"""Train a small GPT, kill it three times, and see it end in the same bytes as a twin that was never killed.

python -m examples.demo (or: make demo)
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

from examples.demo.compare import change_one_weight, differences, same_losses
from examples.demo.curves import draw
from examples.demo.kills import plan, resumed
from examples.demo.race import race, time_steps
from examples.demo.report import print_digests, print_kills, print_ls, print_sample, print_times
from examples.demo.screen import bars_for
from examples.demo.training import Deadline, DemoError, Training
from examples.train_gpt import digest
from rich.console import Console

from keepstep import Checkpoint
from keepstep.errors import KeepstepError

MARK = ".keepstep-demo"
WIDTH_IN_LOGS = 110


def main() -> int:
    """Run the demo; 0 if the two runs are the same."""
    options = parse_options()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_IN_LOGS)
    try:
        run_demo(options, console)
    except (DemoError, KeepstepError) as error:
        console.print(f"FAILED: {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    return 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="emptied first if it is the demo's"
    )
    parser.add_argument("--seed", type=int, help="of the kills; drawn and printed if not given")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=200, help="optimizer steps in an epoch")
    parser.add_argument("--timed-steps", type=int, default=110, help="in each of the runs that time a step")
    parser.add_argument(
        "--rounds", type=int, default=2, help="pairs of such runs, without and with checkpoints"
    )
    parser.add_argument("--timeout", type=float, default=600, help="most seconds for everything")
    parser.add_argument(
        "--sabotage",
        action="store_true",
        help="change one weight by one bit at the end: the demo must notice",
    )
    return parser.parse_args()


def run_demo(options: argparse.Namespace, console: Console) -> None:
    """Do everything.

    Raises:
        DemoError, KeepstepError: something isn't as it should be.
    """
    deadline = Deadline(options.timeout)
    out: Path = options.out
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    steps = options.epochs * options.batches
    planned = plan(seed, steps=steps, kills=options.kills)
    console.print(
        f"{steps} steps, a checkpoint at each, {options.kills} kills at random instants (--seed {seed})"
    )
    claim(out)
    shape = {"epochs": options.epochs, "batches": options.batches}
    killed = Training("killed", out / "killed", save_every=1, **shape)
    twin = Training("twin", out / "twin", save_every=steps, **shape)
    timing = 2 * options.rounds * options.timed_steps
    with bars_for(console, {"killed": steps, "twin": steps, "timing": timing}) as bars:
        kills = race(killed, twin, planned, bars, deadline)
        kills = resumed(kills, killed.losses)
        compared = same_losses(killed.losses, twin.losses)
        draw(killed.losses, twin.losses, kills, out / "losses.png")
        check_final_states(console, killed, twin, sabotage=options.sabotage)
        times = time_steps(
            out / "timing", steps=options.timed_steps, rounds=options.rounds, bars=bars, deadline=deadline
        )
    print_sample(console, killed.digest_and_sample[1])
    print_ls(console, killed.out)
    print_kills(console, kills)
    print_times(console, *times)
    console.print(f"All {compared} losses of all attempts are exactly the twin's: {out / 'losses.png'}")
    lost = sum(kill.lost_steps for kill in kills)
    console.print(
        f"{len(kills)} kills, {lost} step{'s' * (lost != 1)} done again, and bit for bit the same weights, "
        f"optimizer, schedule, place in the data and random numbers. {deadline.passed_s:.0f} s",
        style="bold green",
    )


def claim(out: Path) -> None:
    """Make the directory, or empty it if an earlier demo made it.

    Raises:
        DemoError: it holds something else.
    """
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise DemoError(
            f"{out} was not made by the demo, so nothing in it was touched. Choose another --out."
        )
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text("The demo empties this directory when it starts.\n")


def check_final_states(console: Console, killed: Training, twin: Training, *, sabotage: bool) -> None:
    """Print the digests of both runs and compare every part of their last checkpoints.

    Raises:
        DemoError: something differs; the message says what.
    """
    mine, its = killed.final_checkpoint(), twin.final_checkpoint()
    if sabotage:
        mine = change_one_weight(mine)
    digests = [digest_in(mine), digest_in(its)]
    print_digests(console, *digests)
    different = differences(mine, its)
    if different:
        raise DemoError("The runs differ:\n" + "\n".join(f"  {sentence}" for sentence in different))
    ends = [run.digest_and_sample for run in (killed, twin)]
    if [end[0] for end in ends] != digests or ends[0][1] != ends[1][1]:
        raise DemoError(
            "The checkpoints are the same, but what the runs printed at their end is not:\n"
            f"{killed.output}\n{twin.output}"
        )


def digest_in(checkpoint: Checkpoint) -> str:
    """Digest of the weights in a checkpoint."""
    return digest(checkpoint.load("model")["model"])


if __name__ == "__main__":
    sys.exit(main())
