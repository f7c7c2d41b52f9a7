"""``explore``: a page for the browser of this machine, with the patches of a dataset and samples drawn on request."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from PIL import Image

from latent_medi.core import config
from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError, needs
from latent_medi.core.hub import is_hub_id
from latent_medi.core.progress import get_logger
from latent_medi.explore.settings import ExploreSettings
from latent_medi.metadata.estimability import Verdicts
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.metadata.splits import split_column
from latent_medi.shards.dataset import INFO_FILE, SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.codec import encode_image

if TYPE_CHECKING:
    from latent_medi.diffusion.pipeline import MediPipeline

log = get_logger(__name__)

PER_PAGE = 20
"""Patches of each dataset on one page."""
_LARGEST = 256  # pixels of a patch on the page; larger ones are shown smaller
_LOCAL = ("127.0.0.1", "localhost")
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
"""What the browser may ask: this server alone. Gradio's own page has scripts and styles in it."""


def explore(settings: ExploreSettings) -> dict[str, Any]:
    """Serve the page until Ctrl-C.

    Returns:
        ``address``: where it was.

    Raises:
        UserError: The folders cannot be used, the address is taken, or gradio is not installed.
    """
    collection, models = open_folders(settings)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    with needs("The page", "'latent-medi[web]'"):
        import gradio  # noqa: F401
    with _listen(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if settings.host not in _LOCAL:
            log.warning("Whoever can reach %s sees these patches.", address)
        print(f"{address} shows {collection.title}. Ctrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            _serve(collection, Generator(models), listener, settings.host)
    return {"address": address}


def open_folders(settings: ExploreSettings) -> tuple[Collection, dict[str, str]]:
    """The datasets of the settings, opened, and the model folders by name.

    Raises:
        UserError: A folder is absent, damaged or of another kind.
    """
    if not settings.data:
        raise UserError("No folder is given.", "latent-medi explore runs/demo")
    folder, synthetic, models = Path(settings.data), dict(settings.synthetic), dict[str, str]()
    if (folder / "settings.yaml").is_file() and (folder / "stages").is_dir():
        from latent_medi.experiment.models import data_folder
        from latent_medi.experiment.settings import ExperimentSettings

        file = folder / "settings.yaml"
        experiment = config.make(ExperimentSettings, config.load(ExperimentSettings, file), str(file))
        for name, entry in experiment.models.items():
            models[name] = entry.folder or str(folder / name / "model")
            synthetic.setdefault(name, str(folder / "synthetic" / name))
        # Those of models that are only started from, or of stages that are yet to come, are absent.
        models = {name: model for name, model in models.items() if _is_model(model)}
        synthetic = {n: s for n, s in synthetic.items() if n in settings.synthetic or (Path(s) / INFO_FILE).is_file()}
        folder = data_folder(replace(experiment, out=str(folder)))  # it may have been moved
    if settings.model:
        if not _is_model(settings.model) and not (is_hub_id(settings.model) and not Path(settings.model).exists()):
            raise UserError(f"{settings.model} is no model folder.", "Give the folder `model` of a finished run.")
        models[settings.model] = settings.model
    opened = {name: PatchDataset.open(path) for name, path in synthetic.items()}
    return Collection(PatchDataset.open(folder), opened, settings), models


def _is_model(folder: str) -> bool:
    return (Path(folder) / "model_index.json").is_file()


class Collection:
    """A dataset with its synthetic sets, as the page asks for them. Each index is read once, pixels by page.

    Args:
        data: The dataset.
        synthetic: Synthetic datasets by name.
        settings: What verdicts are about and rest on.

    Raises:
        UserError: An unknown field, split or part.
    """

    def __init__(self, data: PatchDataset, synthetic: Mapping[str, PatchDataset], settings: ExploreSettings) -> None:
        self.data, self.synthetic = data, dict(synthetic)
        self.categorical = [f for f in data.schema.fields if not f.continuous]
        self.continuous = [f for f in data.schema.fields if f.continuous]
        for name in settings.fields:
            if data.schema.field(name).continuous:
                raise UserError(f"Field {name!r} is continuous: combinations have class and categorical fields only.")
        self.fields = settings.fields or [f.name for f in self.categorical]
        real = data.index["origin"] == "real"
        self.rests_on = "all patches"
        if data.splits:
            column = split_column(data.index, settings.split)
            self.rests_on = f"{column.removeprefix(SPLIT_PREFIX)}: {settings.split_value}"
            data.rows({column: settings.split_value})  # refuses a part that there is not
            real &= data.index[column] == settings.split_value
        self._verdict_of = Verdicts(data.index[real], settings.thin_patients)
        self.rows = lru_cache(maxsize=16)(self._rows)

    @property
    def title(self) -> str:
        """Name and sizes."""
        named = "".join(f", {name} with {len(dataset)}" for name, dataset in self.synthetic.items())
        patients = self.data.index["patient"].nunique()
        return f"{self.data.name}: {counted(len(self.data), 'patch')} of {counted(patients, 'patient')}{named}"

    @property
    def parts(self) -> list[str]:
        """``SPLIT: PART`` of every part of every split."""
        index = self.data.index
        return [
            f"{name}: {part}"
            for name in self.data.splits
            for part in sorted({str(part) for part in index[SPLIT_PREFIX + name].unique()} - {""})
        ]

    def values(self, name: str) -> list[str]:
        """The values of a categorical field in any of the datasets."""
        datasets = [d for d in (self.data, *self.synthetic.values()) if name in d.schema.names]
        found = [value for dataset in datasets for value in dataset.schema.field(name).values]
        unknown = any((dataset.index[name] == UNKNOWN_WORD).any() for dataset in datasets)
        return [*dict.fromkeys(found), *([UNKNOWN_WORD] if unknown else [])]

    def _rows(self, name: str, chosen: tuple[tuple[str, str], ...], part: str) -> np.ndarray:
        """Row numbers of the patches with some values, int64, in an order that mixes patients; always the same.

        Args:
            name: A synthetic set; empty for the dataset itself.
            chosen: Field and value of each condition. A field that the dataset does not have is no condition.
            part: ``SPLIT: PART`` of the dataset; empty for all. Synthetic patches are in no part.
        """
        dataset = self.synthetic[name] if name else self.data
        where = {n: value for n, value in chosen if n in dataset.schema.names}
        if any(v != UNKNOWN_WORD and v not in dataset.schema.field(n).values for n, v in where.items()):
            return np.empty(0, dtype=np.int64)
        if part and not name:
            split, _, value = part.partition(": ")
            where[SPLIT_PREFIX + split] = value
        return np.random.default_rng(0).permutation(dataset.rows(where))

    def pages(self, name: str, chosen: tuple[tuple[str, str], ...], part: str) -> int:
        """How many pages the dataset and a synthetic set fill, at least 1."""
        most = max(len(self.rows(source, chosen, part)) for source in {"", name})
        return max(1, -(-most // PER_PAGE))

    def cards(self, name: str, chosen: tuple[tuple[str, str], ...], part: str, page: int) -> str:
        """HTML of one page of patches; see :meth:`_rows`."""
        dataset = self.synthetic[name] if name else self.data
        rows = self.rows(name, chosen, part)
        absent = [n for n, _ in chosen if n not in dataset.schema.names]
        return _CARDS.render(
            heading=f"{name or dataset.name}: {len(rows)} patch{'es' * (len(rows) != 1)}",
            note=f"It has no field {', '.join(absent)}: patches of any value." if absent else "",
            figures=[self._figure(dataset, int(row)) for row in rows[page * PER_PAGE : (page + 1) * PER_PAGE]],
        )

    def _figure(self, dataset: PatchDataset, row: int) -> dict[str, Any]:
        about = dataset.index.iloc[row]
        values = {n: str(about[n]) for n in self.fields if n in dataset.schema.names}
        figure = self.figure(values, f"{about['key']}, patient {about['patient']}", about["origin"] == "synthetic")
        try:
            return figure | {"uri": _uri(dataset.read([row])[0], about["origin"])}
        except UserError as error:  # the others of the page are not damaged
            return figure | {"problem": error.message}

    def figure(self, values: Mapping[str, str], text: str, synthetic: bool) -> dict[str, Any]:
        """A picture's entry of the template: its combination, its verdict and its origin."""
        found = self.verdict(values)
        verdict, reason = (found["verdict"], found["reason"]) if found else ("", "")
        caption = " × ".join(values.values())
        return {"caption": caption, "text": text, "synthetic": synthetic, "verdict": verdict, "reason": reason}

    def verdict(self, values: Mapping[str, str]) -> dict[str, Any] | None:
        """The audit's verdict on the known ones of some values; ``None`` if none is known, or there is nothing that it
        could rest on.

        Raises:
            UserError: The fields have too many values.
        """
        known = {f.name: values[f.name] for f in self.categorical if values.get(f.name, UNKNOWN_WORD) != UNKNOWN_WORD}
        return self._verdict_of(known) if known and len(self._verdict_of.index) else None

    def verdict_text(self, chosen: Mapping[str, str]) -> str:
        """HTML of the verdict on a choice."""
        found = self.verdict(chosen)
        units = ", ".join(f"{found[unit]} {unit}" for unit in ("patches", "slides", "patients")) if found else ""
        where = {"rests_on": self.rests_on, "empty": not len(self._verdict_of.index)}
        return _VERDICT.render(found=found, units=units, **where, note=self.data.patients_note)


class Generator:
    """Draws samples; the model that was used last stays loaded.

    Args:
        models: Model folders, or hub ids, by name.
    """

    def __init__(self, models: Mapping[str, str]) -> None:
        self.models = dict(models)
        self._load = lru_cache(maxsize=1)(self._loaded)

    def _loaded(self, name: str) -> MediPipeline:
        import torch

        from latent_medi.diffusion.pipeline import MediPipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return MediPipeline.from_pretrained(self.models[name], device=device)

    def draw(
        self, name: str, values: Mapping[str, Any], guidance: float, steps: int, seeds: Sequence[int]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Samples, and those of the values that the model is conditioned on.

        Args:
            name: The model.
            values: Value by field; the model is not conditioned on a field that is left out.
            guidance: Guidance scale of every field; 1 is the conditional model.
            steps: Steps of the sampler.
            seeds: One per sample.

        Returns:
            uint8 [n, H, W, 3], and value by field.

        Raises:
            UserError: The model cannot be read, does not know a value, or was not trained for the conditions.
        """
        pipeline = self._load(name)
        given = {n: value for n, value in values.items() if n in pipeline.schema.names}
        scale = None if guidance == 1 else float(guidance)
        made = pipeline(steps=steps, guidance=scale, seeds=list(seeds), conditions=given)
        return np.stack([np.asarray(image) for image in made.images]), given


def _uri(image: np.ndarray, origin: str, largest: int = _LARGEST) -> str:
    """A patch uint8 [H, W, 3] as a data URI of a PNG that says its origin."""
    if max(image.shape[:2]) > largest:
        small = Image.fromarray(image)
        small.thumbnail((largest, largest))
        image = np.asarray(small)
    return f"data:image/png;base64,{base64.b64encode(encode_image(image, 'png', origin)).decode()}"


# ---- the page

_CSS = """
.patches { display: grid; grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); gap: 8px; }
#generated .patches { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.patches figure { margin: 0; }
.picture { display: block; position: relative; line-height: 0; }
.picture img { width: 100%; aspect-ratio: 1; }
.synthetic img { outline: 3px solid #b5179e; outline-offset: -3px; }
.mark { position: absolute; left: 0; bottom: 0; background: #b5179e; color: #fff; font: 600 11px/16px sans-serif;
  padding: 0 5px; }
.patches figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
.verdict { border-radius: 3px; padding: 0 4px; background: #c62828; color: #fff; font-weight: 600;
  display: inline-block; }
.verdict[data-is="seen"] { background: #2e7d32; }
.verdict[data-is="thin"] { background: #ffc107; color: #222; }
.verdict[data-is="both margins seen"] { background: #1565c0; }
.problem { color: #c62828; white-space: pre-line; overflow-wrap: anywhere; }
.note { opacity: 0.75; font-size: 13px; margin: 0 0 6px; }
h2, h3 { margin: 4px 0; overflow-wrap: anywhere; }
"""
_JINJA = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)  # names of the data are text, no markup
_CARDS = _JINJA.from_string("""
<h3>{{ heading }}</h3>{% if note %}<p class="note">{{ note }}</p>{% endif %}
<div class="patches">{% for f in figures %}<figure class="{{ 'synthetic' if f.synthetic else 'real' }}">
{% if f.uri is defined %}<span class="picture"><img src="{{ f.uri }}" title="{{ f.text }}"
alt="{{ 'synthetic' if f.synthetic else 'real' }} patch {{ f.text }}">
{% if f.synthetic %}<span class="mark">synthetic</span>{% endif %}</span>
{% else %}<p class="problem">{{ f.problem }}</p>{% endif %}
<figcaption>{{ f.caption }}
{% if f.verdict %}
<span class="verdict" data-is="{{ f.verdict }}" title="{{ f.reason }}">{{ f.verdict }}</span>{% endif %}
{% if f.file is defined %}<br><a href="{{ f.full }}" download="{{ f.file }}">download</a>{% endif %}</figcaption>
</figure>{% endfor %}</div>""")
_VERDICT = _JINJA.from_string("""
{% if found %}<p><b>{{ found.combination.values() | join(' × ') }}</b>
<span class="verdict" data-is="{{ found.verdict }}">{{ found.verdict }}</span> {{ found.reason }}.
{{ units }} in {{ rests_on }}.</p>
{% elif empty %}<p>No verdict: there is no real patch in {{ rests_on }}.</p>
{% else %}<p>Choose values: the audit's verdict on their combination appears here. It rests on {{ rests_on }}.</p>
{% endif %}{% if note %}<p class="note">{{ note }}</p>{% endif %}""")
_PROBLEM = _JINJA.from_string("""<p class="problem">{{ text }}</p>""")
_HEADING = _JINJA.from_string("<h2>{{ text }}</h2>")


def _choices(none: str, values: Sequence[str]) -> list[Any]:
    """The label and value of each choice; the first one chooses nothing."""
    return [(none, ""), *((value, value) for value in values)]


def build_page(collection: Collection, generator: Generator) -> Any:
    """The page, a ``gradio.Blocks``."""
    import gradio as gr

    with gr.Blocks(title=f"latent-medi: {collection.data.name}", analytics_enabled=False) as page:
        gr.HTML(_HEADING.render(text=collection.title))
        with gr.Row():
            chosen = [
                gr.Dropdown(_choices("any", collection.values(f.name)), value="", label=f.name)
                for f in collection.categorical
            ]
            part = gr.Dropdown(_choices("all", collection.parts), value="", label="Split")
            names = list(collection.synthetic)
            choices: list[Any] = names or [("none", "")]
            source = gr.Dropdown(choices, value=(names or [""])[0], label="Synthetic set", visible=len(names) > 1)
        verdict = gr.HTML(elem_id="verdict")
        with gr.Row():
            with gr.Column(min_width=300):
                real = gr.HTML(elem_id="real")
            with gr.Column(min_width=300, visible=bool(names)):
                synthetic = gr.HTML(elem_id="synthetic")
        number = gr.State(0)
        with gr.Row():
            back, where, on = gr.Button("Previous page"), gr.HTML(elem_id="page"), gr.Button("Next page")

        def show(page_number: int, name: str, part_: str, *values: str) -> list[Any]:
            wanted = tuple((f.name, v) for f, v in zip(collection.categorical, values, strict=True) if v)
            try:
                pages = collection.pages(name, wanted, part_)
                page_number = min(max(page_number, 0), pages - 1)
                cards = collection.cards("", wanted, part_, page_number)
                made = collection.cards(name, wanted, part_, page_number) if name else ""
                text = collection.verdict_text(dict(wanted))
                return [page_number, text, cards, made, f"Page {page_number + 1} of {pages}"]
            except UserError as error:
                return [0, _PROBLEM.render(text=str(error)), "", "", ""]

        inputs, outputs = [source, part, *chosen], [number, verdict, real, synthetic, where]
        changes = [page.load, *(choice.change for choice in inputs)]
        # Whoever chooses again before the page has answered sees what was chosen last.
        gr.on(changes, lambda *given: show(0, *given), inputs, outputs, trigger_mode="always_last")
        back.click(lambda now, *given: show(now - 1, *given), [number, *inputs], outputs)
        on.click(lambda now, *given: show(now + 1, *given), [number, *inputs], outputs)
        if generator.models:
            _generation(gr, collection, generator, chosen)
    return page


def _generation(gr: Any, collection: Collection, generator: Generator, chosen: Sequence[Any]) -> None:
    """The part of the page that draws samples of the chosen combination."""
    names = list(generator.models)
    gr.HTML("<h3>Generate the chosen combination</h3>")
    with gr.Row():
        model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
        numbers = [
            gr.Textbox(label=f"{f.name}{f' ({f.unit})' if f.unit else ''}", placeholder="not given")
            for f in collection.continuous  # Gradio's field for numbers shows 0 where nothing is given
        ]
    with gr.Row():
        sliders = [
            gr.Slider(0, 10, 1, step=0.5, label="Guidance"),
            gr.Slider(1, 100, 20, step=1, label="Steps"),
            gr.Slider(0, 9999, 0, step=1, label="Seed"),
            gr.Slider(1, 8, 4, step=1, label="Pictures"),
        ]
    button, generated = gr.Button("Generate", variant="primary"), gr.HTML(elem_id="generated")

    def draw(name: str, guidance: float, steps: float, seed: float, count: float, *values: Any) -> str:
        fields = [*collection.categorical, *collection.continuous]
        wanted = {f.name: v for f, v in zip(fields, values, strict=True) if v}
        seeds = range(int(seed), int(seed) + int(count))
        try:
            images, given = generator.draw(name, wanted, guidance, int(steps), seeds)
        except UserError as error:
            return _PROBLEM.render(text=str(error))
        words = {n: str(value) for n, value in given.items()}
        figures = []
        for image, number in zip(images, seeds, strict=True):
            file = "-".join(["synthetic", *words.values(), f"seed{number}"])
            uris = {"uri": _uri(image, "synthetic"), "full": _uri(image, "synthetic", largest=max(image.shape))}
            uris["file"] = "".join(c if c.isalnum() or c in "-+." else "_" for c in file) + ".png"
            text = f"{name}, guidance {guidance:g}, {int(steps)} steps, seed {number}"
            figures.append(collection.figure(words, text, True) | uris)
        unused = [n for n in wanted if n not in given]
        note = f"{name} is not conditioned on {', '.join(unused)}." if unused else ""
        return _CARDS.render(heading=" × ".join(words.values()) or "any combination", note=note, figures=figures)

    button.click(draw, [model, *sliders, *chosen, *numbers], generated)


# ---- the server


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"The address {host}:{port} cannot be used: {error.strerror}.", "port=0 takes a free port."
        ) from None


def _serve(collection: Collection, generator: Generator, listener: socket.socket, host: str) -> None:
    """Serve the page until a signal."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    font = ["system-ui", "sans-serif"]  # Gradio's own ones are fetched from elsewhere
    theme = gr.themes.Default(font=font, font_mono=["ui-monospace", "monospace"])
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in _LOCAL:  # a page from elsewhere, whose name is made to mean this machine, would read the patches
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOCAL)
    page = build_page(collection, generator)
    mounted = gr.mount_gradio_app(
        app, page, "/", footer_links=[], run_history=False, ssr_mode=False, theme=theme, css=_CSS
    )

    async def closed(scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        await mounted(scope, receive, answer)

    uvicorn.Server(uvicorn.Config(closed, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listener])
