"""What a job file may say: one model per stage, `JobConfig` for the file.

Unknown keys are refused. A conflict between fields is reported here, before any device or
cluster is touched, and the message names the setting to change.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from eagleray.storage import join, normalize_uri

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Fraction
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class WorkspaceConfig(Section):
    """Where runs, models and experiments are kept."""

    root: str = "./eagleray"
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
        return self.tracking_uri or f"sqlite:///{join(normalize_uri(self.root), 'mlflow.db')}"

    @property
    def runs_uri(self) -> str:
        return join(normalize_uri(self.root), "runs")

    @property
    def models_uri(self) -> str:
        return join(normalize_uri(self.root), "models")

    @property
    def experiments_uri(self) -> str:
        return join(normalize_uri(self.root), "experiments")


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

    uri: str
    weight: PositiveFloat = 1.0
    """How often each of its pictures comes in an epoch, on average: 0.5 half of them, 2 each twice."""


class DataConfig(Section):
    """Which shards are streamed, and how."""

    train: str | Annotated[list[MixturePart], Field(min_length=1)]
    """URI of the ingested training split (the folder that holds `manifest.json`), or a list of `{uri, weight}` to mix."""

    val: str
    """URI of the ingested validation split; it selects trials and checkpoints."""

    test: str | None = None
    """URI of a held-out split that selects nothing; reported once for the final model."""

    image_size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Side of the square that models see, in pixels."""

    eval_resize: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Shorter side before the centre crop of evaluation, in pixels; by default image_size / 0.875 from 128 px on."""

    augment: AugmentConfig = AugmentConfig()

    lanes: PositiveInt = 8
    """Parts into which every global batch is divided; any number of workers that divides it sees the same batches."""

    shuffle_window: PositiveInt = 8192
    """Samples that are mixed with each other at a time; row groups are permuted over the whole epoch besides."""

    max_bad_fraction: Fraction = 0.001
    """A run stops when more than this share of an epoch's pictures cannot be decoded."""

    verify_checksums: bool = False
    """Compare each shard's sha256 with the manifest when a process first reads from it; reads all of the shard."""

    cache_dir: str | None = None
    """Folder on each node's disk that keeps what was read from S3 for the next epochs; null: none."""

    cache_bytes: PositiveInt = 100_000_000_000
    """What `cache_dir` may hold, over all processes of a node; the least recently used goes first."""

    @property
    def train_parts(self) -> tuple[MixturePart, ...]:
        return (MixturePart(uri=self.train),) if isinstance(self.train, str) else tuple(self.train)

    @property
    def resolved_eval_resize(self) -> int:
        if self.eval_resize is not None:
            return self.eval_resize
        return self.image_size if self.image_size < 128 else round(self.image_size / 0.875)


class ModelConfig(Section):
    """Which network."""

    name: str = "resnet50"
    """A name of the zoo (`cnn`, `resnet18`, …, any torchvision classifier) or `module:function`."""

    params: dict[str, Any] = {}
    """Keyword arguments of its builder (`width`, `dropout`, …)."""


class OptimizerConfig(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.5
    """Peak learning rate for the whole global batch (not per worker)."""

    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-5
    """Applied to matrices only, not to biases and norms."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Nesterov momentum of SGD; AdamW takes it as beta1."""


class ScheduleConfig(Section):
    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 5.0
    """Linear warm-up from 1 % of the peak."""

    step_epochs: PositiveInt = 30
    """Epochs between divisions by ten, for `step`."""


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
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    mixup_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """Mixup (Zhang et al. 2017, arXiv:1710.09412) with weights from Beta(alpha, alpha), one per batch; 0: none."""

    cutmix_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """CutMix (Yun et al. 2019, arXiv:1905.04899), likewise. With both, each batch gets one of the two at random."""

    grad_clip_norm: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay per step of an exponential moving average of the weights; it is what is evaluated and saved as the model."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast on GPUs that have it, else fp32."""

    deterministic: bool = False
    """Deterministic kernels: slower, bit-identical on the same devices and number of workers."""

    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures survived by going on from the last checkpoint; -1: any number."""

    checkpoint_every_epochs: PositiveInt = 1
    checkpoint_every_steps: PositiveInt | None = None
    """Steps after which a checkpoint is written within epochs too, for long ones; a resumed run goes on at that very batch."""

    checkpoints_to_keep: Annotated[int, Field(ge=2)] = 3
    """Best checkpoints kept, by validation top-1, besides the newest."""

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


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al., 2018, arXiv:1810.05934)."""

    grace_epochs: PositiveInt = 1
    """No trial is stopped before this many epochs."""

    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One in this many trials is kept at each rung."""


class SearchConfig(Section):
    """What is searched, with which budget."""

    num_trials: PositiveInt = 20
    max_concurrent: PositiveInt | None = None
    """Trials at a time; by default as many as the cluster's CPUs or GPUs hold."""

    epochs: PositiveInt = 10
    """Epochs of a trial that is not stopped early."""

    families: Annotated[dict[str, dict[str, Distribution]], Field(min_length=1)]
    """Architecture name → its own parameters (keys of `model.params`); chosen first."""

    space: dict[str, Distribution] = {}
    """Dotted key of the job file (`train.optimizer.lr`) → distribution."""

    scheduler: AshaConfig | None = AshaConfig()
    """null: every trial runs all its epochs."""

    storage: str | None = None
    """Optuna storage URL (`postgresql://…`); by default an SQLite file beside the study's run."""


class ServingConfig(Section):
    """How a model version is served."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    num_replicas: PositiveInt = 1
    """Replicas of each variant."""

    max_batch_size: PositiveInt = 32
    """Pictures that a replica classifies at once."""

    batch_wait_s: Annotated[float, Field(ge=0.0, le=1.0)] = 0.002
    """Longest time a request waits for others to share its batch."""

    max_queued_requests: PositiveInt = 256
    """Requests waiting for a variant before the next one is refused with 503."""

    max_image_bytes: PositiveInt = 20_000_000
    max_image_pixels: PositiveInt = 50_000_000


class JobConfig(Section):
    """One job file: data → model → training → search → serving."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    """Name of the model in the registry, and the start of its runs' names."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    workspace: WorkspaceConfig = WorkspaceConfig()
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
    def _warmup_is_shorter_than_training(self) -> JobConfig:
        if self.train.schedule.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"train.schedule.warmup_epochs {self.train.schedule.warmup_epochs} must be below train.epochs {self.train.epochs}"
            )
        return self
