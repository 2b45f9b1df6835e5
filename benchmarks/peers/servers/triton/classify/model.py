"""Triton's Python backend: images in, answers out, all stages in one instance."""

import json

import cascade
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):  # noqa: ARG002
        self.stages = cascade.Stages()

    def execute(self, requests):
        files = [pb.get_input_tensor_by_name(request, "image").as_numpy().ravel()[0] for request in requests]
        return [respond(found) for found in self.stages.run_files(files)]


def respond(found):
    if isinstance(found, ValueError):
        return pb.InferenceResponse(error=pb.TritonError(str(found), pb.TritonError.INVALID_ARG))
    text = np.array([[json.dumps(found).encode()]], dtype=object)
    return pb.InferenceResponse([pb.Tensor("answer", text)])
