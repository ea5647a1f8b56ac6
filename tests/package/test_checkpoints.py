"""A resumed run ends like one in one go, whatever is trained, or is refused."""

import contextlib
import shutil

import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from small_models import byte_tokenizer, random_llama
from small_training import build
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback
from trl import SFTTrainer

from course_utils import inference
from course_utils import training_callbacks as callbacks
from course_utils.training import LossHistory, find_checkpoint, prepare_trainer
from course_utils.training_speed import refuse_packed
from maintenance.runs.peft_table import NEEDED

# What a tiny Llama needs beside that: else its defaults, on three sorts of layer.
OPTIONS = {
    "ADALORA": {"total_step": 8, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "target_modules": None},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": None},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "P_TUNING": {"encoder_hidden_size": 16},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": None},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "r": 2},
    "WAVEFT": {"n_frequency": 20},
}
UNTRIED = {  # PEFT's own demands, which a tiny Llama and its records do not meet
    "ADAMSS": "it needs scikit-learn",
    "POLY": "it needs task_ids in its batches",
    "SHADOW": "it fails in PEFT 0.21's own forward pass",
    "XLORA": "it is made of trained adapters",
}
MORE = [
    ("P_TUNING", {"encoder_num_layers": 2}),
    (
        "P_TUNING",
        {
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 2,
            "encoder_dropout": 0.2,
        },
    ),
    ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 16}),
    ("VERA", {"save_projection": False}),
    ("PVERA", {"save_projection": False}),
    ("RANDLORA", {"save_projection": False}),
    ("VBLORA", {"save_only_topk_weights": True}),
    ("LORA", {"modules_to_save": ["lm_head"]}),
    ("LORA", {"trainable_token_indices": [5, 6]}),
    ("LORA", {"bias": "all"}),
    ("LORA", {"use_dora": True, "lora_dropout": 0.1}),
]
METHODS = [(kind.value, {}) for kind in PEFT_TYPE_TO_CONFIG_MAPPING] + MORE


def adapted(method, options, seed):
    """A Llama under a method; only what the adapter draws depends on the seed."""
    make = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    settings |= NEEDED.get(method, {}) | OPTIONS.get(method, {}) | options
    known = make.__dataclass_fields__
    settings = {k: v for k, v in settings.items() if k in known and v is not None}
    model = random_llama(initializer_range=0.05)
    torch.manual_seed(seed)
    return get_peft_model(model, make(task_type="CAUSAL_LM", **settings))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Keep(TrainerCallback):
    """Copies of all parameters as they were when each checkpoint was written."""

    def __init__(self):
        self.weights = {}

    def on_save(self, args, state, control, model=None, **_):
        copies = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.weights[state.global_step] = copies


def same(model, weights):
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, weights[name], atol=0, rtol=0)


def trainer_of(kind, folder, model, tasks=False, **more):
    settings = {"save_strategy": "steps", "save_steps": 2}
    settings |= {"lr_scheduler_type": "constant"} | more
    trainer = build(kind, folder, model, **settings)
    if tasks:  # multitask prompt tuning reads which task each record is of
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {
            **collate(rows),
            "task_ids": torch.tensor([len(row["input_ids"]) % 2 for row in rows]),
        }
    prepare_trainer(trainer, fast=not tasks)
    return trainer


def goes_on(make, folder, kind=SFTTrainer, **more):
    """Four steps in one go; then from checkpoint 4 and 2, by models built anew."""
    whole = trainer_of(kind, folder, make(1), **more)
    whole.add_callback(keep := Keep())
    whole.train()
    losses = LossHistory.from_trainer(whole).loss
    assert any(p.ne(keep.weights[2][n]).any() for n, p in keep.weights[4].items())
    again = trainer_of(kind, folder, make(2), **more)
    again.train(resume_from_checkpoint=find_checkpoint(folder))
    same(again.model, keep.weights[4])
    whole.state.best_model_checkpoint = str(folder / "checkpoint-2")
    whole._load_best_model()
    same(whole.model, keep.weights[2])
    shutil.rmtree(folder / "checkpoint-4")
    again = trainer_of(kind, folder, make(3), **more)
    again.train(resume_from_checkpoint=find_checkpoint(folder))
    assert LossHistory.from_trainer(again).loss == pytest.approx(losses, rel=1e-5)
    same(again.model, keep.weights[4])


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_every_method_of_peft_goes_on_or_says_that_it_cannot(method, options, tmp_path):
    if method in UNTRIED:
        pytest.skip(f"because {UNTRIED[method]}")
    refused = pytest.raises(ValueError, match="cannot be resumed: .* in one go")
    expected = refused if method == "ADALORA" else contextlib.nullcontext()
    with expected:
        goes_on(
            lambda seed: adapted(method, options, seed),
            tmp_path,
            tasks=method == "MULTITASK_PROMPT_TUNING",
        )


def family(name, **more):
    base = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64}
    base |= {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    base |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(base | more))
    return AutoModelForCausalLM.from_config(config)


def only(model, word):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = word in name
    return model


def second_adapter(seed):
    model = adapted("LORA", {}, seed)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    return model


def by_transformers(seed):
    model = random_llama(initializer_range=0.05)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    return model


def head_by_hand(seed):
    model = adapted("LORA", {}, seed)
    model.get_base_model().lm_head.requires_grad_(True)
    return model


# The library saves fused experts under other names than those it resumes by.
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
WHOLE = {
    "full": lambda _: random_llama(initializer_range=0.05),
    "tied": lambda _: random_llama(tie_word_embeddings=True),
    "biases": lambda _: only(random_llama(attention_bias=True), "bias"),
    "last layer": lambda _: only(random_llama(), "layers.1."),
    "head beside LoRA": head_by_hand,
    "two adapters": second_adapter,
    "add_adapter": by_transformers,
    "P-tuning": lambda seed: adapted("P_TUNING", {}, seed),
    "gpt2": lambda _: family("gpt2"),
    "opt": lambda _: family("opt", word_embed_proj_dim=32),
    "gemma3": lambda _: family("gemma3_text"),
    "mixtral": lambda _: family("mixtral", **EXPERTS),
    "qwen3_moe": lambda _: family("qwen3_moe", moe_intermediate_size=16, **EXPERTS),
    "granitemoe": lambda _: family("granitemoe", **EXPERTS),
    "gpt_oss": lambda _: family("gpt_oss", **EXPERTS),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore")
def test_whatever_else_is_trained_goes_on(name, tmp_path):
    goes_on(WHOLE[name], tmp_path, Trainer)


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True}], ids=str)
def test_the_best_model_at_the_end_is_the_best_one(options, tmp_path):
    """The first of two: a rate this high makes the second one worse, or it is best."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1.0}
    settings |= {"load_best_model_at_end": True, "max_grad_norm": 1e9}
    method = "PREFIX_TUNING" if options else "P_TUNING"
    model = adapted(method, options, 1)
    trainer = trainer_of(SFTTrainer, tmp_path, model, **settings)
    trainer.add_callback(keep := Keep())
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    same(trainer.model, keep.weights[best])


def test_a_checkpoint_that_lacks_an_encoder_is_refused_before_step_1(tmp_path):
    whole = trainer_of(SFTTrainer, tmp_path, adapted("P_TUNING", {}, 1))
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-2" / callbacks.TRAINED_STATE).unlink()
    again = trainer_of(SFTTrainer, tmp_path, adapted("P_TUNING", {}, 2))
    with pytest.raises(ValueError, match="is not there, and .* begin anew"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 0


def test_a_checkpoint_of_another_encoder_is_refused_before_step_1(tmp_path):
    trainer_of(SFTTrainer, tmp_path, adapted("P_TUNING", {}, 1)).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    for options in ({"encoder_hidden_size": 8}, {"num_virtual_tokens": 5}):
        again = trainer_of(SFTTrainer, tmp_path, adapted("P_TUNING", options, 2))
        with pytest.raises(ValueError, match="of another model or adapter: prompt_enc"):
            again.train(resume_from_checkpoint=find_checkpoint(tmp_path))


def test_a_whole_model_is_not_saved_twice(tmp_path):
    for name, model, more in (
        ("full", random_llama(), False),
        ("tied", random_llama(tie_word_embeddings=True), False),
        ("p-tuning", adapted("P_TUNING", {}, 1), True),
        ("experts", family("mixtral", **EXPERTS), True),
    ):
        trainer_of(SFTTrainer, tmp_path / name, model, max_steps=2).train()
        written = tmp_path / name / "checkpoint-2" / callbacks.TRAINED_STATE
        assert written.is_file() == more, name


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_mixes_the_rows_of_a_batch_is_known(method, options):
    if method in UNTRIED:
        pytest.skip(f"because {UNTRIED[method]}")
    model = adapted(method, options, 0).eval()
    torch.manual_seed(1)
    rows = torch.randint(5, 250, (2, 9))
    tasks = method == "MULTITASK_PROMPT_TUNING"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        alone, both = (
            model(
                input_ids=part,
                attention_mask=torch.ones_like(part),
                **({"task_ids": torch.zeros(len(part), dtype=int)} if tasks else {}),
            ).logits[0]
            for part in (rows[:1], rows)
        )
    mixed = (both - alone).norm() > 1e-3 * alone.norm()
    assert bool(mixed) == (method in inference.MIXING)
    if not mixed:
        return
    prompts = ["Hi", "Turn on the light", "Download"]
    options = {"template": "plain", "max_new_tokens": 4}
    answers = inference.generate(model, byte_tokenizer(), prompts, **options)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert [answer] == inference.generate(
            model, byte_tokenizer(), [prompt], **options
        )
    with pytest.raises(ValueError, match=f"packed examples and {method} do not"):
        refuse_packed(model)


def test_what_the_library_saves_whole_is_not_saved_twice(tmp_path):
    """So that checkpoints of LoRA from before, or of others, can be gone on from."""
    for method, twice in (("LORA", False), ("P_TUNING", True)):
        trainer = trainer_of(SFTTrainer, tmp_path / method, adapted(method, {}, 1))
        trainer.train()
        folder = tmp_path / method / "checkpoint-4"
        assert (folder / callbacks.TRAINED_STATE).exists() == twice


def test_a_checkpoint_without_an_optimizer_is_not_complete(tmp_path):
    model = adapted("LORA", {}, 1)
    trainer_of(SFTTrainer, tmp_path, model, save_only_model=True).train()
    assert (tmp_path / "checkpoint-4").exists() and find_checkpoint(tmp_path) is None
