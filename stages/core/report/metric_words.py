"""What each metric is, in a sentence: docs/metrics.md and docs/world.md say more."""

from __future__ import annotations

from collections.abc import Mapping

METRICS: Mapping[str, str] = {
    "pickscore": "how well a picture fits its prompt and pleases, by a CLIP that learned from people's choices on "
    "Pick-a-Pic; about 15 to 25",
    "hpsv2": "the same by a CLIP that learned from people's rankings; 100 times a cosine",
    "imagereward": "the same by a BLIP that learned from experts' rankings; 0 is average",
    "aesthetics": "how people would rate the picture's looks, from 1 to 10; it does not know the prompt",
    "clipscore": "how well the picture fits its prompt, by a CLIP that learned from no preferences; 100 times a "
    "cosine",
    "colourfulness": "how colourful the picture is, from its pixels; 0 is grey, above 80 is highly colourful",
    "sharpness": "how much fine detail the picture has, from its pixels; a logarithm",
    "compressibility": "how small the picture's JPEG file is: minus its kilobytes at quality 95",
    "incompressibility": "how large the picture's JPEG file is: its kilobytes at quality 95",
    "total": "what the embedded world's people like, from 0 to 5: caption match times what they like beyond it",
    "caption_match": "how far the drawing is what its caption says, from 0 to 1",
    "appeal": "how far what the caption leaves open is as people like it, from 0 to 1",
}
