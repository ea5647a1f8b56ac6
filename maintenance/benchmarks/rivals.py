"""Other libraries beside the course on the same work: 8-bit layers, llama.cpp's server.

    python -m maintenance.benchmarks.rivals layers NAME STEPS
    python -m maintenance.benchmarks.rivals server NAME ROUNDS

Each runs in a process of its own, which has the packages of `others.txt` on its path
(`make build/others` puts them there), and takes turns with the course. Prints the
fields of a run as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch

from course_utils import inference
from course_utils.data import load_examples
from course_utils.formatting import generation_prompt
from course_utils.models import SMOLLM2, load_model, load_tokenizer
from course_utils.runtime import build_folder
from maintenance.benchmarks import paths
from maintenance.benchmarks.training import ROOT, _without, run_pairs
from maintenance.benchmarks.turns import Task

TOGETHER = 8  # prompts asked at once
NEW_TOKENS = 32  # of each answer
LIMIT_S = 200.0  # what is slower than that takes fewer steps


def others_folder() -> Path | None:
    """The folder of the packages of `others.txt`, or None if it was not made."""
    folder = build_folder() / "others"
    return folder if folder.is_dir() else None


def beside(part: str, name: str, count: int) -> dict:
    """Run this module in a process of its own; a failure is kept as its last line."""
    start, path = time.perf_counter(), [str(ROOT)]
    if folder := others_folder():
        path.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-m", __name__, part, name, str(count)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if not done.returncode:
        return json.loads(done.stdout.splitlines()[-1])
    said = [*filter(None, done.stderr.splitlines()), f"ended with {done.returncode}"]
    errors = [line for line in said if "Error: " in line and line[0].isalpha()]
    measured = {"failed": (errors or said)[-1][:300]}
    return {"seconds": time.perf_counter() - start, "measured": measured}


def layers(name: str, steps: int) -> dict:
    """The course's LoRA step beside a bare loop on other layers of 8 bits."""
    return run_pairs("lora", steps, bare={"layers": name}, limit_s=LIMIT_S)


def as_q8_0(source: Path, target: Path) -> None:
    """Write a GGUF file again with its matrices as Q8_0."""
    from gguf import GGMLQuantizationType as Types
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize
    from gguf.constants import LlamaFileType

    reader = GGUFReader(source)
    fields = dict(reader.fields)
    writer = GGUFWriter(target, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        if not name.startswith("GGUF."):
            kind, value = field.types[0], field.contents()
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            if name == "general.file_type":
                value = int(LlamaFileType.MOSTLY_Q8_0)
            writer.add_key_value(name, value, kind, inner)
    for tensor in reader.tensors:
        values, kind = numpy.array(tensor.data), tensor.tensor_type
        if kind != Types.F32:
            values, kind = quantize(dequantize(values, kind), Types.Q8_0), Types.Q8_0
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file() -> Path:
    """The built-in model as Q8_0, made once from the file that its package has."""
    folder = others_folder() or build_folder()
    file = folder / f"{SMOLLM2.name}.Q8_0.gguf"
    if not file.is_file():
        draft = file.with_suffix(".draft")
        as_q8_0(folder / SMOLLM2.package.replace("-", "_") / SMOLLM2.weights, draft)
        draft.replace(file)
    return file


def llama_server() -> Callable[[list[int]], dict]:
    """Start llama.cpp's server in this process; a function that asks it for tokens."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf_file())
    settings.n_parallel, settings.n_ctx = TOGETHER, TOGETHER * 512
    settings.cpuparams.n_threads = torch.get_num_threads()
    settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.n_gpu_layers, settings.verbosity = 0, 0
    server = xllamacpp.Server(settings)

    def ask(ids: list[int]) -> dict:
        wanted = {"n_predict": NEW_TOKENS, "ignore_eos": True, "temperature": 0.0}
        return server.handle_completions({"prompt": ids, **wanted})

    return ask


def server(name: str, rounds: int, ask: Callable | None = None, model=None) -> dict:
    """The same answers, of equal length, by llama.cpp's server and by the course."""
    start, tokenizer = time.perf_counter(), load_tokenizer()
    ask, model = ask or llama_server(), model or load_model()
    prompts = load_examples("home_commands", "test", limit=TOGETHER * rounds)["prompt"]
    own, others, counts = [], [], set()
    options = {"max_new_tokens": NEW_TOKENS, "batch_size": TOGETHER}
    endless = (inference, "_stop_ids", lambda *_: set())
    with ThreadPoolExecutor(TOGETHER) as pool, _without(endless):
        for first in range(0, len(prompts), TOGETHER):
            asked = prompts[first : first + TOGETHER]
            rows = [generation_prompt(prompt, tokenizer) for prompt in asked]
            begun = time.perf_counter()
            answers = list(pool.map(ask, rows))
            others.append(time.perf_counter() - begun)
            counts |= {answer["usage"]["completion_tokens"] for answer in answers}
            begun = time.perf_counter()
            inference.generate(model, tokenizer, asked, **options)
            own.append(time.perf_counter() - begun)
    if counts != {NEW_TOKENS}:
        raise RuntimeError(f"answers of {counts} tokens, not {NEW_TOKENS}")
    measured: dict[str, Any] = {"course_s": own, "server_s": others}
    measured |= {"answers": TOGETHER, "tokens": NEW_TOKENS}
    return {"seconds": time.perf_counter() - start, "measured": measured}


def rival_tasks(steps: int) -> list[Task]:
    """Each library of 8-bit layers, and llama.cpp's server."""
    names = [("int8", "layers", name) for name in paths.LAYERS]
    return [
        Task(
            part,
            name,
            lambda _, w=work, n=name: beside(w, n, steps),
            {"method": "lora", "steps": steps} if part == "int8" else {"steps": steps},
            once=True,
        )
        for part, work, name in [*names, ("server", "server", "llama.cpp, Q8_0")]
    ]


if __name__ == "__main__":
    work, name, count = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        found = {"layers": layers, "server": server}[work](name, int(count))
    print(json.dumps(found))
