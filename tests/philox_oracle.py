"""csrc/philox.h written again in numpy: what every backend's dropout mask is compared with."""

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)


def philox(key: int, offset: int, group: np.ndarray) -> np.ndarray:
    """The 4 words of Philox4x32-10 at counter (group, offset): uint32, shape (*group.shape, 4)."""
    group = group.astype(np.uint64)
    c0, c1 = group & _MASK, group >> np.uint64(32)
    c2 = np.full_like(group, offset & 0xFFFFFFFF)
    c3 = np.full_like(group, (offset >> 32) & 0xFFFFFFFF)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def dropout_mask(seed, rows, cols: int, p: float) -> np.ndarray:
    """The mask, already scaled, of `rows` (a count, or row numbers) x `cols`; float32."""
    key, offset = (int(value) & 0xFFFFFFFFFFFFFFFF for value in seed)
    rows = np.arange(rows) if isinstance(rows, int) else np.asarray(rows)
    groups = (cols + 7) // 8
    group = rows.astype(np.uint64)[:, None] * np.uint64(groups) + np.arange(groups, dtype=np.uint64)
    words = philox(key, offset, group)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    halves = halves.reshape(len(rows), groups * 8)[:, :cols]
    threshold = int(np.floor(p * 65536.0 + 0.5))
    scale = 0.0 if threshold == 65536 else 65536.0 / (65536 - threshold)
    return (halves >= threshold).astype(np.float32) * np.float32(scale)
