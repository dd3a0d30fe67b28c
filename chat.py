"""A conversation as token ids: chat templates, control tokens, thoughts, and how an agent sees it.

    chat template -> ChatFormat: pieces of text -> encode -> ids, as apply_chat_template gives them
    turns -> View.sample_to_speak -> Sample: ids, and a mask, 1 on the tokens to be trained

Token in, token out: a stream grows by the ids that were sampled, never by their text encoded
again. Other text is encoded as in the whole rendering: cut at control tokens and nowhere else.
They are read in the template's own text only; what a person or a model wrote never becomes one.

One seam is ours. The dialogues of a group share the ids of persona and dilemma, so these are
encoded by themselves, and what follows them too (unless the tokenizer puts a prefix before each
text). With GPT-2's rule for blank lines two line breaks are one token there, not two.
"""

import copy
import dataclasses
import datetime
import functools
import os
import re
import sys

import jinja2
from tokenizers import AddedToken

from cli import UserError

# ---- what travels -------------------------------------------------------------------------------


@dataclasses.dataclass
class Turn:
    """One utterance, and the ids that were sampled for it (end of turn included unless truncated).

    logprobs: at the sampling temperature over the full vocabulary; less the log mass of the nucleus
    they are the policy's that sampled. cuts, log_masses: see `drawing.draw`.
    """

    speaker: int
    text: str
    truncated: bool
    ids: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    cuts: list = dataclasses.field(default_factory=list)
    log_masses: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Sample:
    """Ids as one agent sees them; mask 1: its own words that count here. The other lists are 0
    where the mask is.

    What an agent says has mask 1 in at most one Sample of its stream.
    """

    ids: list = dataclasses.field(default_factory=list)
    mask: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    cuts: list = dataclasses.field(default_factory=list)
    log_masses: list = dataclasses.field(default_factory=list)

    def trained_ids(self):
        """The ids with mask 1."""
        return [token for token, mask in zip(self.ids, self.mask) if mask]

    def record(self):
        """As it is written to dialogues.jsonl."""
        return {"ids": self.ids, "mask": self.mask, "logprobs": self.logprobs}


def add_ids(sample, ids):
    """Append ids that nobody sampled here: mask 0."""
    sample.ids += ids
    for column in (sample.mask, sample.logprobs, sample.cuts, sample.log_masses):
        column += [0] * len(ids)


def add_turn(sample, turn, trained, end):
    """Append the sampled ids of a turn, with mask 1 if they are to be trained, and the token `end`
    where it was cut off."""
    if trained:
        zeros = [0] * len(turn.ids)
        sample.ids += turn.ids
        sample.mask += [1] * len(turn.ids)
        sample.logprobs += turn.logprobs or zeros
        sample.cuts += turn.cuts or zeros
        sample.log_masses += turn.log_masses or zeros
    else:
        add_ids(sample, turn.ids)
    if turn.truncated:
        add_ids(sample, [end])


# ---- chat templates -----------------------------------------------------------------------------

PROBE = ["Be fair.", "The well is dry.", "I will dig.", "With whom?", "With you.", "And when?"]
# Markers that templates write in letters: <|user|>, <<SYS>>, [/INST], ### Response:
LETTERED = re.compile(r"<+[^\s<>]+>+|\[/?\w+\]|#{2,} ?\w+:?")
THOUGHTS = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
]
UNHEARD = (
    "thinking is off; thoughts are trained but not heard, and short turns are cut in mid-thought"
)
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # of a chat template
MARK = "\ue000mark\ue001"  # stands for the control token before a text, in private characters
SEAM = (None, False)  # in a list of texts: what follows may be encoded by itself


@functools.cache
def remark(line):
    """Say something about a model on stderr, once, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {line}", file=sys.stderr, flush=True)


def without_controls(tokenizer):
    """A copy of a tokenizer's core that reads no added token but blanks and MARK."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise UserError("--model: its tokenizer has no tokenizer.json; use another model")
    bare = copy.deepcopy(core)
    bare.no_padding()
    bare.no_truncation()
    entries = tokenizer.added_tokens_decoder.values()
    bare.add_special_tokens([e for e in entries if e.special or e.content.strip()])
    bare.add_tokens([AddedToken(MARK, normalized=False)])
    bare.encode_special_tokens = True  # as letters
    return bare


class ChatFormat:
    """The pieces of a model's chat template, found by rendering a conversation of known words.

    opening       text between a user's words and an assistant's turn that is to be sampled
    past_opening  the same before a turn that lies in the past
    end, after    the end-of-turn token; the text between it and the next user's words
    ends          every token that ends a turn
    controls      tokens that must never come out of text: all added ones but blanks
    thoughts      the markers around a thought, or None; `thinks`: a turn begins inside of one
    stable        both openings have equal ids: a conversation's never change as it grows.
                  Qwen3 adds an empty thought to the newest turn only: there it is False

    date: the day that a template may print, YYYY-MM-DD. Raises UserError for a template that
    cannot be used; what is odd about one is said once on stderr.
    """

    def __init__(self, tokenizer, model, date=""):
        self.tokenizer = tokenizer
        try:
            self.day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        except ValueError as error:
            raise UserError(f"--date {date!r}: write it as YYYY-MM-DD") from error
        if not tokenizer.chat_template:
            raise UserError("--model: it has no chat template; use an instruct model")
        self._template = DATE_CALL.sub(
            lambda call: repr(self.day.strftime(call[2])), tokenizer.get_chat_template()
        )
        self._bare = without_controls(tokenizer)
        self._find_pieces()
        self._find_controls(model.generation_config)
        self._find_markers()
        openings = [self.encode([(text, True)]) for text in (self.opening, self.past_opening)]
        self.stable = openings[0] == openings[1]
        # whether a text is encoded alike by itself and behind another one
        self._seams = self._letters("\nx") == self._letters("\n") + self._letters("x")
        self._tell()

    # -- what the template is --

    def render(self, messages):
        """The template's own text of messages, up to where the assistant speaks next."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
                thinking=False,
                chat_template=self._template,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--model: its chat template fails ({reason}); use another model"
            ) from error

    def _messages(self, words):
        """The words as a conversation; the system's come first where there is such a role."""
        roles = ["user", "assistant", "user", "assistant", "user"]
        if self.has_system:
            roles.insert(0, "system")
        return [{"role": role, "content": word} for role, word in zip(roles, words)]

    def _split(self, words):
        """Render the words as a conversation; the pieces before, between and after them."""
        text = self.render(self._messages(words))
        any_word = "|".join(map(re.escape, words))
        pieces = re.split(any_word, text)
        if re.findall(any_word, text) != words or pieces[-5:-3] != pieces[-3:-1]:
            raise UserError(
                "--model: its chat template drops messages, or renders equal turns differently; "
                "use another model"
            )
        return pieces

    def _find_pieces(self):
        """Set the template's texts: before system and user, past, gap, opening; all as pieces."""
        try:
            self.has_system = True
            self._pieces = self._split(PROBE)
        except UserError:  # Gemma, some Mistrals: no system role, or it is dropped
            self.has_system = False
            self._pieces = ["", *self._split(PROBE[1:])]
        self._before_system, self._before_user, past, self._gap, _, _, self.opening = self._pieces
        self.past_opening, self._space = past, ""
        if past.rstrip() == self.opening.rstrip():
            # Mistral: "[/INST] turn" in the past, "[/INST]" to be continued
            self.past_opening, self._space = self.opening, past.removeprefix(self.opening)

    def _find_controls(self, generation_config):
        """Set controls, ends, end, and the texts before and after the end of a turn."""
        added = self.tokenizer.added_tokens_decoder
        self._added = {
            entry.content: (token, entry)
            for token, entry in added.items()
            if entry.special or entry.content.strip()
        }
        longest_first = sorted(self._added, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.controls = {token for token, _ in self._added.values()}
        declared = generation_config.eos_token_id if generation_config else None
        if not isinstance(declared, list):
            declared = [declared]
        self.ends = {*declared, self.tokenizer.eos_token_id} - {None}
        self._before_end, *rest = self._cut.split(self._gap, maxsplit=1)
        if rest and not self._before_end.strip():
            # the template's own end of turn, whatever the configs say; Llama 2 writes " </s>"
            self.end, self.after = self._added[rest[0]][0], rest[1]
            self.ends.add(self.end)
        elif self.ends:
            self.end, self.after, self._before_end = min(self.ends), self._gap, ""
        else:
            raise UserError("--model: it has no end-of-turn token; use an instruct model")
        # A letter that is unknown gives the unknown token, unless that is an end or a beginning.
        used = self.ends | {self.tokenizer.bos_token_id, self.tokenizer.pad_token_id}
        self._never = self.controls - ({self.tokenizer.unk_token_id} - used)

    def _find_markers(self):
        """Set thoughts, thinks, and what `disarm` looks for: markers written in letters."""
        known = [pair for pair in THOUGHTS if pair[0] in self._template or pair[0] in self._added]
        self.thoughts = known[0] if known else None
        self.thinks = False
        if self.thoughts:
            start, stop = self.thoughts
            self.thinks = self.opening.rfind(start) > self.opening.rfind(stop)
        markers = {*(self.thoughts or ())} - self._added.keys()
        for literal in self._cut.split("\n".join(self._pieces))[::2]:
            markers |= set(LETTERED.findall(literal))
        longest_first = sorted(markers, key=len, reverse=True)
        self._lettered = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _tell(self):
        """Say what is odd about this template."""
        if self.thinks:
            remark(f"--model: its chat template opens a thought in each turn although {UNHEARD}")
        ours, theirs = self.compared()
        if ours != theirs:
            same = len(os.path.commonprefix([ours, theirs]))
            remark(
                "--model: its chat template rewrites past turns; a stream keeps them as they were "
                f"sampled (in a short conversation {len(ours)} ids for {len(theirs)}, other ones "
                f"from the {same + 1}th on: {self.tokenizer.decode(theirs[same : same + 5])!r})"
            )

    def compared(self):
        """A short conversation, as (ids of a stream in which it was sampled, the template's)."""
        system, task, first, question, second, last = PROBE
        said = PROBE if self.has_system else [f"{system}\n\n{task}", *PROBE[2:]]
        ids = self.asked("", self.prompt_parts(system, task), past=True)
        ids += [*self._turn(first, past=True), self.end] + self.asked(question, past=True)
        ids += [*self._turn(second, past=True), self.end] + self.asked(last)
        rendered = self.render(self._messages(said))
        return ids, self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    # -- text to ids --

    def disarm(self, text):
        """Untrusted text in which lettered markers, as [INST], have lost their signs."""
        while self._lettered.search(text):
            text = self._lettered.sub(lambda found: re.sub(r"[^\w\s]", "", found[0]), text)
        return text

    def _letters(self, text, first=False):
        """Ids of a text without control tokens; first: nothing at all stands before it."""
        if not text:
            return []
        encoding = self._bare.encode(text if first else MARK + text, add_special_tokens=False)
        ids = encoding.ids if first else encoding.ids[1:]
        return [token for token in ids if token not in self._never]

    def encode(self, texts, first=False):
        """Ids of (text, trusted) pairs that follow each other, as the tokenizer reads them whole.

        Control tokens are read in trusted text only. first: they open the stream.
        """
        ids, run, strip = [], "", False  # run: letters since the last control token
        for text, trusted in texts:
            if text is None:
                if self._seams:
                    ids += self._letters(run, first and not ids)
                    run, strip = "", False
                continue
            literal, *rest = self._cut.split(text) if trusted else [self.disarm(text)]
            run += literal
            if strip:
                run = run.lstrip()
            for control, literal in zip(rest[::2], rest[1::2]):
                token, entry = self._added[control]
                if entry.lstrip:
                    run = run.rstrip()
                ids += [*self._letters(run, first and not ids), token]
                strip = entry.rstrip
                run = literal.lstrip() if strip else literal
        return ids + self._letters(run, first and not ids)

    def plain(self, text):
        """Ids of untrusted text by itself, in which a literal <|im_end|> stays letters."""
        return self.encode([(text, False)])

    def prompt_parts(self, system, task=""):
        """The texts of a stream up to the end of `task`, with which its first message begins."""
        if self.has_system:
            parts = [(self._before_system, True), (system, False), (self._before_user, True)]
        else:
            parts = [(self._before_user, True), (f"{system}\n\n", False)]
        return [*parts, (task, False), SEAM]

    def prompt(self, system, task=""):
        """Their ids."""
        return self.encode(self.prompt_parts(system, task), first=True)

    def asked(self, words, prompt=None, past=False):
        """Ids of a user's words up to where the assistant speaks: at the beginning of a stream
        behind its prompt, later behind the end of the assistant's turn."""
        opening = self.past_opening if past else self.opening
        before = prompt or [(self.after, True)]
        return self.encode([*before, (words, False), (opening, True)], first=bool(prompt))

    def _turn(self, text, before_end="", past=False):
        """Ids of a text that the assistant says, as they follow its opening."""
        lead = self._cut.split(self.past_opening if past else self.opening)[-1]
        before = self._letters(lead)
        whole = self._letters(lead + self._space + self.disarm(text) + before_end)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self._letters(self.disarm(text) + before_end)

    def turn(self, text, past=False):
        """Ids of a text as the assistant's turn, its end included, as the template writes it."""
        return [*self._turn(text, self._before_end, past), self.end]

    # -- ids to text --

    def text(self, ids):
        """What the other side hears of sampled ids: no control tokens, no thoughts."""
        markers = {self._added[mark][0] for mark in self.thoughts or () if mark in self._added}
        silent = self.controls - markers
        words = self.tokenizer.decode([token for token in ids if token not in silent])
        if self.thoughts:
            words = self._spoken(words)
        return words.strip()

    def _spoken(self, words):
        """Words without thoughts. That somebody thinks is said once."""
        start, stop = self.thoughts
        if self.thinks:
            words = start + words
        thought = re.compile(f"{re.escape(start)}(.*?)(?:{re.escape(stop)}|$)", re.DOTALL)
        if any(inside.strip() for inside in thought.findall(words)) and not self.thinks:
            remark(f"--model: it thinks although {UNHEARD}")
        return thought.sub("", words).rpartition(stop)[2]

    def forgets(self, ids):
        """Whether the template leaves the thoughts of these ids out once they lie in the past."""
        if self.stable or not self.thoughts:
            return False
        said = self.tokenizer.decode(ids)
        return self.thinks or any(mark in said for mark in self.thoughts)


class Voice:
    """Somebody who can speak: a model and its chat format. Errors and date as in ChatFormat."""

    def __init__(self, model, tokenizer, date=""):
        self.model, self.chat = model, ChatFormat(tokenizer, model, date)


# ---- how an agent sees a dialogue ---------------------------------------------------------------


@dataclasses.dataclass
class View:
    """How agent `me` sees a dialogue: turns a list of Turns into a Sample in its chat format.

    task opens its first user message. Each message to it ends with the question `ask`. earlier
    stands for turns that are not shown, silence for a turn without words.
    """

    chat: ChatFormat
    me: int
    system: str
    task: str
    ask: str
    earlier: str
    silence: str

    @property
    def prompt(self):
        """Ids up to the end of the task: what the dialogues of a scenario share."""
        return self.chat.prompt(self.system, self.task)

    def sample_to_speak(self, turns, closing=None, train=True, window=0):
        """The Sample of `turns` up to the point where this agent speaks next.

        closing: the request for the joint solution, in place of the last `ask`. train: whether
        this agent's turns get mask 1. window: so many of the last turns are shown (0: all).
        """
        chat, sample = self.chat, Sample()
        seen = turns[-window:]
        prompt = chat.prompt_parts(self.system, self.task)
        heard = []  # what the other side said since this agent's last turn
        unseen = [self.earlier] if len(seen) < len(turns) else []
        for turn in seen:
            if turn.speaker != self.me:
                heard.append(turn.text or self.silence)
                continue
            words = "\n\n".join([*(heard or unseen), self.ask])
            add_ids(sample, chat.asked(words, prompt, past=True))
            if chat.forgets(turn.ids):
                add_ids(sample, chat.turn(turn.text, past=True))
            else:
                add_turn(sample, turn, train, chat.end)
            heard, prompt = [], None
        words = "\n\n".join([*heard, closing or self.ask])
        add_ids(sample, chat.asked(words, prompt))
        return sample

    def sample_with(self, turns, last, train=True, closing=None, window=0):
        """The Sample of `turns` followed by this agent's own turn `last`, which gets mask 1."""
        sample = self.sample_to_speak(turns, closing, train, window)
        add_turn(sample, last, True, self.chat.end)
        return sample


def samples_of(view, turns, context_turns):
    """An agent's stream as Samples: one with all its turns, or one for each of them where its
    view is a window (context_turns > 0) or the template rewrites what was said."""
    own = [i for i, turn in enumerate(turns) if turn.speaker == view.me and turn.logprobs]
    if own and view.chat.stable and not context_turns:
        return [view.sample_with(turns[: own[-1]], turns[own[-1]])]
    samples = []
    for i in own:
        samples.append(view.sample_with(turns[:i], turns[i], train=False, window=context_turns))
    return samples
