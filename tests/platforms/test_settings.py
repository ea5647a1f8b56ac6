"""Broken settings, one row each: the message names the setting and the cure.

Broken data files have a table of their own in test_data.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import byte_tokenizer, random_llama

from course_utils import (
    data,
    evaluation,
    formatting,
    inference,
    lessons,
    memory,
    models,
    parameters,
    runtime,
    training,
)
from course_utils.models import ModelUnavailable

TOKENIZER = byte_tokenizer()
RECORD = {"prompt": "a", "completion": "b" * 30}
PROFILE = runtime.Profile("cpu", "cpu", torch.float32, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model's folder, to be broken in many ways."""
    place = tmp_path_factory.mktemp("saved")
    random_llama(hidden_size=64).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("PROFILE", "MODEL", "CACHE", "BUILD"):
        monkeypatch.delenv(f"COURSE_{name}", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def generate(**options):
    prompts = options.pop("prompts", ["hi"])
    return inference.generate(random_llama(), TOKENIZER, prompts, **options)


def estimate(method="lora", model="llama-2-7b", **options):
    sizes = {"batch_size": 1, "sequence_length": 8, "dtype": "float16"}
    return memory.estimate_memory(model, method, **sizes | options)


def evaluate(limit):
    commands = data.load_examples("home_commands", "test")
    return evaluation.evaluate(random_llama(), TOKENIZER, commands, limit=limit)


def adapter(method, **options):
    config = memory.model_config("llama-2-7b")
    return parameters.adapter_parameters(config, method, **options)


def sft(**settings):
    return training.sft_config(PROFILE, "nowhere", **settings)


def arguments(**settings):
    return training.training_arguments(PROFILE, "nowhere", **settings)


def tokenize(**options):
    return formatting.tokenize_example(RECORD, TOKENIZER, **options)


# what is set: (the call, the error, words that its message must have)
BROKEN = {
    "a profile that there is not": (
        lambda: runtime.get_profile("gpu"),
        *(ValueError, ["'gpu'", "choose smoke, cpu, t4"]),
    ),
    "a seed that is a text": (
        lambda: runtime.set_seed("a"),
        *(ValueError, ["seed must be an integer", "'a'"]),
    ),
    "a model folder that is not there": (
        lambda: models.load_model("/no/such/folder"),
        *(
            ModelUnavailable,
            [f"{Path('/no/such/folder')}: no such folder", "Cures: check"],
        ),
    ),
    "a model folder below one's home that is not there": (
        lambda: models.load_model("~/no/such/folder"),
        *(ModelUnavailable, ["no such folder", "Cures: check"]),
    ),
    "a hub name without a network": (
        lambda: models.load_model("no/such"),
        *(ModelUnavailable, ["From the hub no/such", "unset COURSE_MODEL"]),
    ),
    "a dtype as a text": (
        lambda: models.load_model("x", dtype="fp16"),
        *(ValueError, ["dtype 'fp16'", "torch.float32, float16"]),
    ),
    "a dtype of whole numbers": (
        lambda: models.load_model("x", dtype=torch.int8),
        *(ValueError, ["dtype torch.int8", "torch.float32"]),
    ),
    "a quantization that there is not": (
        lambda: models.load_model("x", quantization="4bit"),
        *(ValueError, ["'4bit'", "choose nf4, fp4, int8"]),
    ),
    "a single label": (
        lambda: models.load_classifier(num_labels=1),
        *(ValueError, ["num_labels must be 2 or more", "not 1"]),
    ),
    "a template that there is not": (
        lambda: tokenize(template="chat"),
        *(ValueError, ["unknown template 'chat'", "'chatml'"]),
    ),
    "a length too small for the completion": (
        lambda: tokenize(max_length=20),
        *(ValueError, ["max_length=20", "raise max_length or shorten"]),
    ),
    "a length of 0": (
        lambda: tokenize(max_length=0),
        *(ValueError, ["max_length=0", "raise max_length"]),
    ),
    "a side that there is not": (
        lambda: formatting.CompletionCollator(TOKENIZER, padding_side="center"),
        *(ValueError, ["padding_side is 'left' or 'right'", "'center'"]),
    ),
    "packs shorter than an example": (
        lambda: formatting.pack_examples([tokenize()], 9),
        *(ValueError, ["example 0", "give each 1 to 9", "raise it"]),
    ),
    "one prompt instead of a list": (
        lambda: generate(prompts="hi"),
        *(TypeError, ["prompts is a list", "write [prompt]"]),
    ),
    "a generation batch of 0": (
        lambda: generate(batch_size=0),
        *(ValueError, ["batch_size must be 1 or more", "0"]),
    ),
    "no new tokens": (
        lambda: generate(max_new_tokens=0),
        *(ValueError, ["max_new_tokens must be 1 or more", "0"]),
    ),
    "more tokens than the model reads": (
        lambda: generate(max_new_tokens=10**6),
        *(ValueError, ["prompt 0", "1000000 new ones", "exceeds the 512"]),
    ),
    "an evaluation of nothing": (
        lambda: evaluate(limit=0),
        *(ValueError, ["limit must be 1 or more", "0"]),
    ),
    "examples of nothing": (
        lambda: data.load_examples("home_commands", limit=0),
        *(ValueError, ["limit must be a positive whole number", "0"]),
    ),
    "a split that there is not": (
        lambda: data.load_examples("home_commands", "dev"),
        *(data.DataError, ["no split 'dev'", "'validation'"]),
    ),
    "a misspelt trainer setting": (
        lambda: sft(learn_rate=1e-3),
        *(TypeError, ["learn_rate"]),
    ),
    "a learning rate as a text": (
        lambda: sft(learning_rate="3e-4"),
        *(ValueError, ["learning_rate must be a number", "'3e-4'"]),
    ),
    "a negative learning rate": (
        lambda: arguments(learning_rate=-1e-4),
        *(ValueError, ["learning_rate must be a number, 0 or more", "-0.0001"]),
    ),
    "a learning rate that is no number": (
        lambda: arguments(learning_rate=float("nan")),
        *(ValueError, ["learning_rate", "nan"]),
    ),
    "a training batch of 0": (
        lambda: sft(per_device_train_batch_size=0),
        *(ValueError, ["per_device_train_batch_size", "1 or more", "0"]),
    ),
    "half a step of accumulation": (
        lambda: arguments(gradient_accumulation_steps=0.5),
        *(ValueError, ["gradient_accumulation_steps", "whole number", "0.5"]),
    ),
    "both 16-bit types": (
        lambda: sft(fp16=True, bf16=True),
        *(ValueError, ["fp16 and bf16", "not both"]),
    ),
    "an optimizer that there is not": (
        lambda: arguments(optim="adam"),
        *(ValueError, ["adam is not a valid", "adamw_torch"]),
    ),
    "a card that there is not": (
        lambda: estimate().fits("T5"),
        *(ValueError, ["unknown GPU 'T5'", "T4"]),
    ),
    "a model that the planner does not know": (
        lambda: estimate(model="llama-9"),
        *(ValueError, ["unknown model 'llama-9'", "llama-2-7b"]),
    ),
    "a method that the planner does not know": (
        lambda: estimate("loar"),
        *(ValueError, ["'loar'", "lora"]),
    ),
    "a planned batch of 0": (
        lambda: estimate(batch_size=0),
        *(ValueError, ["batch_size must be a whole number of at least 1"]),
    ),
    "a planned dtype that there is not": (
        lambda: estimate(dtype="f16"),
        *(ValueError, ["dtype 'f16'", "float16"]),
    ),
    "an option of another library": (
        lambda: estimate(rank=8),
        *(ValueError, ["lora", "'rank'"]),
    ),
    "targets that no module has": (
        lambda: estimate(target_modules=["q"]),
        *(ValueError, ["Target modules {'q'}", "choose target_modules among"]),
    ),
    "an adapter that there is not": (
        lambda: adapter("loro"),
        *(ValueError, ["unknown method 'loro'", "lora"]),
    ),
    "a prompt without a length": (
        lambda: adapter("prompt_tuning"),
        *(ValueError, ["needs num_virtual_tokens="]),
    ),
    "a result that is not finite": (
        lambda: lessons.save_result("02", "x", loss=float("nan")),
        *(ValueError, ["lesson 02: loss is nan"]),
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_setting_is_named_with_what_it_may_be(kind):
    call, error, parts = BROKEN[kind]
    with pytest.raises(error) as caught:
        call()
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def test_there_are_enough_kinds():
    assert len(BROKEN) >= 30


# --- model folders --------------------------------------------------------------------


def shorten(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def half_a_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def another_kind(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-kind"}')


def own_code(folder):
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = {"model_type": "own", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")


FOLDERS = {
    shorten: "header",
    without_weights: "model.safetensors",
    half_a_config: "not a valid JSON",
    another_kind: "no-such-kind",
    own_code: "custom code",
}


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
def test_a_broken_model_folder_is_named_with_the_cures(change, saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    assert models.load_model(str(folder), dtype=torch.float32).config.hidden_size == 64
    change(folder)
    with pytest.raises(ModelUnavailable) as caught:
        models.load_model(str(folder))
    message = str(caught.value)
    assert str(folder) in message and FOLDERS[change] in message
    assert "Cures: bring config.json" in message


def test_a_model_with_code_of_its_own_asks_nobody_and_runs_nothing(saved, tmp_path):
    """transformers would ask "Do you wish to run the custom code? [y/N]"."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    own_code(folder)
    code = "from course_utils.models import load_model\nload_model('model')"
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="y\ny\ny\n",
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert "ModelUnavailable" in done.stderr
    assert not re.search(r"y/N", done.stdout + done.stderr)
    assert not (tmp_path / "ran").exists()


# --- the environment ------------------------------------------------------------------


def test_a_broken_environment_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "gpu")
    with pytest.raises(ValueError, match="COURSE_PROFILE: .*'gpu'.*smoke, cpu, t4"):
        runtime.get_profile()
    monkeypatch.setenv("COURSE_MODEL", str(tmp_path / "nowhere"))
    monkeypatch.delenv("COURSE_PROFILE")
    with pytest.raises(ModelUnavailable, match=r"(?s)nowhere.*unset COURSE_MODEL"):
        models.load_model()
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelUnavailable, match="cannot be written.*COURSE_CACHE"):
        models.prepare(models.SMOLLM2)


@pytest.mark.skipif(
    not any(Path(torch.__file__).parent.glob("lib/libgomp*")),
    reason="PyTorch without GNU's OpenMP",
)
def test_what_the_readme_says_of_waiting_threads_is_what_openmp_reads():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [turns] = re.findall(r"`GOMP_SPINCOUNT=(\d+) make lab`", text)
    run = subprocess.run(
        [sys.executable, "-c", "import course_utils, torch"],
        env=os.environ | {"GOMP_SPINCOUNT": turns, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert f"GOMP_SPINCOUNT = '{turns}'" in run.stderr  # as the runtime took it


@pytest.mark.parametrize(
    "lesson",
    sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb")),
    ids=lambda path: path.stem,
)
def test_a_lesson_imports_the_course_before_what_reads_its_settings(lesson):
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    [text] = ["".join(c["source"]) for c in cells if c["id"] == "imports"]
    names = [
        getattr(node, "module", None) or node.names[0].name
        for node in ast.parse(text).body
    ]
    packages = [name.split(".")[0] for name in names]
    ours, *_ = [p for p in packages if p not in sys.stdlib_module_names]
    assert ours == "course_utils"
