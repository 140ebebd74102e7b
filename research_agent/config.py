"""The settings of each command: frozen data classes whose fields the command line shows as flags.

A run is its configuration and its seed. The text under a field is the help text of its flag, so a
setting is explained in one place. Nothing here imports torch, so ``--help`` is quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from research_agent.settings import Settings
from research_agent.tree_plan import TreePlan


@dataclass(frozen=True)
class EnvironmentConfig:
    """The environment: any Gymnasium environment that speaks text."""

    env: str
    """Id of the Gymnasium environment; MODULE:ID imports the module that registers it."""
    env_args: Settings = field(default_factory=dict)
    """Arguments of the environment. They are added to those of the preset, if there is one (VALUE
    none unsets one); with another --env than the preset's they stand alone."""


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: a Hugging Face causal language model."""

    model: str
    """Folder of a model (a checkpoint is one), a GGUF file, a LoRA adapter, a warm-start
    checkpoint that ships with the package, or a name on the hub; with --endpoint the name that the
    endpoint knows it by. An adapter is trained on."""
    chat_template: bool = False
    """Prompt with the model's chat template, for models tuned to follow instructions."""
    chat_template_args: Settings = field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking=false. An --endpoint gets them as
    chat_template_kwargs."""
    chat_template_date: str | None = None
    """The day, YYYY-MM-DD, that a chat template which writes the date takes for today. None takes
    the day of the first start, also when the run or the evaluation is continued."""
    device: str = "auto"
    """Where the model lives: cpu, cuda, or auto, which is cuda where there is one."""


@dataclass(frozen=True)
class SamplingConfig:
    """How an episode is played, in training and in evaluations."""

    temperature: float
    """Temperature of the softmax that tokens are drawn from; 0 is greedy, for evaluations only.
    Learning takes one other than 1 into account."""
    engine: str = "transformers"
    """What samples the tokens: transformers, vllm (vllm:tp=2,memory=0.4: GPUs per copy of the
    weights, and vLLM's share of their memory), a vLLM server per node that the run starts
    (serve:tp=2,dp=1,memory=0.4), or servers that run already (server:URL,URL; server+nccl:URL,URL
    or server+ipc:URL,URL if weights go from GPU to GPU)."""
    max_prompt: int = 512
    """Longest first observation, in tokens. In training --overlong-prompts says what becomes of
    longer ones."""
    max_response: int = 8192
    """The most tokens of an episode after its prompt: all actions and observations together. An
    episode also ends where the model's context does."""
    max_turn_tokens: int | None = None
    """Longest action, in tokens; none leaves it to --max-response."""
    max_in_flight: int | None = None
    """Episodes played at the same time; none plays all those of a training step at once, and 128
    of an evaluation."""
    overlap: bool = False
    """Sample some episodes while others wait for the environment. Faster with a slow environment;
    the order of events, and so the last bits of a number, then depend on timing."""


@dataclass(frozen=True)
class RolloutConfig:
    """Which episodes a training step plays, and when."""

    prompts_per_step: int = 256
    """Tasks per training step."""
    group_size: int = 5
    """Episodes of each task: the group that an advantage is measured in."""
    tree_branches: int = 0
    """Grow trees instead of chains: after each chain this many episodes branch off it, each from a
    state before one of its turns. A group is then a number of whole trees; the environment must
    offer branch(source, targets)."""
    tree_rounds: int = 1
    """Rounds of branches per tree; later ones branch off earlier branches too."""
    tree_choice: Literal["random", "entropy"] = "random"
    """Which states are branched from: each with the same probability, or the more probable the more
    entropy the turn that followed has over the first one (ARPO's rule)."""
    tree_max_tokens: int | None = None
    """Action tokens that a tree may sample. A branch that would exceed them, if it were as long as
    the rest of the episode that it leaves, is not played; none plays all branches."""
    tree_max_turns: int | None = None
    """Turns that a tree may take, each a step of an environment; none takes any number. A branch
    that would exceed them is not played."""
    overlong_prompts: Literal["error", "skip"] = "error"
    """What to do about a task whose prompt is longer than --max-prompt: stop the run and name the
    episode, or leave the task out (see skipped_fraction in the log)."""
    max_staleness: int = 0
    """Training steps that sampling may run ahead of learning. Above 0 each rank plays in a child
    process, which continues with the next steps while the learner updates. No token is learned from
    after more updates than this; 0 is strictly on-policy."""
    stages: tuple[str, ...] = ()
    """Parts of the run with environment arguments of their own, one after the other, each in
    quotes: "steps=20 until=1.4 KEY=VALUE ..." lasts 20 steps, or until the mean reward of five
    steps is 1.4; the last one lasts to the end of the run and has neither."""

    @property
    def tree_plan(self) -> TreePlan:
        """The settings of trees as a plan.

        Raises:
            ConfigError: a setting has a value that no tree can have.
        """
        return TreePlan(
            branches=self.tree_branches,
            rounds=self.tree_rounds,
            choose=self.tree_choice,
            max_tokens=self.tree_max_tokens,
            max_turns=self.tree_max_turns,
        )


@dataclass(frozen=True)
class AlgorithmConfig:
    """How rewards become a loss."""

    algorithm: str = "grpo"
    """Name of an algorithm, or MODULE:CLASS for one of your own."""
    algorithm_args: Settings = field(default_factory=dict)
    """Settings of the algorithm: the fields of its class. Added to those of the preset; with
    another --algorithm than the preset's they stand alone."""
    max_void_fraction: float = 0.2
    """Void episodes (failed infrastructure, never learned from) that a step may have, as a share.
    Above it the run stops: something is down."""


@dataclass(frozen=True)
class LearnerConfig:
    """How a loss changes the weights: AdamW."""

    learning_rate: float = 1e-6
    """Learning rate after the warm-up; constant from there on."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from zero."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    minibatches: int = 1
    """Optimizer steps per training step: its tasks are split into this many parts."""
    micro_batch_tokens: int = 4096
    """Tokens that go through the model at once. Changes memory and speed, not the gradient."""
    old_logprobs: Literal["sampler", "recomputed"] = "sampler"
    """The denominator of probability ratios: the log-probabilities that the sampler reported, or
    the model's own, recomputed before its first update on an episode."""
    importance_sampling_cap: float | None = None
    """With --old-logprobs recomputed: weight each token by its recomputed over its reported
    probability, but at most by this (truncated importance sampling); none weights no token."""
    packing: Literal["auto", "on", "off", "tree"] = "auto"
    """Put several trajectories into one row without padding (on), or give each its own row (off).
    With tree the samples of a task also share one copy of their common beginning: the prompt, and
    the turns before a branch. auto is tree with --tree-branches; otherwise on with a GPU, and off
    without. Changes memory and speed, not the gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the model's matrix products, and of the copy that vLLM samples with.
    Weights, optimizer and softmax are float32 with both."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer, and compute the rest again: less memory, slower."""
    compile: bool = False
    """Let torch.compile fuse the operations of each layer: faster on a GPU, after minutes."""
    lora_rank: int = 0
    """Learn adapters of this rank beside the weights (LoRA, needs peft); 0 learns the weights."""
    merge_adapter: bool = False
    """Add the adapter that --model names to the weights of its base first, and train those."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_offload"] = "adamw"
    """Plain AdamW, with moments of 8 bits (needs bitsandbytes), or in the CPU's memory."""
    bucket_bytes: int = 2**30
    """With torchrun: the most bytes of weights that a rank holds whole at once, besides its shard,
    while weights are saved or given to the sampler. A larger tensor is a bucket of its own."""
    shard_ranks: int | None = None
    """With torchrun: ranks that one copy of the weights is spread over; it must divide the number
    of ranks. None takes those of a node, so that weights are gathered inside it. Give more where a
    node has too little memory."""


@dataclass(frozen=True)
class RunConfig:
    """How long, how often, where."""

    steps: int = 100
    """Training steps. Give more to continue a finished run."""
    seed: int = 0
    """Seed of everything drawn at random: order of the tasks, and sampled tokens."""
    output: Path = Path("runs/train")
    """Folder of the run. One that holds a run of the same configuration is continued; settings of
    memory, speed and place may change."""
    time_limit: float | None = None
    """Seconds of training (evaluation left out) after which the run stops, at the end of a step."""
    save_every: int = 10
    """Steps between checkpoints; the end of the run always has one."""
    keep: int = 2
    """Checkpoints kept: the newest ones. The best by evaluation stays too, as checkpoints/best."""
    collapse: float | None = None
    """A run has collapsed when its reward, averaged over ten steps, falls below this share of its
    best such average; none never looks. Needs rewards above 0."""
    on_collapse: Literal["stop", "rollback"] = "stop"
    """Stop, or go back to the newest checkpoint of the best steps (give --keep enough) and continue
    with the next tasks. With rollback --save-every and --keep change the results."""
    eval_every: int | None = None
    """Steps between evaluations, with one before the first step and one after the last. 0 or none:
    never."""
    eval_args: Settings = field(default_factory=dict)
    """Arguments of the environment of evaluations, on top of --env-args, such as split=dev: they
    must name tasks that are not trained on. Added to those of the preset; with another --env than
    the preset's they stand alone."""
    eval_limit: int | None = None
    """Tasks per evaluation; none plays every task of the environment once."""
    eval_temperature: float = 0.0
    """Temperature of evaluations; 0 is greedy."""
    plan: str | None = None
    """Say what the run would need (memory, disk, tokens, hours) on GPUs such as 8xH100, or 2x8xH100
    for two nodes, and stop. Nothing is loaded. Exit status 2 if it does not fit."""
    trace: Path | None = None
    """File for a timeline of generation, environments and updates, which ui.perfetto.dev opens;
    written anew each time the run is started or continued."""
    wandb: str | None = None
    """Log to this project of Weights & Biases too (extra wandb). WANDB_MODE=offline keeps it on
    disk, in the folder of the run."""
    log_episodes: int = 4
    """Episodes of each step written out in words, to trajectories.jsonl."""
    collective_timeout: float = 15.0
    """With torchrun: minutes that a rank waits for the others before it stops with an error."""
    override: bool = False
    """Continue a run with settings that change its results; changes.jsonl in its folder records
    them."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """Print the summary as one line of JSON on standard output, for scripts."""

    def __post_init__(self) -> None:
        """Take a text as a path too."""
        object.__setattr__(self, "output", Path(self.output))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on."""

    preset: Annotated[str, tyro.conf.Suppress] = ""
    environment: EnvironmentConfig = EnvironmentConfig(env="research_env:ReSearch-MiniWorld-v0")
    policy: PolicyConfig = PolicyConfig(model="miniworld-starter")
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class EvalConfig:
    """Play tasks with a model, and average what the environment reports.

    The same command continues an evaluation that was stopped. docs/explanation/scores.md says what
    is measured.
    """

    environment: EnvironmentConfig
    policy: PolicyConfig
    output: Path
    """Folder for predictions.jsonl and summary.json."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    endpoint: str | None = None
    """Address of an OpenAI-compatible endpoint to sample from, such as http://localhost:8000/v1.
    Its key, where it wants one, is read from OPENAI_API_KEY."""
    split: str | None = None
    """Short for --env-args split=SPLIT."""
    limit: int | None = None
    """Number of tasks; none plays every task of the environment."""
    samples_per_task: int = 1
    """Episodes of each task. Several need a --temperature; they also give pass@k and the majority
    of their answers."""
    seed: int = 0
    """Seed of the order of the tasks, and of the sampled tokens."""
    log_tokens: bool = False
    """Write the text and log-probability of each action token too, for the report's page."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """Print the summary as one line of JSON on standard output, for scripts."""

    def __post_init__(self) -> None:
        """Take a text as a path too."""
        object.__setattr__(self, "output", Path(self.output))


@dataclass(frozen=True)
class CompareConfig:
    """Compare two evaluations of the same questions.

    It makes a paired bootstrap of the difference of each metric, and McNemar's exact test of one.
    """

    a: tyro.conf.Positional[Path]
    """A predictions.jsonl, or the folder of an evaluation."""
    b: tyro.conf.Positional[Path]
    """Another one, on the same questions. Differences are B minus A."""
    metric: str | None = None
    """The metric of McNemar's test: above 0.5 an answer is right. none takes em, or else the first
    metric."""
    seed: int = 0
    """Seed of the bootstrap's draws."""
    json: bool = False
    """Print the comparison as one line of JSON on standard output, for scripts."""


@dataclass(frozen=True)
class GradeConfig:
    """Grade questions by how many samples of a policy are right, from an evaluation.

    First: research-agent eval ... --samples-per-task 8 --temperature 1. Then an
    environment can choose by grade: --env-args grades=FILE grade=hard, or a
    mixture such as grade=medium:1+hard:2.
    """

    predictions: tyro.conf.Positional[Path]
    """A predictions.jsonl, or the folder of an evaluation."""
    output: Path
    """The file of grades, a line per question."""
    metric: str | None = None
    """A sample is right where this is above 0.5; none takes em, or else the first metric."""
    easy: float = 2 / 3
    """The least share of right samples of an easy question."""
    hard: float = 1 / 3
    """The greatest share of a hard one; medium is between."""
    json: bool = False
    """Print the counts as one line of JSON on standard output, for scripts."""


@dataclass(frozen=True)
class SampleConfig:
    """Keep the right episodes of an evaluation as demonstrations (rejection sampling).

    First: research-agent eval ... --samples-per-task 8 --temperature 1. Then:
    research-agent sft own --demonstrations FILE --model MODEL.
    """

    predictions: tyro.conf.Positional[Path]
    """A predictions.jsonl, or the folder of an evaluation."""
    output: Path
    """The file of demonstrations, a line per episode."""
    metric: str | None = None
    """A sample is right where this is above 0.5; none takes em, or else the first metric."""
    each: int = 1
    """The most episodes to keep per task."""
    json: bool = False
    """Print the counts as one line of JSON on standard output, for scripts."""


@dataclass(frozen=True)
class ReportConfig:
    """Make one HTML page of runs and evaluations: curves, means, and every trajectory to look at.

    The page needs no network and no server: a double click opens it. Two evaluations of the same
    questions stand side by side on it.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of training runs (their first and last evaluations are shown), folders of
    evaluations, or files of predictions."""
    output: Path | None = None
    """The page; none writes report.html into the first folder. With a training run, curve.png is
    written beside it."""
    limit: int | None = None
    """How many samples of questions are shown, from the first on; none shows all (ten thousand are
    no problem)."""
    metric: str | None = None
    """What the terminal's curve shows; none takes the evaluations' reward, or else training's."""


def complete(config: TrainConfig, preset: TrainConfig) -> TrainConfig:
    """Add the preset's environment and algorithm arguments to those given on the command line.

    Arguments belong to what they are arguments of: with another environment or algorithm than the
    preset's, the preset's are left out.
    """

    def merge(given: dict[str, Any], presets: dict[str, Any], same: bool) -> dict[str, Any]:
        if same:
            return {**presets, **given}
        return {} if given is presets else given  # the very object: no flag was given

    same_env = config.environment.env == preset.environment.env
    same_algorithm = config.algorithm.algorithm == preset.algorithm.algorithm
    env_args = merge(config.environment.env_args, preset.environment.env_args, same_env)
    eval_args = merge(config.run.eval_args, preset.run.eval_args, same_env)
    algorithm_args = merge(
        config.algorithm.algorithm_args, preset.algorithm.algorithm_args, same_algorithm
    )
    return replace(
        config,
        environment=replace(config.environment, env_args=env_args),
        algorithm=replace(config.algorithm, algorithm_args=algorithm_args),
        run=replace(config.run, eval_args=eval_args),
    )


def as_json(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping as (``"outer.inner"``, value); ``*_args`` are leaves."""
    for key, value in values.items():
        if isinstance(value, Mapping) and not key.endswith("_args"):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
