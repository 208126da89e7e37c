"""A local root on a cluster of several nodes: only where every node sees it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# The second node is a process tree of its own. "hidden" puts an empty disk over the root, for that node alone.
STORY = """
    import os, subprocess, sys, time
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster
    from mis_platform.stages.cluster import cluster
    from mis_platform.storage import Storage

    root, kind = sys.argv[1:]
    os.makedirs(root, exist_ok=True)
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = head.address
    join = f"exec ray start --address={head.address} --num-cpus=1 --block"
    hide = f"mount -t tmpfs none {root} && " if kind == "hidden" else ""
    node = subprocess.Popen(["unshare", "-m", "sh", "-c", hide + join], stdout=subprocess.DEVNULL)
    try:
        ray.init(address=head.address, logging_level="ERROR", log_to_driver=False)
        for _ in range(300):
            if len([each for each in ray.nodes() if each["Alive"]]) == 2:
                break
            time.sleep(0.1)
        try:
            with cluster(Storage(root)):
                print("passed", os.listdir(root))
        except ValueError as error:
            print("refused", error)
        with cluster(Storage("s3://bucket/x?region=us-east-1")):
            print("object stores need no look")
    finally:
        ray.shutdown()
        node.terminate()
        node.wait(timeout=20)
        head.shutdown()
    """


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("kind", ["same", "hidden"])
def test_a_root_that_a_node_cannot_see_is_refused(tmp_path: Path, kind: str) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a second view of the disk needs root and mount namespaces")
    root = tmp_path / "root"
    command = [sys.executable, "-c", textwrap.dedent(STORY), str(root), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    first, last = done.stdout.strip().splitlines()[-2:]
    assert last == "object stores need no look", done.stderr
    if kind == "same":
        assert first == "passed []"
    else:
        assert first.startswith(f"refused {root} is not the same directory on all 2 nodes of the cluster"), done.stderr
        assert "use --root s3://bucket/prefix" in first
    assert list(root.iterdir()) == []
