#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6: safetensors.numpy writes an array's memory, whatever its strides say. An array
# in Fortran order, so any `weight.T`, is saved under its own shape with its values in the wrong places. No error.
#
# The docstring asks for contiguous tensors; safetensors.torch checks that and raises ValueError, safetensors.numpy does
# not. Version 0.5.3 still wrote `tensor.tobytes()`, which puts the values in C order: old code was right then.
# Cure: np.ascontiguousarray.
#
# Seen: [[0, 3], [1, 4], [2, 5]] saved and loaded is [[0, 1], [2, 3], [4, 5]] (safetensors 0.5.3: unchanged).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
  safetensors==0.8.0 numpy==2.4.6
cd "$place"
"$place/env/bin/python" - <<'PY'
import numpy as np
from safetensors.numpy import load_file, save_file


def saved_and_loaded(array):
    save_file({"weight": array}, "weight.safetensors")
    return load_file("weight.safetensors")["weight"]


weight = np.arange(6, dtype=np.float32).reshape(2, 3)
assert np.array_equal(saved_and_loaded(weight), weight)
for name, array in {"weight.T": weight.T, "Fortran order": np.asfortranarray(weight)}.items():
    read = saved_and_loaded(array)
    print(name, array.tolist(), "reads back as", read.tolist())
    assert read.shape == array.shape and not np.array_equal(read, array)
    assert np.array_equal(read.ravel(), array.ravel(order="K"))
    assert np.array_equal(saved_and_loaded(np.ascontiguousarray(array)), array)
PY
echo "as described"
