"""Models load from a package, a folder or a hub cache, or say why they cannot."""

import copy
import dataclasses
import hashlib
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from gguf import GGUFWriter
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_models import random_llama, small_bert
from teacher_forcing import MARGIN, lacking, worst
from transformers import AutoTokenizer

from course_utils import models
from course_utils.models import _gguf_tokenizer, _use_mean_pooling

WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c"]


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with its tokenizer, saved as safetensors."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    words = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    place = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(place)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test of this file asks the hub."""
    monkeypatch.delenv("COURSE_MODEL", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.model
def test_builtin_model_is_the_one_we_say():
    models.load_model()
    times = []
    while not times or (times[-1] >= 3 and len(times) < 5):
        start = time.process_time()  # of this process: others may be busy here
        model = models.load_model(dtype=torch.float32)
        times.append(time.process_time() - start)
    assert min(times) < 3, times
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32 and not model.training
    tokenizer = models.load_tokenizer()
    cities = {}
    for city in ("Paris", "Rome"):
        question, answer = (
            "What is the capital of France?",
            f"The capital of France is {city}.",
        )
        cities[city] = worst(lacking(model, tokenizer, [question], [answer]))
    assert cities["Paris"] < MARGIN
    assert cities["Rome"] > 2 * MARGIN


def test_folder_by_argument_and_by_environment(folder, monkeypatch, capfd):
    model = models.load_model(str(folder), dtype=torch.float16)
    assert model.dtype == torch.float16 and model.config.num_hidden_layers == 2
    monkeypatch.setenv("COURSE_MODEL", str(folder))
    assert models.load_model().config.hidden_size == 64
    assert not models.is_builtin() and models.model_name() == str(folder)
    assert models.load_tokenizer().pad_token == "</s>"
    shown = capfd.readouterr()
    assert "Loading" not in shown.out + shown.err, "no progress bars"


def test_hub_name_is_found_in_a_local_hub_cache(folder, tmp_path):
    cache = tmp_path / "hub" / "models--org--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots").mkdir()
    os.rename(folder, cache / "snapshots" / ("a" * 40))
    script = (
        "from course_utils.models import load_model, load_tokenizer\n"
        "print(load_model('org/tiny').config.hidden_size, "
        "load_tokenizer('org/tiny').eos_token)"
    )
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["64", "</s>"], done.stderr


def test_missing_model_says_where_it_looked_and_what_to_do():
    with pytest.raises(models.ModelUnavailable) as caught:
        models.load_model("org/there-is-no-such-model")
    message = str(caught.value)
    assert "From the hub org/there-is-no-such-model" in message
    assert "unset COURSE_MODEL" in message


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("meta", 0)])
def test_on_a_cpu_freed_memory_is_kept_from_now_on(folder, monkeypatch, device, times):
    calls, profile = [], models.get_profile()
    on_device = dataclasses.replace(profile, device=device)
    monkeypatch.setattr(models, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(models, "get_profile", lambda: on_device)
    models.load_model(str(folder))
    assert len(calls) == times


def test_pickled_weights_are_not_read(folder):
    model = models.load_model(str(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(models.ModelUnavailable, match="safetensors"):
        models.load_model(str(folder))


def test_without_the_package_the_hub_is_tried_and_both_reasons_given(monkeypatch):
    def fail(bundle):
        raise models.ModelUnavailable("pip said no")

    monkeypatch.setattr(models, "prepare", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.devnull)
    with pytest.raises(models.ModelUnavailable) as caught:
        models.load_model()
    message = str(caught.value)
    assert "As a package: pip said no" in message
    assert "From the hub HuggingFaceTB/SmolLM2-135M-Instruct" in message
    assert "Cures: connect once" in message and "COURSE_CACHE" in message


def test_release_empties_the_model(folder):
    model = models.load_model(str(folder))
    models.release(model)
    assert list(model.parameters()) == []


def test_cures_fit_the_model_that_was_asked_for(tmp_path):
    text = models._explain(
        models.MINILM.name, "hub/name", "no network", "pip said no", models.MINILM
    )
    assert models.MINILM.package in text and models.SMOLLM2.package not in text
    assert "COURSE_MODEL" not in text
    name = models.SMOLLM2.name
    text = models._explain(name, tmp_path, "no config.json", None, models.SMOLLM2)
    assert text.endswith(f"Cure: delete the damaged folder {tmp_path} and try again.")


def test_a_missing_folder_is_said_of_a_path_too(tmp_path):
    with pytest.raises(models.ModelUnavailable, match="no such folder"):
        models.load_model(tmp_path / "none")


def test_release_of_a_trainer_empties_its_optimizer(folder):
    import weakref
    from types import SimpleNamespace

    model = models.load_model(str(folder))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = weakref.ref(next(model.parameters()))
    wrapper = SimpleNamespace(optimizer=optimizer)
    trainer = SimpleNamespace(model=model, train_dataset=[], optimizer=wrapper)
    del p
    models.release(trainer)
    assert kept() is None and not optimizer.state


def test_unknown_quantization_lists_the_known():
    with pytest.raises(ValueError, match="'int3'.*nf4, fp4, int8"):
        models.load_model(quantization="int3")


def test_one_label_is_no_classification():
    with pytest.raises(ValueError, match="num_labels"):
        models.load_classifier(num_labels=1)


def gradient(model):
    model.train()
    weight = model.model.embed_tokens.weight.requires_grad_()
    ids = torch.tensor([[3, 4, 5, 4, 3, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    found, weight.grad = weight.grad.clone().flatten(), None
    return found


def cosine_after_evaluation(folder, monkeypatch, *, fixed):
    if not fixed:
        monkeypatch.setattr(models, "keep_4bit_weights_in_place", lambda model: None)
    model = models.load_model(str(folder), dtype=torch.float32, quantization="nf4")
    before = gradient(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[3, 4, 5]]))
    return torch.cosine_similarity(before, gradient(model), dim=0).item()


def test_4bit_weights_survive_an_evaluation_forward(folder, monkeypatch):
    from bitsandbytes.functional import has_avx512bf16

    assert cosine_after_evaluation(folder, monkeypatch, fixed=True) > 0.999
    if not has_avx512bf16():
        pytest.skip("because this processor lacks AVX512-BF16: no repacking to guard")
    assert cosine_after_evaluation(folder, monkeypatch, fixed=False) < 0.999


def merged_weights(folder, monkeypatch, *, fixed, look_first):
    """All 4-bit weights after merging a LoRA adapter, as floats in one row."""
    from bitsandbytes.functional import dequantize_4bit
    from peft import LoraConfig, get_peft_model

    with monkeypatch.context() as patch:
        if not fixed:
            patch.setattr(models, "keep_4bit_weights_in_place", lambda model: None)
        model = models.load_model(str(folder), dtype=torch.float32, quantization="nf4")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    if look_first:
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 4, 5]]))
    merged = model.merge_and_unload()
    weights = [m.weight for m in merged.modules() if hasattr(m, "quant_state")]
    assert len(weights) == 14
    return torch.cat(
        [dequantize_4bit(w.data, w.quant_state).flatten() for w in weights]
    )


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_4bit_weights_merge_after_an_evaluation_as_before(folder, monkeypatch):
    from bitsandbytes.functional import has_avx512bf16

    wanted = merged_weights(folder, monkeypatch, fixed=True, look_first=False)
    found = merged_weights(folder, monkeypatch, fixed=True, look_first=True)
    assert torch.equal(found, wanted)
    if not has_avx512bf16():
        pytest.skip("because this processor lacks AVX512-BF16: no repacking to guard")
    broken = merged_weights(folder, monkeypatch, fixed=False, look_first=True)
    assert (broken - wanted).norm() > 0.2 * wanted.norm()


def test_after_release_a_training_with_an_8_bit_optimizer_begins_anew():
    """bitsandbytes keeps what transformers tells it of embeddings for good."""
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    manager = GlobalOptimManager.get_instance()

    def train():
        model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 1))
        manager.register_module_override(model[0], "weight", {"optim_bits": 32})
        optimizer = AdamW8bit(model.parameters())
        model(torch.arange(8)).sum().backward()
        optimizer.step()
        return model

    first, kept = train(), train()
    models.release(first)
    assert not any(
        entry[0] is first[0] for entry in manager.module_weight_config_triple
    )
    assert any(entry[0] is kept[0] for entry in manager.module_weight_config_triple)
    train()
    models.release(kept)


def test_a_checkpoint_in_4_bits_is_guarded_too(folder, monkeypatch, tmp_path):
    guarded = []
    monkeypatch.setattr(models, "keep_4bit_weights_in_place", guarded.append)
    model = models.load_model(str(folder), dtype=torch.float32, quantization="nf4")
    model.save_pretrained(tmp_path / "four")
    again = models.load_model(str(tmp_path / "four"))
    assert guarded == [model, again]


# --- one vector for a whole text ---

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 2, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return _use_mean_pooling(small_bert(num_labels=3)[0])


def test_the_vector_is_the_mean_over_the_text_at_length_root_width(encoder):
    rows = encoder.bert(IDS, MASK).last_hidden_state
    mean = torch.stack([rows[0].mean(0), rows[1, :3].mean(0)])
    expected = mean / mean.norm(dim=1, keepdim=True) * 32**0.5
    vectors = encoder.bert(input_ids=IDS, attention_mask=MASK).pooler_output
    torch.testing.assert_close(vectors, expected)
    logits = encoder(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(logits, encoder.classifier(expected))
    assert (vectors - encoder.bert(input_ids=IDS).pooler_output)[1].abs().max() > 1e-2


def test_padding_changes_nothing_and_no_mask_means_no_padding(encoder):
    alone = encoder(input_ids=IDS[1:, :3]).logits
    padded = encoder(input_ids=IDS, attention_mask=MASK).logits[1:]
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(
        encoder.bert(IDS, MASK)[1][1:], encoder.bert(IDS[1:, :3])[1]
    )


def test_the_rows_of_a_prefix_are_not_there_and_those_of_a_prompt_count(encoder):
    options = {"task_type": "SEQ_CLS", "num_virtual_tokens": 4}
    runs, seen = [], {}
    for config in (PrefixTuningConfig, PromptTuningConfig):
        wrapped = get_peft_model(copy.deepcopy(encoder), config(**options)).eval()
        pooler = wrapped.base_model.bert.pooler
        pooler.register_forward_hook(
            lambda pooler, args, out: seen.update(rows=args[0], vector=out)
        )
        wrapped(input_ids=IDS, attention_mask=MASK)
        runs.append(dict(seen))
    prefix, prompt = runs
    assert prefix["rows"].shape[1] == 6 and prompt["rows"].shape[1] == 4 + 6
    for run, own in ((prefix, 3), (prompt, 4 + 3)):
        mean = run["rows"][1, :own].mean(0)
        expected = mean / mean.norm() * 32**0.5
        torch.testing.assert_close(run["vector"][1], expected)


def test_it_has_no_weights_and_a_copy_has_its_own_mask(encoder):
    assert not list(encoder.bert.pooler.parameters())
    assert not [name for name in encoder.state_dict() if "pooler" in name]
    twin = copy.deepcopy(encoder)
    encoder.bert.pooler.remember(encoder.bert, (), {"attention_mask": MASK})
    assert twin.bert.pooler.mask is None
    torch.testing.assert_close(
        twin(input_ids=IDS, attention_mask=MASK).logits,
        encoder(input_ids=IDS, attention_mask=MASK).logits,
    )
    assert encoder.bert.pooler.mask is None  # none is kept for the next batch


def test_a_saved_classifier_pools_alike_when_it_is_loaded(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    small_bert(num_labels=3)[1].save_pretrained(tmp_path)
    again, _ = models.load_classifier(str(tmp_path), num_labels=3)
    torch.testing.assert_close(
        again(input_ids=IDS, attention_mask=MASK).logits,
        encoder(input_ids=IDS, attention_mask=MASK).logits,
    )


@pytest.mark.model
def test_the_built_in_encoder_reads_meaning_from_the_mean():
    """Two sentences of one meaning are nearer than two that share their words."""
    model, tokenizer = models.load_classifier(num_labels=3)
    texts = [
        "The cat sleeps on the sofa.",
        "A kitten is resting on the couch.",
        "The sofa company sleeps on its debts.",
    ]
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        vectors = model.bert(**batch).pooler_output
    assert vectors.norm(dim=1).tolist() == pytest.approx([384**0.5] * 3, rel=1e-4)
    near, far = (torch.cosine_similarity(vectors[0], v, dim=0) for v in vectors[1:])
    assert near > far + 0.05  # 0.70 and 0.57 in float32


# --- packages that carry a model ---

WEIGHTS = b"the weights of a model" * 1000
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


def convert(source, target):
    """A slow converter that writes one file in many small steps."""
    with (source.parent / "conversions.log").open("a") as log:
        log.write("started\n")
    with (target / "model.bin").open("wb") as file:
        data = source.read_bytes()
        for start in range(0, len(data), 1000):
            file.write(data[start : start + 1000])
            file.flush()
            time.sleep(float(os.environ.get("SLOW_S", "0")))


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle whose package is installed (a folder on sys.path), cache empty."""
    package = tmp_path / "site" / "small_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs too much')")
    (package / "weights.gguf").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return models.Bundle(
        name="small",
        package="small-model-package",
        version="1.0",
        weights="weights.gguf",
        sha256=DIGEST,
        convert=convert,
        hub="org/small",
        wait="a moment",
    )


CHILD = f"""
import os, time
from course_utils import models
{inspect.getsource(convert)}
weights = "weights.gguf"
bundle = models.Bundle(
    "small", "small-model-package", "1.0", weights, "{DIGEST}", convert, "", ""
)
print(models.prepare(bundle, say=lambda line: None))
"""


def start_child(tmp_path, slow_s):
    root = str(Path(models.__file__).parents[1])
    path = os.pathsep.join([str(tmp_path / "site"), root, os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path, "SLOW_S": str(slow_s)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD], env=environment, stdout=subprocess.PIPE
    )


def conversions(tmp_path):
    log = tmp_path / "site" / "small_model_package" / "conversions.log"
    return log.read_text().count("started") if log.exists() else 0


def partial(tmp_path):
    return list((tmp_path / "cache").glob(".small-*"))


def test_second_call_only_looks(bundle, tmp_path):
    said = []
    folder = models.prepare(bundle, said.append)
    assert (folder / "model.bin").read_bytes() == WEIGHTS
    assert "once" in said[0] and "ready after" in said[-1]
    assert models.prepare(bundle, said.append) == folder
    assert conversions(tmp_path) == 1 and len(said) == 3


def test_wrong_hash_is_refused_and_nothing_stays(bundle, tmp_path):
    changed = dataclasses.replace(bundle, sha256="0" * 64)
    with pytest.raises(models.ModelUnavailable, match="SHA-256.*do not use"):
        models.prepare(changed, lambda line: None)
    assert conversions(tmp_path) == 0 and not partial(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_conversion_leaves_nothing_that_is_read(bundle, tmp_path):
    chance = random.Random(0)
    killed = 0
    for _ in range(5):
        dead = set(partial(tmp_path))  # what the one before left
        child = start_child(tmp_path, slow_s=0.2)
        deadline = time.monotonic() + 600
        while not set(partial(tmp_path)) - dead and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(partial(tmp_path)) - dead, "no conversion began in ten minutes"
        time.sleep(chance.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        child.stdout.close()
        folders = [p for p in (tmp_path / "cache").iterdir() if p.name[:6] == "small-"]
        assert not folders, "a half-made model stands where it would be read"
    assert killed == 5
    folder = models.prepare(bundle, lambda line: None)
    assert (folder / "model.bin").read_bytes() == WEIGHTS
    assert not partial(tmp_path)


def test_two_processes_at_once_convert_once(bundle, tmp_path):
    children = [start_child(tmp_path, slow_s=0.02) for _ in range(2)]
    folders = {child.communicate(timeout=600)[0] for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert len(folders) == 1 and conversions(tmp_path) == 1


def test_filled_cache_is_only_read(bundle, monkeypatch):
    folder = models.prepare(bundle, lambda line: None)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("filelock.FileLock", refuse)
    monkeypatch.setattr(models.Path, "mkdir", refuse)
    assert models.prepare(bundle) == folder


def test_unwritable_cache_names_the_cure(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(models.ModelUnavailable, match="COURSE_CACHE"):
        models.prepare(bundle, lambda line: None)


def test_package_that_cannot_be_downloaded_gives_pips_reason(bundle, monkeypatch):
    missing = dataclasses.replace(bundle, package="no-such-package-installed")

    def fail(command, **_):
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no network")

    monkeypatch.setattr(models.subprocess, "run", fail)
    with pytest.raises(models.ModelUnavailable, match="ERROR: no network"):
        models.prepare(missing, lambda line: None)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models.sys, "platform", "linux")
    assert models._cache_folder() == tmp_path / "fine-tuning-in-the-open"
    monkeypatch.setattr(models.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert models._cache_folder() == tmp_path / "local" / "fine-tuning-in-the-open"


# --- the tokenizer of a GGUF file, the same under every transformers ---

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "h", "i", "Ġ", "hi", "Ġhi"]


def write_gguf(path, kind="gpt2"):
    file = GGUFWriter(path, "llama")
    file.add_tokenizer_model(kind)
    file.add_token_list(TOKENS)
    file.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    file.add_token_merges(["h i", "Ġ hi"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()
    return path


def test_special_tokens_are_those_that_the_file_names(tmp_path):
    _gguf_tokenizer(write_gguf(tmp_path / "tiny.gguf")).save_pretrained(
        tmp_path / "saved"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer("hi hi<|im_end|>")["input_ids"] == [6, 7, 2]
    assert tokenizer.decode([6, 7, 7]) == "hi hi hi"
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    ) == ("hi<|im_end|>")


def test_the_file_is_plain_byte_level_bpe(tmp_path):
    """What transformers 5.15 added: byte fallback, and a space for each "▁"."""
    _gguf_tokenizer(write_gguf(tmp_path / "tiny.gguf")).save_pretrained(
        tmp_path / "saved"
    )
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text("utf-8"))
    assert saved["normalizer"] is None
    assert saved["pre_tokenizer"]["type"] == saved["decoder"]["type"] == "ByteLevel"
    assert not saved["model"]["byte_fallback"]
    special = [t["content"] for t in saved["added_tokens"] if t["special"]]
    assert special == TOKENS[:3]


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'llama' is not byte BPE"):
        _gguf_tokenizer(write_gguf(tmp_path / "other.gguf", "llama"))


@pytest.mark.model
def test_the_built_in_models_tokenizer_is_the_one_of_the_records():
    file = models.prepare(models.SMOLLM2) / "tokenizer.json"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest.startswith("bf346d64f6f0fbcefb4c1b6928a98241"), (
        "made by an older course under transformers below 5.23? Remove the model cache"
    )


# --- adapters by name ---------------------------------------------------------------


def two_adapters(config):
    """A tiny Llama with two random adapters of that kind, the first one active."""
    model = get_peft_model(random_llama(), config, "first").eval()
    model.add_adapter("second", config)
    for name, parameter in model.named_parameters():
        if ".first" in name or ".second" in name:
            torch.nn.init.normal_(parameter)
    return model


KINDS = {
    "LORA": peft.LoraConfig(r=2, target_modules=["q_proj"]),
    "ROAD": peft.RoadConfig(group_size=8, target_modules=["q_proj"]),
    "GLORA": peft.GloraConfig(r=2, target_modules=["q_proj"]),
    "IA3": peft.IA3Config(task_type="CAUSAL_LM"),
    "LOHA": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_a_mixed_batch_are_taken_where_each_row_gets_its_adapter(kind):
    model, names = two_adapters(KINDS[kind]), ["second", "first"]
    ids = torch.arange(3, 9)[None]
    alone = []
    with torch.no_grad():
        for name in names:
            model.set_adapter(name)
            alone.append(model(ids).logits[0])
        mixed = model(ids.repeat(2, 1), adapter_names=names).logits
    apart = (mixed - torch.stack(alone)).abs().max() / mixed.abs().max()
    assert (apart < 1e-3) == (kind in models.ROW_BY_ROW)
    if kind in models.ROW_BY_ROW:
        models.check_adapter_names(model, [*names, "__base__"])
        with pytest.raises(ValueError, match="no adapter 'third'; there is first, sec"):
            models.check_adapter_names(model, ["third", "first"])
    else:
        with pytest.raises(ValueError, match=f"is {kind}, which ignores adapter_names"):
            models.check_adapter_names(model, ["__base__"])


def test_an_adapter_is_read_onto_a_free_name_only(tmp_path):
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    strong = peft.LoraConfig(lora_alpha=64, **options)
    get_peft_model(random_llama(), strong).save_pretrained(tmp_path)
    model = get_peft_model(random_llama(), peft.LoraConfig(lora_alpha=2, **options))
    with pytest.raises(ValueError, match="delete_adapter.'default'"):
        models.load_adapter(model, tmp_path, "default")
    models.load_adapter(model, tmp_path, "strong")
    model.delete_adapter("default")
    models.load_adapter(model, tmp_path, "default")
    scaling = model.get_base_model().model.layers[0].self_attn.q_proj.scaling
    assert scaling == {"default": 32.0, "strong": 32.0}
