"""Runs an exported torch file in a process that knows nothing of cllm: ``python -I outside.py KIND FILE``.

An array of ids comes on standard input as a line with its sizes and then int64 numbers; logits go to
standard output as a line with theirs and float32 numbers. The parent runs this file by its path; it must
not import cllm.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def load(kind: str, path: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that the file holds."""
    if kind == "torchscript":
        return torch.jit.load(path, map_location="cpu").eval()
    if kind == "torch-export":
        return torch.export.load(path).module()
    package: Any = torch._inductor.aoti_load_package(path)
    return package


def main(kind: str, path: str) -> None:
    """Answer until the input ends; a file that cannot be loaded is one line on standard error."""
    torch.set_num_threads(1)
    try:
        function = load(kind, path)
    except Exception as error:
        sys.exit(" ".join(str(error).split())[:200] or type(error).__name__)
    loaded = [name for name in sys.modules if name.split(".")[0] == "cllm"]
    assert not loaded, f"the file needed {loaded}"
    # The first line tells that it is ready.
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    while line := sys.stdin.buffer.readline():
        batch, length = map(int, line.split())
        ids = np.frombuffer(sys.stdin.buffer.read(8 * batch * length), dtype=np.int64)
        with torch.no_grad():
            logits = function(torch.from_numpy(ids.copy()).view(batch, length))
        sizes = " ".join(map(str, logits.shape))
        sys.stdout.buffer.write(f"{sizes}\n".encode("ascii"))
        sys.stdout.buffer.write(logits.float().contiguous().numpy().tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
