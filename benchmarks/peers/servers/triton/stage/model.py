"""One stage, as a Triton model of its own, which Triton batches."""

import cascade
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        self.stage = cascade.Stage(int(args["model_name"].removeprefix("stage")))

    def execute(self, requests):
        names = ["image", *self.stage.takes]
        rows = [[pb.get_input_tensor_by_name(request, name).as_numpy() for name in names] for request in requests]
        feeds = {name: np.concatenate(tensors) for name, tensors in zip(names, zip(*rows, strict=True), strict=True)}
        probabilities, confidence, state = self.stage.run(feeds)
        outputs = {"probabilities": probabilities, "confidence": confidence[:, None], **state}
        return [
            pb.InferenceResponse([pb.Tensor(name, tensor[row : row + 1]) for name, tensor in outputs.items()])
            for row in range(len(requests))
        ]
