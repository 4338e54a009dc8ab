"""The data of a run: its manifests as one, whether model and objective can use it, and what lies beside it."""

from __future__ import annotations

import logging
from fractions import Fraction

from configs.schema import Config, Source
from data.arrays import read_npy
from data.batch import to_tensor
from data.contents import Encoded
from data.manifest import Manifest, read_manifest
from data.s3 import open_folder
from models import fingerprint
from models.backbone import Conditioning

log = logging.getLogger(__name__)

NULL = ("null.npy", "null_mask.npy", "null_pooled.npy")
"""The constant null condition beside the manifest of precomputed data."""


def read_data(config: Config) -> Manifest:
    """The manifest of data.manifest, or those of data.sources as one.

    Raises DataError where one is missing or malformed; ValueError where they do not go together, or not with data.flip.
    """
    data = config.data
    sources = data.sources or [Source(str(data.manifest))]
    parts = [
        (read_manifest(source.manifest, data.endpoint_url, data.read_budget_s), Fraction(str(source.weight)))
        for source in sources
    ]
    manifest = Manifest.mix(parts) if data.sources else parts[0][0]
    if data.flip and manifest.encoded is not None:
        raise ValueError(
            "data.flip mirrors images, but the data holds precomputed latents; set data.flip=false, or pack mirrored "
            "images too"
        )
    return manifest


def check_contents(config: Config, manifest: Manifest) -> None:
    """Raises ValueError where the objective needs images that the data lacks, or precomputed data comes from other
    encoders than those of the run."""
    if not manifest.contents.has_targets and not config.objective.get("image_free"):
        remedy = "set objective.image_free=true"
        if "image_free" not in config.objective:
            remedy = "take objective twinflow with image_free=true"
        raise ValueError(
            f"the data ({manifest.shards[0].folder}) holds captions alone, but the objective {config.objective['name']} "
            f"trains on images; {remedy} (the generator's own samples take their place), or pack images"
        )
    if manifest.encoded is not None:
        check_encoders(config, manifest.encoded, manifest.shards[0].folder)


def refuse_other_kind(kind: str, sees_images: bool) -> None:
    """Raises ValueError where images are to be edited by a model that draws from text alone, or the other way round."""
    if kind == "edits" and not sees_images:
        raise ValueError(
            "the data holds edits, but the model's text encoder sees no images; set model.path to a Qwen-Image-Edit folder"
        )
    if kind != "edits" and sees_images:
        raise ValueError(
            f"model.path is an editing model and the data holds {kind} without source images; pack edits (data pack --kind "
            "edits), or set model.path to a text-to-image model"
        )


def check_encoders(config: Config, encoded: Encoded, where: str) -> None:
    """Raises ValueError naming every difference between the encoders that made the data and those of the run."""
    model, encoder = config.model, config.encoder
    pairs: list[tuple[str, object, object]] = [
        ("encoder.max_text_tokens", encoded.max_text_tokens, encoder.max_text_tokens),
        ("encoder.null_prompt", encoded.null_prompt, encoder.null_prompt),
        ("text encoder", encoded.text, text_digest(config)),
    ]
    if encoded.latents:
        refuse_samples(config)
        pairs.append(("model.latents", encoded.latent_kind, model["latents"]))
        pairs.append(("VAE", encoded.latents, latent_digest(model["path"], model["latents"])))
    wrong = [f"{name} {made!r:.20} there, {own!r:.20} here" for name, made, own in pairs if own not in (made, None)]
    if wrong:
        raise ValueError(
            f"{where} was precomputed with other encoders than this run has: {'; '.join(wrong)}. Train with the model "
            "folder and the encoder section that it was packed with, or pack it again (data pack --precompute)"
        )


def refuse_samples(config: Config) -> None:
    """Raises ValueError where latents are to be drawn anew in every step: precomputed ones are made once."""
    if config.encoder.latents == "sample":
        raise ValueError(
            "encoder.latents=sample draws latents anew in every step, which precomputed latents cannot be; set "
            "encoder.latents=mean, or train on images"
        )


def text_digest(config: Config) -> str | None:
    """Digest of the text encoder, with the size at which it sees images where that is not the model's own; None where the
    folder lacks it."""
    digest, edge = _digest(config.model["path"], fingerprint.TEXT), config.encoder.seen_edge
    return digest if digest is None or edge is None else f"{digest}-{edge}"


def latent_digest(path: str, kind: str) -> str | None:
    """Digest of the latent encoder: of vae/, or the word pixels where there is none; None where the folder lacks it."""
    return "pixels" if kind == "pixels" else _digest(path, fingerprint.LATENTS)


def _digest(path: str, patterns: tuple[str, ...]) -> str | None:
    try:
        return fingerprint.fingerprint(path, patterns)
    except FileNotFoundError as error:
        # A node that trains on precomputed data need not hold the encoders.
        log.warning("whether the data was made by this model's encoders is not checked: %s", error)
        return None


def stored_null(config: Config, manifest: Manifest) -> Conditioning | None:
    """The null condition beside precomputed data, one row; None for other data and for edits, which hold one each.

    Raises DataError where it is missing or malformed.
    """
    encoded = manifest.encoded
    if encoded is None or manifest.kind == "edits":
        return None
    folder = open_folder(manifest.shards[0].folder, config.data.endpoint_url, config.data.read_budget_s)
    embeds, mask, pooled = (folder.url_of(name) for name in NULL)
    text = read_npy(folder.read(NULL[0]), encoded.dtype, (1, None, encoded.text_width), embeds)
    found = read_npy(folder.read(NULL[1]), "bool", (1, text.shape[1]), mask)
    if NULL[2] not in folder.sizes(NULL[2]):  # every rank asks, and a listing of all shards takes many requests
        return Conditioning(to_tensor(text, encoded.dtype), to_tensor(found, "bool"))
    vector = read_npy(folder.read(NULL[2]), encoded.dtype, (1, None), pooled)
    return Conditioning(to_tensor(text, encoded.dtype), to_tensor(found, "bool"), to_tensor(vector, encoded.dtype))


def check_latents(encoded: Encoded | None, bucket: tuple[int, int], expected: tuple[int, int, int]) -> None:
    """Raises ValueError where the model generates latents of another shape than the data holds. expected: [C, H, W]."""
    if encoded is None or not encoded.latents:
        return
    scale = encoded.pixels_per_latent
    stored = encoded.latent_channels, bucket[0] // scale, bucket[1] // scale
    if stored != tuple(expected):
        raise ValueError(
            f"the data holds precomputed latents of {stored} for images of {bucket[0]}x{bucket[1]} pixels, the model "
            f"generates {tuple(expected)}; precompute them with the model folder that is trained"
        )
