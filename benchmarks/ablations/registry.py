"""The ablations: which runs each compares, by which numbers, and what its paper says.

An ablation is data. Arms of the same name are the same runs, whichever ablation asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

STARTER = "miniworld-starter"
OFF = {"kl_coef": 0.0, "entropy_coef": 0.0}
RESEARCH = "ReSearch (Chen et al. 2025)"
R1_SEARCHER = "R1-Searcher (Song et al. 2025)"
SEARCH_R1 = "Search-R1 (Jin et al. 2025)"
NO_PAPER = "none of the three papers"


@dataclass(frozen=True)
class Arm:
    """How a run differs from the base run, which is GRPO with MiniWorld's preset."""

    name: str
    algorithm: str = "grpo"
    args: Mapping[str, Any] = field(default_factory=lambda: OFF)  # settings of the algorithm
    env_args: Mapping[str, Any] = field(default_factory=dict)
    miss: float = 0.0  # fraction of queries whose best hit the engine loses, in training
    stages: tuple[str, ...] = ()  # {part} is a third of the steps
    group_size: int | None = None  # a step has as many episodes as others; None: as configured
    masked: bool = True  # tokens of observations are left out of the loss
    learner: Mapping[str, Any] = field(default_factory=dict)  # settings of LearnerConfig
    start: Literal["starter", "nothing", "warm", "verbose"] = "starter"
    grade: str | None = None  # train on questions of this grade only
    by: Literal["rl", "sft"] = "rl"
    hard: bool = False  # trained and evaluated in the hard world only
    rollout: Mapping[str, Any] = field(default_factory=dict)  # settings of RolloutConfig


@dataclass(frozen=True)
class Claim:
    """The claim that a number is larger in one row than in another."""

    number: str  # a column of the table, or one of numbers.EQUAL_BUDGETS
    more: str
    less: str
    open: bool = False  # no paper says so: the verdict names the larger one
    source: str = ""  # the paper, if the ablation is about several


@dataclass(frozen=True)
class Ablation:
    """A comparison of arms, or of one arm's policy before, during and after its training."""

    name: str
    paper: str
    finding: str
    arms: tuple[Arm, ...]
    numbers: tuple[str, ...]  # columns of the table, see numbers.NUMBERS
    claims: tuple[Claim, ...]
    over_time: bool = False
    curves: tuple[str, ...] = ("reward", "eval/em", "env/searches", "action_tokens")
    over: Literal["episodes", "sampled tokens"] = "episodes"  # horizontal axis of the curves
    note: str = ""  # printed above the table


GRPO = Arm("grpo")
EASY, MEDIUM, HARD = (
    Arm(f"{grade} questions", grade=grade) for grade in ("easy", "medium", "hard")
)
MIXED = Arm("mixed questions", grade="easy:1+medium:1+hard:1")
# R1-Searcher's second stage takes 2 off for a broken format: this reward minus 2, a constant that
# does not change GRPO's advantages.
ONE_STAGE = Arm("one stage", env_args={"reward": "f1+2*format"})
F1, EM, CEM = (
    Arm(f"{name} reward", env_args={"reward": f"{name}+2*format"}, start="verbose")
    for name in ("f1", "em", "cem")
)
TWO_STAGES = Arm(
    "two stages",
    stages=("steps={part} until=0.9 reward=0.5*retrieved+0.5*format", "reward=f1+2*format"),
)
START_ARMS = (
    GRPO,
    Arm("from nothing", start="nothing"),
    Arm("warm start", start="warm"),
    Arm("grpo, KL 1e-3", args=OFF | {"kl_coef": 1e-3}),
    Arm("grpo, G = 4", group_size=4),
    Arm("grpo, G = 16", group_size=16),
)
BEFORE, MIDDLE, AFTER = "before", "half-way", "after"
ENDS = ("em in", "em out", "tokens", "searches", "reward", "seconds")


def _open(number: str, *names: str) -> tuple[Claim, ...]:
    """Open claims: is a number larger in the first row, or in each of the others?"""
    first, *others = names
    return tuple(Claim(number, other, first, open=True) for other in others)


# --- rewards and advantages of turns, and trees ---------------------------------------------------

OUTCOME = {"reward": "f1", "max_searches": 8}
GOLD = OUTCOME | {"turn_reward": "0.2*new_support"}
NO_GOLD = OUTCOME | {"turn_reward": "0.1*first_search-0.1*repeated_query-0.1*invalid_action"}
LEVELS = (".3", ".5", ".8")  # exact match
TREE = {"tree_branches": 4}  # a group of three trees has about as many turns as eight chains
CRITIC = OFF | {"critic_learning_rate": 2e-4}


def _hard(name: str, algorithm: str = "grpo", **settings: Any) -> Arm:
    """A run in the hard world, with an engine that misses."""
    return Arm(name, algorithm, **{"env_args": OUTCOME, "miss": 0.05, "hard": True, **settings})


TURN_ARMS = (
    _hard("grpo, outcome"),
    _hard("grpo, turn rewards", env_args=GOLD),
    _hard("grpo, turn rewards without gold", env_args=NO_GOLD),
    _hard("grpo, process", args=OFF | {"turn_rewards": True}, env_args=GOLD),
    _hard("mt_grpo", "mt_grpo", env_args=GOLD),
    _hard("mt_ppo, outcome", "mt_ppo", args=CRITIC),
    _hard("mt_ppo", "mt_ppo", args=CRITIC, env_args=GOLD),
    _hard("gigpo", "gigpo"),
    _hard("grpo, trees", group_size=15, rollout=TREE),
    _hard("tree_grpo", "tree_grpo", group_size=15, rollout=TREE),
    _hard("tree_grpo, 120 tokens", "tree_grpo", group_size=15,
          rollout=TREE | {"tree_max_tokens": 120}),
    _hard("tree_grpo, 10 turns", "tree_grpo", group_size=15,
          rollout=TREE | {"tree_max_turns": 10}),
    _hard("arpo", "arpo", group_size=15, rollout=TREE | {"tree_choice": "entropy"}),
)  # fmt: skip
MT, GIGPO, TREE_GRPO, ARPO = (
    "MT-GRPO and MT-PPO (Zeng et al. 2025)",
    "GiGPO (Feng et al. 2025)",
    "Tree-GRPO (Ji et al. 2025)",
    "ARPO (Dong et al. 2025)",
)


def _sooner(better: str, worse: str, source: str) -> tuple[Claim, ...]:
    """Claims: one run is better at equal budgets, and needs less of each budget to reach .3."""
    return (
        Claim("em at equal tokens", better, worse, source=source),
        Claim("em at equal searches", better, worse, source=source),
        Claim("tokens to .3", worse, better, source=source),
        Claim("searches to .3", worse, better, source=source),
    )


TURNS = Ablation(
    name="turns",
    paper=f"{MT}, {GIGPO}, {TREE_GRPO}, {ARPO}",
    finding="rewards of turns beat the outcome's alone and are more stable (MT-GRPO, MT-PPO); "
    "comparing turns that were taken in the same state beats GRPO (GiGPO); trees beat chains at "
    "equal budgets of tokens and of tool calls (Tree-GRPO), with half of the tool calls (ARPO)",
    arms=TURN_ARMS,
    numbers=(
        "em, T = 1",
        *(f"{unit} to {level}" for level in LEVELS for unit in ("episodes", "tokens", "searches")),
        "all tokens",
        "all searches",
        "em hard",
        "em, 5+ hops",
        "fall",
    ),
    claims=(
        *_sooner("grpo, turn rewards", "grpo, outcome", MT),
        *_sooner("mt_grpo", "grpo, outcome", MT),
        *_sooner("mt_ppo", "mt_ppo, outcome", MT),
        *_sooner("gigpo", "grpo, outcome", GIGPO),
        *_sooner("tree_grpo", "grpo, outcome", TREE_GRPO),
        *_sooner("tree_grpo, 120 tokens", "grpo, outcome", TREE_GRPO),
        *_sooner("tree_grpo, 10 turns", "grpo, outcome", TREE_GRPO),
        *_sooner("arpo", "grpo, outcome", ARPO),
        *_open("em, T = 1", "grpo, turn rewards", "grpo, turn rewards without gold"),
        *_open("em at equal tokens", "grpo, outcome", "grpo, trees"),
        *_open("em at equal searches", "grpo, outcome", "grpo, trees"),
        *_open("em at equal tokens", "grpo, trees", "tree_grpo"),
    ),
    curves=("eval/em", "reward", "env/searches", "env/support_recall"),
    over="sampled tokens",
    note="The hard world is MiniWorld at difficulty 1 (three to six hops, comparisons of three), "
    "with at most 8 searches and an engine that loses the best passage of a twentieth of all "
    "queries. Tokens and searches are those that were sampled: what a tree shares counts once. "
    "Exact match is that of held-out questions at T = 1, on a line between the evaluations; a run "
    "that does not reach a level is behind any that does. The level .3 was added when the first "
    "runs stayed below .5. At equal tokens, or searches, runs are compared where the one that "
    "spent least ended.",
)

ABLATIONS = (
    Ablation(
        name="algorithms",
        paper=R1_SEARCHER,
        finding="GRPO writes more, searches more and is better out of domain; REINFORCE++ is "
        "better in domain",
        arms=(GRPO, Arm("reinforce++", "reinforce_pp", {"baseline": "group", "kl_coef": 0.0})),
        numbers=ENDS,
        claims=(
            Claim("tokens", "grpo", "reinforce++"),
            Claim("searches", "grpo", "reinforce++"),
            Claim("em out", "grpo", "reinforce++"),
            Claim("em in", "reinforce++", "grpo"),
        ),
    ),
    Ablation(
        name="sft",
        paper=R1_SEARCHER,
        finding="RL is better than SFT in and out of domain",
        arms=(GRPO, Arm("sft on right episodes", by="sft")),
        numbers=("em in", "em out", "tokens", "searches", "seconds"),
        claims=(
            Claim("em in", "grpo", "sft on right episodes"),
            Claim("em out", "grpo", "sft on right episodes"),
        ),
        note="Both play as many episodes; SFT learns from those of the starter that are right.",
    ),
    Ablation(
        name="reward",
        paper=R1_SEARCHER,
        finding="F1 is best; EM makes responses short; CEM makes answers long, with needless words",
        arms=(F1, EM, CEM),
        numbers=("em in", "em out", "f1 in", "cem in", "tokens", "answer words", "searches"),
        claims=(
            Claim("em in", "f1 reward", "em reward"),
            Claim("em in", "f1 reward", "cem reward"),
            Claim("em out", "f1 reward", "em reward"),
            Claim("em out", "f1 reward", "cem reward"),
            Claim("tokens", "f1 reward", "em reward"),
            Claim("answer words", "cem reward", "f1 reward"),
        ),
        note="All begin with a starter that was shown episodes in which every other answer that "
        "was searched for has a needless word behind it; gold answers are one word.",
    ),
    Ablation(
        name="difficulty",
        paper=R1_SEARCHER,
        finding="harder and mixed data: more searches, and better in and out of domain",
        arms=(EASY, MEDIUM, HARD, MIXED),
        numbers=ENDS,
        claims=tuple(
            Claim(number, arm.name, EASY.name)
            for arm in (HARD, MIXED)
            for number in ("searches", "em in", "em out")
        ),
        note="Graded by samples of a policy with half of the training, that of grpo.",
    ),
    Ablation(
        name="stages",
        paper=R1_SEARCHER,
        finding="two stages teach retrieving and the format first",
        arms=(ONE_STAGE, TWO_STAGES),
        numbers=("format early", "searches early", "em in", "em out", "tokens", "searches"),
        claims=(
            Claim("format early", "two stages", "one stage"),
            Claim("searches early", "two stages", "one stage"),
            *_open("em in", "one stage", "two stages"),
            *_open("em out", "one stage", "two stages"),
        ),
        curves=("env/format", "env/searches", "eval/em", "action_tokens"),
        note="The first of the two stages lasts a third of the steps at most.",
    ),
    Ablation(
        name="mask",
        paper=f"{SEARCH_R1}, {R1_SEARCHER}",
        finding="without the mask of retrieved tokens training is unstable, and ends worse",
        arms=(GRPO, Arm("grpo, unmasked", masked=False, learner={"old_logprobs": "recomputed"})),
        numbers=("fall", *ENDS),
        claims=(
            Claim("fall", "grpo, unmasked", "grpo"),
            Claim("reward", "grpo", "grpo, unmasked"),
            Claim("em in", "grpo", "grpo, unmasked"),
            Claim("em out", "grpo", "grpo, unmasked"),
        ),
        note="No sampler reports log-probabilities of retrieved tokens, so that the ratios of the "
        "unmasked run are to recomputed ones.",
    ),
    Ablation(
        name="strict",
        paper=RESEARCH,
        finding="open: the paper prints one reward, its code computes the other",
        arms=(GRPO, Arm("research-strict", env_args={"reward": "research-strict"})),
        numbers=("format early", *ENDS),
        claims=(
            *_open("em in", "grpo", "research-strict"),
            *_open("em out", "grpo", "research-strict"),
            *_open("format early", "grpo", "research-strict"),
        ),
    ),
    Ablation(
        name="start",
        paper=NO_PAPER,
        finding="open: cold against warm start, KL 0 against 1e-3, size of the group",
        arms=START_ARMS,
        numbers=ENDS,
        claims=(
            *_open("em in", *(arm.name for arm in START_ARMS)),
            *_open("em out", *(arm.name for arm in START_ARMS)),
        ),
        note="grpo is the cold start: the starter can read and seldom searches, as a base model "
        "does. The warm start was shown how to search before, in other worlds; from nothing is a "
        "model of random weights.",
    ),
    Ablation(
        name="length",
        paper=f"{RESEARCH}, Figure 3",
        finding="response length and number of searches grow over training",
        arms=(GRPO,),
        numbers=("em", "tokens", "searches", "turns"),
        claims=(Claim("tokens", AFTER, BEFORE), Claim("searches", AFTER, BEFORE)),
        over_time=True,
        curves=("action_tokens", "env/searches", "reward"),
    ),
    Ablation(
        name="self-correction",
        paper=RESEARCH,
        finding="the share of episodes that search again after a useless result grows",
        arms=(Arm("grpo, noisy engine", miss=0.2),),
        numbers=("met useless", "searched again", "recovered", "searches", "em"),
        claims=(Claim("searched again", AFTER, BEFORE), Claim("recovered", AFTER, BEFORE)),
        over_time=True,
        curves=("eval/met useless", "eval/searched again", "eval/recovered"),
        note="A result is useless if none of its passages is a gold one of the question. The "
        "engine loses the best passage of a fifth of all queries, always the same ones.",
    ),
    TURNS,
)
BY_NAME = {ablation.name: ablation for ablation in ABLATIONS}
