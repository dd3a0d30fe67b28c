#!/usr/bin/env python3
"""The peer beside bench.py: the same step with Hugging Face `generate` and TRL's GRPO loss.

    python tests/peer.py --model FOLDER [--scenarios 1] [--group 8] [--micro-batch 4]

It needs `trl` (written for 1.16), which is no requirement of ours. `generate` reads the whole
conversation again for every turn; ends of turn are suppressed, so each has exactly --turn-tokens
tokens. One optimizer step follows, over the streams of both agents, with GRPOTrainer's own loss; as
there, the whole model is in --dtype (auto: bf16). Printed are the best play and the best learning
of --repeats steps after one to warm up.
"""

import dataclasses
import tempfile

import torch
import workload
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import UserError, command_line, option, run_cli
from progress import peak_memory_gb

RULES = (
    " You are negotiating with another person about the dilemma below. Speak only as your persona, "
    "in at most three sentences per turn. Look for a solution that benefits both sides and expands "
    "what both can know, do and become. When you fully agree on a joint solution, write AGREE.\n"
    "Dilemma: "
)
OPEN = "Please open the negotiation."
FINAL = "Write the final joint solution."
DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Peer(workload.Flags):
    """What the peer adds."""

    model: str = option("", "a folder, or a Hugging Face id")
    micro_batch: int = option(4, "rows of one forward and backward pass", low=1)


def message(role, content):
    """One entry of a conversation."""
    return {"role": role, "content": content}


# ---- play ----------------------------------------------------------------------------------------


class Player:
    """A model that speaks by `generate`."""

    def __init__(self, flags, device):
        self.flags = flags
        name = flags.model
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[flags.dtype])
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or ["no message"])[0]
            raise UserError(f"--model {name}: no folder with a causal LM ({reason})") from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = model.to(device).eval()

    def play(self):
        """The conversations of each agent, as messages: two lists with one for each dialogue."""
        streams = [[], []]
        for dilemma in workload.dilemmas(self.flags):
            for _ in range(self.flags.group):
                for stream, persona in zip(streams, workload.PERSONAS):
                    creed = f"You are {persona['name']}. {persona['creed']}"
                    stream.append([message("system", creed + RULES + dilemma)])
        for conversation in streams[0]:
            conversation.append(message("user", OPEN))
        for turn in range(self.flags.turns):
            mine, theirs = streams[turn % 2], streams[1 - turn % 2]
            for i, text in enumerate(self.say(mine, self.flags.turn_tokens)):
                mine[i].append(message("assistant", text))
                theirs[i].append(message("user", text))
        asked = [conversation + [message("user", FINAL)] for conversation in streams[0]]
        self.say(asked, self.flags.final_tokens)
        return streams

    @torch.no_grad()
    def say(self, conversations, tokens):
        """The next text of each conversation, of exactly so many tokens."""
        read = self.tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        ).to(self.model.device)
        spoken = self.model.generate(
            **read,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # (rows, read + tokens)
        new = spoken[:, read["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


# ---- learn ---------------------------------------------------------------------------------------


def encoded(tokenizer, conversation, head):
    """(ids of the first `head` messages, ids of the others, mask of what the agent itself said).

    The texts are encoded again, as trainers on top of `generate` do.
    """

    def ids(messages, **how):
        return tokenizer.apply_chat_template(messages, return_dict=False, **how)

    whole = ids(conversation)
    mask = [0] * len(whole)
    for i, said in enumerate(conversation):
        if said["role"] == "assistant":
            start = len(ids(conversation[:i], add_generation_prompt=True))
            end = len(ids(conversation[: i + 1]))
            mask[start:end] = [1] * (end - start)
    start = len(ids(conversation[:head]))
    return whole[:start], whole[start:], mask[start:]


def padded(rows, value, left=False):
    """Rows of ids or of a mask as a tensor (rows, longest)."""
    width = max(map(len, rows))
    filled = []
    for row in rows:
        rest = [value] * (width - len(row))
        filled.append(rest + row if left else row + rest)
    return torch.tensor(filled)


def batch_of(tokenizer, streams, device):
    """What GRPOTrainer's loss reads, {name: tensor of a row for each agent of each dialogue}."""
    items = []
    for head, stream in zip((2, 1), streams):  # the first agent was asked to open
        items += [encoded(tokenizer, conversation, head) for conversation in stream]
    prompts, completions, masks = zip(*items)
    advantages = torch.randn(len(streams[0])).repeat(2)
    pad = tokenizer.pad_token_id
    batch = {
        "prompt_ids": padded(prompts, pad, left=True),
        "prompt_mask": padded([[1] * len(row) for row in prompts], 0, left=True),
        "completion_ids": padded(completions, pad),
        "completion_mask": padded([[1] * len(row) for row in completions], 0),
        "tool_mask": padded(masks, 0),
        "advantages": advantages,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def trainer_of(player, folder):
    """A GRPOTrainer for the sake of its loss. Raises UserError where there is no trl."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ModuleNotFoundError as error:
        raise UserError(
            f"tests/peer.py: there is no {error.name}; python -m pip install trl==1.16"
        ) from error
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=player.model.device.type == "cpu",
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=8,
        beta=0.0,
        loss_type="dapo",
        report_to=[],
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=player.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=player.tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 16}),
        args=config,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def learn(trainer, optimizer, batch, rows):
    """One optimizer step over the batch, so many rows at a time."""
    trainer.model.train()
    optimizer.zero_grad()
    trained = batch["tool_mask"].sum()
    for start in range(0, len(batch["advantages"]), rows):
        part = {name: tensor[start : start + rows] for name, tensor in batch.items()}
        part["num_items_in_batch"] = trained
        trainer._compute_loss(trainer.model, part).backward()
    optimizer.step()
    trainer.model.eval()


def main(argv=None):
    """Time --repeats steps and print the best."""
    flags = command_line(Peer, argv, prog="tests/peer.py")
    if not flags.model:
        raise UserError("tests/peer.py: pass --model FOLDER")
    workload.check_file(flags.json)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    player = Player(flags, device)
    plays, learns = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(player, folder)
        optimizer = torch.optim.AdamW(player.model.parameters(), lr=1e-6)
        for _ in range(flags.repeats + 1):
            start = workload.now(device)
            streams = player.play()
            middle = workload.now(device)
            batch = batch_of(player.tokenizer, streams, device)
            ready = workload.now(device)
            learn(trainer, optimizer, batch, flags.micro_batch)
            plays.append(middle - start)
            learns.append(workload.now(device) - ready)
    play, best = min(plays[1:]), min(learns[1:])
    row = workload.results(flags, "peer", device, (play, best, play + best), peak_memory_gb(device))
    about = f"{player.model.dtype}, {torch.get_num_threads()} threads, best of {flags.repeats}"
    workload.show(row, batch["tool_mask"].sum().item(), about)
    if flags.json:
        workload.add_line(flags.json, row)


if __name__ == "__main__":
    run_cli(main)
