"""Two encoders into one space: an image of a digit and a word for it land near each other, whatever the language.

The space comes from the images: a discriminant analysis finds the nine directions that tell ten digits apart, and each
digit has an anchor in it, the mean of its images. The words are then taught to meet the anchors. All vectors have
length 1, so that the product of two of them is their similarity, from -1 to 1.

This file knows nothing of streamproc. The weights are trained in a second from what scikit-learn ships and from
texts.jsonl; a larger model would load them from a file here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

Vectors = NDArray[np.float64]

TEXTS = Path(__file__).with_name("texts.jsonl")
TRAINING_IMAGES = 1_500
"""Of 1,797; samples/image.jsonl has images of the rest, which the encoder never saw."""


@dataclass(frozen=True)
class Encoders:
    """The weights that both tasks share; ``anchors`` holds one vector per digit."""

    images: Any
    texts: Any
    anchors: Vectors

    def encode_images(self, pixels: Vectors) -> Vectors:
        """One vector per row of 64 pixels from 0 to 1."""
        return to_length_one(self.images.transform(pixels))

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """One vector per text."""
        return to_length_one(self.texts.predict(texts))

    def nearest_digits(self, vectors: Vectors) -> tuple[list[int], list[float]]:
        """The digit whose anchor is nearest to each vector, and how near it is."""
        similarities = vectors @ self.anchors.T
        return similarities.argmax(axis=1).tolist(), similarities.max(axis=1).round(3).tolist()


def train() -> Encoders:
    """Both encoders, the same ones on every run."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[:TRAINING_IMAGES] / 16.0, labels[:TRAINING_IMAGES]
    images = make_pipeline(
        Nystroem(gamma=0.1, n_components=400, random_state=0),
        LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.01),
    ).fit(pixels, labels)
    places = images.transform(pixels)
    anchors = to_length_one(np.stack([places[labels == digit].mean(axis=0) for digit in range(10)]))

    words = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    texts = make_pipeline(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True), Ridge(alpha=0.1))
    texts.fit([word["text"] for word in words], anchors[[word["digit"] for word in words]])
    return Encoders(images, texts, anchors)


def to_length_one(vectors: Vectors) -> Vectors:
    """The same directions, each of length 1."""
    lengths: Vectors = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)
