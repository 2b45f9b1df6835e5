"""Training: AdamW, cosine with warm-up, EMA, resumable to the same loss curve; one process or `torchrun`.

A run writes to its folder: `last.safetensors` (everything needed to resume), `model.safetensors` (the averaged weights,
what one evaluates and exports) and `metrics.jsonl` (one line an epoch).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.checkpoint import CheckpointError, load_tensors, save_model, save_tensors, under
from model.config import DVTConfig, variant
from model.data import EpochSampler, Normalize, TrainImages, eval_loader, mix, scan_image_folder, select
from model.dvt import DVT
from model.evaluate import exit_accuracy
from model.losses import cascade_loss


@dataclass(frozen=True)
class Recipe:
    """How to train a variant. The table `RECIPES` holds the ones whose results are reported."""

    variant: str
    epochs: int = 300
    warmup_epochs: int = 5
    batch_size: int = 128  # of the whole run, shared out over its processes
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    ema_decay: float = 0.9998
    clip_norm: float = 1.0
    min_area: float = 0.08  # random resized crop
    colour: float = 0.4
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_probability: float = 1.0
    clean_epochs: int = 0  # the last epochs, in which no images are mixed: they come to see what they will be asked
    smoothing: float = 0.1
    held_out: float = 0.08  # slice of the training images that is kept for calibration
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0


RECIPES: dict[str, Recipe] = {
    "micro": Recipe(variant="micro", epochs=2, warmup_epochs=0, batch_size=16, ema_decay=0.9, held_out=0.2),
    # The embedded model. So few epochs ask for little augmentation: mild crops, every other batch cut and mixed.
    "photo10": Recipe(
        variant="photo10",
        epochs=44,
        warmup_epochs=3,
        lr=1e-3,
        ema_decay=0.998,
        min_area=0.5,
        colour=0.0,
        mixup=0.0,
        mix_probability=0.5,
        clean_epochs=4,
        precision="bf16",
    ),
}


@dataclass(frozen=True)
class Processes:
    """This process's place in a run started by `torchrun` (or alone)."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls) -> Processes:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        return cls(rank, world, device)

    @property
    def first(self) -> bool:
        return self.rank == 0


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor on the peak rate at a step (from 0): linear warm-up, then a cosine down to min_lr."""
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
    floor = recipe.min_lr / recipe.lr

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress)))

    return factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only, not for biases, norms, class tokens and position embeddings."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
            (decayed if plain else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class Run:
    """One training run: the live model, its average, the optimiser; saved and restored as one."""

    def __init__(self, config: DVTConfig, recipe: Recipe, processes: Processes, steps_per_epoch: int) -> None:
        torch.manual_seed(recipe.seed)  # the same initial weights in every process
        self.recipe, self.processes = recipe, processes
        self.model = DVT(config).to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if processes.world > 1 and processes.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, recipe.weight_decay), lr=recipe.lr, fused=True)
        self.rate = learning_rate(recipe, steps_per_epoch)
        self.steps = 0
        self.forward: nn.Module = nn.parallel.DistributedDataParallel(self.model) if processes.world > 1 else self.model
        self.epoch = 0
        self.normalize = Normalize(config.mean, config.std, processes.device)

    @property
    def averaged(self) -> DVT:
        return self.average.module  # type: ignore[return-value]

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            exits = self.forward(images)
        loss = cascade_loss(exits, targets)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * self.rate(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.steps += 1
        self.average.update_parameters(self.model)
        return loss.detach()

    def save(self, path: Path) -> None:
        tensors = {f"live.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"model.{k}": v for k, v in self.averaged.state_dict().items()}
        state = self.optimizer.state_dict()["state"]
        tensors |= {f"optimizer.{i}.{k}": v for i, slots in state.items() for k, v in slots.items()}
        header = {
            "config": self.model.config.to_dict(),
            "recipe": asdict(self.recipe),
            "epoch": self.epoch,
            "step": self.steps,
            "averaged": int(self.average.n_averaged),
        }
        save_tensors(path, tensors, header)

    def restore(self, path: Path) -> None:
        """Raises CheckpointError where the run that wrote the file was another one."""
        tensors, header = load_tensors(path)
        mine = json.loads(json.dumps({"config": self.model.config.to_dict(), "recipe": asdict(self.recipe)}))
        for part in ("config", "recipe"):
            changed = [k for k, v in mine[part].items() if header[part].get(k) != v]
            if changed:
                raise CheckpointError(f"{path} was written by another run: {part} differs in {', '.join(changed)}")
        self.model.load_state_dict(under(tensors, "live."))
        self.averaged.load_state_dict(under(tensors, "model."))
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in under(tensors, "optimizer.").items():
            index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.average.n_averaged.fill_(header["averaged"])
        self.epoch = header["epoch"]
        self.steps = header["step"]


def train(data: Path, out: Path, recipe: Recipe, resume: bool = False, num_workers: int = 0) -> Path:
    """Train on the image folder `data` and return the path of the averaged model.

    Raises FileNotFoundError or ValueError for unusable data, FileExistsError where `out` holds a run and `resume` is
    not set, CheckpointError where it holds another run.
    """
    processes = Processes.start()
    labels, samples = scan_image_folder(data)
    config = variant(recipe.variant, num_classes=len(labels), labels=labels)
    training = select(data, samples, recipe.held_out, "train")
    watched = select(data, samples, recipe.held_out, "held-out")
    local_batch, rest = divmod(recipe.batch_size, processes.world)
    if rest:
        raise ValueError(f"batch_size {recipe.batch_size} does not divide over {processes.world} processes")
    images = TrainImages(training, config.image_size, recipe.min_area, recipe.colour, recipe.seed)
    sampler = EpochSampler(len(training), local_batch, recipe.seed, processes.rank, processes.world)
    loader = DataLoader(images, local_batch, sampler=sampler, num_workers=num_workers, drop_last=True)
    held_out_loader = eval_loader(watched, config.resize, config.image_size, 256, num_workers)

    out.mkdir(parents=True, exist_ok=True)
    last = out / "last.safetensors"
    run = Run(config, recipe, processes, steps_per_epoch=len(loader))
    if last.exists():
        if not resume:
            raise FileExistsError(f"{out} already holds a run; continue it with --resume or name another folder")
        run.restore(last)
    while run.epoch < recipe.epochs:
        started = time.perf_counter()
        epoch = images.epoch = sampler.epoch = run.epoch
        torch.manual_seed(hash((recipe.seed, epoch, processes.rank)) & 0x7FFFFFFF)  # dropout and drop-path
        rng = np.random.default_rng((recipe.seed, epoch, processes.rank, 1))
        mixing = recipe.mix_probability if epoch < recipe.epochs - recipe.clean_epochs else 0.0
        run.model.train()
        total = torch.zeros((), device=processes.device)
        bar = tqdm(loader, desc=f"epoch {epoch + 1}/{recipe.epochs}", disable=not processes.first, mininterval=1.0)
        for step, (batch, classes) in enumerate(bar):
            pixels = run.normalize(batch).contiguous(memory_format=torch.channels_last)
            pixels, targets = mix(
                pixels, classes.to(processes.device), config.num_classes,
                recipe.mixup, recipe.cutmix, mixing, recipe.smoothing, rng,
            )  # fmt: skip
            total += run.step(pixels, targets)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{float(total) / (step + 1):.3f}")
        run.epoch += 1
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}; lower the learning rate")
        if processes.first:
            run.save(last)
            record: dict[str, Any] = {
                "epoch": run.epoch,
                "loss": float(total) / len(loader),
                "lr": run.optimizer.param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - started, 1),
            }
            if watched:
                record["held_out_accuracy"] = exit_accuracy(run.averaged, held_out_loader, run.normalize)
            with (out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            tqdm.write(json.dumps(record))
    final = out / "model.safetensors"
    if processes.first:
        save_model(final, run.averaged, recipe=asdict(recipe), epochs=run.epoch, training_images=len(training))
    if processes.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return final
