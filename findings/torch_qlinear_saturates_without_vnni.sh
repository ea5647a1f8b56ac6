#!/usr/bin/env bash
# torch 2.13.0 (CPU, AVX-512 without VNNI): `torch.ops.onednn.qlinear_pointwise`, the product of unsigned 8-bit
# activations and signed 8-bit weights behind PyTorch's quantised linear layers, is wrong where both use all 8 bits.
#
# Without VNNI two products are added in 16 bits, which saturate at 32767; 255 * 127 * 2 is 64770. No warning comes.
# With 7 bits on both sides it is exact. With VNNI (`avx512_vnni`, `avx_vnni`) the sums have 32 bits: there the script
# checks that all 8 bits are exact too.
#
# Seen, 64 x 576 times 576 x 96: values from -64 to 63 relative error 0, from -128 to 127 relative error 0.18.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
"$place/env/bin/python" - <<'PY'
import pathlib
import platform

import torch

assert platform.machine() in ("x86_64", "AMD64"), "this is about x86 processors"
flags = pathlib.Path("/proc/cpuinfo").read_text().split()
vnni = "avx512_vnni" in flags or "avx_vnni" in flags
torch.manual_seed(0)
rows, inner, columns = 64, 576, 96


def error(limit):
    """Relative error of the product of values from -limit to limit - 1."""
    left = torch.randint(-limit, limit, (rows, inner), dtype=torch.int8)
    right = torch.randint(-limit, limit, (columns, inner), dtype=torch.int8)
    exact = left.double() @ right.double().T
    packed = torch.ops.onednn.qlinear_prepack(right, [rows, inner])
    scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
    shifted = (left.int() + 128).to(torch.uint8)
    found = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return ((found.double() - exact).norm() / exact.norm()).item()


seven, eight = error(64), error(128)
print(f"VNNI: {vnni}, relative error of 7 bits {seven:.2g}, of 8 bits {eight:.2g}")
assert seven < 1e-6
if vnni:
    print("this processor has VNNI: what is described is not seen here")
    assert eight < 1e-6
else:
    assert eight > 0.05
PY
echo "as described"
