"""The base of a pipeline, as in diffusers: components can be set, listed and shared, and all is saved and published."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, write_text
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.model_card import model_card
from latent_medi.diffusion.model_folder import complete_model
from latent_medi.diffusion.objective import make_scheduler, settings_of
from latent_medi.diffusion.pipeline_arguments import dtype_of, loading_options
from latent_medi.diffusion.samplers import sampler_name
from latent_medi.diffusion.settings import SamplerSettings


class PipelineBase(DiffusionPipeline):
    """A diffusers pipeline of a denoiser and its adapters."""

    _adapters: list[tuple[str, float]]
    _base_hash: str
    _carries_autoencoder: bool
    scheduler: Any

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a component, such as ``pipe.unet = torch.compile(pipe.unet)``.

        Raises:
            UserError: It is a scheduler that is none of the samplers, or a network under stacked adapters.
        """
        made = "denoiser" in self.__dict__
        if name == "scheduler":
            sampler_name(value, settings_of(getattr(self.scheduler if made else value, "config", {})))
        if made and name in ("unet", "conditioning"):
            if self._adapters:
                raise UserError(f"{name} cannot be set under stacked adapters.", "Call merge_adapters() first.")
            parts = {"unet": self.unet, "conditioning": self.conditioning, name: value}
            super().__setattr__("denoiser", Denoiser(parts["unet"], parts["conditioning"]).eval())
        super().__setattr__(name, value)

    @property
    def default_sampler(self) -> SamplerSettings:
        """What samples unless a call names another: the sampler that ``scheduler`` is."""
        return SamplerSettings(sampler_name(self.scheduler, settings_of(self.scheduler.config)))  # type: ignore[arg-type]

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of another pipeline of the same model: ``MediPipeline(**pipe.components)``."""
        names = ("unet", "scheduler", "conditioning", "autoencoder", "shift", "scale", "objective", "provenance")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Another pipeline of the same weights, stacked adapters included.

        Args:
            pipeline: A pipeline of this class.
            kwargs: ``torch_dtype`` and ``scheduler``, as for :meth:`from_pretrained`.

        Raises:
            UserError: It is a pipeline of another class, or an argument is not supported.
        """
        if not isinstance(pipeline, PipelineBase):
            raise UserError(f"A {type(pipeline).__name__} is no MediPipeline.", "Use MediPipeline.from_pretrained.")
        scheduler, *wanted = [kwargs.pop(name, None) for name in ("scheduler", "torch_dtype", "dtype")]
        loading_options("", kwargs)
        made = cls(**pipeline.components)
        made._adapters, made._base_hash = list(pipeline._adapters), pipeline._base_hash
        made._carries_autoencoder = pipeline._carries_autoencoder
        if scheduler is not None:
            made.scheduler = scheduler
        return made.to(dtype_of(wanted[0] or wanted[1])) if any(wanted) else made

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        include_autoencoder: bool | None = None,
        push_to_hub: bool = False,
        repo_id: str = "",
        **kwargs: Any,
    ) -> None:
        """Write the model folder, at once or not at all; safetensors and JSON only.

        Args:
            save_directory: The folder; an older model there is replaced.
            include_autoencoder: Whether to store the autoencoder's weights with it; unset: if it was read from a model
                folder, or from a folder of this machine, which other machines do not have.
            push_to_hub: Whether to publish it, too.
            repo_id: Where; unset: by the folder's name.
            kwargs: Further arguments of :meth:`push_to_hub`.

        Raises:
            UserError: The folder holds something that is not a model, or adapters are stacked on the model.
        """
        folder = Path(save_directory)
        if self._adapters:
            raise UserError(
                "A model with stacked adapters cannot be saved; the adapters have folders of their own.",
                "Call merge_adapters() first.",
            )
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
            raise UserError(f"{folder} is not empty and holds no model.", "Choose another folder.")
        if kwargs.pop("safe_serialization", True) is not True or kwargs.pop("variant", None) is not None:
            raise UserError("A model is written as safetensors, in one variant.", "Leave out those arguments.")
        if kwargs and not push_to_hub:
            raise UserError(f"save_pretrained takes no {', '.join(kwargs)} without push_to_hub=True.")
        inside = self._carries_autoencoder or Path(self.autoencoder.source).is_dir()
        inside = inside if include_autoencoder is None else include_autoencoder
        sampler = self.scheduler
        with atomic_path(folder) as temporary:
            # A sampler belongs to a pipeline, not to a model: the folder has the noise schedule of the training.
            self.scheduler = make_scheduler(settings_of(sampler.config))
            try:
                super().save_pretrained(str(temporary), safe_serialization=True)
            finally:
                self.scheduler = sampler
            complete_model(temporary, self, model_card(self, folder.name), inside)  # type: ignore[arg-type]
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, include_autoencoder, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        include_autoencoder: bool | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Publish the model folder with its card; the URL of the commit.

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            include_autoencoder: As for ``save_pretrained``.
            commit_message: Text of the commit.
            private: Whether a new repository is private.
            token: Access token; unset: that of ``hf auth login``.
            create_pr: Whether to open a pull request instead of changing the repository.

        Raises:
            UserError: Adapters are stacked on the model.
        """
        from huggingface_hub import create_repo, upload_folder

        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, include_autoencoder)
            repo_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
            write_text(folder / "README.md", model_card(self, repo_id))  # type: ignore[arg-type]
            return upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload a model of latent-medi",
                token=token,
                create_pr=create_pr,
            )
