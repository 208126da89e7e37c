"""`python precompute_driver.py FOLDER OUT`: makes trees as `mis precompute` does, and notes each photo it computes.

A line of OUT.computed is: the node, the process, the image id. The worker that comes to the photo which OUT.hung names
stops for ever, and leaves its process id there. With --steps photos go through the object store as they
do on a cluster with GPUs, the features computed on a CPU.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import ray

from mis_platform.config import DataConfig, FeaturesConfig, Resources
from mis_platform.data.benchmarks import open_dataset
from mis_platform.leases import hold
from mis_platform.stages import precompute
from mis_platform.stopping import Signals
from mis_platform.storage import Storage


class Noting(precompute.ChunkWorker):
    def decoded(self, photo: precompute.Photo) -> precompute.Decoded:
        note = f"{ray.get_runtime_context().get_node_id()} {os.getpid()} {photo.image_id}\n"
        with open(f"{self.out.uri}.computed", "a") as file:
            file.write(note)
        scar = Path(f"{self.out.uri}.hung")
        if scar.exists() and scar.read_text() == photo.image_id:
            scar.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().decoded(photo)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("out", type=Storage)
    parser.add_argument("--chunk", type=int, default=1)
    parser.add_argument("--extractors", type=int)
    parser.add_argument("--stall", type=float, default=precompute.STALL_SECONDS, help="seconds")
    parser.add_argument("--steps", action="store_true")
    options = parser.parse_args()
    precompute.ChunkWorker = Noting
    precompute.STALL_SECONDS = options.stall
    if options.steps:

        def through_the_object_store(
            chunks: Any, features: FeaturesConfig, data: DataConfig, out: Storage, pool: Any, *product: Any
        ) -> Any:
            return precompute.in_steps(chunks, features, data, out, options.chunk, pool, "cpu", None, *product)

        precompute.in_whole_chunks = through_the_object_store
    resources = Resources(chunk_images=options.chunk, extractors=options.extractors)
    dataset, features = open_dataset(f"folder:{options.folder}"), FeaturesConfig(extractor="color_texture")
    with hold(options.out) as out:
        output = precompute.precompute(dataset, features, DataConfig(), resources, out)
    print(f"digest {output.digest}", flush=True)


if __name__ == "__main__":
    with Signals(130, lambda _: 6):
        main()
