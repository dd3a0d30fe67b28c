#!/usr/bin/env python3
"""How long one decoding step takes, on models with random weights and the shapes of known ones.

    python tests/decode_speed.py --shape qwen3-0.6b --rows 32 [--json FILE]
    python tests/decode_speed.py --shape smollm2-135m --save FOLDER     # the same as a folder

Three ways: rows (rows that do not speak are left out, as on a CPU), block (all rows, launched one
kernel at a time) and graph (the block replayed; on a card only). The limit is the time that reading
the weights once would take at this machine's own bandwidth.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import helpers
import table
import torch
import workload
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

import attention
import decode
import drawing
import model as lm
from cli import UserError, command_line, option, run_cli

# what both sizes of Qwen3 share
QWEN3 = dict(
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
)
SHAPES = {
    "smollm2-135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        **QWEN3,
    ),
    "qwen3-4b": Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        **QWEN3,
    ),
}


@dataclasses.dataclass(frozen=True)
class Speed:
    """What is measured."""

    shape: str = option("smollm2-135m", "of the model", choices=tuple(SHAPES))
    rows: int = option(8, "rows that speak, all of them", low=1)
    context: int = option(300, "ids that each row holds before", low=1)
    tokens: int = option(32, "steps that are timed, after five", low=1)
    save: str = option("", "a folder to save the model in; nothing is measured")
    json: str = option("", "a file to add the results to, as one line of JSON")


def random_model(shape, device):
    """A model of a shape, on the device in its fast dtype, prepared as `model.load` does."""
    torch.manual_seed(0)
    with torch.device(device):
        dtype = lm.compute_dtype("auto", device)
        return lm.prepare(AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype))


def save(shape, folder):
    """Write a model folder with the default model's tokenizer, or the tests' own without it.

    Ids beyond the tokenizer's vocabulary are sampled as any other, and heard as nothing. Raises
    UserError where something stands there already.
    """
    try:
        Path(folder).mkdir(parents=True)
    except OSError as error:
        problem = f"--save {folder}: cannot be made ({error.strerror})"
        raise UserError(f"{problem}; name a new folder") from error
    random_model(shape, lm.own_device()).cpu().save_pretrained(folder)
    kept = lm.cache_folder() / "smollm2-135m"
    tokenizer = AutoTokenizer.from_pretrained(kept) if kept.exists() else helpers.tokenizer()
    tokenizer.save_pretrained(folder)


def step_of(model, speed, way):
    """(a function that decodes one token for all rows, the Decoder or None)."""
    rows = list(range(speed.rows))
    decoder = None
    if way == "rows":
        cache = attention.RaggedCache(speed.rows)

        def step():
            logits = cache.feed(model, rows, [[5]] * speed.rows)
            columns = [[number] * speed.rows for number in (0.7, 1.0, 0.5)]
            numbers = torch.tensor(columns, device=logits.device)
            return [column.tolist() for column in drawing.draw(logits, *numbers)]

    else:
        decoder = decode.Decoder(model)
        decoder.use_graphs = way == "graph"
        cache = decoder.cache_for(speed.rows)
        wishes = dict.fromkeys(rows, (5, 0.7, 1.0, 0.5))

        def step():
            return decoder.step(model, wishes)

    cache.feed(model, rows, [list(range(10, 10 + speed.context))] * speed.rows)
    return step, decoder


@torch.no_grad()
def milliseconds(model, speed, way):
    """The median of a step; None where it could not be recorded."""
    step, decoder = step_of(model, speed, way)
    for _ in range(5):
        step()
    seconds = []
    for _ in range(speed.tokens):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if way == "graph" and not decoder.use_graphs:
        return None
    return 1000 * statistics.median(seconds)


def read_bandwidth(device):
    """Bytes/s of a plain read, the best of six."""
    # far more than caches hold, and than the card could read while a kernel is launched
    numbers = 1 << 30 if device.type == "cuda" else 1 << 26
    block = torch.ones(numbers, device=device)  # 4 GB, 256 MB
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - start)
    return block.numel() * block.itemsize / min(seconds)


def measure(speed):
    """One line of results, {what: number}."""
    device = torch.device(lm.own_device())
    model = random_model(speed.shape, device)
    on_card = device.type == "cuda"
    row = {
        "what": "decode",
        "model": speed.shape,
        "rows": speed.rows,
        "device": workload.device_name(device),
    }
    for way in ("rows", "block", "graph") if on_card else ("rows", "block"):
        row[f"{way}_ms"] = milliseconds(model, speed, way)
    if on_card:
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    row["limit_ms"] = 1000 * weights / read_bandwidth(device)
    best = min(row[key] for key in ("rows_ms", "block_ms", "graph_ms") if row.get(key))
    row["share_of_limit"] = row["limit_ms"] / best
    return row


def main(argv=None):
    """Measure and print, or save."""
    speed = command_line(Speed, argv, prog="tests/decode_speed.py")
    if speed.save:
        return save(speed.shape, speed.save)
    workload.check_file(speed.json)
    row = measure(speed)
    if speed.json:
        workload.add_line(speed.json, row)
    failed = row.get("graph_ms", 0.0) is None
    print(table.tables([row]))
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
