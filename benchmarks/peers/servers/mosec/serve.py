"""mosec: one worker class, as many processes as there are cores, the server's own dynamic batching in front of them."""

from typing import Any

import cascade
from mosec import Server, Worker
from mosec.errors import ValidationError


class Classify(Worker):
    def __init__(self):
        super().__init__()
        self.stages = cascade.Stages()

    def deserialize(self, data: bytes) -> Any:
        # Here a bad image is its own sender's fault; in `forward` it would be the whole batch's.
        try:
            return cascade.decode(bytes(data))
        except ValueError as error:
            raise ValidationError(str(error)) from error

    def forward(self, data: list[Any]) -> list[Any]:
        return self.stages.run(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Classify, num=cascade.WORKERS, max_batch_size=cascade.BATCH, max_wait_time=max(1, round(cascade.WINDOW_MS))
    )
    server.run()
