"""`make bench`: training paths, start-up and evaluation; writes data/runs/bench.json.

Expect half an hour on two cores; nothing else should run meanwhile.
"""

import statistics
import subprocess
import sys
import time

from course_utils import records
from course_utils.data import data_hash, load_examples
from course_utils.evaluation import evaluate
from course_utils.models import load_model, load_tokenizer
from course_utils.runtime import hardware, versions
from tests.benchmarks import training

ANSWERS = 40


def import_seconds():
    """Seconds that `import course_utils` takes in a fresh interpreter."""
    code = (
        "import time; start = time.perf_counter(); import course_utils; "
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return float(done.stdout)


def load_seconds():
    """Seconds from the call to a model in memory, the converted copy being cached."""
    start = time.perf_counter()
    load_model()
    return time.perf_counter() - start


def evaluation_seconds(batch_size):
    """Seconds to generate and score `ANSWERS` answers."""
    test = load_examples("home_commands", "test")
    result = evaluate(
        load_model(), load_tokenizer(), test, limit=ANSWERS, batch_size=batch_size
    )
    return result.seconds


PARTS = {
    "import course_utils": import_seconds,
    "model load, warm": load_seconds,
    f"{ANSWERS} answers, one by one": lambda: evaluation_seconds(1),
    f"{ANSWERS} answers, in batches of 32": lambda: evaluation_seconds(32),
}


def main(rounds=3):
    start, runs, parts = time.perf_counter(), [], {name: [] for name in PARTS}
    load_model()  # the conversion, the first time, is not measured

    def add(label, seed, seconds, **more):
        run = {"label": label, "settings": {}, "seed": seed, "loss": [], "metrics": []}
        runs.append(run | {"seconds": seconds} | more)

    for number in range(rounds):
        names = list(PARTS)
        for name in names if number % 2 == 0 else reversed(names):
            parts[name].append(PARTS[name]())
            add(name, number, parts[name][-1])
    found = training.measure(["full", "lora", "qlora"], rounds, steps=4)
    for (method, path), speeds in found.items():
        for number, speed in enumerate(speeds):
            add(f"{method}, {path}", number, 0.0, tokens_per_s=speed)
    for name, seconds in parts.items():
        middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
        print(f"{name:<34}{middle:8.3f} s  ({least:.3f} to {most:.3f})")
    print("\n".join(training.table(found)))
    source = {"name": "home_commands", "sha256": data_hash("home_commands")}
    records.save_record(
        "bench",
        {
            "command": "make bench",
            "hardware": hardware(),
            "versions": versions(),
            "data": source,
            "seconds": time.perf_counter() - start,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
