from pathlib import Path

import pytest

from cllm.store.draft import Draft
from cllm.store.run import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A new run."""
    with Draft(tmp_path / "run") as draft:
        draft.run.write_config("[train]\nsteps = 10\n")
        return draft.commit()
