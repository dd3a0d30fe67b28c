"""Self-play: two instances of one model, with opposing personas, negotiate a dilemma in turns.

    scenario -> agent 0's stream: system(persona 0) | dilemma | turn 0 | heard: turn 1 | turn 2 ...
                agent 1's stream: system(persona 1) | dilemma, heard: turn 0 | turn 1 | ...
             -> when they agree, or at the limit, agent 0 writes the joint solution (the final)

    play -> Match.advance -> negotiate -> talk -> Match.next_say -> View.sample_to_speak -> a Say
         -> speak, a token each time -> a Turn, sent back into talk -> ... -> Judge.score

`negotiate` is one dialogue, top to bottom: a generator that yields what it waits for, a Say (until
it is spoken) or a Future (until the judge answers). `play` serves many in one batch. A Dialogue is
the record, a Match what it takes to play it, a Table the cache that the matches share.
Left out: tools, streams that branch, more than two agents: two is assumed here (`number % 2`,
`1 - me`, pairs), in chat.View (which does not say who spoke), in dataset.py, in the pairs of voices
(train, eval, run, plan), in measure.overlap and in what the judge is told (rubric.py, the `agreed`
head); packing, learner and transcripts take any number.

    python selfplay.py --dilemma "..." --human b      # watch one negotiation, or take a side
"""

import concurrent.futures
import dataclasses
import datetime
import math
import re
import sys
import zlib

import numpy as np
import torch

import dataset
import reward
from attention import context_limit
from chat import Sample, Turn, View, Voice, samples_of
from cli import command_line, option, run_cli
from model import WARM_MODEL, load, own_device
from progress import printable
from rubric import fill
from sampler import Say, Table, choose_batch, reordered_weights, speak


@dataclasses.dataclass(frozen=True)
class PlaySettings:
    """How a dialogue is played."""

    max_turns: int = option(3, "turns at most; 0: agent 0 answers alone, no negotiation", low=0)
    turn_tokens: int = option(56, "tokens a turn may have", low=2)
    final_tokens: int = option(112, "tokens the joint solution may have", low=2)
    context_turns: int = option(0, "last turns that an agent sees (0: all; the paper: 2)", low=0)
    agreement: str = option(
        "judge",
        "who finds agreement: the judge after each turn, a marker in both last turns, or nobody",
        choices=("judge", "marker", "none"),
    )
    on_impasse: str = option(
        "complete",
        "without agreement: write the joint solution all the same, or none and reward zero",
        choices=("complete", "zero"),
    )
    temperature: float = option(0.9, "of the dialogue", above=0)
    top_p: float = option(0.8, "nucleus of the dialogue, the learner's too", above=0, high=1)
    final_temperature: float = option(0.8, "of the joint solution (0: greedy)", low=0)
    final_top_p: float = option(0.8, "nucleus of the joint solution", above=0, high=1)
    date: str = option(str(datetime.date.today()), "the day, for chat templates that print one")


# ---- what the agents are told: data, easy to edit -----------------------------------------------

SYSTEM = (
    "You are {me}. {creed} You talk with {other}, and look for a plan that both of you can carry "
    "out.{marker}"
)
MARKER_RULE = " When you accept the plan on the table, end your turn with the word AGREED."
ACCEPTS = re.compile(r"\bAGREED?\b")  # in both last turns
# The dilemma opens the first user message, and a question ends each one: a small model hardly
# reads its system prompt, and what it says drifts.
TASK = (
    "{dilemma}\n\nTalk it over with {other}. Say in one or two sentences what you propose and "
    "why.\n\n"
)
ASK = "What do you propose?"
EARLIER = "(The two of you have been talking for a while.)"
SILENCE = "(says nothing)"
FINAL = (
    'Thank you. {other}\'s creed is: "{creed}" Now sum up the plan that you and {other} will carry '
    "out: who does what and when, what happens if it fails, and how it helps both of you. Two or "
    "three sentences."
)
# without a negotiation
SYSTEM_ALONE = "You are {me}. {creed} You look for a plan that both you and {other} can carry out."
TASK_ALONE = "{dilemma}\n\n"
ALONE = (
    '{other} is not here to talk with. {other}\'s creed is: "{creed}" Write the plan that you and '
    "{other} will carry out: who does what and when, what happens if it fails, and how it helps "
    "both of you. Two or three sentences."
)


def view_of(chat, me, scenario, marker, alone=False):
    """The View of agent `me`. marker: it is told to say AGREED. alone: there is no negotiation."""
    mine, other = scenario.personas[me], scenario.personas[1 - me]
    words = {
        "me": mine["name"],
        "creed": mine["creed"],
        "other": other["name"],
        "dilemma": scenario.dilemma,
        "marker": MARKER_RULE if marker else "",
    }
    system, task = (SYSTEM_ALONE, TASK_ALONE) if alone else (SYSTEM, TASK)
    return View(chat, me, fill(system, words), fill(task, words), ASK, EARLIER, SILENCE)


@dataclasses.dataclass
class Dialogue:
    """One negotiation: number `member` of the step's group number `group_index`.

    stop: "agreed", "max_turns" or "context"; "written" where nobody played it. streams: the
    Samples of each agent. pending_verdict: the Future of a rubric.Verdict on the final. reward:
    None where it is missing. judgement: what came of the judge, a Verdict's record.
    """

    scenario: dataset.Scenario
    step: int
    group_index: int
    member: int
    turns: list = dataclasses.field(default_factory=list)
    streams: list = dataclasses.field(default_factory=lambda: [[], []])
    agreed: bool = False
    stop: str = ""
    final: str = None
    final_sample: Sample = None
    final_truncated: bool = False
    pending_verdict: object = None
    reward: float = None
    advantage: float = None
    judgement: dict = dataclasses.field(default_factory=lambda: {"raw": "", "failures": []})

    def take_verdict(self):
        """Wait for the Verdict on the final, if one is pending: its value is the reward."""
        if self.pending_verdict is not None:
            verdict = self.pending_verdict.result()
            self.reward, self.judgement = verdict.value, verdict.record()

    def record(self):
        """The line of dialogues.jsonl."""
        turns = [
            {"speaker": turn.speaker, "text": turn.text, "truncated": turn.truncated}
            for turn in self.turns
        ]
        streams = [[sample.record() for sample in samples] for samples in self.streams]
        return {
            "step": self.step,
            "scenario_id": self.scenario.id,
            "group": self.group_index,
            "member": self.member,
            "dilemma": self.scenario.dilemma,
            "personas": list(self.scenario.personas),
            "turns": turns,
            "agreed": self.agreed,
            "stop": self.stop,
            "final": self.final,
            "final_truncated": self.final_truncated,
            "reward": self.reward,
            "advantage": self.advantage,
            "judge": self.judgement,
            "streams": [{"speaker": i, "samples": samples} for i, samples in enumerate(streams)],
            "final_ids": self.final_sample.trained_ids() if self.final_sample else [],
            "final_sample": self.final_sample.record() if self.final_sample else None,
        }


# ---- a negotiation that somebody wrote, as if it had been played --------------------------------


def dialogue_of(demonstration, chat, settings):
    """A dataset.Demonstration as the Dialogue of two agents who said just this.

    Nobody sampled its tokens, so each log-prob is NaN: the learner takes plain likelihood.
    """
    scenario = demonstration.scenario
    turns = [written(chat, i % 2, text) for i, text in enumerate(demonstration.turns)]
    views = [view_of(chat, me, scenario, settings.agreement == "marker") for me in (0, 1)]
    final = written(chat, 0, demonstration.final)
    closing = final_request(scenario, FINAL)
    dialogue = Dialogue(scenario, step=0, group_index=0, member=0, turns=turns)
    dialogue.agreed, dialogue.stop = demonstration.agreed, "written"
    dialogue.streams = [samples_of(view, turns, settings.context_turns) for view in views]
    dialogue.final = demonstration.final
    dialogue.final_sample = views[0].sample_with(turns, final, train=False, closing=closing)
    dialogue.advantage = 1.0
    return dialogue


def written(chat, speaker, text):
    """A text as the Turn of a speaker who ended it properly."""
    ids = chat.turn(text)
    return Turn(speaker, text, False, ids, [math.nan] * len(ids))


def final_request(scenario, template):
    """The words that ask agent 0 for the joint solution."""
    other = scenario.personas[1]
    return fill(template, {"other": other["name"], "creed": other["creed"]})


# ---- one dialogue -------------------------------------------------------------------------------


class Match:
    """A dialogue and what it takes to play it. partner(dialogue) -> text may speak for agent 1.

    places: (table, row) of each agent. event: the Say or Future that `negotiate` waits for.
    """

    def __init__(self, dialogue, voices, settings, judge, seed, partner=None, places=None):
        self.dialogue, self.settings, self.judge = dialogue, settings, judge
        self.seed, self.partner, self.places = seed, partner, places
        self.limits = [context_limit(voice.model) for voice in voices]
        scenario, alone = dialogue.scenario, settings.max_turns == 0
        marker = settings.agreement == "marker"
        self.views = [view_of(voices[me].chat, me, scenario, marker, alone) for me in (0, 1)]
        self.request = final_request(scenario, ALONE if alone else FINAL)
        self.script, self.event = negotiate(self), None

    def rng(self, number):
        """Random numbers of one turn. They depend on what is said, never on who else is playing."""
        d = self.dialogue
        scenario = zlib.crc32(d.scenario.id.encode())
        return np.random.default_rng([self.seed, d.step, scenario, d.member, number])

    def next_say(self, number, unless):
        """The Say of a turn, or None where it would leave no room for the joint solution."""
        settings, turns, me = self.settings, self.dialogue.turns, number % 2
        ids = self.views[me].sample_to_speak(turns, window=settings.context_turns).ids
        closed = self.views[0].sample_to_speak(turns, self.request).ids
        room = 3 * settings.turn_tokens + 16  # encoded for the other side it may take three times
        if len(ids) + room > self.limits[me]:
            return None
        if len(closed) + room + settings.final_tokens > self.limits[0]:
            return None
        limit, rng = settings.turn_tokens, self.rng(number)
        return Say(me, ids, limit, settings.temperature, settings.top_p, rng, unless)

    def final_say(self):
        """The Say of the joint solution, or None where the context is full."""
        settings = self.settings
        ids = self.views[0].sample_to_speak(self.dialogue.turns, self.request).ids
        if len(ids) + settings.final_tokens > self.limits[0]:
            return None
        limit, rng = settings.final_tokens, self.rng(1 << 20)  # no turn's number
        how = settings.final_temperature, settings.final_top_p
        return Say(0, ids, limit, *how, rng, final=True)

    def ready(self):
        """Whether the dialogue can go on."""
        return self.event is None or self.event.done()

    def advance(self):
        """Go on until there is something to wait for. Returns False at the end of the dialogue."""
        while self.ready():
            answer = self.event.result() if self.event else None
            try:
                self.event = self.script.send(answer)
            except StopIteration:
                return False
            if isinstance(self.event, Say):
                self.event.begin(*self.places[self.event.speaker])
        return True


def negotiate(match):
    """One dialogue, top to bottom: is sent a Turn for each Say that it yields, a Verdict for each
    Future. Fills in the dialogue's turns, streams, agreed, stop, final and the pending verdict."""
    dialogue, settings, views = match.dialogue, match.settings, match.views
    last_verdict = yield from talk(match)
    turns = dialogue.turns
    dialogue.streams = [samples_of(view, turns, settings.context_turns) for view in views]
    if turns and not dialogue.agreed and settings.on_impasse == "zero":
        if last_verdict and last_verdict.value is None:
            # Nobody knows whether they agreed: a missing reward, not a zero.
            dialogue.judgement["failures"] = [f"agreement: {last_verdict.reason}"]
        else:
            dialogue.reward = 0.0  # the paper: no solution, reward 0, kept in the group
        return
    say = match.final_say()
    if say is None:
        dialogue.stop = "context"
        dialogue.judgement["failures"] = ["context full"]
        return
    final = yield say
    dialogue.final = final.text
    dialogue.final_truncated = final.truncated
    dialogue.final_sample = views[0].sample_with(turns, final, train=False, closing=match.request)
    if match.judge:
        dilemma, personas = dialogue.scenario.dilemma, dialogue.scenario.personas
        dialogue.pending_verdict = match.judge.score(dilemma, personas, turns, final.text)


def talk(match):
    """The turns, until the agents agree, have had their turns, or a context is full.

    Turn n + 1 is spoken while the judge reads turn n. If it finds agreement there, turn n + 1 is
    dropped. Returns the Verdict on the last turn, or None if nobody was asked.
    """
    dialogue, settings, turns = match.dialogue, match.settings, match.dialogue.turns
    dilemma, personas = dialogue.scenario.dilemma, dialogue.scenario.personas
    dialogue.stop = "max_turns"
    check, verdict = None, None  # the Future, until it is read, and the Verdict: do they agree?
    for number in range(settings.max_turns):
        say = match.next_say(number, unless=check)
        if say is None:
            dialogue.stop = "context"
            break
        partner_speaks = match.partner and say.speaker == 1
        if not partner_speaks:
            turn = yield say
        if check:
            verdict, check = (yield check), None
            dialogue.agreed = bool(verdict.value)
            if dialogue.agreed:
                break
        if partner_speaks:
            text = match.partner(dialogue)
            turn = Turn(1, text, False, ids=match.views[0].chat.plain(text))
        turns.append(turn)
        if len(turns) == 1:
            continue
        if settings.agreement == "marker" and all(ACCEPTS.search(turn.text) for turn in turns[-2:]):
            dialogue.agreed = True
            break
        if settings.agreement == "judge":
            check = match.judge.agreed(dilemma, personas, turns[:])
    if check:  # on the last turn
        verdict = yield check
        dialogue.agreed = bool(verdict.value)
    if dialogue.agreed:
        dialogue.stop = "agreed"
    return verdict


# ---- many dialogues in one batch ----------------------------------------------------------------


@torch.no_grad()
def play(
    voices, dialogues, settings, judge=None, seed=0, partner=None, on_token=None, on_done=None
):
    """Play `dialogues` (scenario, step, group_index, member set) to their ends; returns them.

    voices: the Voice of agent 0 and of agent 1, usually one and the same. A finished dialogue is
    sent to the judge while the others still talk. partner: see `Match`. on_token(say) and
    on_done(dialogue) may watch.
    """
    if not dialogues:
        return dialogues
    count = len(dialogues)
    tables = [Table(voice, 2 * count) for voice in voices]
    if voices[0].model is voices[1].model:
        tables[1] = tables[0]
    matches = []
    for row, dialogue in enumerate(dialogues):
        # Agent 1's rows follow those of agent 0, because one side mostly speaks at a time.
        places = (tables[0], row), (tables[1], row + count)
        matches.append(Match(dialogue, voices, settings, judge, seed, partner, places))
    with reordered_weights(*{voice.model for voice in voices}):
        tables[0].read_prompts({row: match.views[0].prompt for row, match in enumerate(matches)})
        if settings.max_turns > 1 and not partner:
            prompts = {row: match.views[1].prompt for row, match in enumerate(matches, count)}
            tables[1].read_prompts(prompts)
        while matches:
            for match in [match for match in matches if match.ready()]:
                matches.remove(match)
                if match.advance():
                    matches.append(match)
                elif on_done:
                    on_done(match.dialogue)
            batch = choose_batch([match.event for match in matches if isinstance(match.event, Say)])
            if batch:
                speak(batch, on_token)
            elif matches:
                answers = [match.event for match in matches]
                concurrent.futures.wait(answers, return_when=concurrent.futures.FIRST_COMPLETED)
    return dialogues


# ---- what a person sees -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WatchSettings(PlaySettings, reward.JudgeSettings):
    """Watch one negotiation in the terminal."""

    model: str = option(WARM_MODEL, "this one, smollm2-135m, a folder, or a Hugging Face id")
    scenarios: str = option("", "JSON Lines file of scenarios (empty: the shipped ones)")
    dilemma: str = option("", "the dilemma (empty: that of a scenario, drawn by --seed)")
    human: str = option("", "your side, a or b; the model then opens", choices=("", "a", "b"))
    seed: int = option(0, "of the scenario and of the sampling", low=0)


def watched_scenario(settings):
    """The scenario that the flags describe; the person, if there is one, is agent 1."""
    scenarios = dataset.load_scenarios(settings.scenarios or None, settings.seed)
    scenario = scenarios[settings.seed % len(scenarios)]
    personas = scenario.personas[::-1] if settings.human == "a" else scenario.personas
    dilemma = settings.dilemma or scenario.dilemma
    return dataclasses.replace(scenario, dilemma=dilemma, personas=personas)


class Screen:
    """Prints a negotiation turn by turn, and asks the person who takes a side."""

    def __init__(self, scenario):
        self.names = [printable(persona["name"]) for persona in scenario.personas]
        print(f"dilemma: {printable(scenario.dilemma)}")
        for name, persona in zip(self.names, scenario.personas):
            print(f"{name}: {printable(persona['creed'])}")

    def on_token(self, say):
        """Print what was said, once it is."""
        if say.spoken:
            title = "joint solution" if say.final else self.names[say.speaker]
            print(f"{title}: {printable(say.turn.text)}", flush=True)

    def ask_human(self, dialogue):
        """A line from the keyboard; at its end the person agrees."""
        print(f"{self.names[1]} (you): ", end="", flush=True)
        return (sys.stdin and sys.stdin.readline() or "AGREED").strip()  # None: it is closed


def main(argv=None):
    """`python selfplay.py`: one negotiation, with the judge's score at the end."""
    settings = command_line(WatchSettings, argv, prog="selfplay.py")
    scenario = watched_scenario(settings)
    speaker = Voice(*load(settings.model, device=own_device()), settings.date)
    voices, dialogue = (speaker, speaker), Dialogue(scenario, step=0, group_index=0, member=0)
    with reward.open_judge(settings) as judge:
        judge.check_agreement(settings)
        screen = Screen(scenario)
        partner = screen.ask_human if settings.human else None
        play(voices, [dialogue], settings, judge, settings.seed, partner, screen.on_token)
        dialogue.take_verdict()
    why = "".join(dialogue.judgement["failures"]) or "no joint solution"
    scored = dialogue.pending_verdict and dialogue.reward is not None
    score = f"{dialogue.reward:.2f} of 5" if scored else f"none ({why})"
    print(f"\nstopped: {dialogue.stop}; the judge's score: {score}")


if __name__ == "__main__":
    run_cli(main)
