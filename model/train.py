"""Training: AdamW, cosine with warm-up, EMA, resumable to the same loss curve; one process or `torchrun`.

A run writes to its folder: `last.safetensors` (everything needed to resume), `model.safetensors` (the averaged weights,
what one evaluates and exports) and `metrics.jsonl` (one line an epoch).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.augment import erase, mix
from model.checkpoint import CheckpointError, load_model, load_tensors, save_model, save_tensors, under
from model.config import variant
from model.data import EpochSampler, Normalize, TrainImages, eval_loader, scan_image_folder, select
from model.dvt import DVT
from model.evaluate import exit_accuracy
from model.losses import cascade_loss
from model.recipes import Recipe


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

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor on the peak rate at a step (from 0): linear warm-up, a cosine down to min_lr, and there it stays."""
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
    floor = recipe.min_lr / recipe.lr

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress)))

    return factor


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only, not for biases, norms, class tokens and position embeddings; and the
    heads' rate apart from the backbone's. `scale`: a group's factor on the learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
            scale = 1.0 if ".head." in name else recipe.backbone_lr
            groups.setdefault((recipe.weight_decay if plain else 0.0, scale), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "scale": scale} for (decay, scale), p in groups.items()]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


class Run:
    """One training run: the live model, its average, the optimiser; saved and restored as one."""

    def __init__(self, model: DVT, recipe: Recipe, processes: Processes, steps_per_epoch: int) -> None:
        self.recipe, self.processes = recipe, processes
        self.model = model.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if processes.world > 1 and processes.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
        self.optimizer = build_optimizer(self.model, recipe)
        # Keeps small gradients from vanishing in fp16; does nothing elsewhere.
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.precision == "fp16")
        self.rate = learning_rate(recipe, steps_per_epoch)
        self.steps = 0
        self.forward: nn.Module = nn.parallel.DistributedDataParallel(self.model) if processes.world > 1 else self.model
        self.epoch = 0
        self.normalize = Normalize(model.config.mean, model.config.std, processes.device)

    @property
    def averaged(self) -> DVT:
        return self.average.module  # type: ignore[return-value]

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step on a batch of this process, cut into `accumulate` parts. Returns the mean loss."""
        recipe = self.recipe
        dtype = torch.float16 if recipe.precision == "fp16" else torch.bfloat16
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * self.rate(self.steps) * group["scale"]
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=images.device)
        parts = list(zip(images.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
        for number, (some, theirs) in enumerate(parts, start=1):
            share = len(some) / len(images)
            with nullcontext() if number == len(parts) else self._unsynchronized():
                with torch.autocast(images.device.type, dtype, enabled=recipe.precision != "fp32"):
                    exits = self.forward(some)
                loss = cascade_loss(exits, theirs) * share
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1
        self.average.update_parameters(self.model)
        return total

    def _unsynchronized(self) -> AbstractContextManager[None]:
        """Processes exchange their gradients once a step, not with every part."""
        forward = self.forward
        return forward.no_sync() if isinstance(forward, nn.parallel.DistributedDataParallel) else nullcontext()

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
            "scaler": self.scaler.state_dict(),
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
        self.scaler.load_state_dict(header["scaler"])
        self.epoch = header["epoch"]
        self.steps = header["step"]


def initial_model(recipe: Recipe, labels: tuple[str, ...], start: Path | None) -> DVT:
    """A new network for these classes; with `start`, from a checkpoint, whose head is kept where it has as many
    classes. Raises CheckpointError."""
    changes: dict[str, Any] = {**recipe.changes, "num_classes": len(labels), "labels": labels}
    changes |= {} if recipe.drop_path is None else {"drop_path": recipe.drop_path}
    changes |= {field: given for field in ("mean", "std") if (given := getattr(recipe, field))}
    torch.manual_seed(recipe.seed)  # the same initial weights in every process
    if start is None:
        return DVT(variant(recipe.variant, **changes))
    source, _ = load_model(start)
    model = DVT(replace(source.config, **changes))
    wanted = model.state_dict()
    model.load_state_dict({k: v if v.shape == wanted[k].shape else wanted[k] for k, v in source.state_dict().items()})
    return model


def train(
    data: Path, out: Path, recipe: Recipe, resume: bool = False, num_workers: int = 0, start: Path | None = None
) -> Path:
    """Train on the image folder `data` and return the path of the averaged model.

    `start` is a checkpoint to begin with; it decides the variant. Raises FileNotFoundError or ValueError for unusable
    data, FileExistsError where `out` holds a run and `resume` is not set, CheckpointError for an unusable `start` and
    where `out` holds another run.
    """
    processes = Processes.start()
    labels, samples = scan_image_folder(data)
    model = initial_model(recipe, labels, start)
    config = model.config
    training = select(data, samples, recipe.held_out, "train")
    watched = select(data, samples, recipe.held_out, "held-out")
    local_batch, rest = divmod(recipe.batch_size, processes.world)
    if rest:
        raise ValueError(f"batch_size {recipe.batch_size} does not divide over {processes.world} processes")
    images = TrainImages(training, config.image_size, recipe.min_area, recipe.colour, recipe.seed, recipe.rand_augment)
    sampler = EpochSampler(len(training), local_batch, recipe.seed, processes.rank, processes.world)
    loader = DataLoader(images, local_batch, sampler=sampler, num_workers=num_workers, drop_last=True)
    held_out_loader = eval_loader(watched, config.resize, config.image_size, 256, num_workers)

    out.mkdir(parents=True, exist_ok=True)
    last = out / "last.safetensors"
    run = Run(model, recipe, processes, steps_per_epoch=len(loader))
    if last.exists():
        if not resume:
            raise FileExistsError(f"{out} already holds a run; continue it with --resume or name another folder")
        run.restore(last)
    while run.epoch < recipe.all_epochs:
        started = time.perf_counter()
        epoch = images.epoch = sampler.epoch = run.epoch
        torch.manual_seed(hash((recipe.seed, epoch, processes.rank)) & 0x7FFFFFFF)  # dropout and drop-path
        rng = np.random.default_rng((recipe.seed, epoch, processes.rank, 1))
        mixing = recipe.mix_probability if epoch < recipe.all_epochs - recipe.clean_epochs else 0.0
        run.model.train()
        total = torch.zeros((), device=processes.device)
        bar = tqdm(loader, desc=f"epoch {epoch + 1}/{recipe.all_epochs}", disable=not processes.first, mininterval=1.0)
        for step, (batch, classes) in enumerate(bar):
            pixels = run.normalize(batch).contiguous(memory_format=torch.channels_last)
            pixels, targets = mix(
                pixels, classes.to(processes.device), config.num_classes,
                recipe.mixup, recipe.cutmix, mixing, recipe.smoothing, rng,
            )  # fmt: skip
            if recipe.erasing:
                pixels = erase(pixels, recipe.erasing, rng)
            total += run.step(pixels, targets)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{float(total) / (step + 1):.3f}")
        run.epoch += 1
        total = processes.mean(total)
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
