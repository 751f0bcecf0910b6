"""The fields of a CronJob and a RayJob that infra/ uses, each with its type, and the rules between them.

By the documentation of batch/v1 and of KubeRay. A field that is not here is refused: a misspelled one is lost without a word
where nobody validates.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Whole = Annotated[int, Field(strict=True, ge=0)]
Schedule = Annotated[str, StringConstraints(pattern=r"^\S+( \S+){4}$")]


class Strict(BaseModel):
    """No other field, and no other type."""

    model_config = ConfigDict(extra="forbid")


class OnExitCodes(Strict):
    """Which exit codes of which container."""

    containerName: str | None = None
    operator: Literal["In", "NotIn"]
    values: Annotated[list[Whole], Field(min_length=1, max_length=255)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        assert self.values == sorted(set(self.values)), "in order, each once"
        assert self.operator == "NotIn" or 0 not in self.values, "0 is no failure"
        return self


class OnPodCondition(Strict):
    """A condition of a pod; that it holds is the default."""

    type: Literal["DisruptionTarget", "ConfigIssue"]
    status: Literal["True", "False", "Unknown"] = "True"


class Rule(Strict):
    """What a failure of a pod means. One of the two requirements, never both."""

    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: OnExitCodes | None = None
    onPodConditions: Annotated[list[OnPodCondition], Field(max_length=20)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        assert (self.onExitCodes is None) != (self.onPodConditions is None), "one requirement"
        return self


class Policy(Strict):
    """Rules, of which the first that fits counts."""

    rules: Annotated[list[Rule], Field(max_length=20)]


class Container(BaseModel):
    """What rules refer to; the rest is tests/test_infra.py's."""

    name: str
    image: str
    command: list[str]


class Pod(BaseModel):
    """A pod of a job may not be restarted in its place."""

    restartPolicy: Literal["Never", "OnFailure"]
    containers: Annotated[list[Container], Field(min_length=1)]


class Template(Strict):
    """The pod of a job."""

    metadata: dict[str, Any] = {}
    spec: Pod


class Job(Strict):
    """batch/v1 Job."""

    backoffLimit: Whole = 6
    activeDeadlineSeconds: Whole | None = None
    ttlSecondsAfterFinished: Whole | None = None
    podFailurePolicy: Policy | None = None
    template: Template

    @model_validator(mode="after")
    def _refers(self) -> Self:
        if self.podFailurePolicy:
            assert self.template.spec.restartPolicy == "Never", "needed for podFailurePolicy"
            named = {rule.onExitCodes.containerName for rule in self.podFailurePolicy.rules if rule.onExitCodes}
            assert named <= {None, *(container.name for container in self.template.spec.containers)}
        return self

    def goes_on(self, code: int | None, disrupted: bool = False) -> bool:
        """Whether another pod is started after a first one that ended so: with an exit code, or lost with its node."""
        for rule in self.podFailurePolicy.rules if self.podFailurePolicy else []:
            if rule.onExitCodes:
                fits = code is not None and (code in rule.onExitCodes.values) == (rule.onExitCodes.operator == "In")
            else:
                fits = disrupted
            if fits and rule.action != "Count":
                return rule.action == "Ignore"
        return self.backoffLimit > 0


class JobTemplate(Strict):
    """The job of each schedule."""

    metadata: dict[str, Any] = {}
    spec: Job


class CronJob(Strict):
    """The `spec` of a batch/v1 CronJob."""

    schedule: Schedule
    timeZone: Literal["Etc/UTC"]
    concurrencyPolicy: Literal["Allow", "Forbid", "Replace"] = "Allow"
    startingDeadlineSeconds: Whole | None = None
    suspend: bool = False
    successfulJobsHistoryLimit: Whole = 3
    failedJobsHistoryLimit: Whole = 1
    jobTemplate: JobTemplate


class RayJob(Strict):
    """The `spec` of a ray.io/v1 RayJob."""

    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"] = "K8sJobMode"
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Whole = 0
    activeDeadlineSeconds: Whole | None = None
    backoffLimit: Whole = 0
    rayClusterSpec: dict[str, Any]
