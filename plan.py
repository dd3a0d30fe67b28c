"""What one card must hold: `python train.py --plan --model NAME --nproc 8`.

    config -> the model and one pass, on tensors without data -> bytes of each part -> the peak

Nothing is allocated. Left out: what the allocator and the libraries take for themselves, and the
embedded judge, on the last card.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

import dataset
import selfplay
from attention import Tree, inner
from decode import bucket
from grpo import CHUNK
from model import add_lora, find, prepare
from packing import MICRO_TOKENS

TURN_GLUE, FINAL_GLUE = 8, 80  # tokens of template and request around a turn and a final
ADVICE = {
    "activations": "--gradient-checkpointing, or a smaller --micro-tokens",
    "logits": "a smaller --micro-tokens",
    "KV cache": "a smaller --group-size or --scenarios-per-step, or more cards",
    "drawing tokens": "a smaller --group-size or more cards",
    "reference": "--beta 0, or --lora-rank 16 (the base is the reference)",
}


def show_plan(settings):
    """Print what a card must hold, where it fits, and what to change if not. Returns 0."""
    _, config, tokenizer = find(settings.model)
    dtype = torch.float32 if settings.dtype == "fp32" else torch.bfloat16
    scenarios = dataset.load_scenarios(settings.scenarios or None, settings.seed)
    prompt = prompt_tokens(tokenizer, scenarios)
    plan = memory_plan(config, settings, dtype, prompt)
    print(f"{settings.model} on {settings.nproc} card(s), {dtype}, GB per card:")
    for what, size in plan.items():
        print(f"  {what:18} {size / 1e9:8.2f}")
    peak = plan.pop("peak") / 1e9
    for size in (24, 40, 80, 96):
        print(f"  fits in {size} GB: {'yes' if peak < 0.9 * size else 'no'}")
    largest = max(plan, key=plan.get)
    advice = ADVICE.get(largest, "--fsdp on more cards, or --lora-rank 16")
    host = host_bytes(config, settings) / 1e9
    print(f"  host memory, of {settings.nproc} rank(s) as they load or save: {host:.1f} GB")
    print(f"largest: {largest}; to need less: {advice}")
    return 0


def prompt_tokens(tokenizer, scenarios):
    """Tokens before a dialogue on the longest of these scenarios."""
    prompts = []
    for scenario in scenarios:
        creed = max((persona["creed"] for persona in scenario.personas), key=len)
        prompts.append(selfplay.SYSTEM + selfplay.TASK + scenario.dilemma + creed)
    return max(len(ids) for ids in tokenizer(prompts)["input_ids"])


def memory_plan(config, settings, dtype, prompt):
    """{what: bytes} of one of `settings.nproc` cards; prompt: tokens before each dialogue."""
    text, size = config.get_text_config(), dtype.itemsize
    layers = text.num_hidden_layers
    model = shell(config, settings, dtype)
    shards = settings.nproc if settings.fsdp else 1
    weights = weight_bytes(model, settings, size, shards)

    turn = settings.turn_tokens + TURN_GLUE
    final = settings.final_tokens + FINAL_GLUE
    row = settings.max_turns * turn + (final if settings.train_tokens != "dialogue" else 0)
    if settings.context_turns:
        row = min(row, settings.context_turns * turn)
    micro_tokens = settings.micro_tokens or MICRO_TOKENS["cuda"]
    rows = max(1, min(settings.group_size, (micro_tokens - prompt) // row))
    activations = kept_bytes(model, Tree([0] * prompt, [[0] * row] * rows))
    if settings.gradient_checkpointing:  # of one layer, and what goes into each
        into_layer = (prompt + rows * row) * text.hidden_size * size
        activations = activations // layers + layers * into_layer
    learn = {
        "gradients": weights["optimizer"] // 2,
        "activations": activations,
        "logits": 4 * 4 * text.vocab_size * min(CHUNK["cuda"], rows * row),
    }
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    width *= getattr(text, "num_key_value_heads", None) or heads
    dialogues = -(-settings.scenarios_per_step // settings.nproc) * settings.group_size
    block = 2 * dialogues  # rows, of two streams; a step of decoding takes all
    places = block * bucket(prompt + settings.max_turns * turn + final)
    cuts = min(settings.top_p, settings.final_top_p) < 1
    play = {
        "KV cache": 2 * layers * width * size * places,
        # logits, log-probs, weights, their sums; for a nucleus a full sort as well
        "drawing tokens": (11 if cuts else 5) * 4 * text.vocab_size * block,
    }
    # the cache and the recorded steps stay while the model learns (decode.py)
    peak = sum(weights.values()) + sum(learn.values()) + sum(play.values())
    return {**weights, **learn, **play, "peak": peak}


def shell(config, settings, dtype):
    """The model without data."""
    with torch.device("meta"):
        model = prepare(AutoModelForCausalLM.from_config(config, dtype=dtype))
    return add_lora(model, settings.lora_rank) if settings.lora_rank else model


def host_bytes(config, settings):
    """Bytes of a machine's own memory that its ranks take, beside Python and the libraries.

    Loading: each rank reads the model in fp32; with --fsdp rank 0 alone does (see policy.build).
    Saving: rank 0 gathers the weights in fp32, and two moments of what is trained; adapters are
    merged into a second copy.
    """
    parameters = list(shell(config, settings, torch.float32).parameters())
    every = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    readers = 1 if settings.fsdp else settings.nproc
    copies = 2 if settings.lora_rank else 1
    return max(4 * readers * every, 4 * copies * every + 8 * trained)


def weight_bytes(model, settings, size, shards):
    """{what: bytes} that are held all the time; size: bytes of a number in computation."""
    parameters = dict(model.named_parameters())
    every = sum(p.numel() for p in parameters.values())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    compute = size * every if size < 4 or settings.lora_rank or shards > 1 else 0
    if shards > 1:  # FSDP gathers two blocks and what is in none, with their gradients
        blocks = sum(p.numel() for n, p in parameters.items() if ".layers." in n or ".h." in n)
        compute += 4 * size * blocks // model.config.get_text_config().num_hidden_layers
        compute += 2 * size * (every - blocks)
    return {
        "weights (compute)": compute,
        "weights (fp32)": 4 * (trained if shards == 1 else every) // shards,
        "optimizer": 8 * trained // shards,
        "reference": size * every if settings.beta > 0 and not settings.lora_rank else 0,
    }


def kept_bytes(model, tree):
    """Bytes that autograd keeps for backward when the model reads a tree, weights aside."""
    kept = {}  # {address: storage}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.device("meta"), saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(1, tree.tokens, dtype=torch.long)
        inner(model)(input_ids=ids, position_ids=ids, use_cache=False, tree=tree, masks={})
    for p in model.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())
