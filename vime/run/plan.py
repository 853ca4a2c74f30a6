"""Plan of a run. Made once by `vime.submit`, written to `plan.json`, read by all later programs.

One module since its classes are the parts of one document.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Item(Frozen):
    """One line of a memory account."""

    name: str
    bytes: int
    why: str


class Memory(Frozen):
    """Bytes by item."""

    items: tuple[Item, ...] = ()
    total_bytes: int = 0


class GpuMemory(Frozen):
    """GPU memory of the fullest rank of a node: an estimate, unlike the host's account."""

    estimate: Literal[True] = True
    training: Memory = Memory()
    engine: Memory = Memory()
    """Includes the KV cache, which fills `--vllm-gpu-memory-utilization` after weights and reserve."""
    gpu_bytes: int
    """GPU memory, from the cluster profile."""
    kv_cache_tokens: int = 0
    """Tokens that the KV cache of one GPU holds."""
    missing: int = 0
    """Bytes by which the engine's weights and reserve exceed their budget."""
    moments: tuple[Item, ...] = ()
    """With `--colocate`: bytes that trainer and engine together hold at each moment of a rollout."""


class TrainerRank(Frozen):
    """One Megatron rank and its place."""

    rank: int
    node: int
    """Logical node."""
    gpu: int
    """GPU slot on the node."""
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    edp: int


class EnginePlan(Frozen):
    """One vLLM engine: its GPUs, node by node, and its parallel sizes."""

    index: int
    nodes: tuple[int, ...]
    """Logical nodes in order; the first one serves."""
    gpus: tuple[tuple[int, ...], ...]
    """GPU slots on each of these nodes."""
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel: bool = False
    port: int
    """Port of the server on its first node."""
    aux_port: int
    """First of 32 ports for communication among the engine's ranks."""


class TeacherPlan(Frozen):
    """The teacher of `--use-opd`: what its engines load, and where they are."""

    path: str
    """HF folder."""
    weights_bytes: int = 0
    """Bytes of its weights; 0 where the plan was made without the folder."""
    max_model_len: int
    """Tokens of the longest prompt and response."""
    engines: tuple[EnginePlan, ...]
    """Numbered after the engines of the plan. They get no weights from the trainer, and never sleep."""
    gpu_memory: Memory | None = None
    """Estimate for one of its GPUs; None without GPUs."""
    missing: int = 0
    """Bytes by which that estimate exceeds what its engines may take of a GPU."""


class NodePlan(Frozen):
    """One logical node."""

    index: int
    gpus: int
    host_memory: Memory = Memory()
    gpu_memory: GpuMemory | None = None
    """None without GPUs."""
    ranks: tuple[int, ...] = ()
    engines: tuple[int, ...] = ()
    """Numbers in `Plan.servers`."""


class Artefact(Frozen):
    """Something a stage reads or writes on disk, verified by its fingerprint."""

    name: str
    path: str
    kind: Literal["hf", "torch_dist", "data", "run"]
    bytes: int | None = None


class Stage(Frozen):
    """One step of the run, dependent on those before it. A service stays up while later stages run."""

    name: str
    """`preflight`, `ring`, `rehearsal`, `cast`, `convert`, `verify-cast`, `verify-convert`, `ray-head`, `ray-workers`,
    `train`, `report`; `export` and `evaluate` of an evaluation."""
    nodes: tuple[int, ...]
    """Logical nodes."""
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    """CPUs of a task; None: all CPUs of the node."""
    gpus_per_node: int = 0
    command: tuple[str, ...]
    """argv after the Python interpreter, for example ("-m", "vime.train", "--run", …)."""
    env: dict[str, str] = Field(default_factory=dict)
    service: bool = False
    needs_services: bool = True
    """If False, running services are stopped before the stage. (A restarted slurmctld may refuse a step next to theirs:
    Slurm 22.05 forgets that they share the job's memory.)"""
    tells_end: bool = False
    """True if the stage succeeds only with a report `result`; exit code 0 alone is not enough."""
    inputs: tuple[Artefact, ...] = ()
    outputs: tuple[Artefact, ...] = ()
    deadline_s: float
    """Seconds after which the stage has failed; for a service, until it is ready."""

    @property
    def saves_on_request(self) -> bool:
        """True if the stage writes the run's checkpoints, including one on the controller's request."""
        return any(output.kind == "run" for output in self.outputs)


class Ports(Frozen):
    """Ports of the run, the same on every node, outside the ephemeral range; a job's offset keeps two runs apart."""

    gcs: int
    node_manager: int
    object_manager: int
    worker_first: int
    worker_last: int
    trainer_master: int
    stage_master: int
    sync_master: int
    runtime_env: int
    dashboard_agent: int
    dashboard_agent_grpc: int
    metrics_export: int


class Container(Frozen):
    """Container for the stages; the controller runs outside of it, on the batch host."""

    runtime: Literal["pyxis", "apptainer"]
    image: str
    """Image in the runtime's syntax: a .sqsh or .sif file, or a registry's name."""
    mounts: tuple[str, ...] = ()
    """`SOURCE:TARGET` or `SOURCE:TARGET:FLAGS`. Run folder, base folder and node-local files are always mounted."""
    python: str = "python3"
    """Interpreter inside the container."""
    options: tuple[str, ...] = ()
    """Further options of srun (pyxis) or of `apptainer exec`."""

    @field_validator("mounts", "options", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class EvalJob(Frozen):
    """Shape of the jobs of `--eval-job`; what is not set is as in the rest of the profile."""

    nodes: int | None = Field(default=None, ge=1)
    """Nodes of a job; None: as few as one engine takes."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_type: str | None = None
    cpus_per_node: int | None = None
    exclusive: bool | None = None
    mem: str | None = None
    time_limit_minutes: int | None = Field(default=None, ge=1)
    """None: what starting, loading and one `--rollout-timeout` take."""

    @property
    def settings(self) -> dict[str, Any]:
        """Replacements for settings of the profile, by name."""
        return {name: value for name, value in self if value is not None and name != "nodes"}


class Cluster(Frozen):
    """The cluster profile as resolved for this run."""

    name: str
    kind: str
    """The scheduler: `slurm`, `local` (this machine alone), or `package.module:Class` (vime.run.scheduler)."""
    base_dir: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 0
    gpu_request: Literal["gres", "gpus-per-node", "none"] = "gpus-per-node"
    gpu_type: str | None = None
    """Slurm's name of the GPU type (`h100`), for a partition with several."""
    cpus_per_node: int | None = None
    memory_per_node_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    """Memory of one GPU; None: 80 GB."""
    exclusive: bool = True
    mem: str | None = "0"
    time_limit_minutes: int = 24 * 60
    network_interface: str | None = None
    min_network_gbit: float | None = None
    """Gigabits per second that every node must reach to its neighbour in preflight (gloo, over TCP); by default 1 for
    nodes with GPUs. 0 skips the test."""
    container: Container | None = None
    modules: tuple[str, ...] = ()
    """Modules for `module load`, before anything else."""
    venv: str | None = None
    """Virtual environment to activate, whose Python runs."""
    setup: tuple[str, ...] = ()
    """Further shell lines before Python starts."""
    env: dict[str, str] = Field(default_factory=dict)
    gpu_hours_per_failure: float = Field(default=50_000, gt=0)
    """GPU hours between two failures, for `--save-interval auto`. Default: 419 in 54 days of 16,384 GPUs (Llama 3)."""
    extra_sbatch: dict[str, Any] = Field(default_factory=dict)
    eval_job: EvalJob = EvalJob()
    job_comment: Literal["append", "keep"] = "append"
    """`append`: the job's comment shows the run's activity after the site's part; a JSON comment is kept unchanged."""
    python: str | None = None
    """Interpreter on the nodes; by default the virtual environment's, else that of vime.submit."""

    @field_validator("modules", "setup", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("eval_job", mode="before")
    @classmethod
    def _dashes(cls, value: Any) -> Any:
        return {str(key).replace("-", "_"): each for key, each in value.items()} if isinstance(value, dict) else value

    @property
    def one_machine(self) -> bool:
        """True if every logical node is this machine: nodes then share address, ports and memory."""
        return self.kind == "local"

    @property
    def on_gpu(self) -> bool:
        """The run's GPU slots are real GPUs, and not shares of the processors."""
        return self.gpu_request != "none" and self.gpus_per_node > 0

    @property
    def interpreter(self) -> str | None:
        """Python of the batch script, if the profile sets it."""
        return self.python or (f"{self.venv}/bin/python" if self.venv else None)


VERSION = 2
_MODULES_OF_1 = {
    "vime.launch.preflight": "vime.node.preflight",
    "vime.launch.ring": "vime.node.ring",
    "vime.launch.ray_node": "vime.node.ray_node",
}


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the content of a `plan.json` of any version to this version. Version 1: vime 0.1.

    The result is not validated; content of an unknown version is returned unchanged.
    """
    if values.get("version") != 1:
        return values
    recipe = dict(values.get("recipe", {}))
    recipe["resources"] = recipe.pop("cluster", {})
    recipe["perf"] = {name: value for name, value in recipe.get("perf", {}).items() if name != "balance_data"}
    stages = [
        {**stage, "command": [_MODULES_OF_1.get(word, word) for word in stage.get("command", ())]}
        for stage in values.get("stages", ())
    ]
    return {**values, "version": VERSION, "recipe": recipe, "stages": stages}


class Evaluation(Frozen):
    """Weights that a run evaluates instead of training."""

    weights: str
    """HF folder that the engines load."""
    run_dir: str | None = None
    """Run that gets the results; None for a plain HF folder."""
    rollout_id: int = 0
    """Step of the results: the last rollout that the weights were trained on."""
    weights_time: float = 0.0
    """Unix time at which the weights were saved: a run that was set back since does not take their results."""
    temporary: bool = False
    """The folder was made for this evaluation, and is removed after it."""


class Plan(Frozen):
    """Complete plan of one run. `binding.json` adds the facts known only in the allocation."""

    version: Literal[2] = VERSION
    command: tuple[str, ...] = ()
    """Arguments of `python -m vime.submit` from which the plan was made."""
    run_name: str
    run_dir: str
    base_dir: str | None
    shape: Literal["allocation", "chain"] = "allocation"
    recipe: Recipe
    """Recipe with every path absolute and every derived value filled in."""
    model_config_hf: dict[str, Any]
    """The model's HF `config.json`, as read from the checkpoint or from `configs/models/`."""
    cluster: Cluster
    layout: ParallelLayout
    spares: int = 0
    nodes: tuple[NodePlan, ...]
    trainer_ranks: tuple[TrainerRank, ...]
    engines: tuple[EnginePlan, ...]
    """Engines of the policy."""
    teacher: TeacherPlan | None = None
    ports: Ports
    stages: tuple[Stage, ...]
    evaluation: Evaluation | None = None
    """None for a run that trains."""
    code: str | None = None
    """Folder with the copy of the code that the run's processes import; None: the installed code."""
    hold_minutes: float = 0.0
    """Minutes for which the run's nodes stay idle after its end, for others to run in them."""
    max_timeouts: int = 1000
    signal_lead_s: int = 300
    """Seconds before the time limit at which the batch script is signalled."""
    notes: tuple[str, ...] = ()
    """Notes for the user: flags without effect here, translated values, costs."""

    @property
    def on_gpu(self) -> bool:
        """The run's GPU slots are real GPUs, and not shares of the processors."""
        return self.cluster.on_gpu

    @property
    def servers(self) -> tuple[EnginePlan, ...]:
        """All vLLM servers by their number: the policy's engines, then the teacher's."""
        return (*self.engines, *(self.teacher.engines if self.teacher else ()))

    @property
    def model(self) -> ModelConfig:
        """The model that `model_config_hf` describes."""
        return ModelConfig.from_hf(self.model_config_hf)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and response in the engines: `--vllm-max-model-len`, else the model's own length."""
        return context_length(self.recipe, self.model)


def context_length(recipe: Recipe, config: ModelConfig) -> int:
    """Most tokens of prompt and response in the engines. Raises BadInput if neither flag nor model sets it."""
    given = recipe.engine.vllm.get("max_model_len")
    if given is None:
        if config.hf.get("max_position_embeddings") is None:
            raise BadInput("the model's config.json has no max_position_embeddings: give --vllm-max-model-len")
        return config.max_position_embeddings
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise BadInput(f"--vllm-max-model-len is {given!r}: give a whole number of tokens")
    return given


class BoundNode(Frozen):
    """A logical node's host."""

    index: int
    host: str
    address: str
    interface: str | None = None
    rdma: tuple[str, ...] = ()
    """Active RDMA ports, such as `mlx5_0:1`."""
    slurm_index: int = 0
    """Place in SLURM_JOB_NODELIST."""


class Binding(Frozen):
    """Facts of the allocation. The controller writes it after preflight, and again after a requeue."""

    job_id: str | None = None
    restart: int = 0
    version: int = 0
    """Number of earlier bindings of this start."""
    nodes: tuple[BoundNode, ...]
    port_offset: int = 0
    end_time: float | None = None
    """Unix time at which the allocation ends."""
