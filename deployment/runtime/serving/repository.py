"""The models of a server: what is served, what lies in its folder, and how they come and go beside running requests."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ...bundle.files import BundleError, check_name
from ...bundle.loading import load_bundle
from ...bundle.manifest import Manifest, read_manifest
from ...bundle.versions import is_version, versions_of
from ...checks import is_whole
from ...naming import did_you_mean, listed
from ..wire.protocol import USUAL_MESSAGE_BYTES
from ..wire.signatures import Signature
from ..wire.status import ServingError, invalid
from ..wire.tensors import MOST_SAMPLES
from .models import Served, models_of

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Listed:
    """One line of the index.

    Args:
        name: A model's name, or a bundle's that is not loaded.
        version: Its version.
        ready: Whether it is served.
        reason: Why not.
    """

    name: str
    version: int
    ready: bool
    reason: str = ""


class Repository:
    """Models by name and version.

    Args:
        placement: The placement that is served; ``None``: of each bundle the last on its route.
        folder: The one folder below which bundles may be loaded by name; ``None``: none may.
        device: Where partitions run.
        samples: Most samples of a request.

    Raises:
        ValueError: ``folder`` is none, or ``samples`` is out of range.
    """

    def __init__(
        self,
        placement: str | None = None,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        samples: int = 8,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"repository={folder} is no folder; name the one whose bundles may be loaded")
        if not is_whole(samples) or not 1 <= samples <= MOST_SAMPLES:
            raise ValueError(f"samples must be a whole number from 1 to {MOST_SAMPLES}, got {samples!r}")
        self.placement, self.device, self.samples = placement, device, samples
        self.message_bytes: int | None = None
        # Replaced, never changed: who looks something up needs no lock.
        self._models: dict[str, dict[int, Served]] = {}
        self._bundles: dict[str, list[Served]] = {}
        self._loading = threading.Lock()

    def add(self, folder: str | Path) -> list[Served]:
        """Load the bundle in a folder that the server's owner names, all versions of it.

        Raises:
            BundleError: It is none, is damaged, lacks the placement, or fails its own test, or one of its name and
                version is served already; nothing has changed then.
        """
        with self._loading:
            name, versions = versions_of(Path(folder))
            known = self._bundles.get(name, [])
            for version, each in versions.items():
                if other := next((model for model in known if model.version == version), None):
                    raise BundleError(
                        f"{each} and {other.bundle.directory} are both version {version} of {name}; give one of them "
                        "another folder's name, or put both into one folder, as versions: its folders 1 and 2"
                    )
            found = self._all_loaded(name, versions)
            self._serve(name, [*known, *found])
        return found

    def _all_loaded(self, name: str, versions: Mapping[int, Path]) -> list[Served]:
        found = [model for version, each in versions.items() for model in self._loaded(name, version, each)]
        most = max(each.most_bytes() for each in found)
        if self.message_bytes is not None and most > self.message_bytes:
            raise BundleError(
                f"{name} needs messages of {most} bytes, but this server was started for {self.message_bytes}; "
                f"start it with message_bytes={most}"
            )
        return found

    def _serve(self, name: str, models: list[Served]) -> None:
        """Serve models as the bundle of a name, in place of those that there are."""
        self._bundles = {**self._bundles, name: models}
        self._models = _by_name(self._bundles)
        for each in models:
            _LOG.info("serving %s, version %d, of %s", each.name, each.version, each.digest[:12])

    def _loaded(self, name: str, version: int, folder: Path) -> list[Served]:
        manifest = read_manifest(folder)
        placement = self._placement(manifest)
        bundle = load_bundle(folder, self.device, placement)
        return models_of(bundle, name, version, placement, self.samples)

    def _placement(self, manifest: Manifest) -> str:
        placement = manifest.route.placements[-1] if self.placement is None else self.placement
        manifest.at(placement)  # refuses one that the bundle lacks
        return placement

    def load(self, name: str) -> None:
        """Load, or load again, the bundle of a name that came from a client.

        Raises:
            ServingError: There is no such bundle below the folder, or it cannot be served.
        """
        folder = self._found(name)
        try:
            with self._loading:
                name, versions = versions_of(folder)
                self._serve(name, self._all_loaded(name, versions))
        except (ValueError, OSError) as error:
            raise ServingError("FAILED_PRECONDITION", f"{name} cannot be served: {error}") from error

    def _found(self, name: str) -> Path:
        """Return where the bundle of a model lies; a name, never a path."""
        self._check_asked(name)
        known = self._on_disk()
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            bundle = ".".join(parts[:count])
            if bundle in known:
                return known[bundle]
        near = did_you_mean(name, known)
        raise ServingError("NOT_FOUND", f"the repository has no bundle {name!r:.200}; it has {listed(known)}.{near}")

    def _check_asked(self, name: str) -> None:
        """Refuse what a client may not ask for."""
        if self.folder is None:
            raise ServingError(
                "FAILED_PRECONDITION", "nothing comes or goes: the server was started without a repository"
            )
        try:
            check_name(name, "the model")
        except BundleError as error:
            raise invalid(str(error)) from error

    def _on_disk(self) -> dict[str, Path]:
        """Return the folders of bundles in the repository by name; links lead elsewhere, so they do not count."""
        found: dict[str, Path] = {}
        for each in sorted(self.folder.iterdir()) if self.folder is not None and self.folder.is_dir() else ():
            if each.is_symlink() or not each.is_dir():
                continue
            try:
                found[versions_of(each)[0]] = each
            except BundleError:
                continue
        return found

    def unload(self, name: str) -> None:
        """Serve a bundle no longer; requests that have begun end as they would have.

        Raises:
            ServingError: It is not served, or the server has no repository.
        """
        self._check_asked(name)
        with self._loading:
            models = self._models.get(name)
            held = [key for key, each in self._bundles.items() if key == name or (models and _any_of(models, each))]
            if not held:
                raise self._unknown(name)
            self._bundles = {key: each for key, each in self._bundles.items() if key not in held}
            self._models = _by_name(self._bundles)
        _LOG.info("unloaded %s", held[0])

    def get(self, name: str, version: str = "") -> Served:
        """Return a model; its newest version where none is named.

        Raises:
            ServingError: There is none.
        """
        versions = self._models.get(name)
        if versions is None:
            raise self._unknown(name)
        if not version:
            return versions[max(versions)]
        if not is_version(version) or int(version) not in versions:
            known = ", ".join(map(str, sorted(versions)))
            raise ServingError("NOT_FOUND", f"{name} has no version {version!r:.40}; it has {known}")
        return versions[int(version)]

    def versions(self, name: str) -> list[int]:
        """Return the versions of a model that are served."""
        return sorted(self._models.get(name, ()))

    @property
    def served(self) -> list[Served]:
        """All models that are served."""
        return [model for versions in self._models.values() for model in versions.values()]

    def _unknown(self, name: str) -> ServingError:
        near = did_you_mean(name, self._models)
        known = listed(self._models) or "nothing"
        return ServingError("NOT_FOUND", f"there is no model {name!r:.200}; served is {known}.{near}")

    def index(self, ready: bool = False) -> list[Listed]:
        """Return all models that are served, and, unless ``ready``, the bundles of the repository that are not."""
        found = [Listed(model.name, model.version, True) for model in self.served]
        if not ready:
            absent = {name: folder for name, folder in self._on_disk().items() if name not in self._bundles}
            every = [(name, version) for name, folder in absent.items() for version in versions_of(folder)[1]]
            found += [Listed(name, version, False, "not loaded") for name, version in every]
        return found

    def needed_bytes(self) -> int:
        """Most bytes of a message to or from what is served, or lies in the repository: what gRPC must let through."""
        found = [model.most_bytes() for model in self.served]
        for folder in self._on_disk().values():
            for each in versions_of(folder)[1].values():
                try:
                    manifest = read_manifest(each)
                    signature = Signature(manifest, self._placement(manifest))
                except (ValueError, OSError):
                    continue  # it is refused when it is loaded
                found.append(signature.most_bytes(self.samples))
        return max([USUAL_MESSAGE_BYTES, *found])


def _by_name(bundles: dict[str, list[Served]]) -> dict[str, dict[int, Served]]:
    found: dict[str, dict[int, Served]] = {}
    for models in bundles.values():
        for model in models:
            found.setdefault(model.name, {})[model.version] = model
    return found


def _any_of(models: dict[int, Served], held: Sequence[Served]) -> bool:
    return any(model in held for model in models.values())
