"""No lesson and no module calls a library with what it no longer takes.

Nothing is executed: `library_calls` compares the text of each call with the installed
signatures, so a removed argument is found in seconds, in code that no test reaches too.
"""

import re

import notebook_rules as rules
import pytest
from library_calls import ALLOWED, FORWARDS, complaints, find, read

from maintenance.runs.lists import LESSON_RUNS

LESSONS = sorted((rules.ROOT / "notebooks").glob("*.ipynb"))
MODULES = [
    path
    for room in ("course_utils", "maintenance")
    for path in sorted((rules.ROOT / room).rglob("*.py"))
    if not {"benchmarks", "data_sets"} & set(path.parts)
]
# Written in C++, without a signature; a few words each.
NO_SIGNATURE = {"torch.device", "torch.Generator", "torch.finfo"}
NO_SIGNATURE |= {"torch.is_autocast_enabled", "torch.get_autocast_dtype"}

# What public notebooks still write, and a word of the complaint each must give.
REMOVED = {
    "SFTConfig(max_seq_length=512)": "max_seq_length",
    "Trainer(model=m, tokenizer=t)": "tokenizer",
    "SFTTrainer(m, tokenizer=t)": "tokenizer",
    "SFTTrainer(m, dataset_text_field='text')": "dataset_text_field",
    "TrainingArguments('out', evaluation_strategy='steps')": "evaluation_strategy",
    "TrainingArguments('out', overwrite_output_dir=True)": "overwrite_output_dir",
    "TrainingArguments('out', group_by_length=True)": "group_by_length",
    "TrainingArguments('out', no_cuda=True)": "no_cuda",
    "TrainingArguments('out', save_safetensors=True)": "save_safetensors",
    "TrainingArguments(**{'evaluation_strategy': 'steps'})": "evaluation_strategy",
    "kw = {'no_cuda': 1}\nTrainingArguments(**kw | {'seed': 1})": "no_cuda",
    "training.sft_config(p, f, max_seq_length=512)": "max_seq_length",
    "training.training_arguments(p, f, no_cuda=True)": "no_cuda",
    "AutoModelForCausalLM.from_pretrained('x', load_in_4bit=True)": "load_in_4bit",
    "AutoModelForCausalLM.from_pretrained('x', use_auth_token=1)": "use_auth_token",
    "BitsAndBytesConfig(bnb_4bit_type='nf4')": "bnb_4bit_type",
    "model.generate(ids, max_new_token=3)": "max_new_token",
    "LoraConfig(rank=8)": "rank",
    "get_peft_model(m, c, 'a', True, False, False, 7, 8)": "positional",
    "t = SFTTrainer(model=m)\nt.train(resume=True)": "resume",
    "m = load_model()\nm.train(modes=1)": "modes",
    "torch.zeros(2, dtypes=torch.int8)": "dtypes",
    "torch.linalg.svd(w, some=True)": "some",
    "torch.nn.functional.cross_entropy(a, b, size_averages=1)": "size_averages",
    "estimate_memory('x', 'lora', batch_size=1, rank=8)": "rank",
    "datasets.load_metric('x')": "load_metric",
    "transformers.DynamicCache.from_legacy_cache(x)": "from_legacy_cache",
    "from trl import DataCollatorForCompletionOnlyLM": "DataCollator",
    "from trl import setup_chat_format": "setup_chat_format",
    "from peft import convert_pissa_to_lora": "convert_pissa_to_lora",
    "import transformers.models.no_such_model": "no_such_model",
    "class T(Trainer):\n  def compute_loss(self, model, inputs, return_outputs=0): 1": (
        "num_items_in_batch"
    ),
}
IMPORTS = """
import datasets, torch, transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer
from course_utils import training
from course_utils.memory import estimate_memory
from course_utils.models import load_model
"""
FINE = [
    "Trainer(model=m, processing_class=t)",
    "TrainingArguments('out', eval_strategy='steps', use_cpu=True)",
    "training.sft_config(p, f, max_length=512, learning_rate=1e-3)",
    "AutoModelForCausalLM.from_pretrained('x', dtype=torch.float16)",
    "m = load_model()\nm.generate(**x, max_new_tokens=3, do_sample=False)",
    "def f(Trainer):\n    return Trainer(tokenizer=1)",
    "Trainer = print\nTrainer(tokenizer=1)",
    "torch.zeros(2, 3, 4, dtype=torch.int8, device='cpu')",
    "estimate_memory('x', 'lora', batch_size=1, r=8, target_modules=['q_proj'])",
    "class T(Trainer):\n  def compute_loss(self, *a, **k): return 1",
    "raise transformers.utils.hub.EntryNotFoundError('x', response=None)",
]


@pytest.mark.parametrize("code", REMOVED)
def test_what_was_removed_is_found(code):
    found = complaints(f"{IMPORTS}\n{code}")
    assert len(found) == 1 and REMOVED[code] in found[0], found


@pytest.mark.parametrize("code", FINE)
def test_what_is_right_is_let_be(code):
    assert complaints(f"{IMPORTS}\n{code}") == []


def lesson_code(path):
    """All code cells as one text: imports of an early cell hold in the later ones."""
    lesson = rules.Lesson.read(path, ())
    return "\n\n".join(rules.own_lines(text) for _, text in lesson.of_kind("code"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_each_call_of_a_lesson_fits_the_installed_libraries(path):
    reader = read(lesson_code(path))
    assert reader.bad == []
    assert set(reader.unknown) <= NO_SIGNATURE
    assert len(reader.seen) >= 10, "hardly a call was recognised"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_solutions_and_shown_code_fit_too(path):
    lesson = rules.Lesson.read(path, ())
    fences = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
    shown = [
        rules.own_lines(block)
        for _, text in lesson.of_kind("markdown")
        for block in fences.findall(text)
    ]
    assert shown, "a lesson has solutions"
    assert complaints("\n\n".join([lesson_code(path), *shown])) == []


def test_each_call_of_the_package_fits_the_installed_libraries():
    calls, bad = 0, {}
    for path in MODULES:
        reader = read(path.read_text(encoding="utf-8"))
        calls += len(reader.seen)
        assert set(reader.unknown) <= NO_SIGNATURE
        if reader.bad:
            bad[path.name] = reader.bad
    assert bad == {} and calls > 300


def test_a_removed_argument_in_a_real_lesson_is_found():
    """Planted in the code of a lesson, not in a line of our own."""
    path = next(p for p in LESSONS if p.stem.startswith("03"))
    code = lesson_code(path)
    assert "processing_class=" in code
    planted = code.replace("processing_class=", "tokenizer=", 1)
    (found,) = complaints(planted)
    assert "SFTTrainer takes no argument tokenizer" in found


def test_each_recorded_method_is_a_configuration_that_peft_takes():
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING as kinds

    methods = [
        experiment.method
        for families in LESSON_RUNS.values()
        for family in families.values()
        if not callable(family)
        for experiment in family
        if isinstance(getattr(experiment, "method", None), dict)
    ]
    assert methods
    for method in methods:
        fields = set(kinds[method["peft_type"]].__dataclass_fields__)
        assert set(method) <= fields, method
    assert "rank" not in kinds["LORA"].__dataclass_fields__


def test_the_lists_name_what_exists_and_say_why():
    for names, reason in ALLOWED.values():
        assert names and len(reason.split()) >= 3
    for path, others in FORWARDS.items():
        for each in (path, *others):
            assert find(each)
