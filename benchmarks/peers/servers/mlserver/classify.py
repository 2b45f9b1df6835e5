"""MLServer: a custom runtime behind adaptive batching, and as many inference workers as there are cores."""

import json

import cascade
from mlserver import MLModel
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Classify(MLModel):
    async def load(self) -> bool:
        self.stages = cascade.Stages()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        files = Base64Codec.decode_input(payload.inputs[0])
        answers = self.stages.run_files(files)
        texts = [json.dumps({"error": str(a)} if isinstance(a, ValueError) else a) for a in answers]
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("answer", texts)])
