# mypy: allow-untyped-defs, allow-incomplete-defs
"""Softmax losses of rows of fp32 logits. One pass reads what the loss needs, a second pass writes the gradient.

For a row of student logits s and teacher logits t over this rank's slice of the vocabulary:

    m_s = max s,  z_s = sum exp(s - m_s),  m_t, z_t likewise,  c = sum exp(t - m_t) (t - s)
    KL(t || s) = c / z_t - m_t - log z_t + m_s + log z_s,      d KL / ds = softmax(s) - softmax(t)
    CE(label)  = m_s + log z_s - s[label],                     d CE / ds = softmax(s) - onehot(label)

After every rank has rescaled z_s, z_t and c to the maxima over all ranks, these and s[label] are sums over ranks.
"""

import triton
import triton.language as tl


@triton.jit
def _larger_maximum(values, maximum):
    """The running maximum (-inf at first) with that of a block, and the factor that rescales earlier sums to it."""
    larger = tl.maximum(maximum, tl.max(values, axis=0))
    return larger, tl.exp(maximum - larger)


@triton.jit
def row_statistics(
    student, teacher, labels, maxima, sums,
    rows, columns, first_label,
    HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With a teacher maxima [2, rows] are m_s, m_t and sums [3, rows] are z_s, z_t, c. Without one maxima [1, rows] are
    m_s and sums [2, rows] are z_s, s[label], where labels outside [first_label, first_label + columns) count 0.
    Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    student += row * columns
    m_s = tl.full((), float("-inf"), tl.float32)
    z_s = tl.zeros((BLOCK,), tl.float32)
    if HAS_TEACHER:
        teacher += row * columns
        m_t = tl.full((), float("-inf"), tl.float32)
        z_t = tl.zeros((BLOCK,), tl.float32)
        c = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        mask = start + lanes < columns
        s = tl.load(student + start + lanes, mask=mask, other=float("-inf"))
        m_s, fade = _larger_maximum(s, m_s)
        z_s = z_s * fade + tl.exp(s - m_s)
        if HAS_TEACHER:
            t = tl.load(teacher + start + lanes, mask=mask, other=float("-inf"))
            m_t, fade = _larger_maximum(t, m_t)
            e = tl.exp(t - m_t)
            z_t = z_t * fade + e
            c = c * fade + tl.where(mask, e * (t - s), 0.0)
    tl.store(maxima + row, m_s)
    tl.store(sums + row, tl.sum(z_s, axis=0))
    if HAS_TEACHER:
        tl.store(maxima + rows + row, m_t)
        tl.store(sums + rows + row, tl.sum(z_t, axis=0))
        tl.store(sums + 2 * rows + row, tl.sum(c, axis=0))
    else:
        label = tl.load(labels + row) - first_label
        mine = (label >= 0) & (label < columns)
        tl.store(sums + rows + row, tl.load(student + label, mask=mine, other=0.0))


@triton.jit
def row_gradients(
    student, teacher, labels, weights, student_log_total, teacher_log_total, gradient,
    columns, first_label,
    HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights[row] * d loss / d logits [rows, columns] in gradient's dtype; grid (rows, blocks of columns).

    log_total = m + log z over the whole vocabulary, so softmax = exp(logits - log_total).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    at = row * columns + column
    s = tl.load(student + at, mask=mask, other=0.0)
    difference = tl.exp(s - tl.load(student_log_total + row))
    if HAS_TEACHER:
        t = tl.load(teacher + at, mask=mask, other=0.0)
        difference -= tl.exp(t - tl.load(teacher_log_total + row))
    else:
        difference -= tl.where(column == tl.load(labels + row) - first_label, 1.0, 0.0)
    weighted = tl.load(weights + row) * difference
    tl.store(gradient + at, weighted.to(gradient.dtype.element_ty), mask=mask)
