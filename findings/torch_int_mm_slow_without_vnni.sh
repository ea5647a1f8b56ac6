#!/usr/bin/env bash
# torch 2.13.0 (CPU, AVX-512 without VNNI): `torch._int_mm`, the product of 8-bit integers that torchao's dynamic
# quantisation calls, takes tens of times as long as the float32 product of the same shape.
#
# The same product through `torch.ops.onednn.qlinear_pointwise` (8-bit activations, prepacked 8-bit weights) is faster
# than float32 on the same processor: the kernel, not 8 bits, is what is slow. With VNNI (`avx512_vnni`, `avx_vnni`)
# `_int_mm` has a kernel of its own; there the script checks that it is not slower than three times float32.
# Times are the least of several in turn, on one thread.
#
# Seen on a busy machine, 1112 x 576 times 576 x 1536: float32 111 ms, qlinear_pointwise 71, _int_mm 6028.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
"$place/env/bin/python" - <<'PY'
import pathlib
import platform
import time

import torch

assert platform.machine() in ("x86_64", "AMD64"), "this is about x86 processors"
flags = pathlib.Path("/proc/cpuinfo").read_text().split()
vnni = "avx512_vnni" in flags or "avx_vnni" in flags
torch.set_num_threads(1)
torch.manual_seed(0)
rows, inner, columns = 1112, 576, 1536
left = torch.randint(-64, 64, (rows, inner), dtype=torch.int8)
right = torch.randint(-64, 64, (columns, inner), dtype=torch.int8)
shifted = (left.int() + 128).to(torch.uint8)
packed = torch.ops.onednn.qlinear_prepack(right, [rows, inner])
scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
a, b = left.float(), right.float()
ways = {
    "float32": lambda: a @ b.T,
    "qlinear_pointwise": lambda: torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    ),
    "_int_mm": lambda: torch._int_mm(left, right.T),
}
exact = (left.double() @ right.double().T).float()
least = dict.fromkeys(ways, float("inf"))
for turn in range(5):
    for name, multiply in ways.items():
        start = time.perf_counter()
        found = multiply()
        least[name] = min(least[name], time.perf_counter() - start)
        if turn == 0:
            error = (found.float() - exact).norm() / exact.norm()
            print(f"{name}: relative error {error:.1e}")
            assert error < 1e-5
print("VNNI:", vnni, {name: f"{1000 * s:.1f} ms" for name, s in least.items()})
slower = least["_int_mm"] / least["float32"]
print(f"_int_mm takes {slower:.1f} times as long as float32")
if vnni:
    print("this processor has VNNI: what is described is not seen here")
    assert slower < 3
else:
    assert slower > 10
    assert least["qlinear_pointwise"] < 2 * least["float32"]
PY
echo "as described"
