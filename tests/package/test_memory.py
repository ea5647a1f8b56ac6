"""Predicted memory: against the real allocator, the exact engine, PEFT's own run."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from course_utils import memory, parameters
from course_utils.memory import (
    GIB,
    estimate,
    estimate_memory,
    measure_memory,
    model_config,
)
from course_utils.memory.formula import optimizer_state_bytes, quantization_constants

ALL = {"r": 8, "target_modules": "all-linear"}
VIRTUAL = {"num_virtual_tokens": 16}
PUBLISHED = {  # Llama-3.2-3B in PEFT's method comparison, LoRA r 32 on q and v
    "batch_size": 4,
    "sequence_length": 768,
    "dtype": torch.bfloat16,
    "r": 32,
    "target_modules": ["q_proj", "v_proj"],
}
PLAN = {"batch_size": 4, "sequence_length": 512, "dtype": "bfloat16"}


def short(name, layers):
    """A known configuration with fewer layers, at its real width."""
    config = model_config(name)
    config.num_hidden_layers = layers
    return config


# --- against the real CPU allocator ----------------------------------------------


def case(method, size, options=None, **more):
    base = {"method": method, "batch_size": size[0], "sequence_length": size[1]}
    return base | {"options": options or {}} | more


def real_cases(size):
    nf4 = {"quantization": "nf4", "double_quant": True}
    return [
        case("full", size),
        case("full", size, gradient_checkpointing=True),
        case("lora", size, ALL),
        case("lora", size, ALL, gradient_checkpointing=True),
        case("lora", size, ALL, **nf4),
        case("lora", size, ALL, gradient_checkpointing=True, **nf4),
        case("lora", size, ALL, padding=False),
        case("lora", size, ALL, quantization="fp4", double_quant=False),
        case("prompt_tuning", size, VIRTUAL),
        case("prefix_tuning", size, VIRTUAL),
    ]


def compare_with_allocator(cases, layers):
    child = Path(__file__).with_name("memory_child.py")
    command = [sys.executable, str(child), str(layers), json.dumps(cases)]
    path = os.pathsep.join([str(child.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [x[5:] for x in done.stdout.splitlines() if x.startswith("CASE ")]
    assert len(lines) == len(cases)
    for settings, line in zip(cases, lines, strict=True):
        real = json.loads(line)
        arguments = dict(settings)
        options = arguments.pop("options")
        guess = estimate_memory(
            short("smollm2-135m", layers),
            arguments.pop("method"),
            dtype="float32",
            engine="exact",
            **arguments,
            **options,
        )
        assert guess.total == pytest.approx(real["peak"], rel=0.05), settings
        kept = guess.static - guess.static_parts["gradients"]
        assert kept == pytest.approx(real["start"], rel=0.01), settings
        added = guess.total - kept  # without the weights, which are easy to guess
        assert added == pytest.approx(real["peak"] - real["start"], rel=0.05), settings


@pytest.mark.model
@pytest.mark.timeout(1800)
def test_exact_is_within_5_percent_of_the_real_allocator():
    compare_with_allocator(real_cases((3, 64))[:6], layers=3)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", [(2, 128), (8, 96)])
def test_exact_is_within_5_percent_of_the_real_allocator_on_all_layers(size):
    compare_with_allocator(real_cases(size), layers=30)


# --- the closed form against the exact engine ------------------------------------

METHODS = {
    "full": ("full", {}),
    "lora": ("lora", ALL),
    "lora q,v": ("lora", {"r": 64}),
    "qlora": ("qlora", ALL),
    "prompt": ("prompt_tuning", VIRTUAL),
    "prefix": ("prefix_tuning", VIRTUAL),
}


def assert_engines_agree(config, method, options, moving=0.15, **settings):
    if method == "prefix_tuning" and settings.get("gradient_checkpointing"):
        return
    exact, form = (
        estimate_memory(config, method, engine=engine, **settings, **options)
        for engine in ("exact", "formula")
    )
    where = (config.hidden_size, method, settings)
    assert form.static_parts == exact.static_parts, where
    assert form.trainable == exact.trainable, where
    assert form.total == pytest.approx(exact.total, rel=0.10), where
    # the same without what is easy to count, so that weights hide nothing
    kept = exact.static - exact.static_parts["gradients"]
    assert form.total - kept == pytest.approx(exact.total - kept, rel=moving), where


GRID = [("llama-3.2-3b", method) for method in METHODS]
GRID += [("qwen2.5-7b", "qlora"), ("smollm2-360m", "full")]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "method"), GRID)
def test_formula_is_within_10_percent_of_exact(name, method, checkpointing):
    method, options = METHODS[method]
    assert_engines_agree(
        short(name, 2),
        method,
        options,
        batch_size=4,
        sequence_length=512,
        dtype="bfloat16",
        gradient_checkpointing=checkpointing,
        loss="logits" if checkpointing else "chunked",
    )


HALF = {"dtype": "float16", "autocast": "float16"}
MIXED = {"dtype": "float32", "autocast": "float16"}
VARIANTS = [
    ("lora", {"loss": "chunked"}),
    ("qlora", {"loss": "chunked", "gradient_checkpointing": True}),
    ("lora", {"attention": "eager"}),
    ("lora", {"attention": "math", "padding": False}),
    ("lora", HALF),
    ("qlora", HALF),
    ("lora", MIXED),
    ("qlora", MIXED),
    ("full", MIXED | {"gradient_checkpointing": True}),
    ("lora", {"gradient_accumulation": True}),
    ("qlora", {"optimizer": "paged_adamw_8bit"}),
    ("lora", HALF | {"lora_dropout": 0.1}),
    ("qlora", HALF | {"lora_dropout": 0.1}),
]


@pytest.mark.parametrize(("method", "settings"), VARIANTS, ids=str)
def test_formula_follows_exact_through_other_settings(method, settings):
    settings = {"dtype": "bfloat16", "batch_size": 2, "sequence_length": 384} | settings
    options = {} if method == "full" else ALL
    assert_engines_agree(short("mistral-7b", 2), method, options, **settings)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", memory.KNOWN_MODELS)
def test_formula_is_within_10_percent_of_exact_on_all_layers(name, method):
    method, options = METHODS[method]
    runs = [((1, 1024), "chunked"), ((4, 512), "logits")]
    for (size, loss), checkpointing in itertools.product(runs, [False, True]):
        assert_engines_agree(
            model_config(name),
            method,
            options,
            batch_size=size[0],
            sequence_length=size[1],
            dtype="bfloat16",
            loss=loss,
            gradient_checkpointing=checkpointing,
            moving=0.25,
        )


# --- against a published run, and against libraries ------------------------------


@pytest.mark.parametrize("engine", ["formula", "exact"])
def test_the_published_run_of_peft(engine):
    estimate = estimate_memory("llama-3.2-3b", "lora", engine=engine, **PUBLISHED)
    assert estimate.trainable == 9_175_040
    assert estimate.static == 6_572_300_288  # 3,212,749,824 x 2 + 9,175,040 x 16
    assert estimate.total_gib == pytest.approx(20.76, rel=0.05)


def test_trained_parameters_agree_with_the_counter():
    config = model_config("qwen2.5-7b")
    for method, options in METHODS.values():
        estimate = estimate_memory(config, method, **PLAN, **options)
        name = "lora" if method == "qlora" else method
        expected = parameters.adapter_parameters(config, name, **options)
        assert estimate.trainable == expected


def test_a_lora_config_with_ranks_and_layers_of_its_own():
    import peft

    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"down_proj": 32},
    )
    assert_engines_agree(short("smollm2-360m", 3), config, {}, **PLAN)


def test_exact_takes_what_has_no_formula():
    import peft
    from transformers import GPT2Config

    base = {"batch_size": 2, "sequence_length": 32, "dtype": "float32"}
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=200)
    with pytest.raises(ValueError, match="engine='exact'"):
        estimate_memory(config, "full", **base)
    assert estimate_memory(config, "full", engine="exact", **base).trainable > 0
    ia3 = peft.IA3Config(task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="engine='exact'"):
        estimate_memory(short("smollm2-135m", 2), ia3, **base)
    estimate = estimate_memory(short("smollm2-135m", 2), ia3, engine="exact", **base)
    assert estimate.trainable == 2 * (192 + 192 + 1536)
    named = estimate_memory(short("smollm2-135m", 2), "ia3", engine="exact", **base)
    assert named.parts == estimate.parts


@pytest.mark.parametrize("elements", [1000, 5000, 150_000])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd_momentum"])
def test_optimizer_state_is_what_the_optimizer_keeps(name, elements):
    import bitsandbytes.optim as bnb

    # It remembers the place in its list of a weight that is to keep 32 bits, and holds
    # every later optimizer of the process to it (0.50.2).
    bnb.GlobalOptimManager.get_instance().initialize()
    makers = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": bnb.AdamW8bit,
        "sgd_momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    }
    weight = torch.nn.Parameter(torch.ones(elements))
    weight.grad = torch.ones(elements)
    optimizer = makers[name]([weight])
    optimizer.step()
    shared = ("qmap1", "qmap2", "step")  # code books, one for all; a counter
    state = optimizer.state[weight]
    real = sum(
        value.nbytes
        for key, value in state.items()
        if torch.is_tensor(value) and key not in shared
    )
    assert optimizer_state_bytes(name, elements, 4) == real


@pytest.mark.parametrize("method", ["full", "prompt_tuning"])
def test_the_trainer_keeps_an_embeddings_moments_in_float32(method, tmp_path):
    """Also where the optimizer has 8 bits; it is the largest tensor of small models."""
    from peft import get_peft_model
    from small_models import byte_tokenizer, random_llama
    from training_child import records
    from trl import SFTTrainer

    from course_utils.formatting import CompletionCollator
    from course_utils.parameters import peft_config
    from course_utils.runtime import Profile
    from course_utils.training import sft_config

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
    model = random_llama(**sizes, tie_word_embeddings=method == "full")
    options = {} if method == "full" else {"num_virtual_tokens": 80}
    plans = [
        estimate_memory(
            model.config,
            method,
            batch_size=2,
            sequence_length=8,
            dtype="float32",
            optimizer="adamw_8bit",
            engine=engine,
            **options,
        )
        for engine in ("formula", "exact")
    ]
    assert plans[0].static_parts == plans[1].static_parts
    if options:
        config = peft_config(method, task_type="CAUSAL_LM", **options)
        model = get_peft_model(model, config)
    profile = Profile("cpu", "cpu", torch.float32)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(profile, tmp_path, max_steps=1, optim="adamw_bnb_8bit"),
        train_dataset=records(),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    shared = ("qmap1", "qmap2", "step")
    real = sum(
        value.nbytes
        for state in trainer.optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key not in shared
    )
    assert plans[0].static_parts["optimizer"] == real


def test_paged_state_of_large_tensors_is_left_to_the_driver():
    plain = estimate_memory("llama-3.2-1b", "full", **PLAN, optimizer="adamw_8bit")
    paged = estimate_memory(
        "llama-3.2-1b", "full", **PLAN, optimizer="paged_adamw_8bit"
    )
    table = 128256 * 2048  # in fp32; the norms are too, and stay
    moved = 8 * table + 2 * (plain.trainable - table - 33 * 2048)
    stayed = paged.static_parts["optimizer"]
    assert plain.static_parts["optimizer"] == stayed + moved


def test_4bit_bytes_are_those_that_bitsandbytes_makes():
    import bitsandbytes as bnb

    for double in (False, True):
        layer = bnb.nn.Linear4bit(
            2048, 512, bias=False, compress_statistics=double, quant_type="nf4"
        )
        layer = layer.to("cpu")  # quantizes
        state = layer.weight.quant_state
        real = state.absmax.nbytes + state.code.nbytes
        if double:
            nested = (state.offset, state.state2.absmax, state.state2.code)
            real += sum(tensor.nbytes for tensor in nested)
        one = short("llama-3.2-1b", 1)
        with_4bit, without = (
            estimate_memory(one, "lora", **PLAN, quantization=q, double_quant=double)
            for q in ("nf4", None)
        )
        linear = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)
        saved = without.static_parts["weights"] - with_4bit.static_parts["weights"]
        assert saved == 2 * linear - linear // 2
        widths = {"uint8": 1, "float32": 4}
        constants = quantization_constants(2048 * 512, double)
        assert sum(length * widths[dtype] for _, length, dtype in constants) == real
        assert layer.weight.nbytes == 2048 * 512 // 2


# --- what the answer says --------------------------------------------------------


def test_parts_add_up_and_more_work_takes_more_memory():
    last = 0
    for batch in (1, 2, 4, 8):
        settings = PLAN | {"batch_size": batch}
        estimate = estimate_memory("smollm2-360m", "lora", **settings, **ALL)
        assert sum(estimate.parts.values()) == estimate.total
        assert sum(estimate.static_parts.values()) == estimate.static
        assert set(estimate.parts) <= set(memory.PARTS)
        assert estimate.total > last
        last = estimate.total


def test_each_saving_saves():
    base = {"batch_size": 8, "sequence_length": 512, "dtype": "bfloat16", **ALL}
    plain = estimate_memory("llama-3.2-1b", "lora", **base).total
    for saving in (
        {"gradient_checkpointing": True},
        {"loss": "chunked"},
        {"optimizer": "adamw_8bit"},
        {"quantization": "nf4"},
    ):
        assert estimate_memory("llama-3.2-1b", "lora", **base, **saving).total < plain
    accumulated = estimate_memory(
        "llama-3.2-1b", "lora", **base, gradient_accumulation=True
    )
    assert accumulated.total > plain


def test_verdict_names_the_cheapest_change_that_fits():
    run = PLAN | {"batch_size": 4, "sequence_length": 512, **ALL}
    estimate = estimate_memory("llama-3.2-3b", "lora", **run)
    assert not estimate.fits("T4") and estimate.fits("A100-40")
    assert estimate.verdict("A100-40").startswith("Fits")
    words, changed = estimate.cheapest_change("T4")
    assert changed.fits("T4")
    assert words in estimate.verdict("T4")
    # nothing cheaper fits
    cheaper = [{"loss": "chunked"}, {"optimizer": "adamw_8bit"}]
    cheaper.append(cheaper[0] | cheaper[1])
    assert not any(
        estimate_memory("llama-3.2-3b", "lora", **run, **c).fits("T4") for c in cheaper
    )


def test_verdict_where_nothing_fits_and_where_there_is_no_formula():
    config = model_config("llama-3.1-8b")
    config.hidden_size, config.num_hidden_layers = 8192, 80
    config.intermediate_size, config.num_attention_heads = 28672, 64
    estimate = estimate_memory(config, "lora", **PLAN)
    assert estimate.cheapest_change("T4") is None
    assert estimate.verdict("T4").endswith("a smaller model, or at least the A100-40.")
    from transformers import GPT2Config

    small = GPT2Config(n_layer=2, n_embd=512, n_head=2, vocab_size=50_000)
    plan = PLAN | {"batch_size": 512, "engine": "exact"}
    wide = estimate_memory(small, "full", **plan)
    assert wide.verdict("T4").endswith("the closed form knows no change for this.")


def test_full_fine_tuning_of_3b_on_a_t4_is_told_to_become_qlora():
    estimate = memory.t4_plan("llama-3.2-3b", "full", batch_size=4, sequence_length=512)
    words, changed = estimate.cheapest_change("T4")
    assert "QLoRA" in words and changed.fits("T4")
    assert changed.request.method == "lora" and changed.request.quantization == "nf4"


def test_a_batch_of_one_as_a_cure_is_what_the_card_would_plan():
    estimate = memory.t4_plan(
        "llama-3.2-1b", "lora", batch_size=4, sequence_length=2048, **ALL
    )
    alone = memory.t4_plan(
        "llama-3.2-1b",
        "lora",
        batch_size=1,
        sequence_length=2048,
        gradient_accumulation=True,
        **ALL,
    )
    assert not estimate.fits("T4") and not alone.fits("T4")
    words, changed = estimate.cheapest_change("T4")
    assert changed.fits("T4") and words != "batch 1 with gradient accumulation"
    if changed.request.batch_size == 1:
        assert changed.request.attention == "math"


def test_t4_plan_knows_a_prefix_by_name_and_by_configuration():
    from peft import PrefixTuningConfig

    size = {"batch_size": 1, "sequence_length": 256}
    config = PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    named = memory.t4_plan(
        "llama-3.2-3b", "prefix_tuning", num_virtual_tokens=20, **size
    )
    assert memory.t4_plan("llama-3.2-3b", config, **size).total == named.total
    assert named.request.attention == "sdpa"


def test_t4_plan_takes_the_choices_of_the_card():
    plan = {"batch_size": 1, "sequence_length": 512}
    adapter = memory.t4_plan("llama-3.2-1b", "lora", **plan).request
    assert (adapter.dtype, adapter.autocast) == ("float16", "float16")
    assert adapter.attention == "math"  # grouped heads, nothing padded
    whole = memory.t4_plan("llama-2-7b", "full", **plan).request
    assert (whole.dtype, whole.attention) == ("float32", "sdpa")


# --- requests that make no sense -------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"sequence_length": 2.5}, "sequence_length must be a whole number"),
        ({"sequence_length": 9000}, "only 8192 positions"),
        ({"config": "gpt-5"}, "unknown model"),
        ({"method": "magic"}, "unknown method 'magic'; known: full, lora"),
        ({"dtype": "int8"}, "dtype 'int8' is none of float32"),
        ({"optimizer": "adam"}, "optimizer 'adam' is none of adamw"),
        ({"attention": "flash"}, "attention 'flash' is none of"),
        ({"loss": "fused"}, "loss 'fused' is none of"),
        ({"engine": "guess"}, "engine 'guess' is none of"),
        ({"quantization": "int4"}, "quantization 'int4' is none of nf4"),
        ({"method": "full", "quantization": "nf4"}, "cannot train 4-bit weights"),
        ({"method": "full", "dtype": "float16"}, "cannot train fp16 weights"),
        ({"method": "full", "r": 8}, "full fine-tuning takes no r"),
        ({"autocast": "float32"}, "autocast 'float32' is none of float16"),
        ({"method": "prompt_tuning"}, "needs num_virtual_tokens"),
        (
            {
                "method": "prefix_tuning",
                "num_virtual_tokens": 8,
                "gradient_checkpointing": True,
            },
            "key/value cache",
        ),
        ({"rank": 8}, "rank"),
        ({"target_modules": ["w_q"]}, "w_q"),
        ({"target_modules": ["lm_head"], "loss": "chunked"}, "chunked loss needs"),
        (
            {"target_modules": ["lm_head"], "loss": "chunked", "engine": "exact"},
            "chunked loss needs",
        ),
    ],
    ids=str,
)
def test_bad_requests_say_what_is_wrong(changes, message):
    good = {
        "config": "smollm2-135m",
        "method": "lora",
        "batch_size": 2,
        "sequence_length": 64,
        "dtype": "float32",
    }
    with pytest.raises(ValueError, match=message):
        estimate_memory(**good | changes)


def test_an_unknown_card_is_answered_with_the_list():
    estimate = estimate_memory("smollm2-135m", "lora", **PLAN)
    for ask in (estimate.fits, estimate.verdict, estimate.cheapest_change):
        with pytest.raises(ValueError, match="unknown GPU 'T5'; known: T4, P100"):
            ask("T5")
    assert memory.GPUS["T4"] == 14.0


# --- measuring -------------------------------------------------------------------


def test_allocator_counts_what_lives_at_the_same_time():
    kept = torch.ones(250_000)
    with measure_memory("allocator") as used:
        for _ in range(3):
            first = torch.ones(1_000_000)
            second = first + 1
            del first
        del second
    expected = 3 * 4_000_000  # the old second, first, second; and some scalars
    assert used.added_bytes == pytest.approx(expected, abs=1000)
    assert used.start_bytes >= kept.nbytes
    assert used.peak_bytes == used.start_bytes + used.added_bytes


def test_measure_memory_refuses_unknown_kinds():
    with pytest.raises(ValueError, match="none of auto, cuda"), measure_memory("ram"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA"), measure_memory("cuda"):
            pass
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="needs Apple"), measure_memory("mps"):
            pass


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", "allocator"), ("mps", "mps"), ("cuda", "cuda")]
)
def test_what_is_measured_follows_the_device_of_the_profile(monkeypatch, device, kind):
    """A run on the CPU beside a card measures the CPU's memory."""
    profile = SimpleNamespace(device=device)
    monkeypatch.setattr(estimate, "get_profile", lambda: profile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for meter in ("_cuda", "_mps", "_allocator"):
        monkeypatch.setattr(estimate, meter, lambda result: iter([None]))
    with measure_memory() as used:
        pass
    assert used.kind == kind


def test_the_peak_on_apples_gpu_is_what_the_pool_grew_by(monkeypatch):
    """It keeps no peak, but blocks that were freed stay in torch's pool."""
    in_use, pool, synchronised = [1000], [8000], []
    for name, answer in (
        ("synchronize", lambda: synchronised.append(True)),
        ("empty_cache", lambda: pool.__setitem__(0, 1500)),
        ("current_allocated_memory", lambda: in_use[0]),
        ("driver_allocated_memory", lambda: pool[0]),
    ):
        monkeypatch.setattr(torch.mps, name, answer)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with measure_memory("mps") as used:
        in_use[0], pool[0] = 5000, 5500
        in_use[0] = 2000
    assert (used.start_bytes, used.peak_bytes, used.kind) == (1000, 5000, "mps")
    assert synchronised and used.added_bytes == 4000


@pytest.mark.gpu
def test_cuda_peak_is_the_allocators():
    with measure_memory() as used:
        block = torch.ones(1_000_000, device="cuda")
        del block
    assert used.kind == "cuda"
    assert 4_000_000 <= used.added_bytes < 8_000_000


def test_estimates_take_milliseconds():
    run = {"batch_size": 4, "sequence_length": 512, "dtype": "bfloat16", **ALL}
    estimate_memory("llama-2-7b", "qlora", **run)
    start = time.process_time()
    for batch in range(1, 11):
        estimate_memory("llama-2-7b", "qlora", **run | {"batch_size": batch})
    assert (time.process_time() - start) / 10 < 0.1
    assert GIB == 2**30


def test_adapters_on_the_upper_layers_alone_have_no_formula():
    options = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [2]}
    with pytest.raises(ValueError, match="upper layers alone: use engine='exact'"):
        estimate_memory(short("smollm2-360m", 3), "lora", **PLAN, **options)
