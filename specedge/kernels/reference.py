"""The specification: every op of the engine in plain torch, on any device.

An op without a function here does not exist; tests import these and never a copy of them. Clarity comes before speed, yet this is
also the path of a machine without a compiler, so nothing is quadratic that need not be. Knows nothing of sequences, requests or
schedules. Invariant: arithmetic is float32 (noise: float64), results are rounded once to the dtype of the input.

Letters: R rows, B segments, Hq/Hkv query/KV heads, G = Hq/Hkv, D head dim, S page size, P pages, L layers, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MASK32 = 0xFFFFFFFF
INPUTS, GROUP = 128, 32  # of a linear layer that share a scale: of 8-bit activations, of 4-bit weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [R, H]`, `weight [H]` -> `x / sqrt(mean(x^2) + eps) * weight [R, H]`."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x, residual [R, H]` -> `rms_norm(sum, weight, eps)` and `sum = x + residual`, which is rounded before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(x: Tensor) -> Tensor:
    """`x [R, 2F]`, gate then up -> `silu(gate) * up [R, F]`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [R, K]`, `weight [N, K]` -> `x W^T + bias [N]`, `[R, N]`; without a bias, None."""
    return _rounded(x.float() @ weight.float().T, bias, x.dtype)


def _rounded(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.float()).to(dtype)


def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`weight [N, K]` as integers `[N, K]` int8 and their scales, the integer times the scale being about the weight.

    8 bits: -127 .. 127, one scale for each output, `[N]` float32. 4 bits: -8 .. 7, a scale for each 32 inputs, `[N, K / 32 rounded up]`
    bfloat16, such that the largest weight of the 32 becomes -8.
    """
    w = weight.float()
    if bits == 8:
        scale = w.abs().amax(1) / 127
        return (w / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale
    inputs = w.shape[1]
    groups = F.pad(w, (0, -inputs % GROUP)).view(len(w), -1, GROUP)
    most = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    small = (most / -8).bfloat16()
    q = (groups / torch.where(small == 0, 1, small.float())).round().clamp(-8, 7).to(torch.int8)
    return q.flatten(1)[:, :inputs].contiguous(), small[:, :, 0]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [R, K]` as integers -127 .. 127 `[R, K]` int8, with a scale for each 128 inputs `[R, K / 128 rounded up]` float32.

    Where the largest of the 128 is below 1e-30 they are 0; where one is no number the scale is NaN.
    """
    groups = F.pad(x.float(), (0, -x.shape[1] % INPUTS)).view(len(x), -1, INPUTS)
    most = groups.abs().amax(2, keepdim=True)
    some = (most >= 1e-30) & (most < torch.inf)
    inverse = torch.full_like(most, 127) / most  # `127 / most` would be 127 times a rounded reciprocal
    q = torch.where(some, groups * inverse, 0).round().to(torch.int8)
    scale = torch.where(some, most / 127, torch.where(most < torch.inf, 0.0, torch.nan))
    return q.flatten(1)[:, : x.shape[1]], scale[:, :, 0]


def linear_int(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with the weights `q [N, K]` and `scale` of `quantise`, and `x` rounded by `quantise_rows`.

    Products of integers are summed exactly (below 2^24, so in float32), over 128 inputs with 8 bits and over 32 with 4; the sums, times their
    scales, are added in order, each operation rounded by itself. So a row's bits depend on nothing else, on any machine.
    """
    a, a_scale = quantise_rows(x)
    y = torch.zeros(len(x), len(q))
    size = INPUTS if scale.dim() == 1 else GROUP
    for g, at in enumerate(range(0, q.shape[1], size)):
        part = a[:, at : at + size].float() @ q[:, at : at + size].float().T
        if scale.dim() == 2:
            part = part * scale[:, g].float()
        y = y + part * a_scale[:, at // INPUTS, None]
    return _rounded(y * scale if scale.dim() == 1 else y, bias, x.dtype)


def rope_write(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, rows_kv: Tensor, heads: int) -> Tensor:
    """Rotate queries and keys, store keys and values, return the queries `[R, Hq, D]`.

    `qkv [R, (Hq + 2 Hkv) D]`: a row is all query heads, all key heads, all value heads. `cos, sin [max_position, D/2]` float32.
    `positions [R]` int32: absolute. `slots [R]` int32: where a row's K/V goes in `rows_kv [2, rows, Hkv, D]` (written in place).
    Rotation is the half-split form of Llama: pairs are (i, i + D/2).
    """
    dim = rows_kv.shape[-1]
    qkv = qkv.view(qkv.shape[0], -1, dim)
    kv_heads = rows_kv.shape[2]
    c, s = cos[positions.long()][:, None], sin[positions.long()][:, None]
    turned, v = qkv[:, : heads + kv_heads].float(), qkv[:, heads + kv_heads :]
    a, b = turned.chunk(2, dim=-1)
    turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(qkv.dtype)
    rows_kv[0, slots.long()] = turned[:, heads:]
    rows_kv[1, slots.long()] = v
    return turned[:, :heads].contiguous()


def norm_rope_write(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, rows_kv: Tensor, heads: int
) -> Tensor:
    """`rope_write` after an `rms_norm` of every query head by `q_norm [D]` and of every key head by `k_norm [D]` (Qwen3)."""
    dim, kv_heads = rows_kv.shape[-1], rows_kv.shape[2]
    x = qkv.view(len(qkv), -1, dim)
    q, k, v = x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]
    normed = torch.cat((rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps), v), dim=1)
    return rope_write(normed.flatten(1), cos, sin, positions, slots, rows_kv, heads)


def attention(
    q: Tensor,
    rows_kv: Tensor,
    pages_kv: Tensor,
    segments: Tensor,
    page_table: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    anc: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attention of rows over their sequence's pages and over rows of the row buffer; returns `o [R, Hq, D]`.

    `q [R, Hq, D]`; `rows_kv [2, rows, Hkv, D]` (keys, values); `pages_kv [2, P, Hkv, S, D]`.
    `segments [B, 6]` int32: q0, nq, k0, nk, prefix, causal. Queries are rows q0 .. q0+nq. Their keys are (1) tokens 0 .. prefix-1 of the
    sequence, token t on page `page_table[b, t // S]` (int32 `[B, M]`) at t % S; (2) rows k0 .. k0+nk of the row buffer:
    with causal = 1 query i sees the first nk - nq + i + 1 of them, otherwise key j counts if bit j % 64 of word
    `anc[q0 + i, j // 64]` is set (`anc [R, W]` int64, read as unsigned words). Every query sees at least one key.
    `q_pos [R]`, `k_pos [rows]` int32: absolute positions, those of queries at least `prefix`. window > 0: a key counts only if
    q_pos - k_pos < window.
    Rows that belong to no segment are left zero.
    """
    group = q.shape[1] // rows_kv.shape[2]
    size = pages_kv.shape[3]
    out = torch.zeros_like(q)
    for b, (q0, nq, k0, nk, prefix, causal) in enumerate(segments.tolist()):
        pages = page_table[b, : (prefix + size - 1) // size].long()
        old = pages_kv[:, pages].transpose(2, 3).flatten(1, 2)[:, :prefix]  # [2, prefix, Hkv, D]
        k, v = torch.cat((old, rows_kv[:, k0 : k0 + nk]), dim=1).float().repeat_interleave(group, dim=2)  # [keys, Hq, D]
        j = torch.arange(nk, device=q.device)
        if causal:  # noqa: SIM108 (two lines read better than one of 150)
            seen = j[None, :] <= torch.arange(nk - nq, nk, device=q.device)[:, None]
        else:
            seen = (anc[q0 : q0 + nq][:, j // 64] >> (j % 64)) & 1 == 1
        seen = torch.cat((seen.new_ones(nq, prefix), seen), dim=1)
        if window > 0:
            key_pos = torch.cat((torch.arange(prefix, device=q.device), k_pos[k0 : k0 + nk].long()))
            seen &= q_pos[q0 : q0 + nq].long()[:, None] - key_pos[None, :] < window
        scores = torch.einsum("qhd,khd->hqk", q[q0 : q0 + nq].float() * scale, k)
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[q0 : q0 + nq] = torch.einsum("hqk,khd->qhd", p, v).to(q.dtype)
    return out


def commit(rows_kv: Tensor, pages_kv: Tensor, rows: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Copy the K/V of `rows [n]` of all layers to (`pages [n]`, `offsets [n]`), int64 each, in place.

    `rows_kv [L, 2, rows, Hkv, D]`, `pages_kv [L, 2, P, Hkv, S, D]`.
    """
    pages_kv[:, :, pages, :, offsets] = rows_kv[:, :, rows].permute(2, 0, 1, 3, 4)


def accept(
    rows_kv: Tensor, pages_kv: Tensor, segments: Tensor, page_table: Tensor, tokens: Tensor, anc: Tensor, sampled: Tensor, verify: Tensor,
    stops: Tensor,
) -> Tensor:  # fmt: skip
    """The accepted path of every segment, and the K/V of what is kept to its pages, in place; `[B, 3]` int32: row, closing token, finish.

    `segments`, `page_table`, `anc` as in `attention`, over the rows whose `tokens [R]` int64 are; a segment's last nq - chain rows are a tree below
    the row before them, its root. `sampled [n]` int64 holds the token of each such row and root, `verify [B, 5]` int32: where in it the root's is
    (-1: nothing was sampled, all rows are kept), chain, room >= 1, and which of `stops [*]` int32 (first, end) end the text. The walk goes from the
    root to the child that carries the sampled token; it ends at the first row whose token is a stop id (finish 1), is number `room` of the path
    (2), or belongs to no child (0), and that token closes it. `row` is the last accepted one, 0 for the root; for -1 the result is not written.
    Kept are the chain and the path: the first of them becomes token `prefix` of the sequence.
    """
    results = torch.zeros((len(segments), 3), dtype=torch.int32, device=tokens.device)
    rows, at = list[int](), list[tuple[int, int]]()
    each = zip(segments.tolist(), verify.tolist(), strict=True)
    for b, ((q0, nq, k0, _, prefix, _), (want, chain, room, first_stop, end_stop)) in enumerate(each):
        if nq == 0:
            continue  # padding
        stop, path, row, finish = set(stops[first_stop:end_stop].tolist()), list[int](), chain - 1, 0
        seen = [sum((w & 2**64 - 1) << 64 * i for i, w in enumerate(words)) for words in anc[q0 : q0 + nq].tolist()]
        parent = {j: max(chain, (seen[j] & (1 << j) - 1).bit_length()) - 1 for j in range(chain, nq)}
        while want >= 0:
            token = int(sampled[want + row - (chain - 1)])
            finish = 1 if token in stop else 2 if len(path) + 1 == room else 0
            below = next((j for j in parent if parent[j] == row and tokens[q0 + j] == token), None)
            if finish or below is None:
                results[b] = torch.tensor([row - (chain - 1), token, finish])
                break
            row = below
            path.append(row)
        kept = [*range(chain), *path]
        rows += [k0 + j for j in kept]
        at += [(int(page_table[b, t // pages_kv.shape[4]]), t % pages_kv.shape[4]) for t in range(prefix, prefix + len(kept))]
    if rows:
        pages, offsets = torch.tensor(at, device=tokens.device).unbind(1)
        commit(rows_kv, pages_kv, torch.tensor(rows, device=tokens.device), pages, offsets)
    return results


def philox(seed: int, counter: Tensor, position: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): `counter [n]` int64 -> words `[n, 4]` int64 in 0 .. 2^32-1.

    Key is the 64-bit seed (low word first), counter is (counter, position, 0, 0).
    """
    k0, k1 = seed & MASK32, seed >> 32 & MASK32
    x0, x1 = counter, torch.full_like(counter, position)
    x2, x3 = torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(10):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # wraps modulo 2^64, of which both halves are used
        x0, x1, x2, x3 = (p1 >> 32 & MASK32) ^ x1 ^ k0, p1 & MASK32, (p0 >> 32 & MASK32) ^ x3 ^ k1, p0 & MASK32
        k0, k1 = k0 + 0x9E3779B9 & MASK32, k1 + 0xBB67AE85 & MASK32
    return torch.stack((x0, x1, x2, x3), dim=1)


def gumbel(seed: int, position: int, vocab: int, device: torch.device | str = "cpu") -> Tensor:
    """The noise g(seed, position, v) of every token v, `[V]` float32; `position` is the index of the token being sampled.

    Word w of token v is output v & 3 of counter v >> 2; e = min((w + 0.5) 2^-32, 1 - 2^-24); g = -ln(-log1p(-e)) in float64,
    rounded once. (In float32 g would be +inf for 128 words and differ between libraries in up to a third of its values.)
    """
    words = philox(seed, torch.arange((vocab + 3) // 4, device=device), position).flatten()[:vocab]
    e = ((words.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return (-torch.log(-torch.log1p(-e))).float()


def fill_noise(table: Tensor, fills: Tensor) -> None:
    """Write the noise of `fills [m, 3]` int64 (seed as a signed number, position, row of `table [n, V]`) to the rows they name, but for those
    below 0."""
    for seed, position, row in fills.tolist():
        if row >= 0:
            table[row] = gumbel(seed % 2**64, position, table.shape[1], table.device)


def adjust(logits: Tensor, rows: Tensor, penalties: Tensor, edits: Tensor, bias: Tensor, paths: Tensor) -> None:
    """Bias, hold open and penalise `logits [n, V]` float32 in place, in this order and with every operation rounded by itself.

    `rows [n, 4]` int32: which edits (first, end) change the row, and which of `paths [P]` int32 (first, end) are the tokens on its path below the
    root. `edits [E, 3]` int32: a token, different from the others of its row and rising; how often it stands in the output before the root, 0 if it
    does in the prompt alone and -1 if nowhere; the length that a path must have for it to win. `bias [E]` float32 is added first. A token that the
    row's text holds is divided by the repetition penalty if positive, else multiplied; then frequency times its count in the output and, if that
    is not 0, presence are taken away: `penalties [n, 3]` float32, in this order.
    """
    first, end, path_first, path_end = rows.long().unbind(1)
    row, edit = _ranges(first, end)  # one element for every row and each of its edits
    if len(row) == 0:
        return
    token, count, held = edits[edit].long().unbind(1)
    of, at = _ranges(path_first, path_end)
    keys, wanted = row * logits.shape[1] + token, of * logits.shape[1] + paths[at]
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    here = torch.bincount(place[keys[place] == wanted], minlength=len(keys))  # how often the token stands in the path
    repetition, frequency, presence = penalties[row].unbind(1)
    z = logits[row, token] + bias[edit]
    z = torch.where((path_end - path_first)[row] < held, float("-inf"), z)
    z = torch.where((count >= 0) | (here > 0), torch.where(z > 0, z / repetition, z * repetition), z)
    times = count.clamp(min=0) + here
    logits[row, token] = z - frequency * times - presence * (times > 0)


def _ranges(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """All numbers first[i] .. end[i]-1 of all i, and before them their i."""
    size = end - first
    i = torch.repeat_interleave(size)
    return i, torch.arange(len(i), device=first.device) - (size.cumsum(0) - size)[i] + first[i]


def sample(logits: Tensor, noise: Tensor, noise_row: Tensor, inv_temperature: Tensor, limit: int) -> Tensor:
    """The token of every row `[n]` int64: argmax over v < limit of logits * inv_temperature + noise; the smaller id wins a tie.

    `logits [n, V]` float32; `noise [m, V]` float32; `noise_row [n]` int32: the row of `noise` to add, or -1 for a greedy row,
    whose logits are neither scaled nor disturbed; `inv_temperature [n]` float32, already rounded from float64.
    """
    greedy = (noise_row < 0)[:, None]
    z = logits[:, :limit]
    if bool(greedy.all()):
        return z.argmax(-1)  # there may be no noise at all
    disturbed = z * inv_temperature[:, None] + noise[noise_row.clamp(min=0).long(), :limit]
    return torch.where(greedy, z, disturbed).argmax(-1)


def truncate(logits: Tensor, inv_temperature: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor, limit: int) -> Tensor:
    """`logits [n, V]` float32 with -inf where a token does not survive the filters of its row, `[n, V]`.

    Each filter works on what the one before it left of z = logits * inv_temperature, v < limit, ranked by falling z, the smaller id first
    among equals. log_min_p `[n]` float32: z - max z >= log_min_p, -inf keeps all. top_k `[n]` int32: the first top_k, 0 keeps all. top_p `[n]`
    float64: the shortest run from the top whose weight reaches top_p of what is left, 1 keeps all; a weight is exp(z - max z) in float64 as an
    integer multiple of 2^-40, so that sums do not depend on their order. The first token always survives.
    """
    out = torch.full_like(logits, float("-inf"))
    for i in range(len(logits)):
        z, order = (logits[i, :limit] * inv_temperature[i]).sort(descending=True, stable=True)
        keep = torch.ones_like(z, dtype=torch.bool)
        if log_min_p[i] > float("-inf"):
            keep &= z - z[0] >= log_min_p[i]
        if top_k[i] > 0:
            keep &= torch.arange(limit, device=z.device) < top_k[i]
        if top_p[i] < 1:
            weight = torch.where(keep, ((z.double() - z[0].double()).exp() * 2.0**40 + 0.5).long(), 0)
            above = weight.cumsum(0) - weight
            keep &= above < (weight.sum().double() * top_p[i]).ceil().long()
        keep[0] = True
        out[i, order[keep]] = logits[i, order[keep]]
    return out
