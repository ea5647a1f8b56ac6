"""The closed form of the memory engine: arithmetic on a configuration, milliseconds.

It adds up what automatic differentiation keeps of each decoder layer of the Llama
family (as transformers writes it), and takes the largest of three moments: the loss,
the first layer that the backward pass reaches, and the last one.

Letters: `B` batch, `T` sequence, `N` = B T tokens, `d` width, `F` feed-forward width,
`V` vocabulary, `L` layers, `H` heads, `r` rank.
"""

from __future__ import annotations

from typing import Any

from course_utils.memory_request import BYTES, Request
from course_utils.memory_static import SOURCES, Shapes, shapes, static_parts

TILE_TOKENS, TILE_WORDS = 4096, 32768  # of TRL's chunked loss


class Layer:
    """Bytes that one decoder layer keeps for the backward pass, and needs in it."""

    def __init__(self, request: Request, ranks: dict[str, tuple[int, int]]):
        config, self.r = request.config, request
        self.w = BYTES[request.dtype]  # weights, and the residual stream
        self.c = BYTES[request.autocast or request.dtype]  # matrix products
        self.full = request.method == "full"
        self.ranks = ranks
        virtual = getattr(request.peft, "num_virtual_tokens", None) or 0
        prompt = virtual if request.method == "prompt_tuning" else 0
        prefix = virtual if request.method == "prefix_tuning" else 0
        self.T = request.sequence_length + prompt
        self.K = self.T + prefix  # keys that a query sees
        self.N = request.batch_size * self.T
        self.d, self.F = config.hidden_size, config.intermediate_size
        self.H, self.KV = config.num_attention_heads, config.num_key_value_heads
        self.D = getattr(config, "head_dim", None) or self.d // self.H
        self.masked = request.padding or bool(prefix)

    def norm(self) -> int:
        """RMSNorm: its fp32 input, the scale; the product if its weight is trained."""
        return self.N * (self.d * (4 + self.full * self.w) + 8)

    def attention(self) -> int:
        """The core of attention: q, k, v and what turns scores into an output."""
        B, c = self.r.batch_size, self.c
        wide = self.H if self.masked or self.r.attention != "sdpa" else self.KV
        values = 2 * B * self.K * wide * self.D * c
        queries = self.N * self.H * self.D * c
        scores = B * self.H * self.T * self.K
        if self.r.attention == "eager":  # softmax in fp32, and cast
            return queries + values + scores * (4 + (c if c < 4 else 0))
        if self.r.attention == "math":
            return 2 * (queries + values) + 4 * scores
        mask = B * self.T * self.K * c if self.masked else 0
        sums = B * self.H * self.T * 4
        return 2 * queries + values + sums + mask  # queries and output

    def inputs(self) -> int:
        """Inputs of linear layers kept for the gradients of trained weights."""
        if self.full:
            casts = 5 if self.w != self.c else 2  # autocast copies for each of q, k..
            out = self.N * self.H * self.D * self.c
            return self.N * self.c * (casts * self.d + self.F) + (
                out if self.r.attention != "sdpa" else 0
            )
        kept, shared = 0, set()
        amp, a = self.r.autocast, BYTES[self.r.adapter_dtype]
        dropout = getattr(self.r.peft, "lora_dropout", 0)
        for name, (rank, width) in self.ranks.items():
            source = SOURCES[name]
            x = self.w if source in ("attention", "mlp") else self.c
            if self.r.quantization and amp:
                size, copied = self.c, x != self.c
            else:
                size = self.c if amp else a
                copied = x != a or size != a
            kept += self.N * rank * size
            if dropout:
                kept += self.N * width * (1 + size)
            elif copied:
                kept += self.N * width * size
            elif source not in shared:
                shared.add(source)
                if source != "heads" or self.r.attention != "sdpa":
                    kept += self.N * width * size
        return kept

    def saved(self) -> int:
        """All that one layer keeps from its forward to its backward pass."""
        mlp = 3 * self.N * self.F * self.c
        return 2 * self.norm() + self.attention() + self.inputs() + mlp

    def transient(self) -> int:
        """What the backward pass of one layer needs for a moment, above `saved`."""
        c, wide = self.c, self.c
        if "down_proj" in self.ranks and not self.r.autocast:
            wide = BYTES[self.r.adapter_dtype]
        gradients = self.N * self.F * (c + wide)
        if self.r.quantization:  # one dequantized weight, before the gradients peak
            gradients = max(gradients, self.F * (self.N + self.d) * c)
        extra = 3 * self.N * self.d * self.w + gradients
        if self.r.attention != "sdpa":
            scores = self.r.batch_size * self.H * self.T * self.K
            extra = max(extra, scores * (8 + c))
        return extra


def closed_form(request: Request, known: Shapes | None = None) -> dict[str, Any]:
    """Predict one training step by formula; the same answer as `memory_exact.dry_run`.

    Raises:
        ValueError: where there is no closed form.
    """
    known = known or shapes(request)
    static, paged = static_parts(request, known)
    config = request.config
    kinds = [
        Layer(request, known.ranks.get(i, {})) for i in range(config.num_hidden_layers)
    ]
    one = kinds[0]
    saved = [layer.saved() for layer in kinds]
    full, w, c, N = one.full, one.w, one.c, one.N
    V, d = config.vocab_size, config.hidden_size
    tied = config.tie_word_embeddings
    # autocast copies of fp32 weights
    casts = c * known.linear if w != c and not request.quantization else 0
    stream = N * d * w
    transient = max(layer.transient() for layer in kinds)
    if request.gradient_checkpointing:
        kept = len(kinds) * stream
        first = kept + max(saved) + transient + casts // len(kinds)
        last = stream + max(saved) + transient + casts // len(kinds)
    else:
        kept = sum(saved) + casts
        first = kept + transient
        last = saved[0] + transient
    kept += one.norm() + (N * d * c if full else 0) + (c * V * d if w != c else 0)
    if request.loss == "logits":
        logits, head = 12 * N * V, 0
    else:
        rows, words = min(N, TILE_TOKENS), min(V, TILE_WORDS)
        logits = rows * words * c
        head = N * d * (4 + w) + (words * d * c if w != c else 0)
        head += (4 + (w if w < 4 else 0)) * V * d if full else 0
    cache = 0  # prefix tuning works through the cache, alive until there is a loss
    if request.method == "prefix_tuning":
        keys = request.batch_size * one.K * one.KV * one.D * c
        cache = 2 * keys * len(kinds)
    gradients = static["gradients"]
    head_gradient = w * V * d if full else 0
    # moment: (activations, logits, gradients)
    moments = {
        "loss": (kept + head + cache, logits, 0),
        "backward": (first + stream + head_gradient, 0, 0),
        "end": (last, 0, gradients),
    }
    if full:  # the embedding's gradient comes last; a tied table has two of them
        table = w * V * d
        early = (table if tied else 0, gradients - table)
        moments["end"] = (last + early[0], 0, early[1])
        moments["embedding"] = (
            stream + (3 * table if tied else 0),
            0,
            gradients - (table if tied else 0),
        )
    if request.gradient_accumulation:
        moments = {k: (a, b, gradients) for k, (a, b, _) in moments.items()}
    moment = max(moments, key=lambda name: sum(moments[name]))
    activations, logits, held = moments[moment]
    parts = {k: v for k, v in static.items() if k != "gradients"}
    parts |= {"gradients": held, "activations": activations, "logits": logits}
    return {
        "parts": {k: v for k, v in parts.items() if v},
        "static_parts": static,
        "moment": moment,
        "trainable": sum(size * count for size, count in known.trained.items()),
        "paged": paged,
    }
