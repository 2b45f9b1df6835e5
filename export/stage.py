"""One stage as a graph of its own: pixels and the state of the stage before in, an exit's answer and the state out.

What a server would otherwise have to know is inside: normalisation, softmax, confidence. The names of the tensors are
part of the bundle's contract. A stage takes `image`, uint8 (B, S, S, 3), and from the second on what the stage before
left, `features_k` and `relations_k`; it gives `logits`, `probabilities`, `confidence` and, but for the last, its own
state.

Shapes: B images, S image side, K classes, n upstream tokens and N this stage's, both without the class token,
D embed_dim, C = depth * heads.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.onnx.ops
from torch import Tensor, nn

from export import aligned
from export.cpu import suit_cpu
from export.half import DTYPES, Precision, halve
from export.savings import keep_class_row
from export.soft_split import ChannelsLastTokens
from model.backbones.t2t_vit import TokensToToken
from model.dvt import DVT
from model.layers import Attend, Attention, attend
from model.reuse import ReuseState
from model.stage import Stage
from server.bundle.frontier import Criterion

IMAGE = "image"
ANSWER = ("logits", "probabilities", "confidence")


def onnx_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`model.layers.attend` as ONNX's own operator (opset 23): an engine may fuse it. Its fourth output in mode 2 is
    scaled logits plus mask, which is what relation reuse hands on."""
    mixed, _, _, logits = torch.onnx.ops.attention(q, k, v, bias, scale=scale, qk_matmul_output_mode=2)
    return mixed, logits


class BatchInvariantHead(nn.Module):
    """A linear head whose rows do not depend on the batch: on a batch of one, a matrix product of one row, engines take
    a matrix-vector routine that adds in another order. Here every image is two equal rows, of which one is kept."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        logits: Tensor = self.head(x.unsqueeze(1).expand(-1, 2, -1))  # (B, 2, K)
        return logits[:, 0]


class TensorShape(NamedTuple):
    dtype: str
    shape: tuple[int | str, ...]


class StageGraph(nn.Module):
    """The module that is exported for stage `number` (from 1). Takes its own copy of the weights; without `saving` it
    computes as the model is written.

    Raises ValueError for the entropy or margin of a single class, which says nothing.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: DVT,
        number: int,
        saving: bool = True,
        criterion: Criterion = "max_probability",
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        if criterion != "max_probability" and model.config.num_classes < 2:
            raise ValueError(f"the criterion {criterion} needs at least two classes")
        stage = model.stages[number - 1]
        assert isinstance(stage, Stage)
        self.config = model.config
        self.plain_shapes = [each.state_shapes() for each in model.stages if isinstance(each, Stage)]
        saving = saving and not model.config.ablates  # an ablation is exported as it is
        self.number = number
        self.criterion = criterion
        self.precision: Precision = precision
        self.stage = copy.deepcopy(stage).cpu().float().eval()
        self.stage.head = BatchInvariantHead(self.stage.head)  # type: ignore[assignment]
        self.aligned = saving and precision != "fp32"
        operator: Attend = onnx_attention if precision == "fp32" else attend
        if self.aligned:
            operator = aligned.attention(model.config, number, DTYPES[precision])
            self.stage = aligned.align(self.stage, model.config)
        for module in self.stage.modules():
            if isinstance(module, Attention):
                module.attend = operator
        tokenizer = self.stage.tokenizer
        self.channels_last = saving and isinstance(tokenizer, TokensToToken)
        if saving:
            if not self.stage.hands_on:
                keep_class_row(self.stage, operator)
            if isinstance(tokenizer, TokensToToken):
                self.stage.tokenizer = ChannelsLastTokens(tokenizer)
            if precision == "fp32":
                suit_cpu(self.stage)
        # Channels last, the factors of a whole row: engines are slow where three numbers are stretched over many.
        shape = (1, 3) if self.channels_last else (3, 1, 1)
        row = (model.config.image_size, 1) if self.channels_last else (1, 1, 1)
        std = torch.tensor(model.config.std).view(shape) * 255
        self.register_buffer("scale", (1 / std).repeat(row))
        self.register_buffer("shift", (-torch.tensor(model.config.mean).view(shape) * 255 / std).repeat(row))
        if precision != "fp32":  # the last step: it also rounds what the others put in
            halve(self.stage, DTYPES[precision])

    @property
    def takes_state(self) -> bool:
        return self.stage.takes_state

    def forward(
        self, image: Tensor, features: Tensor | None = None, relations: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """image (B, S, S, 3) uint8; features (B, n, D), relations (B, C, n+1, n+1) of `precision` from stage 2 on
        -> logits (B, K), probabilities (B, K), confidence (B,), and but for the last stage its own features and
        relations. In half precision state is padded, see `export.aligned`."""
        state = None if features is None or relations is None else ReuseState(features, relations)
        pixels = image.to(torch.float32)  # first: an integer transpose does not build in TensorRT
        if not self.channels_last:
            pixels = pixels.permute(0, 3, 1, 2)
        pixels = pixels * self.scale + self.shift
        logits, handed_on = self.stage(pixels, state)
        probabilities = logits.softmax(dim=-1)
        answer = (logits, probabilities, self._confidence(logits, probabilities))
        return answer if handed_on is None else (*answer, *handed_on)

    def _confidence(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """logits, probabilities (B, K) -> (B,)"""
        if self.criterion == "max_probability":
            return probabilities.amax(dim=-1)
        if self.criterion == "margin":
            first, second = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
            return first - second
        # By log-softmax, which stays finite where a probability is 0. Rounding may pass either end by a little.
        negentropy = (probabilities * logits.log_softmax(dim=-1)).sum(dim=-1)
        return (1 + negentropy / math.log(self.config.num_classes)).clamp(0, 1)

    def inputs(self) -> dict[str, TensorShape]:
        size = self.config.image_size
        shapes = {IMAGE: TensorShape("uint8", ("B", size, size, 3))}
        if self.takes_state:
            shapes |= self._state_shapes(self.number - 1)
        return shapes

    def outputs(self) -> dict[str, TensorShape]:
        K = self.config.num_classes
        shapes = {name: TensorShape("float32", ("B", K)) for name in ANSWER[:2]}
        shapes[ANSWER[2]] = TensorShape("float32", ("B",))
        if self.stage.hands_on:
            shapes |= self._state_shapes(self.number)
        return shapes

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of the right shapes, deterministic."""
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for dtype, (_, *rest) in self.inputs().values():
            shape = (batch, *(int(size) for size in rest))
            if dtype == "uint8":
                tensors.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
            else:
                tensors.append(torch.randn(shape, generator=generator).to(DTYPES[self.precision]))
        return tuple(tensors)

    def _state_shapes(self, number: int) -> dict[str, TensorShape]:
        """State that stage `number` leaves."""
        shapes = aligned.state_shapes(self.config, number) if self.aligned else self.plain_shapes[number - 1]
        # Named after the stage that leaves them: a graph may not have an input and an output of one name.
        names = (f"features_{number}", f"relations_{number}")
        dtype = str(DTYPES[self.precision]).removeprefix("torch.")
        return {name: TensorShape(dtype, ("B", *shape)) for name, shape in zip(names, shapes, strict=True)}
