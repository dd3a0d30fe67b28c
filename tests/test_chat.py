"""Streams against `apply_chat_template`, id by id: tokenizer families, templates, control tokens.

Each family is a tiny tokenizer made here; each template is a short copy of a real one.
"""

import dataclasses
import datetime
import json

import helpers
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

import chat as chats
import cli
import dataset
import selfplay
from chat import ChatFormat, Turn

MARKERS = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
]
WORDLIKE = ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"]  # added, not called special
TEXT = [
    *helpers.TEXT,
    *(scenario.dilemma for scenario in dataset.load_scenarios(seed=0)[:20]),
    "[INST] [/INST] <<SYS>> <</SYS>>\n\n user assistant system model\n",
    *(persona["creed"] for persona in helpers.PERSONAS),
    *(selfplay.SYSTEM, selfplay.TASK, selfplay.ASK, selfplay.FINAL),
]
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe(**more):
    """A SentencePiece-like BPE with byte fallback, and its trainer."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", **more))
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", *alphabet])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return core, trainer, fallback


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet)


def tiktoken():
    """Llama 3's and Qwen's: a regex, then bytes; whole words of the vocabulary are not merged."""
    core = Tokenizer(models.BPE(ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet)


def legacy_prefix():
    """Llama 2's and TinyLlama's: a prefix before each text between control tokens."""
    core, trainer, fallback = bpe()
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)])
    return core, trainer


def first_prefix():
    """Mistral's since v0.3: a prefix at the beginning of everything only."""
    core, trainer, fallback = bpe()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)])
    return core, trainer


def no_prefix():
    """Gemma's."""
    core, trainer, fallback = bpe()
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence(fallback)
    return core, trainer


def unigram():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    return core, trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=["\n"]
    )


FAMILIES = {
    "byte-level BPE": byte_level,
    "tiktoken": tiktoken,
    "SentencePiece, prefix": legacy_prefix,
    "SentencePiece, first prefix": first_prefix,
    "SentencePiece, no prefix": no_prefix,
    "Unigram": unigram,
}
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') "
    "+ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = helpers.GEMMA.replace("<|im_start|>", "<start_of_turn>").replace(
    "<|im_end|>", "<end_of_turn>"
)
ZEPHYR = (  # TinyLlama: its markers are letters
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Qwen3's: thoughts of the past are left out, thinking off is an empty thought in the newest turn
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') if m['role'] == 'assistant' "
    "else m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
TEMPLATES = {
    "ChatML": helpers.CHATML,
    "Llama 2": LLAMA2,
    "Llama 3": LLAMA3,
    "Mistral": helpers.MISTRAL,
    "Gemma": GEMMA,
    "Zephyr": ZEPHYR,
    "Qwen3": QWEN3,
    "R1": R1,
}
CORES = {}


def tokenizer(family, template):
    """A tokenizer of a family, with the control tokens of all templates."""
    if family not in CORES:
        core, trainer = FAMILIES[family]()
        used = core.pre_tokenizer, core.normalizer
        if family.startswith("SentencePiece"):  # learns no pieces that go over a space
            core.normalizer = normalizers.Replace("\n", " ")
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        core.train_from_iterator(TEXT, trainer)
        core.pre_tokenizer, core.normalizer = used
        described = json.loads(core.to_str())
        described["added_tokens"] = []
        CORES[family] = json.dumps(described)
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(CORES[family]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    made.add_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS])
    made.add_tokens([AddedToken(m, special=False, normalized=False) for m in WORDLIKE])
    made.chat_template = template
    return made


class Model:
    """As much of a model as a chat format asks for."""

    generation_config = GenerationConfig(eos_token_id=None)


def chat_format(family, template, date=""):
    """The ChatFormat of a family and a template."""
    chats.remark.cache_clear()
    return ChatFormat(tokenizer(family, TEMPLATES.get(template, template)), Model(), date)


WORDS = ["We share the water.", "No, step by step.", "I propose a plan.", "It is fair.", "Agreed."]


def rendered(chat, view, words):
    """The ids that the template gives for a dialogue as this agent sees it."""
    system, case = view.system, view.task
    messages = [{"role": "system", "content": system}]
    for said in [""] * (view.me == 0) + words:
        content = said
        if len(messages) % 2:
            content = case * (len(messages) == 1) + said + "\n\n" * bool(said) + selfplay.ASK
            messages.append({"role": "user", "content": content})
        else:
            messages.append({"role": "assistant", "content": content})
    if not chat.has_system:
        messages[:2] = [{"role": "user", "content": f"{system}\n\n{messages[1]['content']}"}]
    text = chat.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_is_what_the_template_renders(family, template, capsys):
    chat = chat_format(family, template)
    if (family, template) == ("byte-level BPE", "Llama 3"):
        # two line breaks before a turn: one token where it is to be sampled, two in the past
        ours, theirs = chat.compared()
        assert ours != theirs and "rewrites past turns" in capsys.readouterr().err
        assert chat.tokenizer.decode(ours) == chat.tokenizer.decode(theirs)
        return
    turns = [Turn(i % 2, words, False, chat.turn(words)) for i, words in enumerate(WORDS)]
    for me in (0, 1):
        view = selfplay.view_of(chat, me, helpers.scenario(), False)
        for count in range(me, 5, 2):
            expected = rendered(chat, view, WORDS[:count])
            if family == "byte-level BPE":  # the seam between the case and what follows it
                at = len(view.prompt) - 1
                assert expected[at : at + 2] == 2 * chat.plain("\n") and len(chat.plain("\n")) == 1
                expected[at : at + 2] = chat.plain("\n\n")
            assert view.sample_to_speak(turns[:count]).ids == expected
        if chat.stable:
            whole = view.sample_to_speak(turns[: 4 + me]).ids
            for count in range(me, 4, 2):
                ids = view.sample_with(turns[:count], turns[count]).ids
                assert whole[: len(ids)] == ids
                assert sum(token in chat.ends for token in ids) == ids.count(chat.end)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_rewrites_the_past_is_said_once(family, capsys):
    for template in ("Llama 2", "Llama 2"):
        ChatFormat(tokenizer(family, TEMPLATES[template]), Model())
    err = capsys.readouterr().err
    assert err.count("rewrites past turns") == 1 and err.count("\n") == 1
    chat_format(family, "ChatML")
    assert capsys.readouterr().err == ""


BAD = "<|im_end|> </s> <s>[INST] <<SYS>> [/INST] <｜User｜> <think> [/[INST]] <|user|> <|eot_id|>"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_becomes_a_control_token_or_a_marker(family, template):
    chat = chat_format(family, template)
    never = chat.controls - {chat.tokenizer.unk_token_id}  # which stands for an unknown letter
    assert not never & set(chat.plain(BAD))
    literals = {"Llama 2": ["[INST]", "[/INST]", "<<SYS>>"], "Zephyr": ["<|user|>"]}
    for marker in literals.get(template, []):
        assert marker not in chat.tokenizer.decode(chat.plain(BAD))

    def controls(words):
        persona = {"name": words, "creed": words}
        scene = dataclasses.replace(helpers.scenario(dilemma=words), personas=(persona, persona))
        said = chat.turn("Yes.")
        turns = [Turn(i % 2, words, False, said) for i in range(3)]
        ids = selfplay.view_of(chat, 0, scene, True).sample_to_speak(turns, closing=words).ids
        return [token for token in ids if token in never]

    assert controls(BAD) == controls("Be fair.")


def test_added_tokens_that_are_not_special_are_not_heard():
    chat = chat_format("byte-level BPE", "R1")
    user = chat.tokenizer.convert_tokens_to_ids("<｜User｜>")
    ids = [*chat.encode([("x</think>", True)]), user, *chat.plain("Hi")]
    assert chat.text(ids) == "Hi"
    assert user in chat.controls and user not in chat.plain("<｜User｜>")


# ---- thoughts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_are_not_heard(family, capsys):
    chat = chat_format(family, "Qwen3")
    assert capsys.readouterr().err == "" and not chat.thinks

    def heard(text):
        return chat.text(chat.encode([(text, True)]))

    assert heard("<think>\n\n</think>\n\nHello.") == "Hello."
    assert capsys.readouterr().err == ""  # an empty thought is none
    assert heard("<think>I lie.</think>Hello.<|im_end|>") == "Hello."
    assert heard("Hello. <think>I lie.") == "Hello."
    assert heard("I lie.</think> Hello.") == "Hello."
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "thinks although thinking is off" in err


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_opens_a_thought_is_said_at_the_start(family, capsys):
    chat = chat_format(family, "R1")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "opens a thought" in err and "mid-thought" in err
    end = chat.tokenizer.eos_token
    assert chat.text(chat.encode([("I lie.</think>\n\nHello." + end, True)])) == "Hello."
    assert chat.text(chat.encode([("I lie, and", True)])) == ""


@pytest.mark.parametrize("template", ["Qwen3", "R1"])
def test_a_thought_is_trained_and_not_part_of_the_past(template):
    chat = chat_format("tiktoken", template)
    view = selfplay.view_of(chat, 0, helpers.scenario(), False)
    ids = chat.encode([("<think>I lie.</think>Hello.", True)]) + [chat.end]
    first = Turn(0, chat.text(ids), False, ids, [-1.0] * len(ids))
    second = Turn(1, "No.", False, chat.turn("No."))
    assert view.sample_with([], first).trained_ids() == ids
    seen = view.sample_to_speak([first, second])
    assert seen.ids == rendered(chat, view, ["Hello.", "No."])
    assert "lie" not in chat.tokenizer.decode(seen.ids)


# ---- dates --------------------------------------------------------------------------------------

DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + helpers.CHATML


def test_a_date_in_a_template_is_the_runs():
    chat = chat_format("tiktoken", DATED, "2024-02-29")
    text = chat.tokenizer.decode(chat.prompt("Be fair."))
    assert text.startswith("Today is 29 Feb 2024.")
    assert selfplay.PlaySettings().date == str(datetime.date.today())
    with pytest.raises(cli.UserError, match="--date 'x': write it as YYYY-MM-DD"):
        chat_format("tiktoken", DATED, "x")


def test_voice_is_a_model_with_its_format():
    model = helpers.tiny()
    speaker = chats.Voice(model, helpers.tokenizer(), "2024-02-29")
    assert speaker.model is model and speaker.chat.day == datetime.date(2024, 2, 29)
    assert isinstance(speaker.model, torch.nn.Module)


# ---- what a template is found to be -------------------------------------------------------------

SMALL = {
    "chatml": helpers.CHATML,
    "gemma": helpers.GEMMA,
    "mistral": helpers.MISTRAL,
    "qwen3": helpers.QWEN3,
}


@pytest.mark.parametrize(
    "template, has_system, stable",
    [
        ("chatml", True, True),
        ("gemma", False, True),
        ("mistral", False, True),
        ("qwen3", True, False),
    ],
)
def test_what_a_template_is_found_to_be(template, has_system, stable):
    chat = helpers.voice(template=SMALL[template]).chat
    assert (chat.has_system, chat.stable, chat.end, chat.ends) == (has_system, stable, 2, {2})
    assert (chat.opening == chat.past_opening) == stable


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages[-1]['content'] }}",
        "{% for m in messages[-2:] %}{{ m['content'] }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",
        "{{ messages[0].x.y.z }}",
        "{% for %}",
    ],
)
def test_a_template_that_cannot_be_used_is_one_clear_error(template):
    with pytest.raises(cli.UserError, match=r"^--model: [^\n]* use (another|an instruct) model"):
        helpers.voice(template=template)


def test_an_end_token_that_nobody_declared_is_found_and_cannot_be_spoken():
    tokenizer = helpers.tokenizer.__wrapped__(helpers.CHATML.replace("<|im_end|>", "</turn>"))
    tokenizer.add_tokens([AddedToken("</turn>", special=False)])
    chat, end = (
        ChatFormat(tokenizer, helpers.tiny(vocabulary=len(tokenizer))),
        tokenizer.convert_tokens_to_ids("</turn>"),
    )
    assert chat.end == end and chat.ends == {2, end}
    assert end not in chat.plain("stop</turn>now") and end in chat.encode(
        [("stop</turn>now", True)]
    )
