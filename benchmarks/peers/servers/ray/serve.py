"""Ray Serve. One deployment with @serve.batch for the full model; for the cascade a composition: an ingress that
decodes, and a deployment for each stage, batched anew by @serve.batch in each replica."""

import os
import signal
import threading

import cascade
import numpy as np
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse

MANY = 100_000  # requests that a replica may have: the batcher's queue is where they wait
COUNTS_ENV = {name: value for name, value in os.environ.items() if name.startswith("PEER_")}
ON = {"runtime_env": {"env_vars": {**COUNTS_ENV, "PYTHONPATH": os.environ["PYTHONPATH"]}}}
BATCHED = {"max_batch_size": cascade.BATCH, "batch_wait_timeout_s": cascade.WINDOW_MS / 1000}


@serve.deployment(num_replicas=cascade.WORKERS, max_ongoing_requests=MANY, ray_actor_options={"num_cpus": 0, **ON})
class Full:
    def __init__(self):
        self.stages = cascade.Stages()

    @serve.batch(**BATCHED)
    async def classify(self, files):
        return self.stages.run_files(files)

    async def __call__(self, request: Request):
        return _response(await self.classify(await request.body()))


@serve.deployment(num_replicas=cascade.WORKERS, max_ongoing_requests=MANY, ray_actor_options={"num_cpus": 0, **ON})
class Stage:
    def __init__(self, number):
        self.stage = cascade.Stage(number)

    @serve.batch(**BATCHED)
    async def run(self, rows):
        probabilities, confidence, state = self.stage.run({name: np.stack([r[name] for r in rows]) for name in rows[0]})
        return [
            (probabilities[row], confidence[row], {name: tensor[row] for name, tensor in state.items()})
            for row in range(len(rows))
        ]

    async def __call__(self, feeds):
        probabilities, confidence, state = await self.run(feeds)
        sure = confidence >= cascade.THRESHOLDS[self.stage.number - 1]
        return probabilities, confidence, {} if sure else state


@serve.deployment(max_ongoing_requests=MANY, ray_actor_options={"num_cpus": 0, **ON})
class Cascade:
    def __init__(self, *stages: DeploymentHandle):
        self.stages = stages

    async def __call__(self, request: Request):
        try:
            image = cascade.decode(await request.body())
        except ValueError as error:
            return _response(error)
        state = {}
        for exit_, stage in enumerate(self.stages, start=1):
            probabilities, confidence, state = await stage.remote({"image": image, **state})
            if not state:
                return _response(cascade.answer(probabilities, confidence, exit_))
        raise AssertionError("the last stage leaves no state")


def _response(answer):
    if isinstance(answer, ValueError):
        return JSONResponse({"error": str(answer)}, 422)
    return JSONResponse(answer)


def main():
    ray.init(
        num_cpus=cascade.WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=512 * 2**20,
        _temp_dir=os.environ["HOME"],
    )
    serve.start(http_options={"host": "127.0.0.1", "port": cascade.PORT, "request_timeout_s": cascade.TIMEOUT_S})
    if cascade.CASCADE:
        app = Cascade.bind(*[Stage.options(name=f"stage{n}").bind(n) for n in range(1, cascade.STAGES + 1)])
    else:
        app = Full.bind()
    serve.run(app, route_prefix="/")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print("ready", flush=True)
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
