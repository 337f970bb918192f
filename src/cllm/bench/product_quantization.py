"""Product quantization of a table by faiss (Jégou, Douze & Schmid 2011), as a contestant."""

from __future__ import annotations

import numpy as np

from cllm.core.errors import require

HEADER = 24  # bytes that any file format needs at least; that of ours


def product_quantized(table: np.ndarray, parts: int, bits: int) -> tuple[int, np.ndarray]:
    """(bytes, decoded table) of ``table`` (V, D) in ``parts`` sub-vectors of ``bits`` each.

    Counted are the codes, ⌈parts·bits/8⌉ a row, and the codebooks in float16, with which it is decoded.
    """
    faiss = require("faiss", "bench", "product quantization")
    width = table.shape[1]
    faiss.omp_set_num_threads(1)
    quantizer = faiss.ProductQuantizer(width, parts, bits)
    quantizer.cp.min_points_per_centroid = 1  # no warning: the table is all there is
    contiguous = np.ascontiguousarray(table, dtype=np.float32)
    quantizer.train(contiguous)
    codes = quantizer.compute_codes(contiguous)
    centroids = faiss.vector_to_array(quantizer.centroids).astype(np.float16)
    faiss.copy_array_to_vector(centroids.astype(np.float32), quantizer.centroids)
    return HEADER + codes.nbytes + centroids.nbytes, quantizer.decode(codes)
