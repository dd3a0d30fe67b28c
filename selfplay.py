"""Self-play: two instances of one model, with opposing personas, negotiate a dilemma in turns.

    scenario ->  agent 0: system(persona 0) | dilemma, cue | turn 0 | turn 1 as user, cue | turn 2 | ...             its own stream
                 agent 1: system(persona 1) | dilemma, turn 0 as user, cue | turn 1 | turn 2 as user, cue | ...      its own stream
             ->  when they agree, or at the limit, agent 0 writes the joint solution (the final completion)

Token in, token out: a stream grows by the ids that were sampled, never by their text encoded again. The mask is 1 exactly
on the tokens that this agent sampled, the end of its turn included; log-probs come out of the sampler with the tokens.
An opponent's turn is encoded once, as plain text that can never become a control token.

`negotiate` is one dialogue, top to bottom; it yields whenever it wants somebody to speak. `play` runs many of them at once:
every wish of every dialogue is decoded in one batch, whoever has finished leaves it, whoever has to read is read together.

    python selfplay.py --dilemma "..." --human b      # watch one negotiation, or take a side
"""

import concurrent.futures
import dataclasses
import math
import re
import sys
import textwrap
import zlib

import jinja2
import numpy as np
import torch

import data_gen
import reward
from cli import UserError, command_line, option, run_cli
from model import WARM_MODEL, RaggedCache, context_limit, load, own_device, packed
from reward import fill


@dataclasses.dataclass(frozen=True)
class PlaySettings:
    """How a dialogue is played."""

    max_turns: int = option(
        3,
        "turns at most, both agents together; 0: agent 0 answers alone, without a negotiation",
        low=0,
    )
    turn_tokens: int = option(56, "tokens a turn may have", low=2)
    final_tokens: int = option(112, "tokens the joint final completion may have", low=2)
    context_turns: int = option(
        0, "turns that an agent sees beside the scenario (0: all of them; the paper: 2)", low=0
    )
    agreement: str = option(
        "judge",
        "who finds that the agents agree: the judge after each turn, a marker in both last turns, or nobody (all turns are played)",
        choices=("judge", "marker", "none"),
    )
    on_impasse: str = option(
        "complete",
        "no agreement at the last turn: write the final completion all the same, or none and a reward of zero",
        choices=("complete", "zero"),
    )
    temperature: float = option(0.7, "of the dialogue", above=0)
    top_p: float = option(
        1.0,
        "nucleus of the dialogue; the learner renormalises over the same nucleus",
        above=0,
        high=1,
    )
    final_temperature: float = option(0.5, "of the final completion (0: greedy)", low=0)
    final_top_p: float = option(1.0, "nucleus of the final completion", above=0, high=1)


# ---- what the agents are told: data, easy to edit ------------------------------------------------------------------

SYSTEM = "You are {me}. {creed} You talk with {other}, and look for a plan that both of you can carry out.{marker}"
MARKER_RULE = " When you accept the plan on the table, end your turn with the word AGREED."
# The dilemma opens the first user message, and a question ends each but the last: a small model hardly reads its system prompt, and what it says drifts.
CASE = "{dilemma}\n\nTalk it over with {other}. Say in one or two sentences what you propose and why.\n\n"
SYSTEM_ALONE = "You are {me}. {creed} You look for a plan that both you and {other} can carry out."  # without a negotiation
CASE_ALONE = "{dilemma}\n\n"
ASK = "What do you propose?"
EARLIER = "(The two of you have been talking for a while.)"
SILENCE = "(says nothing)"
FINAL = (
    'Thank you. {other}\'s creed is: "{creed}" Now sum up the plan that you and {other} will carry out: who does what and when, what happens if it '
    "fails, and how it helps both of you. Two or three sentences."
)
ALONE = (
    '{other} is not here to talk with. {other}\'s creed is: "{creed}" Write the plan that you and {other} will carry out: who does what and when, what '
    "happens if it fails, and how it helps both of you. Two or three sentences."
)


# ---- what travels ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Turn:
    """One utterance: its text, and the ids that were sampled for it (end of turn included unless truncated)."""

    speaker: int
    text: str
    truncated: bool
    ids: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(
        default_factory=list
    )  # log-prob of each id at the sampling temperature
    cuts: list = dataclasses.field(
        default_factory=list
    )  # top-p < 1: log-prob at which the nucleus ended
    masses: list = dataclasses.field(
        default_factory=list
    )  # top-p < 1: log of the nucleus's probability


@dataclasses.dataclass
class Sample:
    """Ids of one view, and beside each id: mask (1: sampled by this agent here), log-prob, cut, mass (0 where mask is 0)."""

    ids: list
    mask: list
    logprobs: list
    cuts: list
    masses: list


@dataclasses.dataclass
class Dialogue:
    """One negotiation. `group` numbers the scenario within the step, `member` the dialogue within its group."""

    scenario: data_gen.Scenario
    step: int
    group: int
    member: int
    turns: list = dataclasses.field(default_factory=list)
    streams: list = dataclasses.field(default_factory=lambda: [[], []])  # per agent: list of Sample
    agreed: bool = False
    stop: str = ""  # "agreed", "max_turns" or "context"; "written" where nobody played it
    final: str = None
    final_sample: Sample = None
    final_truncated: bool = False
    verdict: object = None  # the judge's answer, while it is awaited: Future of reward.Verdict
    reward: float = None  # None: missing
    advantage: float = None
    judge: dict = dataclasses.field(default_factory=lambda: {"raw": "", "failures": []})

    def record(self):
        """The line of dialogues.jsonl."""
        plain = lambda s: {"ids": s.ids, "mask": s.mask, "logprobs": s.logprobs}
        return {
            "step": self.step,
            "scenario_id": self.scenario.id,
            "group": self.group,
            "member": self.member,
            "dilemma": self.scenario.dilemma,
            "personas": list(self.scenario.personas),
            "turns": [
                {"speaker": t.speaker, "text": t.text, "truncated": t.truncated} for t in self.turns
            ],
            "agreed": self.agreed,
            "stop": self.stop,
            "final": self.final,
            "final_truncated": self.final_truncated,
            "reward": self.reward,
            "advantage": self.advantage,
            "judge": self.judge,
            "streams": [
                {"speaker": i, "samples": [plain(s) for s in samples]}
                for i, samples in enumerate(self.streams)
            ],
            "final_ids": [i for i, m in zip(self.final_sample.ids, self.final_sample.mask) if m]
            if self.final_sample
            else [],
            "final_sample": plain(self.final_sample) if self.final_sample else None,
        }


# ---- chat templates, as token ids -----------------------------------------------------------------------------------

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class ChatFormat:
    """The pieces of a model's chat template, found once by rendering a conversation of known words.

    head(system)    ids up to where the first user message's content begins (no system role: the system text opens that message)
    opening         between the end of a user message and an assistant's turn that is to be sampled
    past_opening    the same before a turn that lies in the past
    end, after      the end-of-turn token, and what stands between it and the next user message's content
    stable          opening == past_opening, so that a conversation's earlier ids never change and one stream is one sample;
                    otherwise (Qwen3 adds an empty thought to the newest turn only) every turn becomes a sample of its own
    """

    def __init__(self, tokenizer, model):
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            if tokenizer.eos_token is None:
                raise UserError(
                    "--model: the tokenizer has neither a chat template nor an end-of-text token; use an instruct model"
                )
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.has_system = True
        try:
            words = self._split(["Sysword", "Userone", "Botone", "Usertwo", "Bottwo", "Userthree"])
        except UserError:  # Gemma, some Mistrals: no system role, or it is dropped
            self.has_system = False
            words = self._split(["Userone", "Botone", "Usertwo", "Bottwo", "Userthree"])
        self._before_system, self._before_user = (
            (words[0], words[1]) if self.has_system else ("", words[0])
        )
        past, gap, past2, gap2, opening = words[-5:]
        if past != past2 or gap != gap2:
            raise UserError(
                "--model: its chat template renders equal turns differently, so turns cannot be put together; use another model"
            )
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {e for e in [*ends, tokenizer.eos_token_id] if e is not None}
        if (
            past.strip() == opening.strip()
        ):  # Mistral: "[/INST] turn" in the past, "[/INST]" to be continued
            past = opening
        gap = self.glue(gap)
        if (
            gap and gap[0] in tokenizer.added_tokens_decoder
        ):  # the template's own end of turn, whatever the configs say
            self.ends.add(gap[0])
        if not self.ends:
            raise UserError(
                "--model: no end-of-turn token is known for its tokenizer; use an instruct model"
            )
        self.end, self.after = (
            (gap[0], gap[1:]) if gap and gap[0] in self.ends else (min(self.ends), gap)
        )
        self.opening, self.past_opening = self.glue(opening), self.glue(past)
        self.stable = self.opening == self.past_opening

    def _split(self, words):
        """Render the words as a conversation and return the pieces before, between and after them."""
        roles = (["system"] if self.has_system else []) + ["user", "assistant"] * 3
        messages = [{"role": r, "content": w} for r, w in zip(roles, words)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"--model: its chat template refuses a conversation ({' '.join(str(error).split())}); use another model"
            )
        pieces = re.split("|".join(words), text)
        if re.findall("|".join(words), text) != words:
            raise UserError(
                "--model: its chat template drops or reorders messages; use another model"
            )
        return pieces

    def glue(self, text):
        """Ids of template text, in which control tokens are meant."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def plain(self, text):
        """Ids of untrusted text, in which a literal <|im_end|> stays a string of letters."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        control = self.tokenizer.added_tokens_decoder
        return [i for i in ids if i not in control or not (control[i].special or i in self.ends)]

    def head(self, system):
        """Ids of a stream up to where the content of its first user message begins."""
        if self.has_system:
            return (
                self.glue(self._before_system) + self.plain(system) + self.glue(self._before_user)
            )
        return self.glue(self._before_user) + self.plain(system + "\n\n")

    def text(self, ids):
        """What the other side hears: the words of sampled ids, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


@dataclasses.dataclass
class Voice:
    """Somebody who can speak: a model and its chat format."""

    model: object
    chat: ChatFormat


def voice(model, tokenizer):
    """A model and its tokenizer as a Voice. Raises UserError for a template that cannot be used."""
    return Voice(model, ChatFormat(tokenizer, model))


# ---- one dialogue ---------------------------------------------------------------------------------------------------


class View:
    """One agent's view of a dialogue: it turns a list of turns into a Sample that ends where this agent is to speak."""

    def __init__(self, chat, me, scenario, marker, alone=False):
        mine, other = scenario.personas[me], scenario.personas[1 - me]
        self.chat, self.me = chat, me
        words = {
            "me": mine["name"],
            "creed": mine["creed"],
            "other": other["name"],
            "dilemma": scenario.dilemma,
            "marker": MARKER_RULE if marker else "",
        }
        system, case = (SYSTEM_ALONE, CASE_ALONE) if alone else (SYSTEM, CASE)
        self.head = chat.head(fill(system, words)) + chat.plain(fill(case, words))

    def before(self, turns, closing=None, train=None, cut=False):
        """The Sample of `turns` as this agent sees them, up to the point where it speaks next.

        closing: one more user text at the end (the request for the final completion). train: the turns whose tokens get
        mask 1 (None: all of this agent's). cut: `turns` is a window, earlier ones are not shown.
        """
        sample, heard, chat = Sample([], [], [], [], []), [], self.chat
        add_ids(sample, self.head)
        for turn in turns:
            if turn.speaker != self.me:
                heard.append(turn.text or SILENCE)
                continue
            add_ids(sample, chat.plain("\n\n".join([*(heard or [EARLIER] * cut), ASK])))
            add_ids(sample, chat.past_opening)
            add_turn(sample, turn, train is None or any(turn is t for t in train))
            add_ids(sample, [chat.end] * turn.truncated + chat.after)
            heard = []
        add_ids(sample, chat.plain("\n\n".join([*heard, closing or ASK])) + chat.opening)
        return sample

    def until(self, turns, last, train=None, closing=None, cut=False):
        """The Sample of `turns` followed by this agent's own turn `last`."""
        sample = self.before(turns, closing, train, cut)
        add_turn(sample, last, True)
        add_ids(sample, [self.chat.end] * last.truncated)
        return sample


def add_ids(sample, ids):
    """Append ids that nobody sampled here: mask 0."""
    sample.ids.extend(ids)
    for column in (sample.mask, sample.logprobs, sample.cuts, sample.masses):
        column.extend([0] * len(ids))


def add_turn(sample, turn, trained):
    """Append the sampled ids of a turn, with mask 1 if they are to be trained."""
    n = len(turn.ids)
    sample.ids.extend(turn.ids)
    sample.mask.extend([int(trained)] * n)
    for column, values in (
        (sample.logprobs, turn.logprobs),
        (sample.cuts, turn.cuts),
        (sample.masses, turn.masses),
    ):
        column.extend(values if trained and values else [0] * n)


@dataclasses.dataclass
class Say:
    """A wish: speak after `ids`, up to `limit` tokens. `shared` of the ids are the same for the whole group.

    unless: a Future of a verdict; if its value is True the wish is void, and until it is known the words are held back.
    """

    speaker: int
    ids: list
    shared: int
    limit: int
    temperature: float
    top_p: float
    rng: object
    unless: object = None
    final: bool = False


def room(settings):
    """Tokens to keep free for a turn and its template: broken characters take three tokens each when the other side reads them."""
    return 3 * settings.turn_tokens + 16 if settings.max_turns else 0


def negotiate(dialogue, views, settings, judge, seed, limits, partner=None):
    """One dialogue, top to bottom: a generator that yields `Say` and is sent the Turn that was spoken (None: void).

    limits: per agent, the tokens that its context holds. partner: a function (dialogue) -> text that speaks for agent 1
    in place of the model (a script or a person). Fills in turns, streams, agreed, stop, final and the pending verdict.
    """
    case, turns = (dialogue.scenario.dilemma, dialogue.scenario.personas), dialogue.turns
    draws = lambda n: np.random.default_rng(
        [seed, dialogue.step, zlib.crc32(dialogue.scenario.id.encode()), dialogue.member, n]
    )
    request = final_request(dialogue.scenario, FINAL if settings.max_turns else ALONE)
    last = yield from talk(
        dialogue,
        views,
        settings,
        judge and (lambda: judge.agreed(*case, turns[:])),
        draws,
        limits,
        partner,
        request,
    )
    dialogue.streams = [streams_of(view, turns, settings.context_turns) for view in views]
    if not dialogue.agreed and turns and settings.on_impasse == "zero":
        if (
            last is not None and last.value is None
        ):  # nobody knows whether they agreed: a missing reward, not a zero
            dialogue.judge["failures"] = [f"agreement: {last.reason}"]
        else:
            dialogue.reward = 0.0  # the paper: no completion, reward 0, kept in the group
        return
    before = views[0].before(turns, request).ids
    if len(before) + settings.final_tokens > limits[0]:
        dialogue.stop = "context"
        dialogue.judge["failures"] = ["context full"]
        return
    final = yield Say(
        0,
        before,
        len(views[0].head),
        settings.final_tokens,
        settings.final_temperature,
        settings.final_top_p,
        draws(1 << 20),
        final=True,
    )
    dialogue.final, dialogue.final_truncated = final.text, final.truncated
    dialogue.final_sample = views[0].until(turns, final, train=[], closing=request)
    if judge:
        dialogue.verdict = judge.score(*case, turns, dialogue.final)


def talk(dialogue, views, settings, ask, draws, limits, partner, request):
    """The turns, until the agents agree, have had their turns, or a context is full. Returns the judge's Verdict on the last turn, or None.

    ask: a function () -> Future of the Verdict whether the turns so far end in agreement. draws: turn number -> random generator.
    """
    turns, check, dialogue.stop = dialogue.turns, None, "max_turns"
    for t in range(settings.max_turns):
        me, seen = t % 2, turns[-settings.context_turns or None :]
        before = views[me].before(seen, cut=len(seen) < len(turns)).ids
        if (
            len(before) + room(settings) > limits[me]
            or len(views[0].before(turns, request).ids) + room(settings) + settings.final_tokens
            > limits[0]
        ):
            dialogue.stop = "context"
            break
        if me == 1 and partner:
            dialogue.agreed = bool(check and check.result().value)
            if not dialogue.agreed:
                turn = Turn(1, partner(dialogue), False)
                turn.ids = views[0].chat.plain(turn.text)
        else:  # the next turn is spoken while the judge still thinks about the last one; if that one settled it, the new one is void
            turn = yield Say(
                me,
                before,
                len(views[me].head),
                settings.turn_tokens,
                settings.temperature,
                settings.top_p,
                draws(t),
                unless=check,
            )
            dialogue.agreed = turn is None
        if dialogue.agreed:
            break
        turns.append(turn)
        if settings.agreement == "marker" and len(turns) > 1:
            dialogue.agreed = all(re.search(r"\bAGREED?\b", x.text) for x in turns[-2:])
        if dialogue.agreed:
            break
        check = ask() if settings.agreement == "judge" and len(turns) > 1 else None
    last = None
    if check is not None and not dialogue.agreed:
        last = check.result() if check.done() else (yield check)
        dialogue.agreed = bool(last.value)
    dialogue.stop = "agreed" if dialogue.agreed else dialogue.stop
    return last


def streams_of(view, turns, context_turns):
    """An agent's stream as Samples: one with all turns, or, where its view is a window or a template drops what was said, one for each of its turns."""
    own = [i for i, turn in enumerate(turns) if turn.speaker == view.me and turn.logprobs]
    if context_turns or not view.chat.stable:
        first = lambda i: max(0, i - context_turns) if context_turns else 0
        return [view.until(turns[first(i) : i], turns[i], train=[], cut=first(i) > 0) for i in own]
    return [view.until(turns[: own[-1]], turns[own[-1]])] if own else []


# ---- a negotiation that somebody wrote, as if it had been played --------------------------------------------------------


def imitate(demonstration, chat, settings):
    """A data_gen.Demonstration as a Dialogue: the streams that two agents of this chat format would have, had they said just this.

    Nobody sampled its tokens, so each log-prob is NaN, and the advantage is 1: the learner then takes the gradient of plain likelihood.
    """
    scenario = demonstration.scenario
    dialogue = Dialogue(
        scenario,
        0,
        0,
        0,
        agreed=demonstration.agreed,
        stop="written",
        final=demonstration.final,
        advantage=1.0,
    )
    dialogue.turns = [written(chat, t % 2, text) for t, text in enumerate(demonstration.turns)]
    views = [View(chat, me, scenario, settings.agreement == "marker") for me in (0, 1)]
    dialogue.streams = [streams_of(view, dialogue.turns, settings.context_turns) for view in views]
    closing = final_request(scenario, FINAL)
    dialogue.final_sample = views[0].until(
        dialogue.turns, written(chat, 0, demonstration.final), train=[], closing=closing
    )
    return dialogue


def written(chat, speaker, text):
    """A text as the Turn of a speaker who ended it properly."""
    ids = [*chat.plain(text), chat.end]
    return Turn(speaker, text, False, ids, [math.nan] * len(ids))


def final_request(scenario, template):
    """The words that ask agent 0 for the joint solution."""
    other = scenario.personas[1]
    return fill(template, {"other": other["name"], "creed": other["creed"]})


# ---- many dialogues in one batch ------------------------------------------------------------------------------------


def sample(logits, temperature, top_p, uniform):
    """Draw one token per row by inverse CDF. logits (n, V) fp32; temperature, top_p, uniform (n,) tensors.

    Returns ids, log-prob at that temperature over the full vocabulary, the nucleus's threshold and its log mass, (n,) each.
    Temperature 0 takes the most likely token. A uniform number per row makes the draw independent of the batch.
    """
    greedy = temperature == 0
    logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    logp = logits - logits.logsumexp(1, keepdim=True)  # (n, V)
    weights = logp.exp()
    cut, mass = torch.full_like(uniform, -math.inf), torch.zeros_like(uniform)
    rows = (top_p < 1).nonzero()[:, 0]
    if len(rows):
        for k in (min(256, logits.shape[1]), logits.shape[1]):  # the nucleus is nearly always small
            top = logp[rows].topk(k).values  # (m, k) descending
            inside = (
                (top.exp().cumsum(1) - top.exp() < top_p[rows, None]).sum(1).clamp(min=1)
            )  # (m,) size of the nucleus
            if (inside < k).all():
                break
        least = top.gather(1, inside[:, None] - 1)[:, 0]
        beyond = top.gather(1, inside[:, None].clamp(max=k - 1))[
            :, 0
        ]  # the likeliest token outside
        cut[rows] = torch.where(
            inside < k, (least + beyond) / 2, -math.inf
        )  # half-way: rounding cannot move a token over it
        weights[rows] = torch.where(logp[rows] >= cut[rows, None], weights[rows], 0.0)
        mass[rows] = weights[rows].sum(1).log()
    cdf = weights.cumsum(1)
    total = cdf[:, -1]
    point = torch.minimum(
        uniform * total, torch.nextafter(total, torch.zeros_like(total))
    )  # below the total: never a token of weight 0
    ids = torch.searchsorted(cdf, point[:, None], right=True)[:, 0]
    if greedy.any():
        ids = torch.where(greedy, logits.argmax(1), ids)
    return ids, logp.gather(1, ids[:, None])[:, 0], cut, mass


class Job:
    """A `Say` on its way: which row of which cache, which ids are still unread, what was said so far."""

    def __init__(self, dialogue, script, say, cache, row):
        self.dialogue, self.script, self.say, self.cache, self.row = (
            dialogue,
            script,
            say,
            cache,
            row,
        )
        self.turn, self.spoken = Turn(say.speaker, "", True), False

    @property
    def unread(self):
        """Ids that the row's cache does not hold yet."""
        return (self.say.ids + self.turn.ids)[self.cache.lengths[self.row] :]

    @property
    def void(self):
        """The agents had agreed before this turn."""
        check = self.say.unless
        return check is not None and check.done() and check.result().value is True

    @property
    def held(self):
        """The turn is spoken, but whether it counts is not known yet."""
        return self.spoken and self.say.unless is not None and not self.say.unless.done()


@torch.no_grad()
def play(
    voices, dialogues, settings, judge=None, seed=0, partner=None, on_token=None, on_done=None
):
    """Play `dialogues` (with scenario, step, group and member set) to their ends, all in one batch; returns them.

    voices: the Voice of agent 0 and of agent 1, usually one and the same. A dialogue is sent to the judge when it is
    finished, while the others still talk; its `verdict` is a Future. on_token(job, id) and on_done(dialogue) may watch.
    """
    caches = {id(v.model): RaggedCache(2 * len(dialogues)) for v in voices}
    models = {id(caches[id(v.model)]): v for v in voices}
    read = {
        id(c): [[] for _ in c.lengths] for c in caches.values()
    }  # ids that each row's cache holds
    first_row = {
        id(d): i for i, d in enumerate(dialogues)
    }  # of agent 0; those of agent 1 follow, because one side mostly speaks at a time
    heads, jobs, waiting = {}, [], []

    def advance(dialogue, script, answer):
        """Send an answer into the dialogue and file its next wish."""
        try:
            wish = script.send(answer)
        except StopIteration:
            if on_done:
                on_done(dialogue)
            return
        if isinstance(wish, concurrent.futures.Future):
            waiting.append((wish, dialogue, script))
            return
        cache = caches[id(voices[wish.speaker].model)]
        job = Job(
            dialogue, script, wish, cache, first_row[id(dialogue)] + wish.speaker * len(dialogues)
        )
        held = read[id(cache)][job.row]
        common = next(
            (i for i, (a, b) in enumerate(zip(held, wish.ids)) if a != b),
            min(len(held), len(wish.ids)),
        )
        cache.lengths[job.row] = min(
            common, len(wish.ids) - 1
        )  # crop: what differs is read again, the last id always
        del held[cache.lengths[job.row] :]
        jobs.append(job)

    for dialogue in dialogues:
        views = [
            View(
                v.chat,
                me,
                dialogue.scenario,
                settings.agreement == "marker",
                settings.max_turns == 0,
            )
            for me, v in enumerate(voices)
        ]
        limits = [context_limit(v.model) for v in voices]
        advance(dialogue, negotiate(dialogue, views, settings, judge, seed, limits, partner), None)
    with packed(*{v.model for v in voices}):
        while jobs or waiting:
            for job in [j for j in jobs if j.void or (j.spoken and not j.held)]:
                jobs.remove(job)
                advance(job.dialogue, job.script, None if job.void else job.turn)
            for item in [w for w in waiting if w[0].done()]:
                waiting.remove(item)
                advance(item[1], item[2], item[0].result())
            batch = choose_batch(jobs)
            pending = [j.say.unless for j in jobs if j.held] + [w[0] for w in waiting]
            if batch:
                speak(batch, models[id(batch[0].cache)], heads, read[id(batch[0].cache)], on_token)
            elif pending:
                concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
    return dialogues


def choose_batch(jobs):
    """The jobs of the next forward pass: those who decode, or, once they are a quarter of the talkers, those who must read."""
    live = [j for j in jobs if not j.spoken]
    live = [j for j in live if j.cache is live[0].cache]
    reading = [j for j in live if len(j.unread) > 1]
    talking = [j for j in live if len(j.unread) == 1]
    return reading if reading and 4 * len(reading) >= len(talking) else talking


def speak(batch, speaker, heads, read, on_token=None):
    """One forward pass for `batch`: read what is unread, draw one token for each, and mark the turns that ended."""
    cache, chat = batch[0].cache, speaker.chat
    fresh = {}
    for job in batch:  # a group's shared head is read once and copied
        if cache.lengths[job.row] == 0:
            fresh.setdefault((id(cache), tuple(job.say.ids[: job.say.shared])), []).append(job.row)
    new = [key for key in fresh if key not in heads]
    if new:
        heads.update({key: fresh[key][0] for key in new})
        cache.feed(speaker.model, [heads[key] for key in new], [list(key[1]) for key in new])
    for key, rows in fresh.items():
        targets = [r for r in rows if r != heads[key]]
        if targets:
            cache.copy(heads[key], targets, len(key[1]))
    if all(len(job.unread) == 1 for job in batch):
        order = {row: i for i, row in enumerate(cache.together([job.row for job in batch]))}
        batch = sorted(batch, key=lambda job: order[job.row])
    logits = cache.feed(speaker.model, [job.row for job in batch], [job.unread for job in batch])
    as_tensor = lambda values: torch.tensor(values, dtype=torch.float32, device=logits.device)
    drawn = sample(
        logits,
        as_tensor([j.say.temperature for j in batch]),
        as_tensor([j.say.top_p for j in batch]),
        as_tensor([j.say.rng.random() for j in batch]),
    )
    for job, token, logp, cut, mass in zip(batch, *(x.tolist() for x in drawn)):
        turn = job.turn
        read[job.row] = (
            job.say.ids + turn.ids
        )  # what the cache holds now; the new token is not read yet
        turn.ids.append(token)
        turn.logprobs.append(logp)
        if job.say.top_p < 1:
            turn.cuts.append(cut)
            turn.masses.append(mass)
        turn.truncated = token not in chat.ends
        if on_token:
            on_token(job, token)
        if not turn.truncated or len(turn.ids) == job.say.limit:
            turn.text, job.spoken = chat.text(turn.ids), True


# ---- what a person sees ---------------------------------------------------------------------------------------------


def printable(text):
    """Text from a model on one line, without the control characters that could take over a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def transcript(dialogue, indent="", width=120, longest=1000):
    """One dialogue as lines of text, wrapped at `width`: who said what, how it ended, the joint solution and its score.

    A text of more than `longest` characters ends, after a whole word, in "...".
    """
    names = [p["name"] for p in dialogue.scenario.personas]
    lines = [f"dilemma: {dialogue.scenario.dilemma}"] + [
        f"{names[t.speaker]}: {t.text}{' [cut off]' if t.truncated else ''}" for t in dialogue.turns
    ]
    score = "no score" if dialogue.reward is None else f"{dialogue.reward:.2f}"
    lines.append(
        f"joint solution ({dialogue.stop}, {score}): {dialogue.final if dialogue.final is not None else '(none)'}"
    )
    whole = [textwrap.shorten(printable(line), longest, placeholder=" ...") for line in lines]
    return "\n".join(
        textwrap.fill(
            line,
            width,
            initial_indent=indent,
            subsequent_indent=indent + "  ",
            break_on_hyphens=False,
        )
        for line in whole
    )


@dataclasses.dataclass(frozen=True)
class WatchSettings(PlaySettings, reward.JudgeSettings):
    """Watch one negotiation in the terminal, token by token."""

    model: str = option(
        WARM_MODEL, f"{WARM_MODEL}, smollm2-135m, a folder (a checkpoint), or a Hugging Face id"
    )
    dilemma: str = option("", "the dilemma (empty: one of the shipped ones, drawn by --seed)")
    persona_a: str = option("", "who opens, as 'Name: creed' (empty: the scenario's)")
    persona_b: str = option("", "who answers, as 'Name: creed' (empty: the scenario's)")
    human: str = option(
        "", "take the side of a or b yourself; the model then opens", choices=("", "a", "b")
    )
    seed: int = option(0, "of the scenario and of the sampling", low=0)


def watched_scenario(settings):
    """The scenario that the flags describe. Raises UserError for a persona without a name."""
    scenarios = data_gen.load_scenarios(seed=settings.seed)
    scenario = scenarios[settings.seed % len(scenarios)]
    personas = list(scenario.personas)
    for i, (flag, text) in enumerate(
        (("--persona-a", settings.persona_a), ("--persona-b", settings.persona_b))
    ):
        if text:
            name, colon, creed = text.partition(":")
            if not (name.strip() and creed.strip()):
                raise UserError(f"{flag} {text!r}: write it as 'Name: creed'")
            personas[i] = {"name": name.strip(), "creed": creed.strip()}
    return dataclasses.replace(
        scenario,
        dilemma=settings.dilemma or scenario.dilemma,
        personas=tuple(personas[::-1] if settings.human == "a" else personas),
    )


def main(argv=None):
    """`python selfplay.py`: one negotiation, live and in colour, with the judge's score at the end."""
    settings = command_line(WatchSettings, argv, prog="selfplay.py")
    scenario = watched_scenario(settings)
    speaker = voice(*load(settings.model, device=own_device()))
    names, shown = [printable(p["name"]) for p in scenario.personas], {}

    def on_token(job, token):
        said = printable(
            job.turn.text if job.spoken else speaker.chat.text(job.turn.ids)
        ).removesuffix("\ufffd")  # half a character waits
        if (
            id(job) not in shown
        ):  # {id: [job, characters]}: a job that is kept keeps its id to itself
            title = "joint solution" if job.say.final else names[job.say.speaker]
            print(f"\n\033[1;{36 - 3 * job.say.speaker}m{title}:\033[0m ", end="")
            shown[id(job)] = [job, 0]
        print(said[shown[id(job)][1] :], end="", flush=True)
        shown[id(job)][1] = max(shown[id(job)][1], len(said))

    def ask_human(dialogue):
        print(f"\n\033[1;33m{names[1]} (you):\033[0m ", end="", flush=True)
        return (sys.stdin.readline() or "AGREED").strip()

    with reward.open_judge(settings) as judge:
        print(
            "\n".join(
                [f"dilemma: {printable(scenario.dilemma)}"]
                + [f"{n}: {printable(p['creed'])}" for n, p in zip(names, scenario.personas)]
            )
        )
        dialogue = Dialogue(scenario, 0, 0, 0)
        play(
            (speaker, speaker),
            [dialogue],
            settings,
            judge,
            settings.seed,
            partner=ask_human if settings.human else None,
            on_token=on_token,
        )
        verdict = dialogue.verdict.result() if dialogue.verdict else None
    score = (
        f"{verdict.value:.2f} of 5"
        if verdict and verdict.value is not None
        else f"none ({verdict.reason if verdict else 'no final completion'})"
    )
    print(f"\n\nstopped: {dialogue.stop}; the judge's score: {score}")


if __name__ == "__main__":
    run_cli(main)
