"""Exact match and field F1 on JSON answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_utils import scoring
from course_utils.scoring import (
    by_kind,
    by_slice,
    exact_match,
    field_f1,
    matches,
    parse_json_object,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda item: (
        st.lists(item, max_size=3)
        | st.dictionaries(st.text(max_size=4), item, max_size=3)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=4)


@pytest.mark.parametrize(
    ("guess", "truth", "right"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
        ('\n {"a": 40.0}  ', '{"a": 40}', True),
        ('{"a": 1}.', '{"a": 1}', False),
        ('{"a": 1} {"a": 1}', '{"a": 1}', False),
        ('```json\n{"a": 1}\n```', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": 1, "a": 1}', '{"a": 1}', False),
        ('{"a": NaN}', '{"a": 1}', False),
        ("[1]", '{"a": 1}', False),
        ("", '{"a": 1}', False),
        ("[" * 100_000, '{"a": 1}', False),
        ('{"a": ' + "[" * 700 + "]" * 700 + "}", '{"a": 1}', False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": "K\\u00fcche"}', '{"a": "Küche"}', True),
    ],
)
def test_exact_match_is_json_equality(guess, truth, right):
    assert matches([guess], [truth]) == [right]
    assert exact_match([guess, truth], [truth, truth]) == (1.0 if right else 0.5)
    assert (field_f1([guess], [truth]) == 1.0) == right


def test_commands_are_scored_apart_from_nothing_to_do():
    truths = ['{"action": "none"}', '{"action":"stop"}', '{"action": "none", "a": 1}']
    assert by_kind(truths[:1] * 3, truths) == {"nothing to do": 1.0, "commands": 0.0}
    assert by_kind(truths, truths) == {"nothing to do": 1.0, "commands": 1.0}
    assert by_kind(truths[1:], truths[1:]) == by_kind(truths[:1], truths[:1]) == {}


def test_a_standard_error_knows_its_count_and_is_never_nothing():
    error = scoring.standard_error
    assert error(0.5, 96) == pytest.approx(0.0505, abs=1e-4)
    assert 0 < error(0.0, 96) < error(0.0, 24) == pytest.approx(error(1.0, 24))
    assert error(0.3, 400) == pytest.approx(error(0.3, 100) / 2, rel=0.02)


def test_order_of_actions_matters():
    one, two = '{"action": "stop"}', '{"action": "go"}'
    truth = f'{{"actions": [{one}, {two}]}}'
    assert exact_match([f'{{"actions": [{two}, {one}]}}'], [truth]) == 0.0
    assert exact_match([truth], [truth]) == 1.0


def test_field_f1_by_hand():
    # 2 of 3 predicted fields are right, 2 of 4 wanted fields are found
    guess = '{"action": "light", "room": "hall", "level": 3}'
    truth = '{"action": "light", "room": "hall", "level": 4, "on": true}'
    assert field_f1([guess], [truth]) == pytest.approx(2 * 2 / (3 + 4))
    # micro: the unreadable answer adds its 4 missed fields to the denominator
    assert field_f1([guess, "?"], [truth, truth]) == pytest.approx(4 / (3 + 4 + 4))
    assert field_f1(['{"a": true}'], ['{"a": 1}']) == 0.0
    assert field_f1(['{"a": 1.0}'], ['{"a": 1}']) == 1.0
    assert field_f1(['{"a": []}'], ['{"a": {}}']) == 0.0


@given(objects, objects)
def test_the_two_scores_agree_where_they_must(one, two):
    a, b = json.dumps(one), json.dumps(two)
    assert exact_match([a], [a]) == field_f1([a], [a]) == 1.0
    assert field_f1([a], [b]) == field_f1([b], [a])
    assert 0.0 <= field_f1([a], [b]) <= 1.0
    if json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True):
        assert field_f1([a], [b]) == exact_match([a], [b]) == 1.0
    else:  # no number here has two spellings
        assert exact_match([a], [b]) == 0.0


@given(st.text(max_size=40))
def test_any_text_is_scored_without_an_error(text):
    assert exact_match([text], ['{"action": "none", "never": 7}']) == 0.0
    assert parse_json_object(text) is None or isinstance(parse_json_object(text), dict)


def test_by_slice_is_the_score_of_each_slice():
    truths = ['{"a": 1}', '{"a": 2}', '{"a": 3}']
    guesses = ['{"a": 1}', '{"a": 9}', '{"a": 3}']
    assert by_slice(guesses, truths, ["x", "y", "y"]) == {"x": 1.0, "y": 0.5}
    assert by_slice(guesses, truths, ["x", "y", "y"], field_f1) == {"x": 1.0, "y": 0.5}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: exact_match(["{}"], []), "1 predictions for 0 references"),
        (lambda: exact_match([], []), "nothing to score"),
        (lambda: exact_match(["{}"], ["oops"]), "reference 0 is not a JSON object"),
        (lambda: by_slice(["{}"], ["{}"], []), "0 slices"),
    ],
)
def test_errors_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_bare_string_is_refused():
    with pytest.raises(TypeError, match="lists of strings"):
        scoring.exact_match("{}", "{}")


def test_fields_are_scored_by_name_wherever_they_stand():
    references = [
        '{"actions": [{"action": "on", "room": "hall"}, {"action": "off"}]}',
        '{"action": "on", "room": "hall", "level": 40}',
    ]
    predictions = [
        '{"actions": [{"action": "on", "room": "bath"}, {"action": "off"}]}',
        '{"action": "on", "level": 40.0, "scene": "extra"}',
    ]
    shares = scoring.by_field(predictions, references)
    assert shares == {"action": 1.0, "room": 0.0, "level": 1.0}
    assert list(shares) == ["action", "room", "level"]  # the commonest first
    swapped = ['{"actions": [{"action": "off"}, {"action": "on", "room": "hall"}]}']
    assert scoring.by_field(swapped, references[:1]) == {"action": 0.0, "room": 0.0}
    with pytest.raises(ValueError, match="not a JSON object"):
        scoring.by_field(["{}"], ["free"])


def test_free_answers_are_equal_as_texts():
    score = scoring.exact_text([" It  is\n4. ", "it is 4.", ""], ["It is 4."] * 3)
    assert score == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="there are no references"):
        scoring.exact_text([], [])
    with pytest.raises(ValueError):
        scoring.exact_text(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("guess", "truth", "shares"),
    [
        (
            {"Art.-Nr.": 1, "Kd.-Nr.": 2},
            {"Art.-Nr.": 1, "Kd.-Nr.": 3},
            {"Art.-Nr.": 1.0, "Kd.-Nr.": 0.0},
        ),
        ({"a[0]": 1, "a": [2]}, {"a[0]": 1, "a": [3]}, {"a[0]": 1.0, "a": 0.0}),
        ({"x.y": 1}, {"x": {"y": 1}}, {"y": 0.0}),
        ({"x": {"y": 1}}, {"x.y": 1}, {"x.y": 0.0}),
        ({"a.b": {"c.d": 1}}, {"a.b": {"c.d": 1}}, {"c.d": 1.0}),
        ({"": 1, " ": 2, ".": 3}, {"": 1, " ": 2, ".": 4}, {"": 1, " ": 1, ".": 0}),
        ({"": {"": 1}}, {"": {"": 1}}, {"": 1.0}),
        ({"0": "a", "[0]": "b"}, {"0": "a", "[0]": "c"}, {"0": 1.0, "[0]": 0.0}),
        ({"0": {"1": 5}}, {"0": [7, 5]}, {"0": 0.0}),
        (
            {"t": [[1, 2], [{"u v": 3}]]},
            {"t": [[1, 2], [{"u v": 4}]]},
            {"t": 1, "u v": 0},
        ),
        ({"Größe (cm)": [1.0]}, {"Größe (cm)": [1]}, {"Größe (cm)": 1.0}),
        ({"a]": [], "b[": {}}, {"a]": [], "b[": []}, {"a]": 1.0, "b[": 0.0}),
    ],
)
def test_a_field_keeps_its_name_whatever_characters_it_has(guess, truth, shares):
    guesses, truths = [json.dumps(guess)], [json.dumps(truth)]
    assert scoring.by_field(guesses, truths) == shares
    assert scoring.by_field(truths, truths) == dict.fromkeys(shares, 1.0)
    same = exact_match(guesses, truths) == 1.0
    assert (field_f1(guesses, truths) == 1.0) == same


@given(objects)
def test_every_field_has_the_key_that_it_stands_under(one):
    def keys(value):
        inner = value.values() if isinstance(value, dict) else value
        if not isinstance(value, dict | list):
            return set()
        return {*(value if isinstance(value, dict) else ())}.union(*map(keys, inner))

    text = json.dumps(one)
    shares = scoring.by_field([text], [text])
    assert set(shares) <= keys(one) and set(shares.values()) <= {1.0}
