"""OpenVINO as a peer: a stateful decoder built from its own operations, in the forms that its CPU plugin fuses.

Fused were, in OpenVINO 2026.4: RMS norms, rope, and attention with the K/V that it appends to in place. Grouped heads must be repeated by a
multiplication with ones: after a broadcast the attention was not fused, and 16 sequences at context 1024 (60m, a busy machine) took about 80 ms
instead of 37.
"""

import tempfile
from typing import Any

import numpy as np

from specedge.config import ModelConfig

FUSED = {"ScaledDotProductAttention", "RMS", "RoPE"}


class OpenVINO:
    """Weights from a float16 file (`int8`: and one scale a row), arithmetic and K/V in bfloat16 or, if `full`, float32; one stream of `threads`
    threads."""

    def __init__(self, c: ModelConfig, int8: bool, full: bool, threads: int) -> None:
        import openvino as ov

        self.ov, self.c = ov, c
        kind = "f32" if full else "bf16"
        self.version = f"openvino {ov.__version__.split('-')[0]}, {kind}"
        hints = {"INFERENCE_PRECISION_HINT": kind, "KV_CACHE_PRECISION": kind, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        with tempfile.TemporaryDirectory() as folder:  # mapped from a file, the weights as given need not stay beside those that it packs
            ov.save_model(build(c, int8), f"{folder}/model.xml", compress_to_fp16=False)
            self.model = ov.Core().compile_model(f"{folder}/model.xml", "CPU", hints)
        missing = FUSED - {node.get_rt_info()["layerType"].astype(str) for node in self.model.get_runtime_model().get_ops()}
        if missing:
            raise RuntimeError(f"this OpenVINO does not fuse {', '.join(sorted(missing))}: its times would not be its best")
        self.request = self.model.create_infer_request()
        self.zeros: Any = None

    def prepare(self, kind: str, sequences: int, rows: int, context: int) -> None:
        if not context:
            self.request.reset_state()
            return
        # a state that was set is moved once more when it first grows: let that happen here, in a pass that ends at `context`
        shape = (sequences, self.c.kv_heads, context - rows, self.c.head_dim)
        if self.zeros is None or tuple(self.zeros.shape) != shape:
            self.zeros = self.ov.Tensor(np.full(shape, 0.5, np.float32))
        for state in self.request.query_state():
            state.state = self.zeros
        self.step(kind, sequences, rows, context - rows)

    def step(self, kind: str, sequences: int, rows: int, context: int) -> None:
        mask = np.triu(np.full((rows, context + rows), -1e30, np.float32), context + 1)
        inputs = {
            "ids": np.ones((sequences, rows), np.int64),
            "positions": np.broadcast_to(np.arange(context, context + rows), (sequences, rows)),
            "mask": np.broadcast_to(mask, (sequences, 1, *mask.shape)),
            "beams": np.arange(sequences, dtype=np.int32),
            "wanted": np.arange(rows - 1 if kind == "prompt" else 0, rows),
        }
        self.request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()}, share_inputs=True)


def build(c: ModelConfig, int8: bool) -> Any:
    """ids, positions `[B, T]`, mask `[B, 1, T, past + T]`, beams `[B]`, wanted `[n]` -> logits `[B, n, V]`; K/V `[B, Hkv, past, D]` are state."""
    import openvino as ov
    from openvino import opset13 as op
    from openvino.op.util import Variable, VariableInfo

    rng = np.random.default_rng(0)
    half, groups = c.head_dim // 2, c.heads // c.kv_heads

    def whole(*values: int) -> Any:
        return op.constant(np.array(values, np.int64))

    def real(value: float) -> Any:
        return op.constant(np.float32(value))

    def matrix(rows: int, columns: int) -> Any:
        pool = rng.integers(-127, 128, 1 << 20, np.int8)  # repeated: to draw every weight would take a minute
        if int8:
            scaled = op.convert(op.constant(np.resize(pool, (rows, columns))), "f16")
            return op.convert(op.multiply(scaled, op.constant(np.full((rows, 1), columns**-0.5 / 74, np.float16))), "f32")
        return op.convert(op.constant(np.resize((pool * (columns**-0.5 / 74)).astype(np.float16), (rows, columns))), "f32")

    def linear(x: Any, rows: int, columns: int) -> Any:
        return op.matmul(x, matrix(rows, columns), False, True)

    def norm(x: Any) -> Any:
        mean = op.reduce_mean(op.power(x, real(2)), whole(-1), True)
        return op.multiply(op.multiply(x, op.divide(real(1), op.sqrt(op.add(mean, real(c.norm_eps))))), op.constant(np.ones(c.hidden, np.float32)))

    def split(x: Any, heads: int) -> Any:
        return op.transpose(op.reshape(x, whole(0, 0, heads, c.head_dim), True), whole(0, 2, 1, 3))

    def rope(x: Any) -> Any:
        a, b = op.variadic_split(x, whole(3), whole(half, half)).outputs()
        return op.add(op.multiply(x, cos), op.multiply(op.concat([op.multiply(b, real(-1)), a], -1), sin))

    def cached(new: Any, name: str) -> Any:
        info = VariableInfo()
        info.variable_id, info.data_type, info.data_shape = name, ov.Type.f32, ov.PartialShape([-1, c.kv_heads, -1, c.head_dim])
        variable = Variable(info)
        none = op.broadcast(real(0), op.concat([batch, whole(c.kv_heads, 0, c.head_dim)], 0))
        full = op.concat([op.gather(op.read_value(none, variable), beams, whole(0)), new], 2)
        sinks.append(op.assign(full, variable))
        repeated = op.multiply(op.unsqueeze(full, whole(2)), op.constant(np.ones((1, 1, groups, 1, 1), np.float32)))
        return op.reshape(repeated, whole(0, c.heads, -1, c.head_dim), True)

    ids = op.parameter([-1, -1], np.int64, name="ids")
    positions = op.parameter([-1, -1], np.int64, name="positions")
    mask = op.parameter([-1, 1, -1, -1], np.float32, name="mask")
    beams = op.parameter([-1], np.int32, name="beams")
    wanted = op.parameter([-1], np.int64, name="wanted")
    sinks: list[Any] = []
    batch = op.gather(op.shape_of(ids), whole(0), whole(0))
    angles = np.tile(np.outer(np.arange(c.max_positions), c.rope_theta ** (-np.arange(half) / half)), 2)
    cos, sin = (op.unsqueeze(op.gather(op.constant(f(angles).astype(np.float32)), positions, whole(0)), whole(1)) for f in (np.cos, np.sin))
    embedding = matrix(c.vocab, c.hidden)
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    x = op.gather(embedding, ids, whole(0))
    for i in range(c.layers):
        h = norm(x)
        keys = cached(rope(split(linear(h, kv, c.hidden), c.kv_heads)), f"k{i}")
        values = cached(split(linear(h, kv, c.hidden), c.kv_heads), f"v{i}")
        o = op.scaled_dot_product_attention(rope(split(linear(h, q, c.hidden), c.heads)), keys, values, mask)
        x = op.add(x, linear(op.reshape(op.transpose(o, whole(0, 2, 1, 3)), whole(0, 0, -1), True), c.hidden, q))
        h = norm(x)
        x = op.add(x, linear(op.multiply(op.swish(linear(h, c.ffn, c.hidden)), linear(h, c.ffn, c.hidden)), c.hidden, c.ffn))
    logits = op.matmul(op.gather(norm(x), wanted, whole(1)), embedding, False, True)
    return ov.Model([op.result(logits)], sinks, [ids, positions, mask, beams, wanted], "decoder")
