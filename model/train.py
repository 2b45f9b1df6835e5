"""Training: AdamW, cosine with warm-up, EMA, resumable to the same loss curve; one process or `torchrun`.

A run writes to its folder: `last.safetensors` (everything needed to resume), `model.safetensors` (the averaged weights,
what one evaluates and exports) and `metrics.jsonl` (one line an epoch).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.batch_augment import erase, mix
from model.checkpoint import CheckpointError, load_tensors, save_model, save_tensors, under
from model.config import DVTConfig, variant
from model.data import (
    EpochSampler,
    InMemory,
    Normalize,
    Sample,
    TrainImages,
    decoded,
    eval_loader,
    scan_image_folder,
    select,
)
from model.dvt import DVT
from model.evaluate import exit_accuracy
from model.losses import cascade_loss
from model.recipes import Recipe
from model.start import Taken, read_start, take_weights

Device = Literal["auto", "cpu", "cuda"]
"""Where to train; auto: on a GPU where there is one."""


@dataclass(frozen=True)
class Processes:
    """This process's place in a run started by `torchrun` (or alone)."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: Device = "auto") -> Processes:
        """Raises ValueError for a device that is not there."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no GPU that PyTorch can use")
        cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(chosen)
            torch.backends.cudnn.benchmark = True  # all batches have one shape
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        return cls(rank, world, chosen)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def any(self, value: bool) -> bool:
        """Whether it is so in one of the processes."""
        if self.world == 1:
            return value
        found = torch.tensor(int(value), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)


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


def build_optimizer(model: nn.Module, recipe: Recipe, graph: bool = False) -> torch.optim.Optimizer:
    """With `graph` (AdamW only) the rates are tensors: a CUDA graph reads them anew, numbers would be frozen in it."""
    groups = parameter_groups(model, recipe)
    if graph:
        for group in groups:
            group["lr"] = torch.tensor(recipe.lr, device=group["params"][0].device)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True, capturable=graph)


class Average:
    """Exponential moving average of a network's weights and buffers. Early on it looks back less far: over a tenth of
    the steps so far."""

    def __init__(self, model: DVT, decay: float) -> None:
        self.model, self.decay = deepcopy(model).requires_grad_(False), decay
        pairs = list(zip(self._tensors(self.model), self._tensors(model), strict=True))
        self.averages, self.lives = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @staticmethod
    def _tensors(model: nn.Module) -> Iterable[Tensor]:
        return chain((p.detach() for p in model.parameters()), model.buffers())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step`, from 1. The host does not wait for the device."""
        decay = min(self.decay, step / (step + 10))
        get_ema_multi_avg_fn(decay)(list(self.averages), list(self.lives), step)
        for average, live in self.counts:
            average.copy_(live)


class Graph:
    """A step on batches of one shape, recorded as a CUDA graph: one launch in place of thousands.

    The first steps run as they are, on a stream of their own, so that libraries and optimiser set themselves up before
    the recording, which itself computes nothing.
    """

    PLAIN = 3

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.step, self.calls = step, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.PLAIN:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(images, targets)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.calls == self.PLAIN + 1:
            self.images, self.targets = images.clone(), targets.clone()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.loss = self.step(self.images, self.targets)
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss


class Run:
    """One training run: the live model, its average, the optimiser; saved and restored as one. A teacher's last exit
    answers beside the targets."""

    def __init__(
        self,
        model: DVT,
        recipe: Recipe,
        processes: Processes,
        steps_per_epoch: int,
        graph: bool = False,
        teacher: DVT | None = None,
    ) -> None:
        self.recipe, self.processes = recipe, processes
        self.teacher = None if teacher is None else teacher.to(processes.device).eval().requires_grad_(False)
        self.model = model.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if processes.world > 1 and processes.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = Average(self.model, recipe.ema_decay)
        self.optimizer = build_optimizer(self.model, recipe, graph)
        # Keeps small gradients from vanishing in fp16; does nothing elsewhere.
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.precision == "fp16")
        self.rate = learning_rate(recipe, steps_per_epoch)
        self.steps = 0
        self.forward: nn.Module = nn.parallel.DistributedDataParallel(self.model) if processes.world > 1 else self.model
        self.compute: Callable[[Tensor, Tensor], Tensor] = Graph(self._compute) if graph else self._compute
        self.epoch = 0
        self.normalize = Normalize(model.config.mean, model.config.std, processes.device)

    @property
    def averaged(self) -> DVT:
        return self.average.model

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step on a batch of this process. Returns the mean loss."""
        for group in self.optimizer.param_groups:
            rate = self.recipe.lr * self.rate(self.steps) * group["scale"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        loss = self.compute(images, targets)
        self.steps += 1
        self.average.update(self.steps)
        return loss

    def _compute(self, images: Tensor, targets: Tensor) -> Tensor:
        """What a step does on the device, the batch cut into `accumulate` parts. Nothing here waits for its outcome
        (but in fp16, where the scaler asks whether gradients overflowed)."""
        recipe = self.recipe
        dtype = torch.float16 if recipe.precision == "fp16" else torch.bfloat16
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=images.device)
        parts = list(zip(images.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
        for number, (some, theirs) in enumerate(parts, start=1):
            share = len(some) / len(images)
            with nullcontext() if number == len(parts) else self._unsynchronized():
                with torch.autocast(images.device.type, dtype, enabled=recipe.precision != "fp32"):
                    exits = self.forward(some)
                    with torch.no_grad():
                        answers = None if self.teacher is None else self.teacher(some)[-1]
                loss = cascade_loss(exits, theirs, recipe.distillation, answers) * share
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
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
            "scaler": self.scaler.state_dict(),
            "teacher": self._taught_by(),
        }
        save_tensors(path, tensors, header)

    def _taught_by(self) -> str | None:
        """A name for the teacher's weights."""
        if self.teacher is None:
            return None
        digest = hashlib.sha256()
        for name, tensor in self.teacher.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def restore(self, path: Path) -> None:
        """Raises CheckpointError where the run that wrote the file was another one, or none."""
        tensors, header = load_tensors(path)
        if missing := sorted({"config", "recipe", "epoch", "step", "scaler"} - header.keys()):
            raise CheckpointError(f"{path} is no run that can be resumed: its header has no {missing[0]}")
        mine = json.loads(json.dumps({"config": self.model.config.to_dict(), "recipe": asdict(self.recipe)}))
        for part in ("config", "recipe"):
            changed = [k for k, v in mine[part].items() if header[part].get(k) != v]
            if changed:
                raise CheckpointError(f"{path} was written by another run: {part} differs in {', '.join(changed)}")
        if header.get("teacher") != self._taught_by():
            raise CheckpointError(f"{path} was written by another run: its teacher is another one, or none")
        for network, prefix in ((self.model, "live."), (self.averaged, "model.")):
            found = under(tensors, prefix)
            if different := sorted(network.state_dict().keys() ^ found.keys()):
                raise CheckpointError(f"{path} is no run that can be resumed: {prefix}{different[0]} is not in both")
            network.load_state_dict(found)
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in under(tensors, "optimizer.").items():
            index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():  # fused optimisers take for granted that all lie in memory alike
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(header["scaler"])
        self.epoch = header["epoch"]
        self.steps = header["step"]


def initial_model(
    recipe: Recipe, labels: tuple[str, ...], start: Path | None, fresh: bool = False, heads: int | None = None
) -> tuple[DVT, Taken | None]:
    """A new network for these classes; with `start`, from a checkpoint, and what became of its weights (see
    `model.start`). Images of another size are resized in proportion to it. Raises CheckpointError, and ValueError for a
    configuration that cannot be."""
    changes: dict[str, Any] = {**recipe.changes, "num_classes": len(labels), "labels": labels}
    changes |= {} if recipe.drop_path is None else {"drop_path": recipe.drop_path}
    changes |= {field: given for field in ("mean", "std") if (given := getattr(recipe, field))}
    source = None if start is None else read_start(start, heads)
    torch.manual_seed(recipe.seed)  # the same initial weights in every process
    if source is None:
        return DVT(variant(recipe.variant, **changes)), None
    base = source.becomes or source.config
    if "resize" not in changes and "image_size" in changes:
        changes["resize"] = round(base.resize * changes["image_size"] / base.image_size)
    model = DVT(replace(base, **changes))
    return model, take_weights(model, source, fresh)


def teaching_model(path: Path, config: DVTConfig, heads: int | None = None, told: bool = False) -> DVT:
    """What is to teach a network of `config`: a checkpoint on its own grids, for the same classes; a ViT for images of
    another size with the patches that it has. Raises CheckpointError for one that knows other classes, or images that
    are normalised in another way, unless it was told how they are."""
    source = read_start(path, heads)
    grids = source.config.grids
    if source.config.image_size != config.image_size and len(grids) == 1:
        grids = (max(1, round(grids[0] * config.image_size / source.config.image_size)),)
    teacher = DVT(
        replace(
            source.config, grids=grids, image_size=config.image_size, resize=config.resize, labels=config.labels,
            num_classes=config.num_classes, drop_path=0.0,
        )
    )  # fmt: skip
    if any(name.split(".")[2] == "head" for name in take_weights(teacher, source).fresh):
        raise CheckpointError(f"{path} cannot teach: it does not know these {config.num_classes} classes")
    if not told and (source.config.mean, source.config.std) != (config.mean, config.std):
        raise CheckpointError(f"{path} cannot teach: it sees images normalised in another way")
    return teacher


def batches(
    training: list[Sample], config: DVTConfig, recipe: Recipe, processes: Processes, num_workers: int
) -> tuple[Iterable[tuple[Tensor, Tensor]], Callable[[int], None], int]:
    """Batches of this process, what sets the epoch before each pass over them, and how many there are."""
    local_batch, rest = divmod(recipe.batch_size, processes.world)
    if rest:
        raise ValueError(f"batch_size {recipe.batch_size} does not divide over {processes.world} processes")
    order = EpochSampler(len(training), local_batch, recipe.seed, processes.rank, processes.world)
    augmentation = (recipe.min_area, recipe.colour, recipe.seed, recipe.rand_augment, recipe.padding)
    images: InMemory | TrainImages
    loader: InMemory | DataLoader[tuple[Tensor, Tensor]]
    if recipe.in_memory:
        size = config.image_size
        images = loader = InMemory(
            training, config.resize, size, local_batch, order, *augmentation, processes.device
        )  # fmt: skip
    else:
        images = TrainImages(training, config.image_size, *augmentation)
        loader = DataLoader(images, local_batch, sampler=order, num_workers=num_workers, drop_last=True)  # type: ignore[arg-type]

    def set_epoch(epoch: int) -> None:
        images.epoch = order.epoch = epoch

    return loader, set_epoch, len(loader)


def watch(
    watched: list[Sample], config: DVTConfig, recipe: Recipe, processes: Processes, num_workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of the held-out slice."""
    if not recipe.in_memory or not watched:
        return eval_loader(watched, config.resize, config.image_size, 256, num_workers)
    images, labels = decoded(watched, config.resize, config.image_size, processes.device)
    return list(zip(images.split(256), labels.split(256), strict=True))


def train(
    data: Path,
    out: Path,
    recipe: Recipe,
    resume: bool = False,
    num_workers: int = 0,
    start: Path | None = None,
    graph: bool = False,
    minutes: float = math.inf,
    fresh: bool = False,
    teacher: Path | None = None,
    heads: int | None = None,
    device: Device = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train on the image folder `data` and return the path of the averaged model.

    `start` is a checkpoint to begin with; it decides the variant, and with `fresh` need not fit. `graph`: record the
    step as a CUDA graph. After `minutes` the run ends with the epoch it is in; it can be resumed. `teacher` is a
    checkpoint whose last exit all exits learn from, by the recipe's share `distillation`; `heads` are those of a ViT
    that does not tell. `progress` is told after every step how many of how many are done, in place of what is printed.
    Raises FileNotFoundError or ValueError for unusable data, FileExistsError where `out` holds a run and `resume` is
    not set, CheckpointError for an unusable `start` or `teacher`, and where `out` holds another run.
    """
    deadline = time.monotonic() + minutes * 60
    processes = Processes.start(device)
    alone = processes.device.type == "cuda" and processes.world == 1
    if graph and not (alone and recipe.optimizer == "adamw" and recipe.precision != "fp16"):
        raise ValueError("a step is recorded as a CUDA graph only on a single GPU, with AdamW, in bf16 or fp32")
    labels, samples = scan_image_folder(data)
    model, taken = initial_model(recipe, labels, start, fresh, heads)
    if processes.first and taken is not None and str(taken):
        tqdm.write(f"{start}: {taken}", file=sys.stderr)
    config = model.config
    if teacher is not None and not recipe.distillation:
        raise ValueError("a teacher teaches by the share that distillation is, and it is 0")
    taught_by = None if teacher is None else teaching_model(teacher, config, heads, bool(recipe.mean or recipe.std))
    training = select(data, samples, recipe.held_out, "train")
    watched = select(data, samples, recipe.held_out, "held-out")
    loader, set_epoch, steps = batches(training, config, recipe, processes, num_workers)
    held_out_batches = watch(watched, config, recipe, processes, num_workers)

    out.mkdir(parents=True, exist_ok=True)
    last, log = out / "last.safetensors", out / "metrics.jsonl"
    run = Run(model, recipe, processes, steps, graph, taught_by)
    if last.exists():
        if not resume:
            raise FileExistsError(f"{out} already holds a run; continue it with --resume or name another folder")
        run.restore(last)
        if processes.first:
            _forget_after(run.epoch, log)
    records: list[dict[str, Any]] = []  # of the epochs since the last checkpoint
    out_of_time = False
    while run.epoch < recipe.all_epochs and not out_of_time:
        started = time.perf_counter()
        epoch = run.epoch
        set_epoch(epoch)
        torch.manual_seed(hash((recipe.seed, epoch, processes.rank)) & 0x7FFFFFFF)  # dropout, drop-path, erasing
        rng = np.random.default_rng((recipe.seed, epoch, processes.rank, 1))
        mixing = recipe.mix_probability if epoch < recipe.all_epochs - recipe.clean_epochs else 0.0
        run.model.train()
        total = torch.zeros((), device=processes.device)
        title = f"epoch {epoch + 1}/{recipe.all_epochs}"
        bar = tqdm(
            loader, desc=title, total=steps, disable=not processes.first or progress is not None, mininterval=1.0
        )
        for batch, classes in bar:
            pixels = run.normalize(batch).contiguous(memory_format=torch.channels_last)
            pixels, targets = mix(
                pixels, classes.to(processes.device), config.num_classes,
                recipe.mixup, recipe.cutmix, mixing, recipe.smoothing, rng,
            )  # fmt: skip
            if recipe.erasing:
                pixels = erase(pixels, recipe.erasing, rng)
            total += run.step(pixels, targets)
            if progress is not None:
                progress(run.steps, recipe.all_epochs * steps)
        run.epoch += 1
        out_of_time = processes.any(time.monotonic() > deadline)
        last_of_all = run.epoch == recipe.all_epochs or out_of_time
        record: dict[str, Any] = {"epoch": run.epoch, "loss": processes.mean(total) / steps}
        record["lr"] = recipe.lr * run.rate(run.steps - 1)
        records.append(record)
        # The loss stays on the device until it is written: who asks for it waits for the device.
        check = run.epoch % recipe.check_every == 0 or last_of_all
        if check and not torch.isfinite(total):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}; lower the learning rate")
        record["seconds"] = round(time.perf_counter() - started, 3)
        if not check:
            continue
        if processes.first:
            if watched:
                record["held_out_accuracy"] = exit_accuracy(run.averaged, held_out_batches, run.normalize)
            with log.open("a") as file:
                file.writelines(json.dumps({**noted, "loss": float(noted["loss"])}) + "\n" for noted in records)
            if progress is None:
                tqdm.write(json.dumps({**record, "loss": float(record["loss"])}))
            run.save(last)
        records.clear()
    final = out / "model.safetensors"
    if processes.first:
        save_model(final, run.averaged, recipe=asdict(recipe), epochs=run.epoch, training_images=len(training))
    if processes.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return final


def _forget_after(epoch: int, log: Path) -> None:
    """Drop the lines of epochs that the checkpoint does not have: the run was cut short between the two."""
    if log.exists():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] <= epoch))
