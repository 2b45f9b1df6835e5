"""mosec: one worker class, as many processes as there are cores, the server's own dynamic batching in front of them."""

from typing import Any

import cascade
from mosec import Server, Worker


class Classify(Worker):
    def __init__(self):
        super().__init__()
        self.stages = cascade.Stages()

    def deserialize(self, data: bytes) -> Any:
        return bytes(data)

    def forward(self, data: list[Any]) -> list[Any]:
        # Whatever is raised, here or in `deserialize`, is the whole batch's answer.
        return [{"error": str(a)} if isinstance(a, ValueError) else a for a in self.stages.run_files(data)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Classify, num=cascade.WORKERS, max_batch_size=cascade.BATCH, max_wait_time=max(1, round(cascade.WINDOW_MS))
    )
    server.run()
