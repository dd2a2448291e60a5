"""The JobSets of gke.sh: their parts fit each other, and Kubernetes knows every field."""

import os
import re
import subprocess

import jsonschema
import pytest
import yaml
from helpers.paths import ROOT

TPU = {"ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "4x8", "MAX_RESTARTS": "7"}
GPU = {"ACCELERATOR": "nvidia-h100-80gb", "HOSTS": "3", "PER_HOST": "8"}
ARGUMENTS = ["--config=spoken_scenes", '--config.data.name=a "b" $(HOME): {c}']


@pytest.fixture(params=[TPU, GPU], ids=["tpu", "gpu"])
def jobset(request):
    environment = {"PATH": os.environ["PATH"], "NAME": "scenes", "IMAGE": "registry/c2f:1"}
    done = subprocess.run(
        ["bash", "launch/gke.sh", "train", *ARGUMENTS],
        cwd=ROOT,
        env={**environment, **request.param, "DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *manifest, last = done.stdout.splitlines()
    assert first.startswith("kubectl apply") and last == "EOF"
    return yaml.safe_load("\n".join(manifest))


def parts(jobset):
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return hosts, job, pod, container


def test_one_pod_is_one_host(jobset):
    _, job, pod, container = parts(jobset)
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    (devices,) = container["resources"]["limits"].items()
    assert container["resources"]["requests"] == dict([devices])
    if "gke-tpu-topology" in str(pod["nodeSelector"]):
        assert devices == ("google.com/tpu", 4) and job["parallelism"] == 8
        assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    else:
        assert devices == ("nvidia.com/gpu", 8) and job["parallelism"] == 3
        assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100


def test_arguments_reach_c2f_as_given(jobset):
    _, _, _, container = parts(jobset)
    assert container["args"][0] == "train"
    # Kubernetes makes one dollar of two; one alone would name a variable.
    given = [word.replace("$$(", "$(") for word in container["args"][-2:]]
    assert given == ARGUMENTS and "$$(HOME)" in container["args"][-1]


def test_processes_find_each_other(jobset):
    hosts, job, _, container = parts(jobset)
    arguments = container["args"]
    if "--distributed" in arguments:  # the cluster names the hosts of a slice
        return
    name = jobset["metadata"]["name"]
    pod = f"{name}-{hosts['name']}-0-0.{name}"  # first pod of the first job, in the JobSet's domain
    (port,) = container["ports"]
    assert f"--coordinator={pod}:{port['containerPort']}" in arguments
    assert f"--num-processes={job['parallelism']}" in arguments
    (variable,) = container["env"]
    assert f"--process-id=$({variable['name']})" in arguments
    assert "job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]


def test_a_mistake_ends_the_jobset_and_a_crash_restarts_it(jobset):
    _, job, pod, _ = parts(jobset)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0


def test_kubernetes_knows_every_field_of_the_job(jobset):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    hosts, *_ = parts(jobset)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "scenes-hosts-0"}}
    kubernetes_validate.validate(job | hosts["template"], "1.33", strict=True)
    hosts["template"]["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job | hosts["template"], "1.33", strict=True)


def closed(schema):
    """The schema without room for unknown fields, which the API server drops or refuses."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        if (
            schema.get("type") == "object"
            and isinstance(schema.get("properties"), dict)
            and not schema.get("x-kubernetes-preserve-unknown-fields")
        ):
            schema.setdefault("additionalProperties", False)
        if schema.pop("x-kubernetes-int-or-string", False):
            schema = {"type": ["integer", "string"]}
        return schema
    return [closed(value) for value in schema] if isinstance(schema, list) else schema


@pytest.mark.slow
def test_jobset_knows_every_field(jobset):
    """JOBSET_CRD names config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of JobSet."""
    if "JOBSET_CRD" not in os.environ:
        pytest.skip("JOBSET_CRD is not set: the file that defines JobSet")
    with open(os.environ["JOBSET_CRD"]) as file:
        definition = yaml.safe_load(file)
    versions = {version["name"]: version for version in definition["spec"]["versions"]}
    version = versions[jobset["apiVersion"].split("/")[1]]["schema"]["openAPIV3Schema"]
    schema = closed(version)
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(jobset, schema)
    names = [rule["name"] for rule in jobset["spec"]["failurePolicy"]["rules"]]
    assert all(re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name) for name in names)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(jobset, schema)
