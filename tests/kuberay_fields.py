"""Fields of KubeRay's custom resources that our files may use, as JSON schemas: a field that is misspelt is silently
dropped by a Kubernetes API server, and only its absence is noticed, much later.

From the CRD reference of KubeRay 1.7 (docs.ray.io, kuberay/references/api.html) and the Kubernetes API reference. Pods
are described as far as our files go; ``additionalProperties`` false makes anything else an error here.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def record(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items}


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGTPE]i?|k)?$"}
RESOURCES = record(
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
SECRET_KEY = record(("name", "key"), name=TEXT, key=TEXT, optional=FLAG)
VALUE_FROM = record(secretKeyRef=SECRET_KEY)
VARIABLE = {**record(("name",), name=TEXT, value=TEXT, valueFrom=VALUE_FROM), "minProperties": 2, "maxProperties": 2}
PORT = record(("containerPort",), containerPort={"type": "integer"}, name={"type": "string", "maxLength": 15})
CONTAINER = record(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    command=many(TEXT),
    args=many(TEXT),
    env=many(VARIABLE),
    ports=many(PORT),
    resources=RESOURCES,
    volumeMounts=many(record(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = {
    **record(("name",), name=TEXT, persistentVolumeClaim=record(("claimName",), claimName=TEXT), emptyDir=record()),
    "minProperties": 2,
}
POD = record(
    ("containers",),
    containers={**many(CONTAINER), "minItems": 1},
    volumes=many(VOLUME),
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    serviceAccountName=TEXT,
    nodeSelector=TEXTS,
    terminationGracePeriodSeconds=COUNT,
    tolerations=many(
        record(
            key=TEXT,
            operator={"enum": ["Exists", "Equal"]},
            value=TEXT,
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        )
    ),
    securityContext=record(runAsNonRoot=FLAG, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT),
)
METADATA = record(name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
POD_TEMPLATE = record(("spec",), metadata=METADATA, spec=POD)

CREDENTIAL = record(value=TEXT, valueFrom=VALUE_FROM)
AUTOSCALER = record(
    version={"enum": ["v1", "v2"]},
    idleTimeoutSeconds=COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    resources=RESOURCES,
    env=many(VARIABLE),
)
HEAD = record(
    ("template",),
    template=POD_TEMPLATE,
    rayStartParams=TEXTS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
)
WORKERS = record(
    ("groupName", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    template=POD_TEMPLATE,
    resources=TEXTS,
    labels=TEXTS,
)
CLUSTER = record(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    gcsFaultToleranceOptions=record(
        ("redisAddress",),
        redisAddress=TEXT,
        redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL,
        externalStorageNamespace=TEXT,
    ),
    headGroupSpec=HEAD,
    workerGroupSpecs=many(WORKERS),
    headServiceAnnotations=TEXTS,
    suspend=FLAG,
)
JOB = record(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=POD_TEMPLATE,
    jobId=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    metadata=TEXTS,
    suspend=FLAG,
    rayClusterSpec=CLUSTER,
)
SERVICE = record(
    ("rayClusterConfig",),
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    upgradeStrategy=record(type={"enum": ["NewCluster", "None", "NewClusterWithIncrementalUpgrade"]}),
    excludeHeadPodFromServeSvc=FLAG,
)


def resource(version: str, kind: str, **properties: Schema) -> Schema:
    return record(
        ("apiVersion", "kind", "metadata"), apiVersion={"const": version}, kind={"const": kind}, metadata=METADATA,
        **properties,
    )  # fmt: skip


SCHEMAS: dict[str, Schema] = {
    "RayJob": resource("ray.io/v1", "RayJob", spec=JOB),
    "RayService": resource("ray.io/v1", "RayService", spec=SERVICE),
    "PersistentVolumeClaim": resource(
        "v1",
        "PersistentVolumeClaim",
        spec=record(
            ("accessModes", "resources"),
            accessModes=many({"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]}),
            resources=RESOURCES,
            storageClassName=TEXT,
        ),
    ),
    "Service": resource(
        "v1",
        "Service",
        spec=record(selector=TEXTS, ports=many(record(("port",), name=TEXT, port=COUNT)), type=TEXT),
    ),
    "Deployment": resource(
        "apps/v1",
        "Deployment",
        spec=record(
            ("selector", "template"),
            replicas=COUNT,
            strategy=record(type={"enum": ["Recreate", "RollingUpdate"]}),
            selector=record(matchLabels=TEXTS),
            template=POD_TEMPLATE,
        ),
    ),
}
