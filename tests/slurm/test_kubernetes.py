"""The settings in launch/kubernetes.yaml on which saving at an eviction depends."""

import pytest

from tests import jobs

yaml = pytest.importorskip("yaml")  # tokenizers brings it along


def test_the_manifest_saves_what_an_evicted_pod_has_learned() -> None:
    job = yaml.safe_load((jobs.PROJECT / "launch" / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    # torchrun's restarts would hide the end of a pod from Kubernetes; SIGUSR1 alone would kill it.
    assert {"--max-restarts=0", jobs.SIGNALS, "distgpt.train"} <= set(trainer["args"])
    [patch] = job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    [shutdown] = trainer["env"]
    assert shutdown["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    assert int(shutdown["value"]) < pod["terminationGracePeriodSeconds"]
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    roots = [mount["mountPath"] for mount in container["volumeMounts"]]
    for flag in ("--data.path=", "--run.dir="):
        [path] = [arg.removeprefix(flag) for arg in trainer["args"] if arg.startswith(flag)]
        assert any(path.startswith(f"{root}/") for root in roots)
