"""How long to train, and what to write down on the way."""

from typing import Literal

from pydantic import Field, model_validator

from heterodox.core.slot import Config

DEVICES = r"^(auto|cpu|cuda(:\d+)?)$"


class Budget(Config):
    """When to stop: exactly one of the four. A step that would begin past the budget is not taken."""

    steps: int | None = Field(None, ge=1, description="stop after so many steps")
    tokens: int | None = Field(None, ge=1, description="training tokens; meta tokens included")
    flops: float | None = Field(None, gt=0, description="stop after so many FLOPs")
    seconds: float | None = Field(None, gt=0, description="training seconds; not reproducible to the bit")

    @model_validator(mode="after")
    def _exactly_one(self) -> "Budget":
        given = [key for key, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens, flops, seconds; found {given or 'none'}")
        return self

    @property
    def unit(self) -> Literal["steps", "tokens", "flops", "seconds"]:
        return next(key for key, value in self if value is not None)  # pyrefly: ignore[bad-return]

    @property
    def limit(self) -> float:
        return float(getattr(self, self.unit))


class Sampling(Config):
    """Text to generate at the end of a run."""

    tokens: int = Field(200, ge=0, description="0: no sample")
    prompt: str | None = Field(None, description="default: the first tokens of the val split")
    temperature: float = Field(0.8, ge=0, description="0: always the likeliest token")
    top_k: int | None = Field(None, ge=1, description="keep the k likeliest tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="keep the likeliest tokens of this mass")


class RunConfig(Config):
    """The trainer's settings."""

    budget: Budget = Budget(steps=1000)  # pyrefly: ignore[missing-argument]
    batch_size: int = Field(16, ge=1, description="windows in a step, over all ranks together")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate, over the budget")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up of the learning rate")
    final_lr: float = Field(0.1, ge=0, le=1, description="share of the learning rate left at the end of a cosine")
    eval_every: int = Field(200, ge=1, description="steps between two evaluations on val")
    eval_batches: int | None = Field(32, ge=1, description="fixed batches in an evaluation; null: the whole split")
    eval_batch_size: int = Field(32, ge=1, description="windows in a batch of an evaluation")
    log_every: int = Field(10, ge=1, description="steps between two rows of metrics")
    probe_every: int | None = Field(None, ge=1, description="steps between two comparisons with the exact gradient")
    checkpoint_every: int = Field(500, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many are kept, the latest")
    sampling: Sampling = Sampling()  # pyrefly: ignore[missing-argument]
    device: str = Field("auto", pattern=DEVICES, description="auto, cpu, cuda or cuda:N")
    precision: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="bfloat16: autocast, weights stay float32 ([what else](#precision))"
    )
    compile: bool = Field(False, description="torch.compile the model")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: PyTorch's choice")

    @model_validator(mode="after")
    def _warmup_within_budget(self) -> "RunConfig":
        if self.budget.steps is not None and self.warmup_steps >= self.budget.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leave nothing of a budget of {self.budget.steps} steps")
        return self


class LogConfig(Config):
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = Field(False, description="also write TensorBoard events (needs the `tensorboard` extra)")
