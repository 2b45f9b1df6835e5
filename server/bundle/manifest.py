"""The bundle: the folder that export writes and the server reads. Manifest, hashes, paths; nothing runs here.

    bundle.json     this module's `Manifest`
    stageN.onnx     one graph per stage, named and hashed in the manifest
    frontier.json   the calibration, see `server.bundle.frontier`
    profile.json    where it was measured: what batches take on one machine, see `server.bundle.profile`

The frontier carries its own hash and is not part of the version: calibration replaces that one file, in one atomic
step, without a new export. What ties it to its stages is its key: version, precision and preprocessing, and it must fit
exactly. So is the profile, whose identity also names the machine; one that was measured on another is read, and it is
for the server not to use it.

Every path in a manifest is resolved inside the bundle's folder, without `..` and without symbolic links. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.bundle.frontier import Criterion, Frontier
from server.bundle.profile import LatencyProfile
from server.documents import cause, parse_json, read_file, shown
from server.errors import BundleError

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
FRONTIER = "frontier.json"
PROFILE = "profile.json"
# Bytes, of files that are read whole: room for tens of thousands of labels, and for a hundred thousand records.
_MAX_MANIFEST, _MAX_FRONTIER, _MAX_PROFILE = 16 * 2**20, 64 * 2**20, 4 * 2**20
EMBEDDED = Path(__file__).resolve().parents[1] / "bundles" / "photo10"
"""The bundle that is served when none is named."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From a decoded photo to pixels: short side to `resize`, then the centre (H, W) of it."""

    resize: int
    crop: tuple[int, int]
    interpolation: Literal["bicubic"] = "bicubic"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


Side = Annotated[int, Field(gt=0)]


class TensorSpec(_Frozen):
    dtype: str
    shape: tuple[int | str, ...]  # a name stands for a size that varies, "B" for the batch


class StageSpec(_Frozen):
    """One stage: its file, its tensors, its token grid, and the cost of an image that leaves at its exit."""

    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    grid: tuple[Side, Side]
    gmacs: float = Field(gt=0, allow_inf_nan=False)  # cumulative: from the pixels to this exit

    @classmethod
    def of(
        cls,
        root: Path,
        file: str,
        *,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        grid: tuple[int, int],
        gmacs: float,
    ) -> StageSpec:
        """Describe a stage file that lies in `root`; its hash is taken here."""
        digest = _sha256(_resolve(root, file))
        return cls(file=file, sha256=digest, inputs=inputs, outputs=outputs, grid=grid, gmacs=gmacs)


class PreprocessingSpec(_Frozen):
    size: tuple[Side, Side]  # (H, W) of the model's input
    resize: Side
    crop: tuple[Side, Side]  # (H, W), equal to size
    interpolation: Literal["bicubic"]

    @property
    def plain(self) -> Preprocessing:
        return Preprocessing(self.resize, self.crop, self.interpolation)

    @model_validator(mode="after")
    def _crop_is_the_input(self) -> Self:
        if self.crop != self.size:
            raise ValueError(f"crop {list(self.crop)} differs from the model's input size {list(self.size)}")
        if self.resize < max(self.crop):
            raise ValueError(f"resize {self.resize} is smaller than the crop {list(self.crop)}")
        return self


class Manifest(_Frozen):
    """bundle.json."""

    format_version: Literal[1]
    name: str = Field(min_length=1)
    version: str = Field(pattern=r"^[0-9a-f]{12}$")
    labels: tuple[str, ...] = Field(min_length=1)
    preprocessing: PreprocessingSpec
    stages: tuple[StageSpec, ...] = Field(min_length=1)  # a single one is a model without early exits
    precision: str = "fp32"
    criterion: Criterion = "max_probability"  # what the graphs compute as `confidence`
    parity: Mapping[str, Any] = Field(default_factory=dict)  # the exported stages against the trained model
    provenance: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _stages_form_a_cascade(self) -> Self:
        for number, stage in enumerate(self.stages, start=1):
            if "image" not in stage.inputs:
                raise ValueError(f"stage {number} has no input `image`")
            if missing := {"logits", "probabilities", "confidence"} - stage.outputs.keys():
                raise ValueError(f"stage {number} has no output `{min(missing)}`")
            classes = stage.outputs["logits"].shape[-1:]
            if classes != (len(self.labels),):
                count = classes[0] if classes else "no"
                raise ValueError(f"stage {number} has {count} classes, but there are {len(self.labels)} labels")
            handed_on = self.stages[number - 2].outputs if number > 1 else {}
            state = stage.inputs.keys() - {"image"}
            if unmet := state - handed_on.keys():
                raise ValueError(f"stage {number} wants `{min(unmet)}`, which no stage before it leaves")
            if other := [name for name in state if stage.inputs[name].dtype != handed_on[name].dtype]:
                name = min(other)
                wanted, left = stage.inputs[name].dtype, handed_on[name].dtype
                raise ValueError(
                    f"stage {number} wants `{name}` as {shown(wanted)}, the stage before leaves {shown(left)}"
                )
        costs = self.stage_gmacs
        if any(later <= earlier for earlier, later in pairwise(costs)):
            raise ValueError(f"cumulative gmacs {list(costs)} do not rise from stage to stage")
        if self.version != _version(self.stages, self.preprocessing):
            raise ValueError("version does not follow from the stages' hashes and the preprocessing")
        return self

    @property
    def stage_gmacs(self) -> tuple[float, ...]:
        return tuple(stage.gmacs for stage in self.stages)

    @property
    def frontier_key(self) -> str:
        """What a frontier must have been calibrated for: another key, another frontier."""
        p = self.preprocessing
        return f"{self.version}/{self.precision}/resize{p.resize}-crop{p.crop[0]}x{p.crop[1]}-{p.interpolation}"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was checked. `solved` is None only where `load` was told that the frontier may be missing,
    `profile` also where none was measured."""

    path: Path
    manifest: Manifest
    solved: Frontier | None
    profile: LatencyProfile | None = None

    @classmethod
    def load(cls, path: Path | str, verify: bool = True, *, need_frontier: bool = True) -> Bundle:
        """Read and check a bundle. Raises BundleError, one line that names the file and the cause.

        `verify=False` skips the hashes (and only those). `need_frontier=False` is for calibrating and profiling, which
        make what follows from the stages: the frontier and the profile that may lie there are not read.
        """
        root = Path(path)
        if not os.path.isdir(root):  # Path.is_dir raises for what can be no path
            raise BundleError(f"{shown(str(root))[1:-1]}: no such folder")
        root = root.resolve()
        manifest = _read_manifest(root)
        for stage in manifest.stages:
            file = _resolve(root, stage.file)
            if verify and (digest := _sha256(file)) != stage.sha256:
                raise BundleError(f"{file}: sha256 is {digest[:12]}…, the manifest says {stage.sha256[:12]}…")
        if not need_frontier:
            return cls(root, manifest, None)
        return cls(root, manifest, _read_frontier(root, manifest), _read_profile(root, manifest))

    @property
    def frontier(self) -> Frontier:
        if self.solved is None:
            raise BundleError(f"{self.path / FRONTIER}: was not read; calibrate the bundle first (dvt calibrate)")
        return self.solved

    @property
    def preprocessing(self) -> Preprocessing:
        return self.manifest.preprocessing.plain

    def stage_path(self, stage: int) -> Path:
        """The file of a stage; stages count from 1."""
        return _resolve(self.path, self.manifest.stages[stage - 1].file)

    def write_frontier(self, frontier: Frontier) -> Bundle:
        """Put a new calibration in place of the old one, atomically; the bundle with it is returned."""
        _check_frontier(self.path / FRONTIER, frontier, self.manifest)
        _write_atomically(self.path / FRONTIER, frontier.to_json())
        return replace(self, solved=frontier)

    def write_profile(self, profile: LatencyProfile) -> Bundle:
        """Put a new profile in place of the one that may be there, atomically; the bundle with it is returned."""
        _check_profile(self.path / PROFILE, profile, self.manifest)
        _write_atomically(self.path / PROFILE, profile.to_json())
        return replace(self, profile=profile)


def write_manifest(
    root: Path,
    *,
    name: str,
    labels: Sequence[str],
    preprocessing: Preprocessing,
    stages: Sequence[StageSpec],
    precision: str = "fp32",
    criterion: Criterion = "max_probability",
    parity: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write bundle.json, last of a bundle's files and atomically: a folder with a manifest is a whole bundle.

    The version is a short sha256 over the stage files' hashes and the preprocessing, so that equal weights and equal
    pixels have equal versions, wherever and whenever they were exported. Raises BundleError where the parts do not fit.
    """
    try:
        how = PreprocessingSpec(
            size=preprocessing.crop,
            resize=preprocessing.resize,
            crop=preprocessing.crop,
            interpolation=preprocessing.interpolation,
        )
        manifest = Manifest(
            format_version=1,
            name=name,
            version=_version(stages, how),
            labels=tuple(labels),
            preprocessing=how,
            stages=tuple(stages),
            precision=precision,
            criterion=criterion,
            parity=dict(parity or {}),
            provenance=dict(provenance or {}),
        )
    except ValidationError as error:
        raise BundleError(f"{root / MANIFEST}: {_first_cause(error)}") from None
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    _write_atomically(root / MANIFEST, text + "\n")
    return manifest


def _version(stages: Sequence[StageSpec], preprocessing: PreprocessingSpec) -> str:
    parts = {"stages": [stage.sha256 for stage in stages], "preprocessing": preprocessing.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _read_manifest(root: Path) -> Manifest:
    file = _resolve(root, MANIFEST)
    try:
        document = parse_json(read_file(file, _MAX_MANIFEST))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: {cause(error)}") from None
    found = document.get("format_version") if isinstance(document, dict) else None
    if found != FORMAT_VERSION:  # first of all: the other fields of another format say nothing
        raise BundleError(f"{file}: format version {shown(found)}, this server reads {FORMAT_VERSION}")
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise BundleError(f"{file}: {_first_cause(error)}") from None


def _read_frontier(root: Path, manifest: Manifest) -> Frontier:
    if not os.path.lexists(root / FRONTIER):
        raise BundleError(f"{root / FRONTIER}: is missing; calibrate the bundle first (dvt calibrate)")
    file = _resolve(root, FRONTIER)
    try:
        frontier = Frontier.from_json(read_file(file, _MAX_FRONTIER))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: {cause(error)}") from None
    _check_frontier(file, frontier, manifest)
    return frontier


def _check_frontier(file: Path, frontier: Frontier, manifest: Manifest) -> None:
    if frontier.key != manifest.frontier_key:
        raise BundleError(f"{file}: calibrated for {shown(frontier.key)}, the bundle is {manifest.frontier_key!r}")
    if frontier.criterion != manifest.criterion:
        found = shown(frontier.criterion).strip("'")
        raise BundleError(f"{file}: its confidence is {found}, the bundle's is {manifest.criterion}")
    if frontier.stage_gmacs != manifest.stage_gmacs:
        raise BundleError(
            f"{file}: stage gmacs {shown(frontier.stage_gmacs)}, the manifest says {shown(manifest.stage_gmacs)}"
        )


def _read_profile(root: Path, manifest: Manifest) -> LatencyProfile | None:
    if not os.path.lexists(root / PROFILE):
        return None
    file = _resolve(root, PROFILE)
    try:
        profile = LatencyProfile.from_json(read_file(file, _MAX_PROFILE))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: {cause(error)}") from None
    _check_profile(file, profile, manifest)
    return profile


def _check_profile(file: Path, profile: LatencyProfile, manifest: Manifest) -> None:
    ours = profile.identity is not None and profile.identity.model == manifest.version
    if ours and len(profile.stages) != len(manifest.stages):
        raise BundleError(f"{file}: has {len(profile.stages)} stages, the manifest has {len(manifest.stages)}")


def _resolve(root: Path, name: str) -> Path:
    """The regular file `name` inside `root`. Raises BundleError for anything else, links included."""
    relative = PurePosixPath(name)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
        raise BundleError(f"{root / MANIFEST}: {shown(name)} is not a path inside the bundle")
    file = root
    for part in relative.parts:
        file = file / part
        try:
            mode = file.lstat().st_mode
        except OSError as error:
            raise BundleError(f"{file}: {cause(error)}") from None
        if stat.S_ISLNK(mode):
            raise BundleError(f"{file}: is a symbolic link")
    if not stat.S_ISREG(mode):
        raise BundleError(f"{file}: is not a regular file")
    return file


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{file}: {cause(error)}") from None


def _write_atomically(file: Path, text: str) -> None:
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a bundle is read by whoever serves it
        os.replace(temporary, file)
    except BaseException as error:
        if temporary is not None:
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise BundleError(f"{file}: {cause(error)}") from None
        raise


def _first_cause(error: ValidationError) -> str:
    cause = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(step) for step in cause["loc"])
    message = cause["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
