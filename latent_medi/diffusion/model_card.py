"""The model card in a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latent_medi.metadata.schema import Field

if TYPE_CHECKING:
    from latent_medi.diffusion.pipeline import MediPipeline

_LISTED = 12  # values of a vocabulary that the card lists


def model_card(pipeline: MediPipeline, name: str) -> str:
    """The model card: Markdown with the hub's header, the fields, an example call, the training, and the limits."""
    schema, objective = pipeline.schema, pipeline.objective
    examples = {f.name: f.values[0] for f in schema.fields if f.values}
    asked = ", ".join(
        [f"{'class_' if schema.field(n).kind == 'class' else n}={v!r}" for n, v in examples.items() if n.isidentifier()]
        + ["num_images=4"]
    )
    patterns = "no condition dropout (unconditional)"
    if pipeline.conditioning is not None:
        p = pipeline.conditioning.patterns
        patterns = (
            f"keep all {p.keep_all:g}, all null {p.all_null:g}, metadata null {p.metadata_null:g}, "
            f"independent {p.independent:g} (each field dropped with probability {p.independent_rate:g})"
        )
    parameters = sum(p.numel() for p in pipeline.unet.parameters()) / 1e6
    known = f"conditioned on {', '.join(schema.names)}" if schema.names else "unconditional"
    schedule = objective.schedule + (", rescaled to zero terminal SNR" if objective.zero_terminal_snr else "")
    facts = "\n".join(f"| {key} | {value} |" for key, value in pipeline.provenance.items() if key != "seen")
    shown = sum(len(part["rows"]) for part in (pipeline.provenance.get("seen") or {}).get("parts", []))
    facts += f"\n| training combinations | {shown}, listed in provenance.json |" if shown else ""
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [histopathology, latent-diffusion, metadata, synthetic-data, latent-medi]
---

# {name}

A latent diffusion model of {pipeline.patch_size} × {pipeline.patch_size} px histopathology patches, {known}.

```python
from latent_medi.diffusion.pipeline import MediPipeline

pipe = MediPipeline.from_pretrained("{name}")
images = pipe({asked}).images
```

## What it knows

{_fields(schema.fields)}

`unknown` stands for data that are missing. A value outside these lists is an error.

## How it was trained

| | |
|---|---|
| network | {parameters:.1f} M parameters, latents {" × ".join(str(n) for n in pipeline.latent_shape)} |
| prediction | {objective.prediction} |
| noise schedule | {schedule} |
| loss | {objective.loss}, weighting {objective.weighting}, γ = {objective.gamma:g} |
| condition dropout | {patterns} |
| autoencoder | {pipeline.autoencoder.kind}, SHA-256 {pipeline.autoencoder.hash[:16]} |
{facts}

## Limits

For research on data sets and classifiers only. The images show no patient and prove nothing about one; they must never
be used for diagnosis, nor counted as real data in validation or testing. Combinations the model never saw are
extrapolation: check them on real held-out patients.
"""


def _fields(fields: tuple[Field, ...]) -> str:
    if not fields:
        return "Nothing: it is unconditional."
    lines = ["| field | kind | values |", "|---|---|---|"]
    for f in fields:
        if f.continuous:
            values = f"a number ({f.unit or 'no unit'}); mean {f.mean:.4g}, standard deviation {f.std:.4g}"
        else:
            more = f" … ({len(f.values)} in all)" if len(f.values) > _LISTED else ""
            values = ", ".join(f.values[:_LISTED]) + more
        lines.append(f"| {f.name} | {f.kind} | {values} |")
    return "\n".join(lines)
