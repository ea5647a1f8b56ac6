"""How near a training step is to the limit: the time of its matrix products alone.

The products of the second LoRA step of the course's path are listed by shape (the first
asks the model, too, whether it keeps packed examples apart); then, after each further
step on the same records, all of them are computed again by themselves.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from course_utils.runtime import cpu_has_bf16, set_seed
from maintenance.benchmarks import paths
from maintenance.benchmarks.training import same_records
from maintenance.benchmarks.turns import Task

Shape = tuple[int, ...]  # ([B,] M, K, N): ([B,] M, K) times ([B,] K, N)
# Places of the two matrices among an operator's arguments.
OPERATORS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
PATIENCE_S = 0.1  # a shape is computed as often as the step does, or so long


class Listing(TorchDispatchMode):
    """Counts matrix products by shape while active.

    Attributes:
        frozen: those with one of the `weights`.
        others: of adapters and attention.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.places = {weight.untyped_storage().data_ptr() for weight in weights}
        self.frozen: Counter[Shape] = Counter()
        self.others: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if places := OPERATORS.get(func.overloadpacket.__name__):
            left, right = (args[place] for place in places)
            storages = {m.untyped_storage().data_ptr() for m in (left, right)}
            counts = self.frozen if storages & self.places else self.others
            counts[(*left.shape, right.shape[-1])] += 1
        return func(*args, **kwargs or {})


def _floats(dtype: torch.dtype) -> Callable[[Shape], Callable]:
    def ready(shape: Shape) -> Callable:
        *batch, rows, inner, columns = shape
        left = torch.randn(*batch, rows, inner).to(dtype)
        right = torch.randn(*batch, columns, inner).to(dtype).mT  # as a layer has it
        return lambda: left @ right

    return ready


def _integers(low: int, *size: int) -> torch.Tensor:
    dtype = torch.uint8 if low == 0 else torch.int8
    return torch.randint(low, low + 256, size, dtype=dtype)


def _int_mm(shape: Shape) -> Callable:
    rows, inner, columns = shape
    left, right = _integers(-128, rows, inner), _integers(-128, columns, inner).T
    return lambda: torch._int_mm(left, right)


def _qlinear(shape: Shape) -> Callable:
    """u8 times prepacked s8, scaled by column, to float32."""
    rows, inner, columns = shape
    left, right = _integers(0, rows, inner), _integers(-128, columns, inner)
    packed = torch.ops.onednn.qlinear_prepack(right, [rows, inner])
    scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
    end = (None, 1.0, 0, torch.float32, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(
        left, 1.0, 128, packed, scales, zeros, *end
    )


# How a product is made ready, by arithmetic.
ARITHMETIC: dict[str, Callable[[Shape], Callable]] = {
    "float32": _floats(torch.float32),
    "bfloat16": _floats(torch.bfloat16),
    "int8, qlinear_pointwise": _qlinear,
    "int8, _int_mm": _int_mm,
}


def seconds_of(product: Callable, count: int) -> float:
    """Seconds of a product computed `count` times, from as many as `PATIENCE_S` has."""
    begun = now = time.perf_counter()
    done = 0
    while done < count and (now - begun < PATIENCE_S or not done):
        product()
        done, now = done + 1, time.perf_counter()
    return (now - begun) * count / done


class AfterEachStep(TrainerCallback):
    """Lists the products of the second step, then times them after each later one.

    Attributes:
        step_s: seconds of each step from the third.
        product_s: of the products with frozen weights in each arithmetic, and of
            the other products in the training's own, as often.
        failed: first line of the error where an arithmetic does not run.
    """

    def __init__(self) -> None:
        self.listing, self.products = None, None
        self.step_s: list[float] = []
        self.product_s: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        if state.global_step == 1:
            weights = [p for p in model.parameters() if not p.requires_grad]
            self.listing = Listing(weights)
            self.listing.__enter__()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds = time.perf_counter() - self.start
        if self.listing is None:
            return
        if self.products is None:
            self.listing.__exit__(None, None, None)
            self.products = dict(self._make_ready("bfloat16" if args.bf16 else None))
            return
        self.step_s.append(seconds)
        with torch.no_grad():
            for name, products in self.products.items():
                total = sum(seconds_of(*product) for product in products)
                self.product_s.setdefault(name, []).append(total)

    def _make_ready(self, own: str | None) -> Iterator[tuple[str, list]]:
        for name, ready in ARITHMETIC.items():
            try:
                products = [(ready(s), n) for s, n in self.listing.frozen.items()]
                for product, _ in products:
                    product()
            except (RuntimeError, AttributeError, IndexError) as error:
                self.failed[name] = str(error).partition("\n")[0]
            else:
                yield name, products
        ready = ARITHMETIC[own or "float32"]
        yield "others", [(ready(s), n) for s, n in self.listing.others.items()]


def run_products(steps: int) -> dict:
    """The course's LoRA step, then its products alone, and so on."""
    start, after = time.perf_counter(), AfterEachStep()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        data = (*same_records(steps), steps, folder)
        timing = paths.course("lora", *data, callbacks=[after])
    measured = {"step_s": after.step_s, "product_s": after.product_s}
    measured |= {"failed": after.failed, "own": "float32"}
    if cpu_has_bf16():
        measured["own"] = "bfloat16"
    measured["operations"] = {
        name: sum(2 * n * torch.Size(s).numel() for s, n in counts.items())
        for name, counts in vars(after.listing).items()
        if name in ("frozen", "others")
    }
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": timing.loss, "measured": measured}


def product_tasks(steps: int) -> list[Task]:
    """`run_products`, once."""
    steps += 1  # beside the first two nothing is timed, beside others one is not
    settings = {"method": "lora", "steps": steps}
    task = Task("products", "step", lambda _: run_products(steps), settings, once=True)
    return [task]
