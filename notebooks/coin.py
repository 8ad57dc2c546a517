"""The control of ppo: the same run, paid by a coin.

    python notebooks/coin.py --arm grpo --config sums --model FOLDER

All flags are those of `train_small.py ppo`. The coin falls for right responses as often as for
wrong ones; one that has no end is paid -1, as in every run. So whatever the policy gains by it, it
owes to the training and to coming to an end, and not to the truth.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402


def coin(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, truth: torch.Tensor, c: nr.Config
) -> torch.Tensor:
    """0 or 1 at the end of each response, whatever it says; -1 if it has none."""
    tosses = torch.rand(len(truth), generator=nr.rng(c.seed, "coin", state.update))
    return nr.at_end((tosses < 0.5).to(truth), b, c)


nr.REWARDS["coin"] = nr.RewardSource(coin)

if __name__ == "__main__":
    given = sys.argv[1:]
    # A run that is resumed knows its reward.
    resumed = any(word.startswith("--resume") for word in given)
    sys.exit(front.main(given if resumed else ["ppo", "--reward", "coin", *given]))
