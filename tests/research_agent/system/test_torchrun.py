"""What torchrun puts into the environment."""

from __future__ import annotations

from research_agent.system.torchrun import without_torchrun


def test_torchrun_s_variables_are_left_out_and_no_others() -> None:
    own = {"LOCAL_CORPUS_DIR": "/data", "RANKER_API_KEY": "k", "MASTER_DATA": "x", "PATH": "/bin"}
    ranks = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE")
    sizes = ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR")
    others = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    names = (*ranks, *sizes, *others)
    assert without_torchrun(own | dict.fromkeys(names, "1")) == own
