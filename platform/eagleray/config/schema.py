"""What a job file may say: one model per stage, `JobConfig` for the file.

Unknown keys are refused. A conflict between fields is reported here, before any device or
cluster is touched, and the message names the setting to change.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from eagleray.errors import StorageError, near_miss
from eagleray.storage import join, normalize_uri

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Fraction
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


def _in_one_spelling(uri: str) -> str:
    try:
        return normalize_uri(uri)
    except StorageError as error:
        raise ValueError(str(error)) from None


Uri = Annotated[str, AfterValidator(_in_one_spelling)]
"""A local path, made absolute since workers have working directories of their own, or s3://bucket/key."""


REQUEST_TIMEOUT_S = 60.0
"""No request to the endpoint takes longer."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class WorkspaceConfig(Section):
    """Where runs, models and experiments are kept."""

    root: Uri = "./eagleray"
    """Folder or s3:// URI that holds `runs/`, `models/` and `experiments/`."""

    tracking_uri: str | None = None
    """MLflow tracking URI; by default an SQLite file in `root`. Needed where `root` is on S3."""

    @model_validator(mode="after")
    def _tracking_needs_a_local_file(self) -> WorkspaceConfig:
        if self.tracking_uri is None and self.root.startswith("s3://"):
            raise ValueError(
                "workspace.tracking_uri is needed where workspace.root is on S3; "
                "give an MLflow server (http://host:5000) or sqlite:////absolute/path/mlflow.db"
            )
        return self

    @property
    def resolved_tracking_uri(self) -> str:
        return self.tracking_uri or f"sqlite:///{join(self.root, 'mlflow.db')}"

    @property
    def runs_uri(self) -> str:
        return join(self.root, "runs")

    @property
    def models_uri(self) -> str:
        return join(self.root, "models")

    @property
    def experiments_uri(self) -> str:
        return join(self.root, "experiments")


class IngestConfig(Section):
    """How pictures become shards."""

    split: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]] = {}
    """Named fractions split off, stratified by class (`{val: 0.1}`); the rest is `train`. Of a source that has splits
    already (its own, or by `split_by`), they are taken from its `train`. Empty: no fractions."""

    split_by: str | None = None
    """`folder`: the source's top folders (`train/`, `val/`, …) are the splits. Or the URI of a CSV file of lines `key,split`."""

    image_column: str | None = None
    """Column with the pictures (Parquet) or their URIs (CSV); by default the first of the usual names."""

    label_column: str | None = None
    """Column (Parquet, CSV) or JSON field (WebDataset) with the class; by default the first of the usual names."""

    class_names: str | None = None
    """URI of a text file with a class name a line, for sources whose labels are numbers from 0."""

    shard_bytes: Annotated[int, Field(ge=1_000)] = 64_000_000
    """Size of a shard file before it is closed, in bytes."""

    row_group_bytes: Annotated[int, Field(ge=1_000)] = 2_000_000
    """Size of a row group, the unit of a range read, in bytes."""

    max_side: Annotated[int, Field(ge=8)] | None = None
    """Re-encode pictures whose shorter side is longer than this, in pixels."""

    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """JPEG quality for re-encoded pictures."""

    max_refused_fraction: Fraction = 0.01
    """Ingest is refused when more than this share of the pictures cannot be read."""

    max_pixels: PositiveInt = 178_956_970
    """Pictures with more pixels than this are refused as decompression bombs (Pillow's own limit)."""

    @model_validator(mode="after")
    def _split_leaves_something(self) -> IngestConfig:
        total = sum(self.split.values())
        if total >= 1.0:
            raise ValueError(f"ingest.split takes {total:.0%} of the pictures and leaves none for 'train'; lower a fraction")
        if "train" in self.split:
            raise ValueError("ingest.split: 'train' is what is left over; name only the other parts")
        return self


class PolicyConfig(Section):
    """A random choice among 14 changes of shape and colour, as torchvision's transform of that name makes it."""

    name: Literal["randaugment", "trivialaugment"]
    """RandAugment (Cubuk et al. 2019, arXiv:1909.13719) or TrivialAugment Wide (Müller & Hutter 2021, arXiv:2103.10158)."""

    num_ops: PositiveInt = 2
    """Changes in a row, for `randaugment`; `trivialaugment` makes one."""

    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of every change, for `randaugment`; `trivialaugment` draws it."""


class ColorJitterConfig(Section):
    """Random changes of colour, in random order; each keeps a picture as it is where it is 0."""

    brightness: Annotated[float, Field(ge=0.0)] = 0.0
    contrast: Annotated[float, Field(ge=0.0)] = 0.0
    saturation: Annotated[float, Field(ge=0.0)] = 0.0
    """The factor is drawn from max(0, 1 - value) to 1 + value."""

    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """The hue is shifted by up to this share of the colour circle, either way."""


class AugmentConfig(Section):
    """Random changes to training pictures, made in the order of the keys; evaluation uses none of them."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] | None = (0.08, 1.0)
    """Share of the picture's area that a random resized crop covers; null: no random crop."""

    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random resized crop."""

    flip: Probability = 0.5
    """Probability of a horizontal flip. Set 0 for digits, text and traffic signs."""

    vertical_flip: Probability = 0.0
    """Probability of a vertical flip, for pictures without an upside: from above, through a microscope."""

    policy: PolicyConfig | None = None
    """`randaugment`, `trivialaugment`, or `{name: randaugment, num_ops: 2, magnitude: 9}`; null: neither."""

    color_jitter: ColorJitterConfig | None = None
    """`{brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1}`, each 0 by default."""

    erase: Probability = 0.0
    """Probability of random erasing (Zhong et al. 2017, arXiv:1708.04896): a rectangle is filled with the mean colour."""

    @field_validator("policy", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"the range [{value[0]}, {value[1]}] is inverted; give [low, high]")
        return value


class MixturePart(Section):
    """One of several training sets that are mixed."""

    uri: Uri
    weight: PositiveFloat = 1.0
    """How often each of its pictures comes in an epoch, on average: 0.5 half of them, 2 each twice."""


class TrainSize(Section):
    """The side of training pictures by epoch, in pixels: `start`, then in a line to `end` (progressive resizing)."""

    start: Annotated[int, Field(ge=8, le=1024)]
    end: Annotated[int, Field(ge=8, le=1024)]
    ramp_epochs: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (0, 0)
    """Finished epochs up to which the size is `start`, and from which on it is `end`."""

    multiple: PositiveInt = 32
    """Sizes between the two are rounded to a multiple of this, in pixels."""

    @field_validator("ramp_epochs")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError(f"the range [{value[0]}, {value[1]}] is inverted; give [first, last]")
        return value

    def of_epoch(self, epoch: int) -> int:
        """Return the side in an epoch, counted from 0."""
        first, last = self.ramp_epochs
        if epoch >= last:
            return self.end
        if epoch <= first:
            return self.start
        size = self.start + (self.end - self.start) * (epoch - first) / (last - first)
        return min(max(round(size / self.multiple) * self.multiple, min(self.start, self.end)), max(self.start, self.end))


class DataConfig(Section):
    """Which shards are streamed, and how."""

    train: Uri | Annotated[list[MixturePart], Field(min_length=1)]
    """URI of the ingested training split (the folder that holds `manifest.json`), or a list of `{uri, weight}` to mix."""

    val: Uri
    """URI of the ingested validation split; it selects trials and checkpoints."""

    test: Uri | None = None
    """URI of a held-out split that selects nothing; reported once for the final model."""

    image_size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Side of the square that models see, in pixels."""

    eval_resize: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Shorter side before the centre crop of evaluation, in pixels; by default image_size / 0.875 from 128 px on."""

    train_size: TrainSize | None = None
    """Side of training pictures where it is not `image_size`: one number, or `{start: 160, end: 192, ramp_epochs: [11, 13]}`
    to let them grow. Evaluation is at `image_size` always."""

    augment: AugmentConfig = AugmentConfig()

    lanes: PositiveInt = 8
    """Parts into which every global batch is divided; any number of workers that divides it sees the same batches."""

    shuffle_window: PositiveInt | None = None
    """Samples that are mixed with each other at a time; row groups are permuted over the whole epoch besides. By default
    1,024, 8 global batches or 32 row groups, whichever is most. A rank's part of it is read into memory at once."""

    decode: Literal["auto", "cluster", "worker"] = "auto"
    """Who decodes: tasks anywhere on the cluster, or each worker as it goes; auto: workers on CPUs where `image_size` is at most
    64 px and a picture has 4,096 bytes or fewer on average, so that handing it over would be most of the work."""

    max_bad_fraction: Fraction = 0.001
    """A run stops when more than this share of an epoch's pictures cannot be decoded."""

    verify_checksums: bool = False
    """Compare each shard's sha256 with the manifest when a process first reads from it; reads all of the shard."""

    cache_dir: Uri | None = None
    """Folder on each node's disk that keeps what was read from S3 for the next epochs; null: none."""

    cache_bytes: PositiveInt = 100_000_000_000
    """What `cache_dir` may hold, over all processes of a node; the least recently used goes first."""

    examples: Annotated[int, Field(ge=0, le=4096)] = 192
    """Pictures of `val` that lie in the package of a registered model, as JPEGs of `image_size`: when it is deployed, back ends
    are compared on them, and int8 is calibrated by them. 0: none, where pictures must not leave with the model."""

    @field_validator("train_size", mode="before")
    @classmethod
    def _one_size(cls, value: Any) -> Any:
        return {"start": value, "end": value} if isinstance(value, int) else value

    @property
    def train_parts(self) -> tuple[MixturePart, ...]:
        return (MixturePart(uri=self.train),) if isinstance(self.train, str) else tuple(self.train)

    @property
    def resolved_eval_resize(self) -> int:
        if self.eval_resize is not None:
            return self.eval_resize
        return self.image_size if self.image_size < 128 else round(self.image_size / 0.875)


class PretrainedConfig(Section):
    """Trained weights that a new run starts from."""

    source: str
    """A path or s3:// URI (`.pt` or `.pth` with a state dict, `.safetensors`, or the folder of a registered model's package),
    `name@alias` or `name:version` of the workspace's registry, or the name of torchvision's weights (`DEFAULT`,
    `IMAGENET1K_V1`, …), which are downloaded."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Digest that the file must have. Filled in when a run starts, so that all its workers start alike."""

    @property
    def is_reference(self) -> bool:
        """Of a version in the registry, by `name@alias` or `name:version`."""
        return re.fullmatch(r"[a-z0-9][a-z0-9_-]*[@:][\w.-]+", self.source) is not None

    @property
    def is_torchvision(self) -> bool:
        """The name of weights that torchvision knows where to fetch."""
        return re.fullmatch(r"[A-Z][A-Z0-9_]*", self.source) is not None

    @property
    def is_uri(self) -> bool:
        return not self.is_reference and not self.is_torchvision


class ModelConfig(Section):
    """Which network."""

    name: str = "resnet50"
    """A name of the zoo (`cnn`, `resnet18`, …, any torchvision classifier) or `module:function`."""

    params: dict[str, Any] = {}
    """Keyword arguments of its builder (`width`, `dropout`, …)."""

    stem: Literal["auto", "standard", "small"] = "auto"
    """`small`: the first layers keep the resolution, where the zoo can change them; `auto`: for pictures up to 64 px."""

    blur_pool: bool = False
    """ResNets only: blur before each down-sampling (Zhang 2019, arXiv:1904.11486)."""

    pretrained: PretrainedConfig | None = None
    """Trained weights to start from, or just their source; null: random weights. The head (the layers whose size is the
    number of classes) starts anew if it is for other classes."""

    @field_validator("pretrained", mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class OptimizerConfig(Section):
    name: Literal["sgd", "adamw", "rmsprop", "lamb", "lion"] = "sgd"
    """SGD, AdamW, RMSProp (torch); LAMB (You et al. 2019, arXiv:1904.00962), Lion (Chen et al. 2023, arXiv:2302.06675) (timm)."""

    lr: PositiveFloat = 0.5
    """Peak learning rate for the whole global batch (not per worker)."""

    lr_batch_size: PositiveInt | None = None
    """Global batch that `lr` is meant for: the peak is lr × global_batch_size / lr_batch_size, the linear scaling rule
    (Goyal et al. 2017, arXiv:1706.02677). null: `lr` is the peak as it is."""

    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-5
    """Applied to matrices only, not to biases and norms."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD and RMSProp; the others take it as beta1."""

    nesterov: bool = True
    """Nesterov's momentum, of SGD."""

    eps: PositiveFloat | None = None
    """Added to the denominator by AdamW (1e-8 by default), RMSProp (0.0316) and LAMB (1e-6)."""


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "step", "constant", "one_cycle"] = "cosine"
    """From the peak down to 0 along a cosine or a line, in steps, not at all; or one cycle, up and down again."""

    warmup_epochs: Annotated[float, Field(ge=0.0)] = 5.0
    """Linear warm-up before any of them but `one_cycle`, which rises by itself."""

    warmup_start: Fraction = 0.01
    """Share of the peak at which the warm-up starts."""

    step_epochs: PositiveInt = 30
    """Epochs between two steps down, for `step`."""

    step_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Factor of each step down, for `step`."""

    rise: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Share of the run in which the rate rises, for `one_cycle` (torch's `pct_start`)."""

    div_factor: Annotated[float, Field(ge=1.0)] = 25.0
    """Peak / first learning rate, for `one_cycle`."""

    final_div_factor: Annotated[float, Field(ge=1.0)] = 10_000.0
    """First / last learning rate, for `one_cycle`."""

    anneal: Literal["cosine", "linear"] = "cosine"
    """Shape of both ways, for `one_cycle`."""


class FineTuneConfig(Section):
    """How gently trained weights are changed; see `model.pretrained`. The head is what has the number of classes as its size."""

    freeze_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the start in which only the head is trained; with `train.epochs` or more, nothing else ever is."""

    freeze: list[str] = []
    """Parts that are never trained, by the start of their parameters' names: `[features]`, `[conv1, layer1.0]`."""

    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The learning rate falls by this factor from each layer to the one before it, from the head down, as in ELECTRA
    (Clark et al. 2020, arXiv:2003.10555) and BEiT (Bao et al. 2021, arXiv:2106.08254)."""

    head_lr_factor: PositiveFloat = 1.0
    """Learning rate of the head, as a multiple of `train.optimizer.lr`."""


class ElasticWorkers(Section):
    """A number of workers that may change while a run goes on."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> ElasticWorkers:
        if self.min > self.max:
            raise ValueError(f"train.num_workers: min {self.min} is above max {self.max}; swap them")
        return self


class TrainingConfig(Section):
    """How the model is trained."""

    epochs: PositiveInt = 90
    global_batch_size: PositiveInt = 1024
    """Pictures per optimizer step over all workers; it does not change with their number."""

    num_workers: PositiveInt | ElasticWorkers = 1
    """DDP workers, or `{min, max}` for an elastic run."""

    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; `auto`: if the cluster has, or can start, any."""

    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    finetune: FineTuneConfig = FineTuneConfig()
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    mixup_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """Mixup (Zhang et al. 2017, arXiv:1710.09412) with weights from Beta(alpha, alpha), one per batch; 0: none."""

    cutmix_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """CutMix (Yun et al. 2019, arXiv:1905.04899), likewise. With both, each batch gets one of the two at random."""

    accumulate: PositiveInt = 1
    """Parts in which a worker goes through its part of each global batch, one after the other, to need less memory."""

    grad_clip_norm: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay per step of an exponential moving average of the weights; it is what is evaluated and saved as the model."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast on GPUs that have it, else fp32. `fp16` scales the loss, for GPUs without bf16."""

    compile: bool = False
    """Compile the network (`torch.compile`) for training: minutes at the start, faster steps on a GPU."""

    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: each worker has all of the network. `fsdp` (FSDP2): each keeps a part of it, and of the optimizer's state, for
    networks that do not fit otherwise."""

    activation_checkpointing: bool = False
    """Keep each block's input alone for the backward pass and compute the rest again: less memory, a second forward pass."""

    sync_batch_norm: bool = False
    """Batch norm over the pictures of all workers, for few pictures per worker; on GPUs."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """At gradients that are infinite or no numbers: stop the run, leave the step out, on all workers alike, or go back to
    the newest checkpoint and leave the batches that led there out."""

    explosion_factor: Annotated[float, Field(gt=1.0)] | None = None
    """Gradients more than this many times as large as usual (the geometric mean of the last 100 steps or so) are dealt with
    likewise; null: only those that are not finite."""

    max_rollbacks: Annotated[int, Field(ge=1)] = 3
    """Times that a run goes back, with `on_nonfinite: rollback`, before it stops."""

    validation: Literal["inline", "beside", "auto"] = "inline"
    """`inline`: the workers validate, and train on afterwards. `beside`: one more process with resources of its own, a worker's
    share, validates while they train on. `auto`: `beside` where the run is on GPUs and one more is free when it starts."""

    eval_flip: bool = False
    """Evaluate a second time with the logits of each picture and its mirror image averaged: `val_top1_flip` besides `val_top1`."""

    deterministic: bool = False
    """Deterministic kernels: slower, bit-identical on the same devices and number of workers."""

    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures survived by going on from the last checkpoint; -1: any number."""

    checkpoint_every_epochs: PositiveInt = 1
    checkpoint_every_steps: PositiveInt | None = None
    """Steps after which a checkpoint is written within epochs too, for long ones; a resumed run goes on at that very batch."""

    checkpoints_to_keep: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints kept, those within epochs too; the weights of the best epoch are kept besides."""

    @property
    def max_workers(self) -> int:
        return self.num_workers.max if isinstance(self.num_workers, ElasticWorkers) else self.num_workers

    @property
    def min_workers(self) -> int:
        return self.num_workers.min if isinstance(self.num_workers, ElasticWorkers) else self.num_workers


class Distribution(Section):
    """One dimension of a search space; exactly one of the four."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    integer: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Distribution:
        given = [name for name in ("choice", "uniform", "log_uniform", "integer") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of choice, uniform, log_uniform, integer (found: {', '.join(given) or 'none'})")
        if given[0] != "choice":
            low, high = getattr(self, given[0])
            if low > high:
                raise ValueError(f"the range [{low}, {high}] is inverted; give [low, high]")
        return self


class SchedulerConfig(Section):
    """Which trials are not worth going on with."""

    name: Literal["asha", "pausing_asha", "hyperband", "median", "pbt"] = "asha"
    """`asha`: asynchronous successive halving (Li et al., 2018, arXiv:1810.05934) that stops a trial for good where it is not
    among the best as it comes to a rung; `pausing_asha`: as published, it pauses there, holds nothing, and goes on if it is
    among the best later. `hyperband`: the former with a share of the trials that are stopped later or never, where the first
    epochs mislead (asynchronous HyperBand, ibid.; with TPE it is BOHB, Falkner et al., 2018, arXiv:1807.01774). `median`: stops a
    trial whose best is worse than the median of the others' running means (Golovin et al., 2017, Google Vizier). `pbt`: stops
    none; time and again the worst quarter go on from the weights of one of the best, with its values changed at random
    (population-based training, Jaderberg et al., 2017, arXiv:1711.09846)."""

    grace_epochs: PositiveInt = 1
    """No trial is stopped before this many epochs; of `pbt`, the epochs between two exchanges."""

    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One in this many trials is kept at each rung, where there are rungs."""


OBJECTIVES: dict[str, Literal["max", "min"]] = {
    "val_top1": "max",
    "val_top5": "max",
    "val_loss": "min",
    "parameters": "min",
    "flops": "min",
    "latency_p50_ms": "min",
    "latency_p99_ms": "min",
    "usd_per_1000": "min",
}
"""What a search can improve → its natural direction. `parameters` and `flops` are the network's size and the floating-point
operations of one picture's forward pass. The last three are measured as the network would be served, where the search names one
of them: milliseconds from an encoded picture to its answer, one at a time, and the cost of a thousand at full load."""

SERVING_OBJECTIVES = ("latency_p50_ms", "latency_p99_ms", "usd_per_1000")


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        raise ValueError(f"no objective is called '{name}'{near_miss(name, OBJECTIVES)}; there are {', '.join(OBJECTIVES)}")
    return name


Objective = Annotated[str, AfterValidator(_known_objective)]


class Bounds(Section):
    """Between which values something must be, both included."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _can_be_kept(self) -> Bounds:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; swap them")
        return self

    def hold(self, value: float) -> bool:
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


class Prices(Section):
    """What a cluster's nodes cost in USD, broken down to what a worker holds of them."""

    gpu_hour: Annotated[float, Field(ge=0.0)] = 0.0
    """A node's price per hour over its GPUs."""

    cpu_hour: Annotated[float, Field(ge=0.0)] = 0.0
    """A node's price per hour over its CPUs, for nodes without GPUs."""


class SelectConfig(Section):
    """Which trial wins: the best by one objective, of those within bounds on others."""

    best: Objective
    where: dict[Objective, Bounds] = {}


MUTABLE = (
    "train.optimizer.",
    "train.label_smoothing",
    "train.mixup_alpha",
    "train.cutmix_alpha",
    "train.grad_clip_norm",
    "data.augment.",
)
"""Keys, or beginnings of keys, that may change from one epoch to the next."""

FIXED = ("train.optimizer.name", "train.optimizer.nesterov")


class SearchConfig(Section):
    """What is searched, with which budget."""

    objectives: Annotated[list[Objective], Field(min_length=1)] = ["val_top1"]
    """What trials are compared by, each in its natural direction; the scheduler goes by the first."""

    select: SelectConfig | None = None
    """Which trial wins; null: the best by the first objective."""

    constraints: dict[Literal["parameters", "flops"], Bounds] = {}
    """Bounds on a network's size; a point outside is not trained, and costs nothing."""

    warm_start: list[str] = []
    """Names of earlier searches of the workspace, with the same objectives, that the sampler knows the results of."""

    num_trials: PositiveInt = 20
    time_budget_s: PositiveFloat | None = None
    """Time after which the search ends with what it has, trials under way included; null: none."""

    max_failed_trials: Annotated[int, Field(ge=0)] = 5
    """Trials that may fail before the search stops and says what failed most."""

    gpu_hours: PositiveFloat | None = None
    """Hours of GPUs that all trials together may hold before the search ends with what it has; null: no limit."""

    prices: Prices = Prices()
    """By which each trial's cost is told."""

    max_usd: PositiveFloat | None = None
    """Cost of all trials together after which the search ends with what it has; null: no limit."""

    stop_without_progress: PositiveInt | None = None
    """Trials in a row, as they began, that may end without a new best by the first objective; null: any number."""

    sampler: Literal["auto", "tpe", "gp", "cmaes", "nsga2", "nsga3", "random", "grid"] = "auto"
    """TPE (multivariate, grouped: for conditional spaces), a Gaussian process, CMA-ES (one objective, one family, ranges of numbers
    only; for hundreds of trials), evolution (for several objectives), chance, or every point once, in random order (choices and
    integers only). `auto`: the Gaussian process where there is one objective and one
    family, every dimension is a number, and there are no constraints and at most 100 trials; else TPE."""

    max_concurrent: PositiveInt | None = None
    """Trials at a time; by default as many as the cluster's CPUs or GPUs hold."""

    num_workers: PositiveInt = 1
    """Workers of each trial, each with its CPUs or its GPU, as `train.num_workers` of a run."""

    trials_per_gpu: PositiveInt = 1
    """Trials that share a GPU, and its memory, where each has one worker."""

    epochs: PositiveInt = 10
    """Epochs of a trial that is not stopped early."""

    families: Annotated[dict[str, dict[str, Distribution]], Field(min_length=1)]
    """Architecture name → its own parameters (keys of `model.params`); chosen first."""

    space: dict[str, Distribution] = {}
    """Dotted key of the job file (`train.optimizer.lr`) → distribution."""

    space_function: str | None = None
    """`module:function` for what else depends on what: it gets each Optuna trial after `families` and `space`, suggests values
    under dotted keys of the job file (`trial.suggest_float("train.optimizer.momentum", 0.8, 0.99)`), and may return more of them."""

    scheduler: SchedulerConfig | None = SchedulerConfig()
    """null: every trial runs all its epochs."""

    storage: str | None = None
    """Optuna storage URL (`postgresql://…`); by default an SQLite file beside the study's run."""

    @model_validator(mode="after")
    def _each_objective_once(self) -> SearchConfig:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives {', '.join(self.objectives)}: one is given twice; give each once")
        return self

    @model_validator(mode="after")
    def _first_objective_is_learned(self) -> SearchConfig:
        if self.objectives[0] in ("parameters", "flops", *SERVING_OBJECTIVES):
            raise ValueError(f"objectives: {self.objectives[0]} cannot be the first one, by which trials are stopped; begin with val_top1")
        return self

    @model_validator(mode="after")
    def _workers_have_whole_gpus(self) -> SearchConfig:
        if self.trials_per_gpu > 1 and self.num_workers > 1:
            raise ValueError(f"trials_per_gpu: {self.trials_per_gpu} needs num_workers: 1; NCCL has one worker to a GPU")
        return self

    @model_validator(mode="after")
    def _population_can_change(self) -> SearchConfig:
        if not self.is_population:
            return self
        if self.sampler not in ("auto", "random"):
            raise ValueError(f"scheduler: pbt begins with random values and changes them; give sampler: auto, not {self.sampler}")
        if self.num_trials < 4:
            raise ValueError(f"num_trials {self.num_trials}: scheduler pbt replaces a quarter of the trials; give 4 or more")
        if not self.mutable:
            raise ValueError(f"space: scheduler pbt can change none of its keys within a run; it can those of {', '.join(MUTABLE)}")
        return self

    @property
    def is_population(self) -> bool:
        return self.scheduler is not None and self.scheduler.name == "pbt"

    @property
    def mutable(self) -> dict[str, Distribution]:
        """What may change within a run."""
        return {key: d for key, d in self.space.items() if key.startswith(MUTABLE) and key not in FIXED}

    @property
    def rule(self) -> SelectConfig:
        """Which trial wins."""
        return self.select or SelectConfig(best=self.objectives[0])

    @property
    def named_objectives(self) -> set[str]:
        """All that trials must report."""
        return {*self.objectives, self.rule.best, *self.rule.where}

    @property
    def measures_serving(self) -> bool:
        return not self.named_objectives.isdisjoint(SERVING_OBJECTIVES)

    @model_validator(mode="after")
    def _cma_es_has_numbers(self) -> SearchConfig:
        if self.sampler != "cmaes":
            return self
        (_, parameters), *others = self.families.items()
        choice = next((key for key, d in (self.space | parameters).items() if d.choice is not None), None)
        if others or choice is not None or len(self.objectives) > 1:
            found = (
                f"'{choice}' is a choice" if choice else f"'{others[0][0]}' is another family" if others else "there are several objectives"
            )
            raise ValueError(f"sampler: cmaes takes one objective, one family and ranges of numbers, and {found}; take tpe")
        return self

    @model_validator(mode="after")
    def _money_has_prices(self) -> SearchConfig:
        if self.max_usd is not None and not (self.prices.gpu_hour or self.prices.cpu_hour):
            raise ValueError("max_usd needs prices: {gpu_hour: …, cpu_hour: …}, in USD")
        if "usd_per_1000" in self.named_objectives and not self.prices.cpu_hour:
            raise ValueError("usd_per_1000 needs prices: {cpu_hour: …}, in USD")
        return self

    @model_validator(mode="after")
    def _grid_is_finite(self) -> SearchConfig:
        dimensions = self.space | {f"{name}.{key}": d for name, family in self.families.items() for key, d in family.items()}
        endless = next((key for key, d in dimensions.items() if d.uniform is not None or d.log_uniform is not None), None)
        if self.sampler == "grid" and endless is not None:
            raise ValueError(f"sampler: grid needs choices and integers, and '{endless}' is a range of reals; give it a choice of values")
        return self


BackendName = Literal["torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-int8"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


class AutoscaledReplicas(Section):
    """A number of replicas that follows the requests."""

    min: Annotated[int, Field(ge=0)] = 1
    """0: none while nobody asks; who asks first then waits until one is up."""

    max: PositiveInt
    idle_s: PositiveFloat = 300.0
    """Time of less load after which replicas are taken away."""

    @model_validator(mode="after")
    def _ordered(self) -> AutoscaledReplicas:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; swap them")
        return self


class ServingConfig(Section):
    """How a model version is served."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    grpc_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """The Open Inference Protocol over gRPC too, on this port of all interfaces, whatever `host` is; null: not."""

    num_replicas: PositiveInt | AutoscaledReplicas = 1
    """Replicas of each variant, or `{min, max, idle_s}` for as many as the requests need."""

    max_batch_size: PositiveInt = 32
    """Pictures that a replica classifies at once: those that have come while it classified the ones before. None waits for others."""

    max_queued_requests: PositiveInt = 256
    """Requests waiting for a variant before the next one is refused with 503."""

    placement: Literal["auto", "replicas"] = "auto"
    """Where a version is computed. `auto`: where its network takes less than 4 ms for a picture on one core, also in the process
    that takes the requests, small pictures of a batch at a time; what is beyond, and other versions, by replicas. `replicas`: all
    by them, so that pictures are decoded in processes that nobody else depends on."""

    backend: BackendName | Literal["auto"] = "auto"
    """What computes a version: PyTorch or OpenVINO, in fp32 or bf16. `auto`: when the version is deployed all of them are
    measured there, and the fastest is taken whose probabilities are within `backend_tolerance` of PyTorch's in fp32."""

    backend_tolerance: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Largest difference of a probability that is borne, over the pictures in the package (`data.examples`); where it holds
    none, over 64 with the statistics of natural ones. Not of int8."""

    int8_agreement: Fraction | None = None
    """Least share of the package's pictures whose most probable class int8 has to leave as it is, such as 0.98: several times
    as fast, of probabilities that are off more than those of others. null: int8 is not taken into account."""

    trusted_keys: tuple[str, ...] = ()
    """Public keys (`eagleray models keygen`), one of which must have signed what is served; none: it need not be signed."""

    max_image_bytes: PositiveInt = 20_000_000
    max_image_pixels: PositiveInt = 50_000_000
    max_json_bytes: PositiveInt = 4_000_000
    """Largest JSON of an inference request. Parsing it takes up to 0.2 s per MB and lets others wait; binary tensors do not."""

    upload_timeout_s: Annotated[float, Field(gt=0.0, le=REQUEST_TIMEOUT_S)] = 20.0
    """Time for a request's body to arrive; who sends more slowly is let go with 408."""

    request_timeout_s: Annotated[float, Field(gt=0.0, le=REQUEST_TIMEOUT_S)] = REQUEST_TIMEOUT_S
    """A request that has no answer by then is ended with 504; one that names its own time (`X-Timeout-Ms`) can only have less."""

    keys_uri: Uri | None = None
    """Folder or s3:// URI of the API keys (`eagleray serve keys`); who has none of them is refused, by all models of the endpoint."""

    allow_anonymous: bool = False
    """Let everybody in who reaches the endpoint, on a host that others reach too."""

    tls_cert_path: str | None = None
    """PEM file with the certificate and its chain; with `tls_key_path`, the endpoint speaks HTTPS alone. On each node."""

    tls_key_path: str | None = None

    @property
    def max_replicas(self) -> int:
        return self.num_replicas.max if isinstance(self.num_replicas, AutoscaledReplicas) else self.num_replicas

    @model_validator(mode="after")
    def _int8_has_a_limit(self) -> ServingConfig:
        if self.backend == "openvino-int8" and self.int8_agreement is None:
            raise ValueError(
                "serve.backend openvino-int8 changes answers; say how many at most by serve.int8_agreement, the least share of pictures "
                "whose class it has to leave as it is, such as 0.98"
            )
        return self

    @model_validator(mode="after")
    def _others_need_keys(self) -> ServingConfig:
        if not (_is_loopback(self.host) or self.keys_uri or self.allow_anonymous):
            raise ValueError(
                f"serve.host {self.host} is reached by others, who would all be let in; set serve.keys_uri to a folder of API keys "
                "(`eagleray serve keys add`), or serve.allow_anonymous: true where everybody may use it"
            )
        return self

    @model_validator(mode="after")
    def _grpc_is_for_all(self) -> ServingConfig:
        if self.grpc_port is not None and not (self.keys_uri or self.allow_anonymous):
            raise ValueError(
                f"serve.grpc_port {self.grpc_port} is reached by others, who would all be let in; set serve.keys_uri to a folder of API "
                "keys (`eagleray serve keys add`), or serve.allow_anonymous: true where everybody may use it"
            )
        if self.grpc_port is not None and self.tls_cert_path is not None:
            raise ValueError(
                "serve.grpc_port: Ray Serve's gRPC has no TLS; leave it out, or put TLS in front of both in place of tls_cert_path"
            )
        return self

    @model_validator(mode="after")
    def _tls_has_both_files(self) -> ServingConfig:
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ValueError("serve.tls_cert_path and serve.tls_key_path: give both, or none of them")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class JobConfig(Section):
    """One job file: data → model → training → search → serving."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    """Name of the model in the registry, and the start of its runs' names."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    workspace: WorkspaceConfig = Field(default_factory=WorkspaceConfig)
    ingest: IngestConfig = IngestConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainingConfig = TrainingConfig()
    tune: SearchConfig | None = None
    serve: ServingConfig = ServingConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> JobConfig:
        batch, lanes = self.train.global_batch_size, self.data.lanes
        if batch % lanes:
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of data.lanes {lanes}; "
                f"use {max(1, batch // lanes) * lanes}, or set data.lanes to a divisor of {batch}"
            )
        for workers in {self.train.min_workers, self.train.max_workers}:
            if lanes % workers:
                raise ValueError(
                    f"data.lanes {lanes} is not a multiple of train.num_workers {workers}; "
                    f"set data.lanes to {-(-lanes // workers) * workers} (and train.global_batch_size to a multiple of it)"
                )
        return self

    @model_validator(mode="after")
    def _parts_divide(self) -> JobConfig:
        batch, parts = self.train.global_batch_size, self.train.accumulate
        for workers in {self.train.min_workers, self.train.max_workers}:
            if batch // workers % parts:
                raise ValueError(
                    f"train.accumulate {parts} does not divide the {batch // workers} pictures that each of {workers} workers takes of "
                    f"train.global_batch_size {batch}; use a divisor of {batch // workers}"
                )
        return self

    @model_validator(mode="after")
    def _compiles_what_is_whole(self) -> JobConfig:
        if self.train.compile and self.train.parallelism == "fsdp":
            raise ValueError("train.compile: true is not for train.parallelism: fsdp; set one of them back")
        return self

    @model_validator(mode="after")
    def _warmup_is_shorter_than_training(self) -> JobConfig:
        if self.train.schedule.name != "one_cycle" and self.train.schedule.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"train.schedule.warmup_epochs {self.train.schedule.warmup_epochs} must be below train.epochs {self.train.epochs}"
            )
        return self
