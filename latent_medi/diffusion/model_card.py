"""The model card in a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from keyword import iskeyword
from typing import TYPE_CHECKING

from latent_medi.diffusion.pipeline_arguments import arguments_of
from latent_medi.metadata.schema import Field, Schema

if TYPE_CHECKING:
    from latent_medi.diffusion.pipeline import MediPipeline

_LISTED = 12  # values of a vocabulary that the card lists


def model_card(pipeline: MediPipeline, name: str) -> str:
    """The model card: Markdown with the hub's header, the fields, an example call, the training, and the limits."""
    schema, objective = pipeline.schema, pipeline.objective
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
library_name: latent-medi
pipeline_tag: unconditional-image-generation
tags: [histopathology, latent-diffusion, diffusers, metadata, synthetic-data]
---

# {name}

A latent diffusion model of {pipeline.patch_size} × {pipeline.patch_size} px histopathology patches, {known}.

```python
from latent_medi import MediPipeline

pipe = MediPipeline.from_pretrained("{name}")
images = pipe({_asked(schema, arguments_of(type(pipeline).__call__))}).images
```

`DiffusionPipeline.from_pretrained` does not read it: code in a folder is never run.

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


def _asked(schema: Schema, arguments: Sequence[str]) -> str:
    """Arguments of an example call, a value for every field."""
    given = {f.name: f.values[0] if f.values else round(f.mean, 1) for f in schema.fields}
    known = schema.class_field
    names = {n: "class_" if known is not None and n == known.name else n for n in given}
    if any(not n.isidentifier() or iskeyword(n) for n in names.values()) or set(given) & set(arguments):
        return f"conditions={given}, num_images=4"
    return ", ".join([f"{names[n]}={value!r}" for n, value in given.items()] + ["num_images=4"])


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
