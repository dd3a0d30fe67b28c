"""The report: one page, and every text on it is hostile."""

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import tokenizer
from test_measure import record

import eval as evaluation
import report
from cli import UserError
from measure import ResultRow

EVIL = (
    '</script><script>document.title = "owned"</script><!-- <script> <img src=x '
    'onerror="document.title=1">\u2028 {{ run }}{% for %} <b>&amp;"\''
)

# ---- the page ------------------------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


STEP = {
    "reward_mean": 2.0,
    "reward_std": 0.5,
    "judge_failures": 1,
    "missing_rewards": 1,
    "agreed_rate": 0.5,
    "truncated_rate": 0.1,
    "seconds_play": 3.0,
    "seconds_judge": 1.0,
    "seconds_learn": 2.0,
    "seconds_step": 6.0,
}
HELD = {"heldout": {"reward": 2.1, "reward_low": 1.9, "reward_high": 2.2}}


def evil_dialogue(step, member, score):
    """A line of dialogues.jsonl whose every text is hostile."""
    ids = tokenizer()("system: we share", add_special_tokens=False)["input_ids"]
    mask = [0] * (len(ids) - 3) + [1] * 3
    sample = {"ids": ids, "mask": mask, "logprobs": [-0.5] * len(ids)}
    return {
        **record("evil", member, [EVIL, EVIL], True, EVIL, score),
        "step": step,
        "group": 0,
        "stop": "agreed",
        "dilemma": EVIL,
        "personas": [{"name": EVIL, "creed": EVIL}, {"name": "Chen", "creed": "You."}],
        "advantage": None if score is None else 0.7,
        "judge": {"raw": EVIL, "failures": []},
        "final_ids": [],
        "final_sample": None,
        "streams": [{"speaker": me, "samples": [sample]} for me in (0, 1)],
    }


@pytest.fixture
def run(tmp_path):
    """A run folder of two steps, whose every text is evil."""
    folder = tmp_path / "run<b>"
    (folder / "eval").mkdir(parents=True)
    config = {"model": EVIL, "recipe": "debug", "seed": 0, "group_size": 2}
    (folder / "config.json").write_text(json.dumps({**config, "train_tokens": "dialogue"}))
    unknown = {"reward_mean": None, "reward_std": None}
    metrics = [
        {"step": 0, **HELD},
        {"step": 1, **STEP},
        {"step": 2, **STEP, **unknown},
        {"step": 2, **HELD},
    ]
    write_lines(folder / "metrics.jsonl", metrics)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rewa')  # left by a kill
    pairs = itertools.product((1, 2), enumerate((3.5, None)))
    dialogues = [evil_dialogue(step, member, score) for step, (member, score) in pairs]
    write_lines(folder / "dialogues.jsonl", dialogues)
    row = dataclasses.asdict(ResultRow(EVIL, "A - B", missing=2, wins=3))
    rows = [row, {**row, "low": 1.0, "high": 2.0}]
    found = {"settings": {"A": {"model": EVIL}}, "judge": EVIL, "rows": rows}
    (folder / "eval" / "conflict.json").write_text(json.dumps(found))
    checkpoint = folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    tokenizer().save_pretrained(checkpoint)
    return folder


def make(folder, *flags):
    """The page as text."""
    assert evaluation.main(["report", str(folder), *flags]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def data_of(page):
    """The transcripts in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_no_text_becomes_part_of_the_page(run):
    page = make(run)
    # Ours: the data, and the reader.
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert "<img src=x" not in page
    assert "run<b>" not in page
    assert "run&lt;b&gt;" in page
    (case,) = data_of(page)  # and yet nothing is lost
    assert case["dialogues"][0]["final"] == case["dilemma"] == EVIL
    assert "default-src 'none'" in page
    assert page.count("data:image/svg+xml") == 6
    # What the page loads comes from within.
    shell = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    places = re.findall(r"""\b(?:src|href|url)\b\s*[=(]\s*["']?(.{5})""", shell)
    assert set(places) == {"data:", "x one"}


def test_a_run_without_held_out_evaluations_shows_none(run):
    assert "held-out reward, first and last" in make(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(s for s in lines if "heldout" not in s) + "\n")
    page = make(run)
    assert "held-out reward" not in page


def test_the_pages_policy_knows_its_script(run):
    """The digest is of the script as it stands in the page."""
    page = make(run)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_results_and_facts_are_shown(run):
    page = make(run)
    for text in ("n 0 in 0, 3 wins, 2 missing", "1.000 to 2.000", "2.00 → 2.00", "2.10 → 2.10"):
        assert f">{text}<" in page
    assert "<b>0.2</b><span>minutes</span>" in page
    assert "a judge (the embedded small one)" in page


def test_the_reader_shows_what_was_trained(run):
    dialogues = data_of(make(run))[0]["dialogues"]
    ends = ("step 1, training, best", "step 1, training, worst")
    ends += ("step 2, training, worst", "step 2, training, best")
    assert [d["label"] for d in dialogues] == [f"{end} of 2" for end in ends]
    assert [d["reward"] for d in dialogues] == [3.5, None, None, 3.5]
    assert dialogues[0]["raw"] == EVIL
    read, *sampled = dialogues[0]["streams"][1]["spans"]
    assert read[1] is None
    assert [logprob for _, logprob in sampled] == [-0.5] * 3
    assert read[0] + "".join(text for text, _ in sampled) == "system: we share"


def test_only_the_first_and_last_step_are_kept(run):
    played = [evil_dialogue(step, 0, 3.5) for step in range(1, 6)]
    write_lines(run / "dialogues.jsonl", played)
    write_lines(run / "heldout.jsonl", [evil_dialogue(step, 0, 3.5) for step in (0, 3, 5)])
    kept = sorted(report.read_run(run).kept["evil"])
    assert kept == [(0, "held out"), (1, "training"), (5, "held out"), (5, "training")]


def test_a_run_without_a_checkpoint_has_no_tokens(run, capsys):
    shutil.rmtree(run / "checkpoints" / "step_000002")
    page = make(run, "--scenarios", "1")
    assert "no tokens in the transcripts" in capsys.readouterr().err
    assert data_of(page)[0]["dialogues"][0]["streams"] == []


def test_a_run_that_has_just_begun(run):
    for name in ("dialogues.jsonl", "config.json"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text("")
    shutil.rmtree(run / "eval")
    assert "None yet" in make(run)


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("metrics.jsonl", '{"step": 1}', 'metrics.jsonl: .*no "missing_rewards"; needed are'),
        ("metrics.jsonl", '{"step": 1, "heldout": 5}', "metrics.jsonl: a line cannot be read"),
        ("dialogues.jsonl", '{"step": 1}', "dialogues.jsonl: .*KeyError: 'scenario_id'"),
        ("dialogues.jsonl", '{"step": "x", "scenario_id": "s"}', "dialogues.jsonl: .*ValueError"),
        ("config.json", "[1]", "config.json is not that of a run"),
        ("eval/a.json", "{", "a.json: cannot be read"),
        ("eval/a.json", b"\xff", "a.json: cannot be read"),
        ("eval/a.json", "[" * 100_000, "a.json: cannot be read"),
        ("eval/a.json", '{"x": 1}', "a.json: .*KeyError: 'settings'"),
    ],
)
def test_a_broken_file_of_a_run_is_named(run, file, content, says):
    (run / file).write_bytes(content if type(content) is bytes else content.encode())
    with pytest.raises(UserError, match=says):
        evaluation.main(["report", str(run)])


def at(place, value):
    """A dialogue's line with this value at `place`, the keys that lead to it, or without it."""
    line = evil_dialogue(1, 0, 3.5)
    *way, last = place
    there = line
    for key in way:
        there = there[key]
    there[last] = value
    if value is None:
        del there[last]
    return line


SAMPLE = ("streams", 0, "samples", 0)


@pytest.mark.parametrize(
    "place, value, says",
    [
        (("reward",), None, "KeyError: 'reward'"),
        (("dilemma",), None, "KeyError: 'dilemma'"),
        (("judge", "raw"), None, "KeyError: 'raw'"),
        (("judge", "failures"), [5], "TypeError: "),
        (("turns", 0), 5, "TypeError: "),
        (("turns", 0, "text"), None, "KeyError: 'text'"),
        (("streams", 0), "x", "TypeError: "),
        (("streams", 0, "speaker"), 2, "IndexError: "),
        (SAMPLE, [], "TypeError: "),
        ((*SAMPLE, "mask"), None, "KeyError: 'mask'"),
        ((*SAMPLE, "mask"), [1], "ValueError: zip"),
        ((*SAMPLE, "ids", -1), -1, "OverflowError: "),
        ((*SAMPLE, "ids", -1), "x", "TypeError: "),
        ((*SAMPLE, "logprobs", -1), "x", "TypeError: "),
    ],
)
def test_damage_inside_a_dialogue_is_named(run, place, value, says):
    write_lines(run / "dialogues.jsonl", [at(place, value)])
    told = f"a line of scenario evil in dialogues.jsonl or .* cannot be read .{says}.*; take it out"
    with pytest.raises(UserError, match=told):
        make(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"reward_mean": "x"},
        {"reward_std": "x"},
        {"final_words": {}},
        {"heldout": {"reward": "x"}},
        {"heldout": {}, "step": "x"},
    ],
)
def test_damage_inside_a_steps_metrics_is_named(run, change):
    write_lines(run / "metrics.jsonl", [{"step": 1, **STEP, **change}])
    with pytest.raises(UserError, match="metrics.jsonl: a line cannot be read .*; take it out"):
        make(run)


def test_a_run_without_its_config_and_its_rewards_is_shown(run):
    (run / "config.json").unlink()  # nobody knows how many dialogues were played
    row = {key: value for key, value in STEP.items() if not key.startswith("reward")}
    write_lines(run / "metrics.jsonl", [{"step": 1, **STEP}, {"step": 2, **row}])
    assert "2.00 → 2.00" in make(run)


@pytest.mark.parametrize("row", [5, {}, {"figure": "ca", "of": "A", "value": "x"}])
def test_damage_inside_a_row_of_results_is_named(run, row):
    found = {"settings": {}, "judge": "x", "rows": [row]}
    (run / "eval" / "conflict.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="conflict.json: cannot be read .*; move it away"):
        make(run)


def test_a_run_that_nobody_may_look_into():
    with pytest.raises(UserError, match="there is no metrics.jsonl in it"):
        evaluation.main(["report", "x" * 300])


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "eval/conflict.json"])
def test_the_page_replaces_no_file_of_the_run(run, name):
    before = (run / name).read_bytes()
    with pytest.raises(UserError, match="is there already, to be kept"):
        evaluation.main(["report", str(run), "--out", str(run / name)])
    assert (run / name).read_bytes() == before
    make(run)
    make(run)  # a page is


def test_a_picture_needs_no_window(monkeypatch):
    """MPLBACKEND names what a person's own plots need; matplotlib reads it as it is imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MPLBACKEND", "foo")
    assert report.chart("t", [report.Line("l", [{"step": 1, "k": 2}], "k")])["source"]


# ---- in a browser ------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; Debian's package is called chromium"
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1200,3000",
    "--virtual-time-budget=3000",
]


def open_page(page, folder):
    """(the page's elements once its script has run, lines that it wrote to the console)."""
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
@pytest.mark.slow
def test_the_page_works_and_no_text_runs(run, tmp_path):
    make(run)
    dom, console = open_page(run / "report.html", tmp_path)
    assert console == [] and "owned" not in re.search(r"<title>(.*?)</title>", dom).group(1)
    assert (
        dom.count('class="pane"') == 2
        and dom.count('class="final"') == 2
        and dom.count("<i title=") == 2 * 2 * 2 * 3  # in what was said, and in what was read
    )
    assert (
        dom.count("reward 3.50") == 2
        and "step 1, training, best of 2" in dom
        and "step 2, training, best of 2" in dom
        and "advantage +0.70 in its group" in dom
    )
    assert dom.count(
        "background: rgba(60, 120, 220, 0.23"
    ) == 24 and "<img src=x" not in dom.replace("&lt;", "")
    lines = (run / "dialogues.jsonl").read_text().splitlines(keepends=True)
    (run / "dialogues.jsonl").write_text("".join(lines[:2]))  # one step: its worst beside its best
    make(run)
    dom, console = open_page(run / "report.html", tmp_path)
    assert (
        console == []
        and dom.count("reward 3.50") == 1 == dom.count("reward missing")
        and dom.count("background: rgba(60, 120, 220, 0.23") == 12
    )


@browser
@pytest.mark.slow
def test_the_console_is_really_read(tmp_path):
    """The test above can fail: an error in a page's script is seen."""
    (tmp_path / "bad.html").write_text("<script>nothing.here()</script>")
    assert len(open_page(tmp_path / "bad.html", tmp_path)[1]) == 1
