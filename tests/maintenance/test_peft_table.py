"""The table of PEFT's types: its counts again, and what its answers mean."""

import importlib.util

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from small_models import random_llama

from course_utils.parameters import count_parameters
from course_utils.records import load_record
from maintenance.runs import peft_table

RECORD = load_record("09_peft_types")
RECORDED = {run["label"]: run for run in RECORD["runs"]}
HERE = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
LONG = {"FROD", "OSF", "PSOFT", "TINYLORA"}  # singular values of large matrices
if not importlib.util.find_spec("sklearn"):
    HERE -= {"ADAMSS"}  # it needs scikit-learn

pytestmark = pytest.mark.filterwarnings("ignore")


def moved(folder, names, recorded=RECORDED):
    """{type: (recorded, now)} where two blocks of the model's widths differ."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 64}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    model = random_llama(tie_word_embeddings=True, **sizes, **heads)
    counts = {}
    for name in sorted(names & HERE & set(recorded)):
        options = recorded[name]["settings"]["options"]
        wrapped = peft_table.adapted(model, name, options, folder)
        known, now = recorded[name]["measured"], count_parameters(wrapped).trainable
        if now != known["cut_trained"]:
            counts[name] = known["cut_trained"], now
    return counts


def test_the_table_holds_every_type_of_this_peft():
    new = HERE - set(RECORDED)
    assert not new, f"PEFT {peft.__version__} has new types: {new}"
    if peft.__version__ == RECORD["versions"]["peft"]:
        assert set(RECORDED) <= HERE | {"ADAMSS"}
    settings = {e.label: e.settings() for e in peft_table.all_types()}
    assert settings == {name: run["settings"] for name, run in RECORDED.items()}
    assert set(peft_table.NEEDED) <= set(RECORDED)


def test_what_a_type_trains_has_not_moved(tmp_path):
    found = moved(tmp_path, set(RECORDED) - LONG)
    assert not found, f"PEFT {peft.__version__} trains other counts: {found}"


@pytest.mark.slow
def test_what_a_type_with_singular_values_trains_has_not_moved(tmp_path):
    assert moved(tmp_path, LONG) == {}


def test_a_count_that_moved_is_named(tmp_path):
    lora = RECORDED["LORA"]
    spoilt = lora | {"settings": {"options": {"r": 9}}}
    now = lora["measured"]["cut_trained"] * 9 // 8
    found = moved(tmp_path, {"LORA", "IA3"}, RECORDED | {"LORA": spoilt})
    assert found == {"LORA": (lora["measured"]["cut_trained"], now)}


@pytest.mark.parametrize(
    ("name", "start", "merges", "mixes"),
    [
        ("LORA", True, "yes", "yes"),
        ("IA3", True, "yes", "ignored"),
        ("ADALORA", True, "yes", "TypeError"),
        ("POLY", True, "NotImplementedError", "ignored"),
        ("PROMPT_TUNING", False, "no method", "ignored"),
        ("FOURIERFT", False, "yes", "ignored"),
        ("XLORA", False, "wrong", "ignored"),
    ],
)
def test_what_a_type_does_is_told(name, start, merges, mixes, tmp_path):
    model, ids = random_llama(), torch.tensor([[5, 9, 33, 120, 7]] * 2)
    small = {"XLORA": {"hidden_size": 32}, "FOURIERFT": {"n_frequency": 50}}
    options = peft_table.NEEDED.get(name, {}) | small.get(name, {})
    with torch.no_grad():
        plain = model(ids).logits
        wrapped = peft_table.adapted(model, name, options, tmp_path)
        found = peft_table._behaviour(wrapped, plain, ids)
        assert torch.equal(model(ids).logits, plain)  # a copy was adapted
    assert (found["start_change"] < 1e-3) == start
    assert (found["merges"], found["mixes"]) == (merges, mixes)
    assert ("merge_error" in found) == (merges in ("yes", "wrong"))


def test_the_first_blocks_are_a_copy():
    model = random_llama()
    cut = peft_table.blocks(model, 1)
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 1
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    cut.model.embed_tokens.weight.data.zero_()
    assert model.model.embed_tokens.weight.abs().sum() > 0
