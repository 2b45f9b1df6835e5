"""What every peer's server shares: the stages as ONNX Runtime sessions, decoding, the answer. Knows no server.

It runs in each peer's own environment, so it imports only the runtime, numpy and the JPEG decoder. What is served comes
from the environment, as `benchmarks.peers` sets it:

PEER_BUNDLE      folder with stage1.onnx ...
PEER_MODE        full: every image runs through all stages; cascade: sure images leave the batch, which shrinks
PEER_THRESHOLDS  one per stage, the last is 0
PEER_SIDE        of the model's input
PEER_WORKERS, PEER_BATCH, PEER_WINDOW_MS, PEER_TIMEOUT_S, PEER_PORT   for the server
PEER_COUNTS      folder where each process counts its batches and their rows by stage
"""

import os
import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import simplejpeg

BUNDLE = Path(os.environ["PEER_BUNDLE"])
CASCADE = os.environ["PEER_MODE"] == "cascade"
THRESHOLDS = [float(part) for part in os.environ["PEER_THRESHOLDS"].split(",")]
STAGES = len(THRESHOLDS)
SIDE = int(os.environ["PEER_SIDE"])
WORKERS = int(os.environ["PEER_WORKERS"])
BATCH = int(os.environ["PEER_BATCH"])
WINDOW_MS = float(os.environ["PEER_WINDOW_MS"])
TIMEOUT_S = float(os.environ["PEER_TIMEOUT_S"])
PORT = int(os.environ["PEER_PORT"])
TOP_K = 5

# Floats are compared as the server that all are compared with compares them: in double.
_thresholds = np.array(THRESHOLDS)
_counting = threading.Lock()


def decode(data):
    """(SIDE, SIDE, 3) uint8. Raises ValueError for what is no JPEG. The driver's photos are of the size that the model
    is resized from, so the centre is all that is left to take."""
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    top, left = (pixels.shape[0] - SIDE) // 2, (pixels.shape[1] - SIDE) // 2
    if top < 0 or left < 0:
        raise ValueError(f"smaller than {SIDE} x {SIDE}")
    return pixels[top : top + SIDE, left : left + SIDE]


def answer(probabilities, confidence, exit_):
    """What an image's client gets, as JSON knows it: the same fields in every peer."""
    top = np.argsort(-probabilities, kind="stable")[:TOP_K]
    return {
        "predictions": [{"class_id": int(i), "probability": round(float(probabilities[i]), 6)} for i in top],
        "exit": int(exit_),
        "confidence": round(float(confidence), 6),
    }


class Stage:
    """One graph. A single thread a run: as many batches at once as there are workers use the cores better."""

    def __init__(self, number):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        self.number = number
        self._session = ort.InferenceSession(
            str(BUNDLE / f"stage{number}.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["SkipLayerNormFusion"],  # slower than what it fuses, on CPUs
        )
        self.takes = sorted({i.name for i in self._session.get_inputs()} - {"image"})
        outputs = {o.name for o in self._session.get_outputs()}
        self.leaves = sorted(outputs - {"logits", "probabilities", "confidence"})
        self._counts = _counts()
        for rows in (BATCH, 1):  # the memory that it needs is there before the first request
            self._session.run(None, {i.name: _zeros(i, rows) for i in self._session.get_inputs()})

    def run(self, feeds):
        """(probabilities, confidence, state by name) of a batch."""
        with _counting:
            self._counts[self.number - 1] += (1, len(feeds["image"]))
        probabilities, confidence, *state = self._session.run(["probabilities", "confidence", *self.leaves], feeds)
        return probabilities, confidence, dict(zip(self.leaves, state, strict=True))


class Stages:
    """All of them, within one batch: who is sure leaves, and the batch shrinks."""

    def __init__(self):
        self._stages = [Stage(number) for number in range(1, STAGES + 1)]

    def run(self, pixels):
        """The answers of a batch of decoded images."""
        images = np.stack(pixels)
        answers = [None] * len(images)
        inside, feeds = np.arange(len(images)), {"image": images}
        for stage in self._stages:
            probabilities, confidence, state = stage.run(feeds)
            last = stage.number == STAGES
            leaves = np.full(len(inside), last) | (CASCADE & (confidence >= _thresholds[stage.number - 1]))
            for row in np.flatnonzero(leaves):
                answers[inside[row]] = answer(probabilities[row], confidence[row], stage.number)
            if leaves.all():
                break
            stays = np.flatnonzero(~leaves)
            inside = inside[stays]
            takes = self._stages[stage.number].takes
            tensors = {"image": feeds["image"], **{name: state[name] for name in takes}}
            feeds = tensors if len(stays) == len(leaves) else {name: every[stays] for name, every in tensors.items()}
        return answers

    def run_files(self, files):
        """`run`, from JPEGs. One that is none has its ValueError in the place of an answer, and spoils no other."""
        answers, pixels, places = [None] * len(files), [], []
        for place, file in enumerate(files):
            try:
                pixels.append(decode(file))
                places.append(place)
            except ValueError as error:
                answers[place] = error
        if pixels:
            for place, found in zip(places, self.run(pixels), strict=True):
                answers[place] = found
        return answers


def _zeros(spec, rows):
    dtype = np.uint8 if spec.type == "tensor(uint8)" else np.float32
    return np.zeros([size if isinstance(size, int) else rows for size in spec.shape], dtype)


_mapped = {}


def _counts():
    """(STAGES, 2) int64 in a file of this process: batches and rows. The driver reads it while the server runs."""
    if os.getpid() not in _mapped:
        path = Path(os.environ["PEER_COUNTS"]) / f"{os.getpid()}.int64"
        _mapped[os.getpid()] = np.memmap(path, np.int64, "w+", shape=(STAGES, 2))
    return _mapped[os.getpid()]
