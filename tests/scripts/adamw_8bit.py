"""Records what bitsandbytes' AdamW with 8-bit moments makes of a matrix, for src/ops/adamw_8bit.rs.

  python tests/scripts/adamw_8bit.py tests/fixtures/adamw_8bit.safetensors

Both dynamic maps, and parameters, codes and scales after four updates. Start and gradients are formulas that the test repeats.
Codes are rounded as bitsandbytes' CUDA kernel and its default implementation round them, not by the table of its CPU kernel.
"""
import sys

import bitsandbytes, torch
import bitsandbytes.backends.cpu.ops as cpu_ops
from bitsandbytes.functional import create_dynamic_map
from safetensors.torch import save_file

COUNT, STEPS = 4396, 4  # one block is not full


def nearest(values, code, scales, codes, block):
    flat = values.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes.copy_(torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8).reshape(-1)[:len(flat)])
    scales.copy_(largest)


def gradient(step):
    i = torch.arange(COUNT, dtype=torch.int64)
    share = ((i * 7919 + step * 104729) % 2003 - 1001).double() / 1001
    share[2048:2304] = 0  # a block of zeros
    return (share * 10.0 ** -(i % 7).double()).float()


cpu_ops._quant_blockwise_fp32_direct = nearest
params = torch.nn.Parameter((torch.arange(COUNT).double() / COUNT - 0.5).float())
optimizer = bitsandbytes.optim.AdamW([params], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, optim_bits=8)
for step in range(1, STEPS + 1):
    params.grad = gradient(step)
    optimizer.step()
state = optimizer.state[params]
assert state["state1"].dtype == torch.uint8
save_file(
    dict(
        signed_map=create_dynamic_map(signed=True), unsigned_map=create_dynamic_map(signed=False), params=params.detach(),
        codes=torch.cat([state["state1"], state["state2"]]), scales=torch.cat([state["absmax1"], state["absmax2"]]),
    ),
    sys.argv[1],
)
