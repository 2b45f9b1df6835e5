"""The cascade as business logic scripting: decode, and call the stages, which Triton batches one by one.

`async` as its documentation shows it: all requests of a batch go their ways at once. Responses of a batch are sent when
all are known (decoupled ones, which would not be held back, cannot be asked for over HTTP).
"""

import asyncio
import json

import cascade
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):  # noqa: ARG002
        stages = [cascade.Stage(number) for number in range(1, cascade.STAGES + 1)]
        self.leaves = [stage.leaves for stage in stages]

    async def execute(self, requests):
        return await asyncio.gather(*[self.one(request) for request in requests])

    async def one(self, request):
        try:
            image = cascade.decode(pb.get_input_tensor_by_name(request, "image").as_numpy().ravel()[0])
        except ValueError as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error), pb.TritonError.INVALID_ARG))
        image = pb.Tensor("image", np.ascontiguousarray(image)[None])
        state = []
        for number, leaves in enumerate(self.leaves, start=1):
            call = pb.InferenceRequest(
                model_name=f"stage{number}",
                requested_output_names=["probabilities", "confidence", *leaves],
                inputs=[image, *state],
                preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
            )
            said = await call.async_exec()
            if said.has_error():
                return pb.InferenceResponse(error=said.error())
            confidence = pb.get_output_tensor_by_name(said, "confidence").as_numpy()[0, 0]
            if confidence >= cascade.THRESHOLDS[number - 1]:
                break
            state = [pb.get_output_tensor_by_name(said, name) for name in leaves]
        probabilities = pb.get_output_tensor_by_name(said, "probabilities").as_numpy()[0]
        text = json.dumps(cascade.answer(probabilities, confidence, number)).encode()
        return pb.InferenceResponse([pb.Tensor("answer", np.array([[text]], dtype=object))])
