"""Every knob of a run. The string under a field is its documentation; `twinflow config show` prints it.

Plug-ins (objective, model, engine) bring their own options: the dataclass in the plug-in's file is the schema of
its section, read as text so that checking a configuration needs no torch (see configs/knobs.py).
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Run:
    name: str = MISSING
    """Name of the run; its folder is outputs/<name> unless run.dir says otherwise."""
    dir: str | None = None
    """Folder of the run: resolved config, journal, checkpoints, pictures. Default outputs/<name>."""
    seed: int = 42
    """Seed of the sample order, of every random draw and of new parameters."""


@dataclass
class Source:
    manifest: str = MISSING
    """Folder or s3:// prefix that holds manifest.json and the shards."""
    weight: float = 1.0
    """Times that its samples count in an epoch of the run."""


@dataclass
class Data:
    manifest: str | None = None
    """Folder or s3:// prefix that holds manifest.json and the shards; or several as data.sources."""
    sources: list[Source] = field(default_factory=list)
    """Several data sets as one run, each {manifest: FOLDER, weight: TIMES}; in place of data.manifest."""
    small_buckets: str = "refuse"
    """refuse | repeat | drop: a bucket with fewer samples in an epoch than a global batch; repeat raises its weight."""
    flip: bool = False
    """Mirror each image in half of its own epochs, drawn by sample; not for precomputed latents."""
    held_out: str | None = None
    """The same for held-out samples; null skips the held-out loss."""
    endpoint_url: str | None = None
    """S3 endpoint for stores other than AWS (MinIO, Ceph)."""
    cache_dir: str | None = None
    """Folder of the node's shard cache for s3:// data. Default <temporary folder>/twinflow-cache."""
    cache_gb: float = 50.0
    """Ceiling of the shard cache on a node [GB]."""
    workers: int = 1
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: int = 4
    """Batches that a loader process prepares ahead, as far as data.prefetch_gb lets it."""
    prefetch_gb: float = 4.0
    """Bytes that the batches prepared ahead may hold on a rank [GB]."""
    fetch_threads: int = 8
    """Download threads of a node's look-ahead, and of each loader process."""
    read_budget_s: float = 60.0
    """Time that may be lost on one object of a store by failed attempts, waits and stalls before the run stops [s]."""
    max_bad_samples: float = 0.001
    """Share of an epoch's samples that may be undecodable and replaced; more stop the run."""
    lanes: int | None = None
    """Parts of a stream read side by side; more mixes better and opens more shards. Default: see data/order.py."""


@dataclass
class Encoder:
    max_text_tokens: int = 512
    """Longest caption [tokens]; longer ones are cut and counted."""
    null_prompt: str = "Generate an image."
    """Prompt of the null condition (method 3)."""
    latents: str = "mean"
    """mean | sample: latents are the mean of the VAE's posterior, or drawn from it anew in every step; references of
    editing and precomputed latents are always the mean."""
    tiling: bool = False
    """Encode and decode images larger than the VAE's tile in overlapping tiles: less memory, slightly other latents."""
    shard: bool = False
    """Spread the text encoder and the VAE over all ranks and gather them for each call, instead of a copy on every rank:
    less GPU memory for more traffic."""
    seen_edge: int | None = None
    """Edge of the square whose area source images of edits get before the text encoder sees them [pixels]; null: as the
    model's pipeline does, 1024 for Qwen-Image-Edit, 384 from 2509 on. Smaller is cheaper."""


@dataclass
class InitFrom:
    path: str | None = None
    """Weights that a new run starts from in place of model.path's: a run's folder, one of its checkpoints, or a diffusers
    folder (an export, a published TwinFlow checkpoint), on disk or s3://. The optimizer starts fresh. With lora.rank it
    may hold adapters, which go on, or a whole model, which becomes their base (and must stay to resume)."""
    weights: str = "ema"
    """ema | online: which weights of a run."""


@dataclass
class Lora:
    rank: int | None = None
    """Train low-rank adapters of this rank beside the frozen weights of model.path; null: train all parameters."""
    alpha: int | None = None
    """Adapters are scaled by alpha / rank; null: as lora.rank."""
    targets: list[str] = field(default_factory=list)
    """Linear layers that get an adapter, by the end of their names, for instance [attn.to_q, attn.to_v]; empty: the
    backbone's published ones."""
    variant: str = "second_embedding"
    """second_embedding | single_time: how the network learns of the target time r. By the second time embedding, which has
    adapters of its own (starts as the base model at r=t); or by the one number t - r/2 in place of t (published; plain
    diffusers runs it at r=0, but at r=t it starts as the base model at t/2)."""


@dataclass
class Guidance:
    scale: float | None = None
    """Effective guidance scale w of u + w (c - u) trained into the model; sets objective.enhanced_ratio. null: off, or
    as objective.enhanced_ratio says."""
    allow_divergent: bool = False
    """Accept a guidance that has no fixed point with a trained teacher (enhanced_ratio >= 1)."""


@dataclass
class Optimizer:
    name: str = "adamw"
    """adamw | adam | radam | adamw8bit (moments of 8 bits, on GPUs only)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw, radam)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""


@dataclass
class Schedule:
    name: str = "constant"
    """constant | linear | cosine: shape of the learning rate after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to optimizer.learning_rate."""
    final_ratio: float = 0.0
    """Learning rate of the last step as a share of the peak (linear, cosine)."""


@dataclass
class Train:
    steps: int = MISSING
    """Optimizer steps of the whole run."""
    global_batch_size: int = MISSING
    """Samples of one optimizer step over all ranks."""
    micro_batch_size: int = MISSING
    """Graded rows of one forward and backward pass on one rank."""
    chunk_rows: int | None = None
    """Most rows of one no-grad pass; null: all rows of the accumulation window at once."""
    non_finite: str = "stop"
    """stop | skip: what follows where a loss or gradient is not finite. The update is left out on all ranks either way."""
    max_skips: int = 10
    """Updates in a row that train.non_finite=skip may leave out before the run stops."""


@dataclass
class Ema:
    decay: float = 0.9
    """Final decay rate of the averaged weights (evaluation, and teacher: ema); 0 keeps none. Published .99. A teacher
    that follows slowly is good at a constant learning rate and slow where training is short."""


@dataclass
class Checkpoint:
    every: int = 500
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep_last: int = 2
    """Newest checkpoints that stay; older ones are removed after the next save."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this stay for ever; 0: none does."""
    dir: str | None = None
    """Folder that all ranks share, or s3:// prefix, of this run's checkpoints alone. Default <run.dir>/checkpoints."""
    endpoint_url: str | None = None
    """S3 endpoint of checkpoint.dir; null: as data.endpoint_url."""


@dataclass
class Sample:
    every: int = 0
    """Steps between sample grids; 0: only at the end."""
    presets: list[str] = field(default_factory=lambda: ["1nfe", "2nfe", "4nfe", "multi30"])
    """Sampler presets drawn, one grid each (trainer/generate/sampler.py)."""
    prompts: list[str] = field(default_factory=list)
    """Prompts of the grid, one row each."""
    columns: int = 8
    """Samples of each prompt."""
    weights: str = "ema"
    """ema | online: which weights sample and evaluate."""
    chunk_rows: int = 256
    """Most rows of one network call while sampling."""


@dataclass
class Evaluate:
    name: str | None = None
    """Yardstick run at the end (digits); null: none."""
    presets: list[str] = field(default_factory=lambda: ["1nfe", "2nfe", "4nfe", "multi32"])
    """Sampler presets scored."""
    images: int = 2000
    """Generated images per preset."""


@dataclass
class Tracking:
    uri: str = "sqlite:///outputs/mlflow.db"
    """MLflow tracking server or sqlite file."""
    experiment: str = "twinflow"
    """MLflow experiment."""
    every: int = 10
    """Steps between logged metrics."""
    held_out_every: int = 0
    """Steps between held-out losses; 0: only at the end."""
    samples: bool = False
    """Write own epoch, shard and key of every sample trained on to samples/ in the run's folder, a file per rank."""


@dataclass
class Profile:
    steps: list[int] = field(default_factory=list)
    """First and last step that rank 0 profiles, for instance [20, 22]; empty: none. Touching profile_now in the run's
    folder profiles the next steps of a run that is under way."""
    memory: bool = False
    """Record the GPU's allocations during profiled steps, too."""


@dataclass
class Runtime:
    nproc: int | None = None
    """Processes on this machine; null: one per GPU, or 1 without GPUs."""
    threads: int | None = None
    """CPU threads of a process; null: cores / processes."""
    tf32: bool = True
    """Allow TF32 in float32 matrix products on GPUs."""
    matmul_precision: str = "high"
    """highest | high | medium: torch.set_float32_matmul_precision."""
    port: int | None = None
    """TCP port of the ranks' rendezvous on this machine; null: a free one."""
    stop_timeout_s: float = 600.0
    """Longest time for the last step and the save after a request to stop [s]."""
    collective_timeout_s: float = 600.0
    """A collective that waits longer ends the run [s]."""
    hang_timeout_s: float = 300.0
    """A rank without progress for this long ends the run with the stacks of all ranks; at most 0.8 of
    runtime.collective_timeout_s counts [s]."""
    hang_first_timeout_s: float = 1800.0
    """The same while a stage is visited for the first time (compilation, cold caches) and while a save is waited for [s]."""
    preflight: str | None = None
    """strict | warn | off: examine all nodes (disks, data, GPUs, all-reduce, clocks) before the model is loaded; strict
    ends the run where something would spoil it, warn says so. null: warn in a job submitted to SLURM, off elsewhere."""


@dataclass
class Config:
    run: Run = field(default_factory=Run)
    model: dict[str, Any] = field(default_factory=lambda: {"name": "qwen_image"})
    """Backbone by name and its options (models/backbones/<name>.py)."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "twinflow"})
    """Objective by name and its options (trainer/objectives/<name>.py)."""
    engine: dict[str, Any] = field(default_factory=lambda: {"name": "fsdp2"})
    """Sharding engine by name and its options (trainer/engines/<name>.py)."""
    lora: Lora = field(default_factory=Lora)
    init_from: InitFrom = field(default_factory=InitFrom)
    guidance: Guidance = field(default_factory=Guidance)
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    ema: Ema = field(default_factory=Ema)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    sample: Sample = field(default_factory=Sample)
    evaluate: Evaluate = field(default_factory=Evaluate)
    tracking: Tracking = field(default_factory=Tracking)
    profile: Profile = field(default_factory=Profile)
    runtime: Runtime = field(default_factory=Runtime)
