"""LitServe: a LitAPI that batches, a worker a core, and the queue that its documentation has for much traffic."""

import base64

import cascade
import litserve
from fastapi.responses import JSONResponse


class Classify(litserve.LitAPI):
    def setup(self, device):  # noqa: ARG002
        self.stages = cascade.Stages()

    def decode_request(self, request):
        # An exception here would be the whole batch's.
        return base64.b64decode(request["image"])

    def batch(self, inputs):
        return inputs

    def predict(self, files):
        return self.stages.run_files(files)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return JSONResponse({"error": str(output)}, 422) if isinstance(output, ValueError) else output


if __name__ == "__main__":
    api = Classify(max_batch_size=cascade.BATCH, batch_timeout=cascade.WINDOW_MS / 1000)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=cascade.WORKERS, timeout=cascade.TIMEOUT_S, fast_queue=True
    )
    server.run(
        host="127.0.0.1",
        port=cascade.PORT,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
