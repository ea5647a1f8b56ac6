"""Tasks that a reader waits for beside training: imports, loading, answers, lessons."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from course_utils import inference, records
from course_utils.data import load_examples
from course_utils.evaluation import evaluate
from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.inference import stream
from course_utils.models import load_tokenizer
from course_utils.runtime import build_folder, get_profile, set_seed
from course_utils.training import SeededBatches
from course_utils.training_speed import completion_loss, without_padding
from maintenance.benchmarks import paths
from maintenance.benchmarks.training import ROOT, _without
from maintenance.benchmarks.turns import Task

PROMPTS = 200
PRACTICE = 24  # steps of training before the answers are timed, so that they end


def _fresh(code: str, **environment: str) -> float:
    """Seconds that a line of code takes in a new process, its start not counted."""
    program = (
        "import time; start = time.perf_counter()\n"
        f"{code}\nprint(time.perf_counter() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def import_time(number: int) -> dict:
    """`import course_utils`."""
    return {"seconds": _fresh("import course_utils")}


LOADING = "from course_utils.models import load_model; load_model()"


def warm_load(number: int) -> dict:
    """From nothing imported to a model in memory, the converted copy being there."""
    return {"seconds": _fresh(LOADING)}


def cold_load(number: int) -> dict:
    """The same the first time: the package's file is converted, too."""
    with tempfile.TemporaryDirectory() as folder:
        return {"seconds": _fresh(LOADING, COURSE_CACHE=folder)}


@functools.cache
def practised_model():
    """The built-in model with a LoRA adapter that has learned to answer in JSON."""
    set_seed(0)
    model, tokenizer = paths.make_model("lora", get_profile().dtype), load_tokenizer()
    model.train()
    data = tokenize_dataset(load_examples("home_commands"), tokenizer)
    order = iter(SeededBatches([1] * len(data), paths.EXAMPLES, 0))
    collator = CompletionCollator(tokenizer)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, paths.RATES["lora"], fused=True)
    bf16 = get_profile().dtype == torch.bfloat16
    for _ in range(PRACTICE):
        batch = collator([data[next(order)] for _ in range(paths.EXAMPLES)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = completion_loss(model, without_padding(model, batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@functools.cache
def _test():
    return list(load_examples("home_commands", "test", limit=PROMPTS))


def _longest() -> int:
    completions = [row["completion"] for row in _test()]
    ids = load_tokenizer()(completions, add_special_tokens=False)["input_ids"]
    return max(map(len, ids)) + 8


def answers(number: int, batch_size: int | None, share: int = 1) -> dict:
    """Seconds of the answers to the 200 prompts, or to one share of them.

    Args:
        number: of the round; says which share.
        batch_size: as for `evaluate`.
        share: the prompts are dealt out into so many shares.
    """
    chosen = list(range(number % share, PROMPTS, share))
    rows = [_test()[i] for i in chosen]
    model, tokenizer = practised_model(), load_tokenizer()
    evaluation = evaluate(
        model, tokenizer, rows, batch_size=batch_size, max_new_tokens=_longest()
    )
    measured = {"answers": len(rows), "chosen": chosen}
    return {
        "seconds": evaluation.seconds,
        "measured": measured,
        "predictions": list(evaluation.predictions),
        "references": list(evaluation.references),
        "metrics": {"exact_match": None},
    }


def answers_by_view(number: int) -> dict:
    """The same in batches, the output layer given a view into all positions again."""
    with _without((inference, "_one_block", lambda module, args: args)):
        return answers(number, None)


def first_token(number: int) -> dict:
    """Seconds until the first piece of a streamed answer; the median of ten prompts."""
    model, tokenizer = practised_model(), load_tokenizer()
    waits = []
    for row in _test()[:10]:
        start = time.perf_counter()
        pieces = stream(model, tokenizer, row["prompt"], max_new_tokens=4)
        next(pieces)
        waits.append(time.perf_counter() - start)
        pieces.close()
    return {"seconds": sum(waits), "measured": {"waits": waits}}


def everyday_tasks(rounds: int) -> list[Task]:
    """Start-up, then answers: each round asks another share one by one."""
    one = {"batch_size": 1, "shares": rounds}
    return [
        Task("start", "import course_utils", import_time),
        Task("start", "model, cached", warm_load),
        Task("start", "model, first time", cold_load, once=True),
        Task("answers", "first token", first_token),
        Task("answers", "one by one", lambda n: answers(n, 1, rounds), one),
        Task("answers", "batched", lambda n: answers(n, None)),
        Task("answers", "batched, by a view", answers_by_view),
    ]


def lesson_runs() -> list[dict]:
    """The seconds of each lesson as the last `make course` kept them, as runs.

    They come from the record `course_cpu` where there is one, else from
    `build/results/course.json`; an empty list where neither holds a whole course.
    """
    if "course_cpu" in records.list_records():
        lessons = records.load_record("course_cpu")["runs"]
        seconds = {run["label"]: run["seconds"] for run in lessons}
        profile = "cpu"
    else:
        file = build_folder() / "results" / "course.json"
        if not file.is_file():
            return []
        course = json.loads(file.read_text(encoding="utf-8"))
        seconds = {o["lesson"]: o["seconds"] for o in course["lessons"] if o["ok"]}
        profile = course["profile"]
    if len(seconds) < len(list((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))):
        return []
    return [
        {
            "label": f"lessons · {lesson}",
            "settings": {"part": "lessons", "name": lesson, "profile": profile},
            "seed": 0,
            "loss": [],
            "metrics": {},
            "seconds": value,
        }
        for lesson, value in seconds.items()
    ]
