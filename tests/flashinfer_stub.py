"""What bench/gpu_peers.py uses of flashinfer 0.6, in plain torch on the CPU, so that its calls are tested where there is no GPU.

Signatures are cut down to what is passed; pages are HND, ragged keys NHD, masks flat, log-sum-exps in base 2. tests/test_bench_gpu.py copies this
file to a folder of its own as flashinfer.py.
"""

import math

import torch

__version__ = "stub"


def attend(q, k, v, mask, scale):
    """`q [T, Hq, D]`, `k, v [keys, Hkv, D]`, `mask [T, keys]` -> output and log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    scores = (torch.einsum("qhd,khd->qhk", q.float(), k) * scale).masked_fill(~mask[:, None], -math.inf)
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1), v).to(q.dtype), scores.logsumexp(-1) / math.log(2)


class Wrapper:
    def __init__(self, workspace, layout, backend="auto", use_tensor_cores=False):
        assert layout in ("HND", "NHD") and workspace.dtype == torch.uint8
        self.layout = layout

    def run(self, q, *kv, return_lse=False):
        outs, taken = [], 0
        for b, (rows, keys) in enumerate(zip(self.rows, self.lengths, strict=True)):
            k, v = self.keys(b, *kv)
            assert len(k) == keys
            if self.custom is not None:
                mask = self.custom[taken : taken + rows * keys].view(rows, keys)
                taken += rows * keys
            else:
                j = torch.arange(keys)
                mask = j[None] <= (keys - rows + torch.arange(rows)[:, None] if self.causal else keys)
            start = sum(self.rows[:b])
            outs.append(attend(q[start : start + rows], k, v, mask, self.scale))
        out, lse = (torch.cat(part) for part in zip(*outs, strict=True))
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def plan(self, qo_indptr, indptr, indices, last, q_heads, kv_heads, dim, page_size, custom_mask=None, causal=False, *, sm_scale, q_data_type,
             kv_data_type):  # fmt: skip
        self.rows, self.custom, self.causal, self.scale = qo_indptr.diff().tolist(), custom_mask, causal, sm_scale
        self.tables = [indices[a:b].long() for a, b in zip(indptr[:-1], indptr[1:], strict=True)]
        self.lengths = [(len(t) - 1) * page_size + int(n) for t, n in zip(self.tables, last, strict=True)]

    def keys(self, b, cache):
        assert self.layout == "HND"
        return [part[self.tables[b]].transpose(1, 2).flatten(0, 1)[: self.lengths[b]] for part in cache]


class BatchDecodeWithPagedKVCacheWrapper(BatchPrefillWithPagedKVCacheWrapper):
    def plan(self, indptr, *args, **kwargs):
        super().plan(torch.arange(len(indptr)), indptr, *args, **kwargs)


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    def plan(self, qo_indptr, kv_indptr, q_heads, kv_heads, dim, custom_mask=None, causal=False, *, sm_scale, q_data_type, kv_data_type):
        self.rows, self.lengths, self.starts = qo_indptr.diff().tolist(), kv_indptr.diff().tolist(), kv_indptr.tolist()
        self.custom, self.causal, self.scale = custom_mask, causal, sm_scale

    def keys(self, b, k, v):
        assert self.layout == "NHD"
        return [part[self.starts[b] : self.starts[b + 1]] for part in (k, v)]


def merge_state_in_place(v, s, v_other, s_other):
    share = torch.sigmoid((s_other - s) * math.log(2))[..., None]
    v.copy_(v.float() * (1 - share) + v_other.float() * share)
