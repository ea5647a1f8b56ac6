#!/usr/bin/env bash
# torch-optimi 0.3.3 (torch 2.13.0, CPU): after a step of a bfloat16 parameter, p.grad is no longer the gradient.
#
# For 16-bit parameters optimi's optimizers sum by Kahan, which is on by default there. The gradient's tensor then
# serves as scratch space: after step() it holds what the parameter moved. A gradient norm logged or clipped after the
# step is wrong, and so is whatever backward() adds to it where zero_grad() is not called after each step. In float32,
# with kahan_sum=False, and with torch.optim, p.grad stays as it was.
# Cure: read gradients before step(), and always zero_grad() after it.
#
# Seen: norm of p.grad before and after AdamW's step at 1e-2: bfloat16 30.71 and 0.33; float32 30.71 and 30.71;
# bfloat16 without the Kahan sum 30.71 and 30.71. The sum itself is the plain one: equal to four lines, to the bit.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 torch-optimi==0.3.3
cd "$place"
"$place/env/bin/python" - <<'PY'
import optimi
import torch


def norms(dtype, **options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1000).to(dtype))
    optimizer = optimi.AdamW([p], lr=1e-2, weight_decay=0.1, **options)
    p.grad = torch.randn(1000).to(dtype)
    before = p.grad.float().norm().item()
    optimizer.step()
    after = p.grad.float().norm().item()
    print(dtype, options, f"norm of p.grad {before:.2f} before the step, {after:.2f} after")
    return before, after


before, after = norms(torch.bfloat16)
assert after < before / 10
for before, after in (norms(torch.float32), norms(torch.bfloat16, kahan_sum=False)):
    assert abs(after - before) < 1e-3 * before

# The same sum by hand, with SGD.
p = torch.nn.Parameter(torch.randn(512).bfloat16())
w, lost = p.detach().clone(), torch.zeros(512).bfloat16()
optimizer = optimi.SGD([p], lr=2**-8, momentum=0, kahan_sum=True)
for _ in range(50):
    p.grad = (0.1 + 0.1 * torch.randn(512)).bfloat16()
    lost = (lost - 2**-8 * p.grad.float()).bfloat16()
    old, w = w, w + lost
    lost = lost + (old - w)
    optimizer.step()
    assert torch.equal(w, p.detach())
print("Kahan sum of 50 steps of SGD: equal, to the bit")
PY
echo "as described"
