"""The measures, against cases worked by hand."""

import dataclasses
import json

import numpy as np
import pytest

import measure
from measure import figure

# ---- numbers of texts ----------------------------------------------------------------------------


def test_words_and_ngrams():
    said = measure.words("Don't stop: 3 well-known Öfen_!")
    assert said == ["don't", "stop", "3", "well", "known", "öfen"]
    assert measure.ngrams(["a b c a", "x y"], 3) == [("a", "b", "c"), ("b", "c", "a")]


def test_overlap_is_over_the_one_with_fewer_trigrams():
    # {abc, bcd} and {abc, bcx, cxy, xyz}: one of two is shared
    assert measure.overlap(["a b c d"], ["A, b c x y z"]) == 0.5
    # The texts of one speaker are not joined.
    assert measure.overlap(["a b c"], ["a b", "c d e"]) == 0.0
    assert measure.overlap(["a b"], ["a b c"]) is None
    assert measure.overlap([], ["a b c"]) is None


def test_distinct_and_repetition():
    assert measure.distinct(["a b a b", "a b"]) == 2 / 4  # ab ba ab, ab
    assert measure.distinct(["a"]) is None
    # abcd bcda cdab dabc abcd, one of five again; what another text says does not count.
    assert measure.repetition(["a b c d a b c d", "a b c d"]) == 1 / 6
    assert measure.repetition(["a b c"]) is None


def test_grounding_compares_the_first_letters_of_content_words():
    final = "We will give the hospitals water, and a pump."  # content: give, hospitals, water, pump
    assert measure.grounding(final, ["The hospital has no", "waters."]) == 2 / 4
    assert measure.grounding("We will.", ["The hospital."]) is None


def record(scenario="s", member=0, turns=(), agreed=False, final="", reward=3.0, **more):
    """A line of dialogues.jsonl with turns given as texts."""
    spoken = [{"speaker": i % 2, "text": text, "truncated": False} for i, text in enumerate(turns)]
    return {
        "scenario_id": scenario,
        "member": member,
        "dilemma": "Who gets the water?",
        "personas": [{"name": "Rosa", "creed": "You farm."}] * 2,
        "turns": spoken,
        "agreed": agreed,
        "final": final,
        "final_truncated": False,
        "reward": reward,
        **more,
    }


def test_measures_of_one_dialogue():
    said = ["one two three", "one two three", "four"]
    ours = measure.text_measures(record(turns=said, agreed=True, final="Rosa brings water"))
    assert ours == {
        "agreed_at_once": 0.0,
        "final_words": 3,
        "overlap": 1.0,
        "distinct_2": 4 / 6,
        "repetition": None,
        "grounding": 2 / 3,
    }
    assert set(measure.text_measures(record(final=None)).values()) == {None}


def test_diversity_and_collapse():
    talk = ["we could share the river", "no the farm needs more of it"]
    finals = [f"{name} brings water on Friday" for name in ("Rosa", "Chen")]
    first = measure.diversity([record(turns=talk, final=final) for final in finals])
    assert first["distinct_openings"] == 1.0
    assert first["grounding"] == (2 / 4 + 1 / 4) / 2

    same = ["yes let us work together"] * 2
    final = "Together we grow and we grow and we grow and we grow"
    now = measure.diversity([record(turns=same, agreed=True, final=final)] * 2)
    assert now["distinct_openings"] == 0.5
    assert now["overlap"] == now["agreed_at_once"] == 1.0
    assert now["grounding"] == 0.0

    assert measure.collapse(first, first) == ""
    warning = measure.collapse(now, first)
    for sign in ("overlap", "repetition", "agreed_at_once", "grounding"):
        assert f"({sign})" in warning
    assert "final_words" not in warning
    # Nothing measured: nothing claimed.
    assert measure.collapse(measure.diversity([record(final=None)]), first) == ""


# ---- how sure a number is ------------------------------------------------------------------------


def test_figure_of_a_known_case():
    row = figure("x", "A", [("s1", 0.0), ("s2", 1.0), ("s2", None)])
    assert row == measure.ResultRow("x", "A", 0.5, 0.0, 1.0, n=2, scenarios=2, missing=1)
    many = figure("x", "A", [(i, float(i % 2)) for i in range(400)])
    expected = (0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025)
    assert many.value == 0.5
    assert (many.low, many.high) == pytest.approx(expected, abs=0.008)
    assert many == figure("x", "A", [(i, float(i % 2)) for i in range(400)])  # seeded


def test_the_bootstrap_draws_scenarios():
    """Ten copies of each number on one scenario say no more than one."""
    one = figure("x", "A", [(i, float(i)) for i in range(20)])
    ten = figure("x", "A", [(i, float(i)) for i in range(20)] * 10)
    assert (one.low, one.high) == (ten.low, ten.high)
    assert (one.low, one.high) == (6.95, 11.9)
    assert (ten.n, ten.scenarios) == (200, 20)


def test_figure_without_enough_to_say():
    assert figure("x", "A", []).value is None
    assert figure("x", "A", [("s", None)]).missing == 1
    one = figure("x", "A", [("s", 1.0), ("s", 2.0)])
    assert (one.value, one.low, one.high) == (1.5, None, None)

    def never(column):
        return np.mean(column) / 0

    infinite = figure("x", "A", [(i, 1.0) for i in range(5)], never)
    assert (infinite.value, infinite.low, infinite.high) == (None, None, None)
    json.dumps(dataclasses.asdict(infinite), allow_nan=False)
