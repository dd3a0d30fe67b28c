"""The fixed workload that bench.py and peer.py both time: its flags, text, clock and results.

Nothing here imports the code that is measured: the peer runs without it.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, option

PLACES = ["A mid-sized town", "A coastal city", "A mountain village", "A desert district"]
DILEMMA = (
    " has one reservoir. A drought has begun. The farming cooperative needs irrigation water or it "
    "loses the season; the hospital and households need a reserve for the summer. What should the "
    "council decide?"
)
FARM = "You lead the farming cooperative. You value livelihoods, food and the dignity of work."
HOSPITAL = "You direct the hospital. You value safety, health and protecting the vulnerable."
PERSONAS = ({"name": "Rosa", "creed": FARM}, {"name": "Dr. Chen", "creed": HOSPITAL})


@dataclasses.dataclass(frozen=True)
class Flags:
    """The workload."""

    dtype: str = option("auto", "of the computation", choices=("auto", "fp32", "bf16"))
    scenarios: int = option(1, "scenarios, each with other dilemma text", low=1)
    group: int = option(8, "dialogues of a scenario", low=2)
    turns: int = option(4, "turns", low=1)
    turn_tokens: int = option(48, "tokens of a turn", low=2)
    final_tokens: int = option(64, "tokens of the joint solution", low=2)
    repeats: int = option(3, "steps that are timed", low=1)
    json: str = option("", "a file to add the results to, as one line of JSON")


def dilemmas(flags):
    """The dilemma of each scenario."""
    return [PLACES[s % len(PLACES)] + DILEMMA for s in range(flags.scenarios)]


def now(device):
    """Seconds, read when the card has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device):
    """The name of a card, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def results(flags, program, device, seconds, peak_gb):
    """One line of results. seconds: (play, learn, step)."""
    play, learn, step = seconds
    sampled = flags.scenarios * flags.group * (flags.turns * flags.turn_tokens + flags.final_tokens)
    return {
        "what": "step",
        "program": program,
        "model": Path(flags.model).name,
        "dialogues": f"{flags.scenarios} x {flags.group}",
        "device": device_name(device),
        "play_s": play,
        "learn_s": learn,
        "step_s": step,
        "sampled_tokens_per_s": sampled / play,
        "peak_memory_gb": peak_gb,
    }


def show(row, trained_tokens, about):
    """Print the lines of play, learn and step."""
    trained = trained_tokens / row["learn_s"]
    print(f"play   {row['play_s']:6.1f} s  {row['sampled_tokens_per_s']:6.1f} sampled tokens/s")
    print(f"learn  {row['learn_s']:6.1f} s  {trained:6.1f} trained tokens/s")
    print(f"step   {row['step_s']:6.1f} s  peak memory {row['peak_memory_gb']:.1f} GB   {about}")


def check_file(path):
    """Raise UserError, before anything is measured, where --json cannot be written."""
    try:
        if path:
            open(path, "ab").close()
    except OSError as error:
        problem = f"--json {path}: cannot be written ({error.strerror})"
        raise UserError(f"{problem}; name another file") from error


def add_line(path, row):
    """Add a line of JSON to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
