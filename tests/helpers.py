"""Tiny random models and a tokenizer trained on the spot, for tests that need no language."""

import functools
import sys
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chat
import dataset
import model as lm
import selfplay

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma's: no system role (it raises), roles must alternate, the assistant is called model
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Mistral's: the instruction is wrapped, the end of a turn is the end of text
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Qwen3's with thinking off: an empty thought stands before the newest turn only, so the ids of a
# conversation change as it grows
QWEN3 = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
)

TEXT = [
    "We share the water between the farm and the hospital.",
    "I propose a plan that is fair to both of us, step by step.",
    "No, I will not agree to that!",
    "system user assistant model",
    "The council should decide by Friday and write it down.",
    "AGREED. Let us do it together.",
]


@functools.cache
def tokenizer(template=CHATML, pad_is_eos=False, ends="<|im_end|>"):
    """A byte-level BPE tokenizer of 400 tokens with chat markers and the given template or None."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(TEXT * 20, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=ends,
        bos_token="<|endoftext|>",
        pad_token=ends if pad_is_eos else "<pad>",
    )
    made.chat_template = template
    return made


# The initial weights are large enough that tokens differ in probability; the sliding windows are
# shorter than the dialogues.
COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=1024,
    initializer_range=0.2,
)
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.2)
WINDOWS = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])
KINDS = {
    "llama": partial(LlamaConfig, num_key_value_heads=2, **COMMON),
    "qwen2": partial(Qwen2Config, num_key_value_heads=2, tie_word_embeddings=True, **COMMON),
    "qwen3": partial(Qwen3Config, num_key_value_heads=1, head_dim=16, **COMMON),
    "mistral": partial(MistralConfig, num_key_value_heads=2, sliding_window=24, **COMMON),
    "gemma3": partial(Gemma3TextConfig, num_key_value_heads=1, head_dim=16, **WINDOWS, **COMMON),
    "phi3": partial(Phi3Config, num_key_value_heads=4, **COMMON),
    "gpt2": partial(GPT2Config, **GPT2),
}


def tiny(kind="llama", seed=0, vocabulary=None):
    """A random model of two layers, prepared as `model.load` prepares one."""
    torch.manual_seed(seed)
    config = KINDS[kind](
        vocab_size=vocabulary or len(tokenizer()),
        eos_token_id=tokenizer().eos_token_id,
        bos_token_id=0,
        pad_token_id=3,
    )
    return lm.prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def voice(kind="llama", template=CHATML, **more):
    """A tiny model with its chat format."""
    return chat.Voice(tiny(kind), tokenizer(template, **more))


PERSONAS = (
    {"name": "Rosa", "creed": "You lead the farm and want water for the fields."},
    {"name": "Chen", "creed": "You run the hospital and want a reserve."},
)


def scenario(name="s0", dilemma="One reservoir is left. Who gets the water?"):
    """A short scenario."""
    return dataset.Scenario(name, "everyday", dilemma, PERSONAS)


def dialogues(scenarios=1, members=2, step=1):
    """Empty dialogues: `members` on each of `scenarios` with dilemmas of different lengths."""
    made = []
    for s in range(scenarios):
        dilemma = "One reservoir is left." + " It is dry." * s + " Who gets the water?"
        case = scenario(f"s{s}", dilemma)
        made += [selfplay.Dialogue(case, step, s, member) for member in range(members)]
    return made


def plain_logprobs(model, ids, temperature=1.0):
    """log-prob of every token after the first, (T - 1,), by Hugging Face's own forward pass."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
    model.set_attn_implementation(before)
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
