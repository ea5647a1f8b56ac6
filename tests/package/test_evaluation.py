"""Scores, stratified limits, perplexity by hand, forgetting."""

import copy
import math

import pytest
import torch
from small_models import byte_tokenizer, random_llama, random_peft
from teacher_forcing import lacking, worst
from test_inference import METHODS, OTHERS, after_a_trainer, small, state

from course_utils import evaluation, scoring
from course_utils.data import load_examples
from course_utils.evaluation import (
    AnswerShare,
    Perplexity,
    _contains_answer,
    answer_share,
    evaluate,
    exact_match,
    forgetting,
    free_text,
    perplexity,
    stratified,
)
from course_utils.formatting import IGNORE, tokenize_example
from course_utils.inference import generate

RECORDS = [
    {"prompt": "on", "completion": '{"action": "on"}'},
    {"prompt": "dim it to 40", "completion": '{"level": 40, "on": true}'},
    {"prompt": "Turn the radio off", "completion": '{"action": "none"}'},
    {"prompt": "b", "completion": '{"a": "灯"}'},
]
SLICED = [record | {"slice": f"s{i % 2}"} for i, record in enumerate(RECORDS)]


def answer_with(monkeypatch, answers):
    asked = {}

    def fake(model, tokenizer, prompts, **options):
        asked.update(options, prompts=list(prompts))
        return [answers[record["prompt"]] for record in prompts]

    monkeypatch.setattr(evaluation, "generate", fake)
    return asked


def test_evaluate_scores_what_the_model_generates(monkeypatch):
    answers = {
        "on": '{"action": "on"}',
        "dim it to 40": '{"on": true, "level": 41}',
        "Turn the radio off": ' {"action":"none"}\n',
        "b": "I cannot do that.",
    }
    asked = answer_with(monkeypatch, answers)
    tokenizer = byte_tokenizer()
    result = evaluate(None, tokenizer, SLICED, system="s", batch_size=2)
    assert result.exact_match == 0.5
    assert result.field_f1 == pytest.approx(2 * 3 / (4 + 5))
    assert result.predictions == tuple(answers.values())
    assert result.references == tuple(r["completion"] for r in RECORDS)
    assert result.by_slice() == {"s0": 1.0, "s1": 0.0}
    assert asked["system"] == "s" and asked["batch_size"] == 2
    longest = max(len(r["completion"].encode()) for r in RECORDS)  # one token a byte
    assert asked["max_new_tokens"] == longest + 8
    text = str(result)
    # Of 4, one right and one wrong more: the root of 3/6 * 3/6 / 6.
    start = "exact match 50.0% ± 20.4 of 4 · commands 33.3% · nothing to do 100.0% · "
    assert text.startswith(start + "field F1 0.667 · ")
    assert text.splitlines()[1:] == ["  s0  100.0% of 2", "  s1    0.0% of 2"]
    with pytest.raises(AttributeError):
        result.exact_match = 1.0


def test_evaluate_with_a_model_is_generate_and_score():
    model, tokenizer = small(), byte_tokenizer()
    result = evaluate(model, tokenizer, RECORDS, max_new_tokens=6)
    prompts = [r["prompt"] for r in RECORDS]
    assert list(result.predictions) == generate(
        model, tokenizer, prompts, max_new_tokens=6
    )
    assert result.slices is None and result.by_slice() == {}
    assert result.exact_match == 0 and result.seconds > 0
    right = [r["completion"] for r in RECORDS]
    assert exact_match(right, right) == 1 and exact_match is scoring.exact_match


def test_evaluate_names_what_is_wrong_before_it_generates():
    with pytest.raises(ValueError, match="the data set is empty"):
        evaluate(None, byte_tokenizer(), [])
    with pytest.raises(ValueError, match="record 1: 'completion' must be a string"):
        evaluate(None, byte_tokenizer(), [RECORDS[0], {"prompt": "x"}])
    bad = [RECORDS[0] | {"completion": "on"}]
    with pytest.raises(ValueError, match="reference 0 is not a JSON object"):
        evaluate(None, byte_tokenizer(), bad)


def test_evaluate_compares_free_answers_as_text(monkeypatch):
    rows = [r | {"completion": f"I did {r['prompt']}."} for r in SLICED]
    answers = {r["prompt"]: r["completion"] for r in rows} | {"b": '{"a": "灯"}'}
    answer_with(monkeypatch, answers)
    assert free_text(r["completion"] for r in rows)
    assert not free_text(r["completion"] for r in [*rows, RECORDS[0]])
    result = evaluate(None, byte_tokenizer(), rows, as_text=True)
    assert result.exact_match == 0.75 and math.isnan(result.field_f1)
    assert result.by_slice() == {"s0": 1.0, "s1": 0.5}
    assert str(result).startswith("exact match 75.0% ± 19.2 of 4 · 0.")


def test_a_limit_takes_each_slice_in_its_share_and_the_same_records_every_time():
    sizes = {"a": 60, "b": 30, "c": 9, "d": 1}
    rows = [{"slice": s, "n": i} for s, k in sizes.items() for i in range(k)]
    for limit in range(1, 101):
        taken = stratified(rows, limit)
        assert len(taken) == limit and taken == stratified(rows, limit)
        count = {s: sum(r["slice"] == s for r in taken) for s in sizes}
        assert len({(r["slice"], r["n"]) for r in taken}) == limit
        assert [rows.index(r) for r in taken] == sorted(rows.index(r) for r in taken)
        if limit >= 4:
            assert min(count.values()) == 1 or limit == 100
            assert all(abs(count[s] - limit * k / 100) < 2 for s, k in sizes.items())
    assert stratified(rows, 1000) == stratified(rows) == rows
    evenly = [r["n"] for r in stratified([{"n": i} for i in range(100)], 4)]
    assert evenly == [12, 37, 62, 87]
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        stratified(rows, 0)


def test_evaluate_with_a_limit(monkeypatch):
    asked = answer_with(monkeypatch, {r["prompt"]: "{}" for r in RECORDS})
    result = evaluate(None, byte_tokenizer(), SLICED, limit=2)
    assert len(asked["prompts"]) == 2 and set(result.slices) == {"s0", "s1"}


def by_hand(model, records, **options):
    """Each record alone, its logits in full, one learned token after another."""
    losses = []
    for record in records:
        row = tokenize_example(record, byte_tokenizer(), **options)
        ids, labels = row["input_ids"], row["labels"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        logits = logits[-len(ids) :]  # virtual tokens stand before
        for i, label in enumerate(labels):
            if label != IGNORE:
                losses.append(-logits[i - 1].log_softmax(-1)[label].item())
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_equals_the_sum_by_hand(method, batch_size):
    model, tokenizer = small(method), byte_tokenizer()
    loss, tokens = by_hand(model, RECORDS)
    got = perplexity(model, tokenizer, RECORDS, batch_size=batch_size)
    assert got.tokens == tokens
    assert got.loss == pytest.approx(loss, abs=1e-4)
    assert got.perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert f"loss {got.loss:.4f} nats a token" in str(got)
    worse = perplexity(model, tokenizer, RECORDS[:3], batch_size=batch_size)
    assert abs(worse.loss - loss) > 1e-3  # the tolerance could tell


def test_perplexity_of_chats_and_of_identical_prompts():
    """Several learned answers a row; rows that share all but their end."""
    model, tokenizer = small(), byte_tokenizer()
    turns = ["hi", "hello", "more", "{}"]
    roles = ["user", "assistant"] * 2
    chat = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    same = [{"prompt": "same", "completion": c} for c in ("aaa", "aab", "a")]
    for records in ([{"messages": chat}, RECORDS[0]], same):
        got = perplexity(model, tokenizer, records)
        assert got.loss == pytest.approx(by_hand(model, records)[0], abs=1e-4)


def test_perplexity_reads_a_common_beginning_once():
    model, tokenizer = small(), byte_tokenizer()
    rows = [{"prompt": "word " * 40 + c, "completion": "{}"} for c in "abcdefgh"]
    positions = []

    def count(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        positions.append(ids.numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    got = perplexity(model, tokenizer, rows)
    handle.remove()
    longest = max(len(tokenize_example(row, tokenizer)["input_ids"]) for row in rows)
    assert sum(positions) < 2 * longest, "each row was read whole"
    assert got.loss == pytest.approx(by_hand(model, rows)[0], abs=1e-4)


def test_perplexity_never_reads_padding():
    """A pad token was added, and the embeddings were not resized."""
    tokenizer = copy.deepcopy(byte_tokenizer())
    expected = perplexity(small(), tokenizer, RECORDS)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= small().config.vocab_size
    assert perplexity(small(), tokenizer, RECORDS) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_perplexity_of_other_architectures(name):
    torch.manual_seed(0)
    model = OTHERS[name][0]().eval()
    got = perplexity(model, byte_tokenizer(), RECORDS, template="plain")
    expected = by_hand(model, RECORDS, template="plain")[0]
    assert got.loss == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["none", "prefix"])
def test_perplexity_leaves_the_model_as_found(method):
    tokenizer = byte_tokenizer()
    expected = perplexity(small(method), tokenizer, RECORDS)
    model = after_a_trainer(small(method))
    before = state(model, tokenizer)
    assert perplexity(model, tokenizer, RECORDS) == expected
    assert state(model, tokenizer) == before


def test_an_answer_counts_as_whole_words_only():
    assert _contains_answer("The answer is:  paris.", ["Paris"])
    assert _contains_answer("It has 8 legs", ["eight", "8"])
    assert _contains_answer("H2O (water)", ["H2O"])
    assert not _contains_answer("It has 18 legs", ["8", "eight"])
    assert not _contains_answer("Parisian", ["Paris"])
    assert not _contains_answer("anything", ["a.y"])


def test_answer_share_and_forgetting(monkeypatch):
    questions = [
        {"prompt": "France?", "answers": ["Paris"], "completion": "Paris."},
        {"prompt": "Legs?", "answer": "8", "answers": ["8", "eight"]},
        {"prompt": "Sky?", "answer": "blue"},
    ]
    replies = iter([["Paris", "Eight!", "Blue"], ["{}", "8", "blue"]])
    monkeypatch.setattr(
        "course_utils.evaluation.generate", lambda *a, **k: next(replies)
    )
    before, after = (answer_share(None, None, questions) for _ in range(2))
    assert before.share == 1 and after.correct == (False, True, True)
    assert str(after) == "2 of 3 answers (66.7%)"
    loss = [Perplexity(x, math.exp(x), 9) for x in (1.0, 1.5)]
    change = forgetting((loss[0], before), (loss[1], after))
    assert change.loss_change == 0.5 and change.lost == ("France?",)
    assert change.share_change == pytest.approx(-1 / 3)
    assert str(change) == (
        "completion loss +0.500 nats · right answers -33.3 points · 1 lost"
    )
    other = AnswerShare(1.0, (True,), ("x",), ("y",))
    with pytest.raises(ValueError, match="not measured on the same questions"):
        forgetting((loss[0], before), (loss[1], other))


@pytest.mark.model
def test_the_built_in_model_knows_some_answers_and_fails_the_task():
    from course_utils.data import load_examples
    from course_utils.models import load_model, load_tokenizer

    model, tokenizer = load_model(), load_tokenizer()
    general = load_examples("general_questions", split="test")
    share = answer_share(model, tokenizer, general, limit=8, max_new_tokens=16)
    assert 0.3 <= share.share <= 1
    loss = perplexity(model, tokenizer, general, limit=16)
    assert 0.2 < loss.loss < 3
    commands = load_examples("home_commands", split="test")
    result = evaluate(model, tokenizer, commands, limit=6, max_new_tokens=12)
    assert result.exact_match == 0 and len(result.by_slice()) == 6


def test_lora_changes_the_perplexity():
    tokenizer = byte_tokenizer()
    base = perplexity(random_llama(), tokenizer, RECORDS)
    tuned = random_peft("lora")
    assert perplexity(tuned, tokenizer, RECORDS).loss != base.loss
    with tuned.disable_adapter():
        assert perplexity(tuned, tokenizer, RECORDS).loss == pytest.approx(base.loss)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_card_measures_the_cpus_perplexity(method):
    model, tokenizer = small(method), byte_tokenizer()
    expected = perplexity(model, tokenizer, RECORDS)
    found = perplexity(model.to("cuda"), tokenizer, RECORDS)
    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, abs=1e-4)
    other = perplexity(model, tokenizer, RECORDS[:3])
    assert abs(other.loss - expected.loss) > 1e-3  # the tolerance could tell


@pytest.mark.gpu
@pytest.mark.model
def test_the_built_in_model_answers_on_a_card_as_on_the_cpu():
    from course_utils.models import load_model, load_tokenizer

    model, tokenizer = load_model(dtype=torch.float32), load_tokenizer()
    assert model.device.type == "cuda"
    rows = load_examples("home_commands", "test")
    on_card = evaluate(model, tokenizer, rows, limit=6, max_new_tokens=12)
    prompts, answers = [r["prompt"] for r in stratified(rows, 6)], on_card.predictions
    model = model.to("cpu")
    assert worst(lacking(model, tokenizer, prompts, answers)) < 1e-2
    assert worst(lacking(model, tokenizer, prompts, answers[::-1])) > 1


def test_evaluate_asks_whole_records_where_they_are_laid_out(monkeypatch):
    record = {"instruction": "Add.", "input": "2 and 3", "output": "{}"}
    record |= {"prompt": "Add.\n\n2 and 3", "completion": "{}"}
    asked = []

    def fake(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        return ["{}"] * len(prompts)

    monkeypatch.setattr(evaluation, "generate", fake)
    for template in ("alpaca", "chatml", None):
        evaluate(None, byte_tokenizer(), [record], template=template)
    assert asked == [record, record, record["prompt"]]


def test_an_empty_thought_before_an_answer_is_not_part_of_it(monkeypatch):
    answers = {r["prompt"]: r["completion"] for r in RECORDS}
    thinking = {k: f"<think>\n\n</think>\n\n{v}" for k, v in answers.items()}
    answer_with(monkeypatch, thinking)
    result = evaluate(None, byte_tokenizer(), SLICED)
    assert result.exact_match == 1 and result.predictions == tuple(answers.values())
    answer_with(monkeypatch, {k: f"<think>Hm.</think>{v}" for k, v in answers.items()})
    assert evaluate(None, byte_tokenizer(), SLICED).exact_match == 0


def test_a_blank_is_no_expected_answer(monkeypatch):
    from course_utils import evaluation

    monkeypatch.setattr(evaluation, "generate", lambda *args, **options: ["London."])
    asked = {"prompt": "Capital of France?", "answers": ["Paris", ""]}
    assert answer_share(None, None, [asked]).share == 0
    for blank in ([" "], [], " "):
        with pytest.raises(ValueError, match="record 0 has no 'answers'"):
            answer_share(None, None, [asked | {"answers": blank}])


def test_answer_share_reads_one_answer_as_one(monkeypatch):
    from course_utils import evaluation

    said = "It is a city in the north."
    monkeypatch.setattr(evaluation, "generate", lambda *args, **options: [said])
    question = {"prompt": "Capital of France?", "answers": "Paris"}
    assert answer_share(None, None, [question]).share == 0
    assert answer_share(None, None, [question | {"answers": "north"}]).share == 1
    with pytest.raises(ValueError, match="record 0 has no 'answers'.*completion"):
        answer_share(None, None, [{"prompt": "?", "completion": "Paris"}])
