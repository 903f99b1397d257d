"""attention_distill by blocks of queries: matrix products of torch around the row kernel of ``distill_kl``.

A block of scores is multiplied out, compared and turned into gradients before the next one, so that no matrix of
queries × keys ever exists; a causal block stops at the last key that its last query sees::

                 keys ─────────────► reach                  scores_s = q_s·k_sᵀ,  scores_t = q_t·k_tᵀ
      queries  ┌──────────────┬────┐                        −inf above the diagonal and at masked keys
        start  │ all allowed  │ ◥  │  not multiplied        rows, slope = distill_kl(scores_s, scores_t)
         stop  └──────────────┴────┘                        grad_q[start:stop] = slope·k_s
                                                            grad_k[:reach]    += slopeᵀ·q_s

Three buffers of scores (student, teacher, slope) and copies of the keys fill ``SCRATCH`` bytes, or hold one head and
``MIN_BLOCK`` queries where that is more. Several heads, or batch entries with all their heads, share a block where
sequences are short. Products and sums are float32 whatever the inputs: scores rounded to 16 bits would drown the
difference of two close distributions.

Where a group has several heads, the rows compared are z, the log of the mean of their softmaxes P_h, by log-sum-exp:
a mean of probabilities in float32 would end at 1e-38. With g the gradient to z, and w_h the share of head h in the
mean (e^(log P_h − z) over the number of heads: no division by a probability that may be 0), the chain rule gives::

    slope_h = rate · (g·w_h − P_h · Σ g·w_h)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: Bytes of score buffers and copies of keys, by device type: what caches hold, and what fills a GPU.
SCRATCH = {"cpu": 8 << 20, "cuda": 256 << 20}

#: The most queries in a block, by device type. More waste work above the diagonal, fewer make thin products.
MAX_BLOCK = {"cpu": 64, "cuda": 512}

#: The fewest, however many keys there are.
MIN_BLOCK = 16


class Plan(NamedTuple):
    """Queries in a block, and how many batch entries and groups share it (more than one entry with all groups only)."""

    block: int
    entries: int
    groups: int

    def parts(self, batch: int, groups: int) -> Iterator[tuple[slice, slice]]:
        """Batch entries and groups that are done together."""
        for entry in range(0, batch, self.entries):
            for group in range(0, groups, self.groups):
                yield slice(entry, min(entry + self.entries, batch)), slice(group, min(group + self.groups, groups))

    def blocks(self, tokens: int, keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
        """Queries of each block, and how many keys the last of them sees, where it sees any."""
        for start in range(0, tokens, self.block):
            stop = min(start + self.block, tokens)
            reach = stop + keys - tokens if causal else keys
            if reach > 0:
                yield slice(start, stop), reach


def plan(batch: int, groups: int, tokens: int, keys: int, heads: int, widths: int, device: str) -> Plan:
    """Layout of the blocks; ``heads``: those of the student and of the teacher in one group, together; ``widths``:
    numbers held of each key in a group, copies and gradients."""
    buffers = 3 if heads == 2 else 4 * heads  # a mean over heads holds log P_h, z, g·w_h and what softmaxes need
    query_bytes = 4 * keys * buffers
    scratch = SCRATCH.get(device, SCRATCH["cpu"])
    block = max(MIN_BLOCK, min(MAX_BLOCK.get(device, MAX_BLOCK["cpu"]), scratch // query_bytes))
    block = max(1, min(block, tokens))
    fit = max(1, scratch // (query_bytes * block + 4 * keys * widths))
    return Plan(block, max(1, min(batch, fit // groups)), min(groups, fit))


class Side(NamedTuple):
    """The student's or the teacher's part of a call: queries, keys, query heads in a group, factor of the scores."""

    q: Tensor
    k: Tensor
    heads: int
    rate: float

    def span(self, groups: slice) -> slice:
        """The query heads of these groups."""
        return slice(groups.start * self.heads, groups.stop * self.heads)

    def queries(self, entries: slice, groups: slice) -> Tensor:
        """float32 [entries · query heads, T, D]."""
        return self.q[entries, self.span(groups)].float().contiguous().flatten(0, 1)

    def keys(self, entries: slice, groups: slice) -> Tensor:
        """float32 [entries · query heads, S, D]: for each query head the keys that it looks at."""
        span = self.span(groups)
        heads = torch.arange(span.start, span.stop, device=self.k.device) // self.repeat
        return self.k[entries].index_select(1, heads).float().flatten(0, 1)

    @property
    def repeat(self) -> int:
        """Query heads that share the keys of one head."""
        return self.q.shape[1] // self.k.shape[1]


def attention_distill(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    row_scale: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    divergence: str,
    mix: float,
    student_rate: float,
    teacher_rate: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, G, T], and the gradients of their sum to ``q_s`` and ``k_s`` (empty without ``with_grad``)."""
    batch, groups, tokens = row_scale.shape
    keys = k_s.shape[2]
    student = Side(q_s, k_s, q_s.shape[1] // groups, student_rate)
    teacher = Side(q_t, k_t, q_t.shape[1] // groups, teacher_rate)
    rows = row_scale.new_zeros(row_scale.shape)
    grad_q = q_s.new_zeros(q_s.shape if with_grad else 0)
    grad_k = k_s.new_zeros(k_s.shape if with_grad else 0, dtype=torch.float32)
    widths = 2 * student.heads * q_s.shape[3] + teacher.heads * q_t.shape[3]
    layout = plan(batch, groups, tokens, keys, student.heads + teacher.heads, widths, q_s.device.type)
    words = layout.entries * layout.groups * layout.block * keys
    buffer_s = q_s.new_empty(words * student.heads, dtype=torch.float32)
    buffer_t = q_s.new_empty(words * teacher.heads, dtype=torch.float32)
    with torch.autocast(q_s.device.type, enabled=False):
        for entries, group in layout.parts(batch, groups):
            scale = row_scale[entries, group].flatten(0, 1)  # [units, T]: a unit is a group of an entry
            mask = None if key_mask is None else key_mask[entries]
            queries_s, keys_s = student.queries(entries, group), student.keys(entries, group)
            queries_t, keys_t = teacher.queries(entries, group), teacher.keys(entries, group)
            if with_grad:  # slopes are 0 for masked keys and queries that do not count, which may hold NaN
                queries_s = torch.where((scale != 0).repeat_interleave(student.heads, 0).unsqueeze(-1), queries_s, 0.0)
                if mask is not None:
                    keys_s = torch.where(mask.repeat_interleave(len(keys_s) // len(mask), 0).unsqueeze(-1), keys_s, 0.0)
                part_q, part_k = torch.zeros_like(queries_s), torch.zeros_like(keys_s)
            for span, reach in layout.blocks(tokens, keys, causal):
                shut = None if mask is None else ~mask[:, :reach]
                diagonal = span.start + keys - tokens if causal else None
                scores_s = _scores(buffer_s, queries_s[:, span], keys_s[:, :reach], shut, diagonal)
                scores_t = _scores(buffer_t, queries_t[:, span], keys_t[:, :reach], shut, diagonal)
                counted = scale[:, span]
                value, slope = _compare(scores_s, scores_t, student, teacher, counted, divergence, mix, with_grad)
                rows[entries, group, span] = value.view(-1, group.stop - group.start, counted.shape[1])
                if with_grad:
                    part_q[:, span] = torch.bmm(slope, keys_s[:, :reach])
                    part_k[:, :reach].baddbmm_(slope.mT, queries_s[:, span])
            if with_grad:
                heads = student.span(group)
                grad_q[entries, heads] = part_q.unflatten(0, (-1, heads.stop - heads.start)).to(q_s.dtype)
                part_k = part_k.unflatten(0, (-1, heads.stop - heads.start))
                for head in range(heads.start, heads.stop):  # in this order on every device
                    grad_k[entries, head // student.repeat] += part_k[:, head - heads.start]
    return rows, grad_q, grad_k.to(k_s.dtype)


def _scores(buffer: Tensor, q: Tensor, k: Tensor, shut: Tensor | None, diagonal: int | None) -> Tensor:
    """q·kᵀ in ``buffer``, [units · heads, queries, keys], with −inf at keys that are ``shut`` ([entries, keys]) and,
    where ``diagonal`` is given, at keys beyond that of the same query: ``diagonal`` + its place in the block."""
    shape = q.shape[0], q.shape[1], k.shape[1]
    scores = buffer[: math.prod(shape)].view(shape)
    torch.bmm(q, k.mT, out=scores)
    if shut is not None:
        scores.unflatten(0, (len(shut), -1)).masked_fill_(shut[:, None, None], -math.inf)
    if diagonal is not None:
        first = max(diagonal + 1, 0)
        beyond = torch.ones(shape[1], shape[2] - first, dtype=torch.bool, device=q.device).triu(diagonal + 1 - first)
        scores[:, :, first:].masked_fill_(beyond, -math.inf)
    return scores


def _compare(
    scores_s: Tensor,
    scores_t: Tensor,
    student: Side,
    teacher: Side,
    row_scale: Tensor,
    divergence: str,
    mix: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Rows [units · queries], and their gradient to the student's scores, of the shape of ``scores_s``."""
    log_s, rate_s = _log_heads(scores_s, student, row_scale)
    log_t, rate_t = _log_heads(scores_t, teacher, row_scale)
    z_s = _log_mean(log_s)
    value, _, slope = torch.ops.pyfast.distill_kl(
        z_s.flatten(0, 1),
        _log_mean(log_t).flatten(0, 1),
        row_scale.flatten(),
        divergence,
        mix,
        1.0 / rate_s,
        1.0 / rate_t,
        0.0,
        0.0,
        None,
        None,
        with_grad,
    )
    if not with_grad or student.heads == 1:
        return value, slope.view_as(scores_s) if with_grad else slope
    share = torch.exp(log_s - z_s.masked_fill(z_s == -math.inf, 0.0).unsqueeze(1)).div_(student.heads)
    share.mul_(slope.view_as(z_s).unsqueeze(1))
    slopes = share.sub_(log_s.exp_().mul_(share.sum(-1, keepdim=True))).mul_(student.rate)
    return value, slopes.flatten(0, 1)


def _log_heads(scores: Tensor, side: Side, row_scale: Tensor) -> tuple[Tensor, float]:
    """[units, heads, queries, keys] and the factor that they still want: the scores themselves of a single head, which
    the row kernel normalises; else the log of each head's softmax."""
    scores = scores.unflatten(0, (-1, side.heads))
    if side.heads == 1:
        return scores, side.rate
    scores.masked_fill_((row_scale == 0)[:, None, :, None], 0.0)  # a row without any allowed key has no softmax
    return torch.log_softmax(scores.mul_(side.rate), dim=-1), 1.0


def _log_mean(log_heads: Tensor) -> Tensor:
    """log of the mean of e^``log_heads`` over the heads: [units, queries, keys]."""
    heads = log_heads.shape[1]
    return log_heads.squeeze(1) if heads == 1 else log_heads.logsumexp(dim=1).sub_(math.log(heads))
