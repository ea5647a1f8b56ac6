"""Which dtype computes and which is trained, on machines that are not here.

The machine is faked where PyTorch is asked about it. What is asserted are built
arguments and the dtypes of parameters of built trainers, never a description.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import byte_tokenizer, random_llama
from training_child import records
from transformers import Trainer, TrainingArguments
from trl import SFTTrainer

from course_utils import models, runtime
from course_utils import training_callbacks as callbacks
from course_utils.formatting import CompletionCollator
from course_utils.training import (
    LossHistory,
    prepare_trainer,
    sft_config,
    training_arguments,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Machine:
    """What PyTorch says there, and what must follow."""

    dtype: torch.dtype
    device: str = "cpu"
    capability: tuple[int, int] | None = None
    mps: bool = False
    avx512_bf16: bool | None = False  # None: this torch cannot say
    amx: bool | None = False


MACHINES = {
    "CPU": Machine(FP32),
    "CPU with AVX512-BF16": Machine(BF16, avx512_bf16=True),
    "CPU with AMX": Machine(BF16, amx=True),
    "CPU, a torch that cannot say": Machine(FP32, avx512_bf16=None, amx=None),
    "T4": Machine(FP16, "cuda", (7, 5)),
    "V100": Machine(FP16, "cuda", (7, 0)),
    "L4": Machine(BF16, "cuda", (8, 9)),
    "A100": Machine(BF16, "cuda", (8, 0)),
    "T4 beside a CPU with bf16": Machine(FP16, "cuda", (7, 5), avx512_bf16=True),
    "a Mac": Machine(FP32, mps=True),
    "MPS, asked for": Machine(FP32, "mps", mps=True),
}


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    found = MACHINES[request.param]
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    monkeypatch.delenv("COURSE_DEVICE", raising=False)
    if found.device == "mps":  # never unasked
        monkeypatch.setenv("COURSE_DEVICE", "mps")

    def capability(*_):
        if found.capability is None:  # as a torch without CUDA says it
            raise AssertionError("Torch not compiled with CUDA enabled")
        return found.capability

    has_card = found.capability is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: has_card)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: found.mps)
    monkeypatch.setattr(runtime.platform, "machine", lambda: "x86_64")
    probes = {
        "_is_avx512_bf16_supported": found.avx512_bf16,
        "_is_amx_tile_supported": found.amx,
    }
    for probe, answer in probes.items():
        if answer is None:
            monkeypatch.delattr(torch.cpu, probe, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, probe, lambda a=answer: a, raising=False)
    pretend_device(monkeypatch, "cpu")
    return found


def pretend_device(monkeypatch, name):
    """What arguments say of their device; none is touched."""
    device = property(lambda self: torch.device(name))
    monkeypatch.setattr(TrainingArguments, "device", device)


@pytest.fixture
def t4():
    return runtime.Profile("t4", "cuda", FP16, 0)


def test_arguments_compute_in_the_dtype_of_the_machine(machine, tmp_path):
    profile = runtime.get_profile()
    assert (profile.device, profile.dtype) == (machine.device, machine.dtype)
    for make in (training_arguments, sft_config):
        args = make(profile, tmp_path)
        assert args.fp16 is (machine.dtype == FP16)
        assert args.bf16 is (machine.dtype == BF16)
        assert args.use_cpu is (machine.device == "cpu")
        fused = machine.device != "mps"
        assert args.optim == ("adamw_torch_fused" if fused else "adamw_torch")
        assert not (args.fp16_full_eval or args.bf16_full_eval)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama and its tokenizer, saved in bfloat16 as many models are."""
    place = tmp_path_factory.mktemp("tiny")
    random_llama(hidden_size=64).to(BF16).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return str(place)


def load(folder, monkeypatch, profile, **options):
    """`load_model` for a profile, on the CPU that is here."""
    here = replace(profile, device="cpu")
    monkeypatch.setattr(models, "get_profile", lambda: here)
    return models.load_model(folder, **options)


def dtypes(model, trainable):
    chosen = [p for p in model.parameters() if p.requires_grad == trainable]
    return {p.dtype for p in chosen if p.is_floating_point()}


def test_what_is_trained_is_float32_on_each_machine(machine, folder, monkeypatch):
    profile = runtime.get_profile()
    model = get_peft_model(load(folder, monkeypatch, profile), LORA)
    assert dtypes(model, trainable=False) == {machine.dtype}
    assert dtypes(model, trainable=True) == {FP32}
    full = load(folder, monkeypatch, profile, dtype=FP32)
    assert dtypes(full, trainable=True) == {FP32}


# --- a T4, closely ------------------------------------------------------------------


def make_trainer(model, t4, folder, kind=SFTTrainer, **settings):
    """A trainer with a T4's arguments; autocast alone is off, which needs the card."""
    make = sft_config if kind is SFTTrainer else training_arguments
    with pytest.MonkeyPatch.context() as patch:
        pretend_device(patch, "cpu")
        args = make(t4, folder, max_steps=2, per_device_train_batch_size=4, **settings)
    assert (args.fp16, args.bf16, args.use_cpu) == (True, False, False)
    args.mixed_precision, args.use_cpu = "no", True
    assert args.device.type == "cpu"  # asked anew: now it sets up what a trainer needs
    return kind(
        model=model,
        args=args,
        train_dataset=records(),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
    )


def every_dtype(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


@pytest.mark.parametrize("kind", [SFTTrainer, Trainer])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_t4_trains_float32_and_meets_no_bfloat16(
    method, kind, t4, folder, monkeypatch, tmp_path
):
    options = {"full": {"dtype": FP32}, "lora": {}, "qlora": {"quantization": "nf4"}}
    model = load(folder, monkeypatch, t4, **options[method])
    if method == "qlora":
        linear = model.model.layers[0].self_attn.q_proj
        assert linear.compute_dtype == FP16
        assert linear.weight.quant_state.dtype == FP16
    if method != "full":
        model = get_peft_model(model, LORA)
    trainer = make_trainer(model, t4, tmp_path, kind)
    prepare_trainer(trainer)
    assert dtypes(trainer.model, trainable=True) == {FP32}
    assert BF16 not in every_dtype(trainer.model)
    if method != "full":
        assert FP16 in dtypes(trainer.model, trainable=False)


@pytest.mark.parametrize("wrong", [BF16, FP16])
def test_a_wrong_dtype_stops_a_t4_before_step_1(wrong, t4, folder, tmp_path):
    trainer = make_trainer(get_peft_model(random_llama(), LORA), t4, tmp_path)
    prepare_trainer(trainer)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "layers.1." in name:
            parameter.data = parameter.data.to(wrong)
    with pytest.raises(ValueError, match="layers.1.*the fp16 gradient scaler refuses"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_card_keeps_the_librarys_kernels_and_never_builds_all_logits(t4, tmp_path):
    """The fused attention kernel, and TRL's loss that never holds B·T·V logits."""
    model = random_llama()
    trainer = make_trainer(model, t4, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        pretend_device(patch, "cuda")
        patch.setattr("course_utils.runtime.keep_freed_memory", pytest.fail)
        prepare_trainer(trainer)
    assert model.config._attn_implementation == "sdpa"
    kinds = {type(c) for c in trainer.callback_handler.callbacks}
    assert callbacks.QuickAttention not in kinds
    assert "compute_loss" not in vars(trainer)
    seen = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    batch = CompletionCollator(byte_tokenizer())(list(records(3)))
    loss = trainer.compute_loss(model.train(), dict(batch))
    own = model.eval()(**batch).loss
    assert seen == [own.new_empty(*batch["input_ids"].shape, 259).shape]
    assert loss.item() == pytest.approx(own.item(), abs=1e-4)


# --- a real card, taken for a T4 ----------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_card_taken_for_a_t4_trains_in_float16(method, folder, tmp_path):
    options = {"full": {"dtype": FP32}, "lora": {}, "qlora": {"quantization": "nf4"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        profile = runtime.get_profile("t4")
        model = models.load_model(folder, **options[method])
    assert (profile.device, profile.dtype) == ("cuda", FP16)
    if method != "full":
        model = get_peft_model(model, LORA)
    size = {"max_steps": 30, "per_device_train_batch_size": 4}
    trainer = SFTTrainer(
        model=model,
        args=sft_config(profile, tmp_path, learning_rate=1e-2, **size),
        train_dataset=records(),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
    )
    prepare_trainer(trainer)
    assert dtypes(trainer.model, trainable=True) == {FP32}
    assert BF16 not in every_dtype(trainer.model)
    if method != "full":
        assert FP16 in dtypes(trainer.model, trainable=False)
    trainer.train()
    scaler = trainer.accelerator.scaler
    assert scaler is not None and scaler.is_enabled()
    assert 1 <= scaler.get_scale() <= 2**24
    loss = LossHistory.from_trainer(trainer).loss
    assert len(loss) == 30 and all(map(math.isfinite, loss))
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
    assert dtypes(trainer.model, trainable=True) == {FP32}
