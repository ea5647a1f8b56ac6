"""What lesson 11 builds: its measurements, its claims on record, and its diagnosis."""

import copy
import math

import pytest
import torch
from cells import cells

from course_utils.lessons import REGISTER
from course_utils.records import load_record
from maintenance.cells import more_cells

STEM = "11_reading_curves"
lesson = cells(
    STEM,
    *("imports", "records", "row", "tiny", "learn", "loop", "look", "looked-at"),
    *("ends", "evidence", "diagnose", "draw", "show", "riddle"),
    definitions=True,
)
more_cells(lesson, STEM, "tells", "claims")
RECORDS = [
    {"prompt": "Lamp off, in the hall!", "completion": "light hall off"},
    {"prompt": "make the hall bright", "completion": "light hall on"},
    {"prompt": "lock the hall", "completion": "lock hall"},
    {"prompt": "the lamp on", "completion": "light on"},
]
PLACES = lesson.vocabulary(2 * RECORDS)
ROWS = lesson.rows_of(RECORDS, PLACES)


def small(seed=0):
    return lesson.tiny(len(PLACES) + 3, seed, d=16, layers=1)


def learn(model, batches=6, rate=1e-2, warmup=4, clip=1.0):
    return lesson.learn(model, [ROWS] * batches, ROWS, rate, warmup, clip)


def test_only_the_answer_is_learned_unless_the_prompt_is_too():
    back = {place: word for word, place in PLACES.items()}
    for record, (ids, labels) in zip(RECORDS, ROWS, strict=True):
        learned = [label for label in labels if label != -100]
        text = " ".join(back[label] for label in learned[:-1])
        assert text == record["completion"] and learned[-1] == lesson.END
        assert ids[-len(learned) :] == learned
    for ids, labels in lesson.rows_of(RECORDS, PLACES, prompt_too=True):
        assert [i for i, n in enumerate(labels) if n == -100] == [
            ids.index(lesson.ANSWER)
        ]


def test_swapped_rows_keep_their_answers_and_get_other_prompts():
    for new, old in zip(lesson.swapped(ROWS), ROWS, strict=True):
        assert lesson.told(new) == lesson.told(old)
        assert lesson.asked(new) != lesson.asked(old) and len(new[0]) == len(new[1])


def test_losses_by_place_are_the_loss():
    model = small()
    places = lesson.by_place(model, ROWS)
    counts = [
        sum(len(lesson.told(row)) - 1 > place for row in ROWS) for place in range(4)
    ]
    mean = sum(n * loss for n, loss in zip(counts, places, strict=True)) / sum(counts)
    assert mean == pytest.approx(lesson.loss_of(model, ROWS), rel=1e-4)


def test_the_loop_is_adamw_and_notes_what_it_did():
    model, other = small(), small()
    start = lesson.flat(model)
    history = learn(model)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(6):
        rate = 1e-2 * min((step + 1) / 4, 1) * (1 - step / 6)
        optimizer.param_groups[0]["lr"] = rate
        loss = other(**lesson.batch_of(ROWS)).loss
        assert history["loss"][step] == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        assert history["norm"][step] == pytest.approx(norm.item(), rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(lesson.flat(model), lesson.flat(other), atol=1e-5)
    length = 1e-2 / 4 * len(start) ** 0.5 / start.norm().item()
    assert history["ratio"][0] == pytest.approx(length, rel=0.02)
    assert [step for step, _ in history["kept_loss"]] == [0, 1, 2, 3, 4, 5, 6]


def test_the_loop_stops_at_a_loss_that_is_no_number():
    model = small()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    history = learn(model)
    assert len(history["loss"]) == 1 and math.isnan(history["loss"][0])


def test_what_is_looked_at_sees_copies_strangers_and_order():
    model = small()
    start = lesson.flat(model)
    seen = lesson.looked_at(model, start, [ROWS], ROWS)
    assert seen["moved"] == 0 and seen["copies"] == 1 and seen["foreign"] == 0
    strangers = [([8, 9, lesson.ANSWER, 5, 4, 3, 0], [-100] * 3 + [5, 4, 3, 0])]
    seen = lesson.looked_at(model, start + 1, [ROWS[:2]], strangers * 2)
    assert seen["moved"] == 1 and seen["copies"] == 0 and seen["foreign"] > 0.5
    blocks = [[ROWS[0]] * 9, [ROWS[2]] * 9]
    assert lesson.looked_at(model, start, blocks, ROWS)["in_order"] > 1.1


def test_a_spike_and_the_harm_after_it():
    losses = [1.0] * 20 + [5.0] + [1.0] * 2 + [1.5] * 6
    assert lesson.spike_of({"loss": losses}) == (20, 5.0)
    assert lesson.harm({"loss": losses}) == pytest.approx(0.5)
    assert lesson.spike_of({"loss": [1.0, math.nan]}) == (0, 0)


# --- on record -----------------------------------------------------------------------

PAST = lesson.from_record("11_gallery")


def pairs(name):
    cured = f"{name}, cured" if f"{name}, cured" in PAST else "healthy"
    return list(zip(PAST[name], PAST[cured], strict=True))


@pytest.mark.parametrize("name", lesson.claims)
def test_a_claim_holds_with_three_seeds_and_not_of_the_cure(name):
    assert len(pairs(name)) == 3
    for bad, good in pairs(name):
        assert lesson.claims[name](bad, good)
        assert not lesson.claims[name](good, good)


def test_what_was_named_on_record_is_what_the_lesson_names():
    for record in ("11_gallery", "11_diagnosis", "11_divided"):
        for histories in lesson.from_record(record).values():
            for history in histories:
                assert lesson.diagnose(history)[0] == history["named"]


def test_a_fifth_of_the_rate_helps_the_faults_of_the_rate_alone():
    nearer = {"rate too high", "no warm-up"}
    farther = {"bad batches", "shuffled labels", "prompt in the labels"}
    for name, histories in lesson.from_record("11_divided").items():
        for divided, (bad, good) in zip(histories, pairs(name), strict=True):
            change = lesson.worse(divided, good) - lesson.worse(bad, good)
            assert name not in nearer or change < -0.05
            assert name not in farther or change > 0.5
    assert (
        pytest.approx(load_record("11_gallery")["runs"][0]["settings"]["rate"])
        == 0.3 / 25
    )


def test_the_trial_has_three_seeds_of_every_fault_and_one_base_more():
    runs = load_record("11_diagnosis")["runs"]
    cases = {(run["label"], run["seed"]) for run in runs}
    assert len(cases) == len(runs) == 2 * 3 * (len(lesson.tells) + 1)
    summary = load_record("11_diagnosis")["summary"]
    assert summary["right"] >= 0.9 * summary["of"]
    assert summary["confusion"]["healthy"] == {"nothing wrong": 6}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("no gradient", {"moved": 0.0}),
        ("prompt in the labels", {"learned": 0.9}),
        ("data in order", {"in_order": 2.5}),
        ("leaked validation", {"copies": 0.4}),
        ("elsewhere", {"foreign": 0.7}),
        ("shuffled labels", {"prompt_worth": 0.0}),
    ],
)
def test_one_measurement_changes_the_name(name, change):
    healthy = copy.deepcopy(PAST["healthy"][0])
    assert lesson.diagnose(healthy)[0] == "nothing wrong"
    assert lesson.diagnose(healthy | change)[0] == name


def test_riddles_have_their_name_and_their_exercise(monkeypatch):
    monkeypatch.setattr(lesson, "described", lambda figure, text: None)
    lesson.trials = lesson.from_record("11_diagnosis")
    names = set()
    for seed in range(12):
        history, fault = lesson.riddle(seed)
        names.add(fault)
        assert REGISTER["11.1"].accepts(fault.upper(), fault=fault)
        assert not REGISTER["11.2"].accepts("another", fault=fault)
        assert len(history["loss"])
    assert len(names) > 4 and names <= {"nothing wrong", *lesson.tells}
