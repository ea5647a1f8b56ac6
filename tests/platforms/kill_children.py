"""Jobs that a test kills: `python kill_children.py JOB FOLDER`.

Imports once; then each line on standard input forks a child that does the job in
FOLDER, and two lines come back: the child's process number, and how it ended (its exit
code, or minus the signal). A child that finishes leaves `result.json` in FOLDER.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402
from small_models import byte_tokenizer, random_llama  # noqa: E402

from course_utils.runtime import Profile  # noqa: E402

FP32 = Profile("cpu", "cpu", torch.float32, 0)


def train(folder):
    """24 steps of a tiny model, a checkpoint every third."""
    from training_child import train

    return train(folder)


def record(folder):
    """Four recorded runs of a tiny model."""
    from course_utils import records
    from course_utils.sweep import experiment as sweep_runs
    from course_utils.sweep.experiment import LastLayers
    from maintenance.runs import experiment as runs
    from maintenance.runs.__main__ import record_family

    def load(name=None, *, dtype=None, **_):
        return random_llama(initializer_range=0.05).to(dtype or torch.float32)

    for module in (sweep_runs, runs):
        module.load_model = load
        module.load_tokenizer = lambda name=None: byte_tokenizer()
        module.get_profile = lambda: FP32
    records.data_folder = lambda: Path(folder)
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2}
    settings |= {"eval_examples": 4, "test_examples": 0}
    family = [
        runs.RecordedExperiment(label, method, **settings)
        for label, method in (("a", "full"), ("b", "head"), ("c", LastLayers(1)))
    ]
    family = [one for each in family for one in each.seeds(0, 1)]
    record_family("02_try", family, command="x", say=lambda line: None)
    made = records.load_record("02_try")["runs"]
    return {"loss": [run["loss"] for run in made]}


def builtin(folder):
    """Six steps of the built-in model with LoRA, a checkpoint after each."""
    from peft import LoraConfig, get_peft_model
    from trl import SFTTrainer

    from course_utils.data import load_examples
    from course_utils.formatting import CompletionCollator, tokenize_dataset
    from course_utils.models import load_model, load_tokenizer
    from course_utils.training import (
        LossHistory,
        find_checkpoint,
        prepare_trainer,
        sft_config,
    )

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
    )
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 1}
    trainer = SFTTrainer(
        model=get_peft_model(load_model(dtype=torch.float32), config),
        args=sft_config(
            FP32, folder, learning_rate=1e-3, save_strategy="steps", **settings
        ),
        train_dataset=tokenize_dataset(
            load_examples("home_commands", limit=10), tokenizer
        ),
        data_collator=CompletionCollator(tokenizer),
        processing_class=tokenizer,
    )
    prepare_trainer(trainer)
    trainer.train(resume_from_checkpoint=find_checkpoint(folder))
    return {"loss": LossHistory.from_trainer(trainer).loss}


def convert(folder):
    """Make the built-in model from its package, in an empty cache."""
    from course_utils import models

    os.environ["COURSE_CACHE"] = str(folder)
    made = models.prepare(models.SMOLLM2, say=lambda line: None)
    with (made / "model.safetensors").open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def child(job, folder):
    torch.set_num_threads(1)
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = job(folder)
    result["seconds"] = time.perf_counter() - started
    draft = Path(folder) / "result.tmp"
    draft.write_text(json.dumps(result))
    draft.replace(Path(folder) / "result.json")


def warm(job):
    """Import now what each child would import."""
    import training_child  # noqa: F401

    import maintenance.runs.__main__

    if job in ("builtin", "convert"):
        import transformers

        assert transformers.AutoModelForCausalLM and maintenance.runs


def main(name):
    job = {"train": train, "record": record, "builtin": builtin, "convert": convert}
    torch.set_num_threads(1)
    warm(name)
    print("ready", flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                child(job[name], line.strip())
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
