"""Records that a model cannot read are refused before step 1, with the cure."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_models import byte_tokenizer, random_llama
from small_training import build
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
)
from trl import SFTTrainer

from course_utils import training_callbacks as callbacks
from course_utils.inference import generate
from course_utils.runtime import Profile
from course_utils.training import prepare_trainer, sft_config, training_arguments

FP32 = Profile("cpu", "cpu", torch.float32, 0)


def rows(*records, count=1):
    """Records of these tokens, all of them learned."""
    full = [
        {"input_ids": ids, "labels": list(ids), "attention_mask": [1] * len(ids)}
        for ids in records
    ]
    return Dataset.from_list(full * count)


GOOD = rows([5, 6, 7, 8], [9, 10, 11], count=4)


def family(name, auto=AutoModelForCausalLM, **more):
    base = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64}
    base |= {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    base |= {"num_key_value_heads": 2, "max_position_embeddings": 24, "dim": 32}
    base |= {"word_embed_proj_dim": 32, "pad_token_id": 1}
    return auto.from_config(AutoConfig.for_model(name, **(base | more)))


def refused(words, model=None, train=GOOD, kind=SFTTrainer, folder="/nowhere", **sets):
    """Built, made ready, refused: with these words, before a step or a file."""
    trainer = build(kind, folder, model or random_llama())
    trainer.train_dataset = train
    for name, data in sets.items():
        setattr(trainer, name, data)
    prepare_trainer(trainer)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", [SFTTrainer, Trainer])
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_a_token_beyond_the_embeddings(kind, train, tmp_path):
    bad = rows([5, 6, 7], [5, 259, 7])
    sets = {"train": bad} if train else {"eval_dataset": bad}
    place = "training" if train else "evaluation"
    words = f"input_ids of the {place} set: 259 is beyond the model's 259 embeddings.*"
    words += r"resize_token_embeddings\(len\(tokenizer\)\)"
    refused(words, kind=kind, folder=tmp_path, **sets)


ADAPTERS = {
    "lora": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "on embeddings": LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "saved embeddings": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "token indices": LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=[5, 6]
    ),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_token_beyond_the_embeddings_under_an_adapter(name, tmp_path):
    model = get_peft_model(random_llama(), ADAPTERS[name])
    refused("300 is beyond the model's 259", model, rows([5, 300]), folder=tmp_path)


def test_after_the_cure_it_trains(tmp_path):
    model = random_llama()
    model.resize_token_embeddings(301)
    trainer = build(SFTTrainer, tmp_path, model, max_steps=1)
    trainer.train_dataset = rows([5, 300, 6, 7], count=8)
    prepare_trainer(trainer)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("input_ids", [5, -1, 6], "input_ids of the training set: -1 is beyond"),
        ("input_ids", [5, -100, 6], "input_ids of the training set: -100 is beyond"),
        ("labels", [5, 259, 6], "labels of the training set: 259 is beyond"),
        ("labels", [5, -1, 6], "labels of the training set: -1 is beyond"),
        ("labels", [-100] * 3, "no record of the training set has labels to learn"),
    ],
)
def test_numbers_that_no_row_stands_for(column, values, words, tmp_path):
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [1] * 3}
    bad = Dataset.from_list([row, row | {column: values}][values == [-100] * 3 :])
    refused(words, train=bad, folder=tmp_path)


@pytest.mark.parametrize("evaluation", ["no", "steps"])
def test_empty_sets(evaluation, tmp_path):
    none = GOOD.select([])
    refused("the training set is empty", train=none, folder=tmp_path)
    refused("the evaluation set is empty", folder=tmp_path, eval_dataset=none)
    sets = {"first": GOOD, "second": rows([5, 999])}
    refused("input_ids of the second set: 999", folder=tmp_path, eval_dataset=sets)


@pytest.mark.parametrize(
    ("name", "longest"),
    [("llama", 24), ("gpt2", 24), ("opt", 24), ("gpt_neox", 24), ("roberta", 22)],
)
def test_a_record_longer_than_the_positions(name, longest, tmp_path):
    more = {"is_decoder": True} if name == "roberta" else {}
    words = f"has {longest + 1} tokens; the model has {longest} positions: .*"
    words += f"max_length={longest}"
    model = family(name, **more)
    refused(words, model, rows([5] * (longest + 1)), folder=tmp_path)
    model = family(name, **more)
    trainer = build(Trainer, tmp_path, model, max_steps=1)
    trainer.train_dataset, trainer.eval_dataset = rows([5] * longest, count=4), None
    prepare_trainer(trainer)
    trainer.train()


@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_take_positions_too(method, tmp_path):
    def model():
        config = method(num_virtual_tokens=4, task_type="CAUSAL_LM")
        return get_peft_model(random_llama(max_position_embeddings=24), config)

    words = "has 21 tokens; .* 20 positions beside 4 virtual.* max_length=20"
    refused(words, model(), rows([5] * 21), folder=tmp_path)
    trainer = build(SFTTrainer, tmp_path, model(), max_steps=1)
    trainer.train_dataset, trainer.eval_dataset = rows([5] * 20, count=4), None
    prepare_trainer(trainer)
    trainer.train()


def test_a_packed_row_may_be_longer_than_the_positions(tmp_path):
    model = random_llama(max_position_embeddings=24)
    ids = [*range(5, 41)]
    row = {"input_ids": ids, "labels": ids}
    apart = [*range(20), *range(16)]
    trainer = build(SFTTrainer, tmp_path, model)
    for positions, good in ((apart, True), ([*range(36)], False)):
        data = Dataset.from_list([row | {"position_ids": positions}])
        trainer.train_dataset = trainer.eval_dataset = data
        if good:
            callbacks.check_data(trainer)
        else:
            with pytest.raises(ValueError, match="has 36 tokens"):
                callbacks.check_data(trainer)
    packed = Dataset.from_list([row | {"seq_lengths": [20, 16]}])
    trainer.train_dataset = trainer.eval_dataset = packed
    callbacks.check_data(trainer)


def classifier(folder, labels, auto=AutoModelForSequenceClassification, **more):
    data = [
        {"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": label}
        for label in labels
    ]
    kind = more.pop("kind", "bert")
    trainer = Trainer(
        model=family(kind, auto, **more),
        args=training_arguments(FP32, folder, max_steps=1),
        train_dataset=Dataset.from_list(data),
        data_collator=DataCollatorWithPadding(byte_tokenizer()),
    )
    prepare_trainer(trainer)
    return trainer


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(("labels", "wrong"), [([0, 3], 3), ([1, -1], -1)])
def test_a_class_that_the_head_does_not_have(kind, labels, wrong, tmp_path):
    trainer = classifier(tmp_path, labels, num_labels=3, kind=kind)
    with pytest.raises(ValueError, match=f"{wrong} is beyond the model's 3 labels"):
        trainer.train()
    classifier(tmp_path, [0, 2], num_labels=3, kind=kind).train()


def test_classes_of_tokens_and_names_of_columns(tmp_path):
    auto = AutoModelForTokenClassification
    trainer = classifier(tmp_path, [[0, 1, -100], [2, 3, 0]], auto, num_labels=3)
    with pytest.raises(ValueError, match="labels .* 3 is beyond the model's 3 labels"):
        trainer.train()
    classifier(tmp_path, [[0, 1, -100], [2, 2, 0]], auto, num_labels=3).train()
    trainer = classifier(tmp_path, [0, 3], num_labels=3)
    trainer.train_dataset = trainer.train_dataset.rename_column("labels", "label")
    with pytest.raises(ValueError, match="label of .* 3 is beyond the model's 3"):
        trainer.train()
    types = [[0, 0, 2]] * 2
    trainer = classifier(tmp_path, [0, 1], num_labels=3)
    trainer.train_dataset = trainer.train_dataset.add_column("token_type_ids", types)
    with pytest.raises(ValueError, match="token_type_ids .* 2 is beyond the model's 2"):
        trainer.train()


def test_amounts_and_several_classes_at_once_are_no_classes(tmp_path):
    classifier(tmp_path, [0.5, 7.0], num_labels=1).train()
    callbacks.check_data(classifier(tmp_path, [4, 7], num_labels=1))
    many = {"num_labels": 3, "problem_type": "multi_label_classification"}
    classifier(tmp_path, [[0.0, 1.0, 1.0]] * 2, **many).train()


def test_other_sets_of_records_are_read_or_left_alone(tmp_path):
    formatted = GOOD.with_format("torch")
    refused("11 is beyond", random_llama(vocab_size=7), formatted, folder=tmp_path)
    shuffled = rows([5, 6], [7, 999]).shuffle(seed=0)
    refused("999 is beyond", train=shuffled, folder=tmp_path)
    trainer = build(Trainer, tmp_path, random_llama(), max_steps=1)
    trainer.train_dataset = rows([5, 999], [5, 6, 7, 8]).select([1])  # 999 is left out
    prepare_trainer(trainer)
    trainer.train()
    stream = IterableDataset.from_generator(lambda: iter(list(GOOD)))
    trainer = build(Trainer, tmp_path, random_llama(), max_steps=1)
    trainer.train_dataset, trainer.eval_dataset = stream, None
    prepare_trainer(trainer)
    trainer.train()


def test_texts_are_checked_as_the_trainer_has_tokenized_them(tmp_path):
    texts = Dataset.from_list([{"prompt": "Hi", "completion": " there"}] * 8)
    trainer = SFTTrainer(
        model=random_llama(vocab_size=100),
        args=sft_config(FP32, tmp_path, max_steps=1),
        train_dataset=texts,
        processing_class=byte_tokenizer(),
    )
    prepare_trainer(trainer)
    with pytest.raises(ValueError, match="is beyond the model's 100 embeddings"):
        trainer.train()


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_a_prompt_beyond_the_embeddings(name):
    model = random_llama(vocab_size=70)
    model = get_peft_model(model, ADAPTERS[name]) if name else model
    with pytest.raises(
        ValueError, match=r"prompt 1: token \d+ is beyond.*resize_token"
    ):
        generate(model, byte_tokenizer(), ["!", "~"], template=None)
