"""llama.cpp computing a GGUF file: logits and greedy continuations, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from impq_gguf.llama import ModelParams, declare, errors_logged, llama


class ContextParams(ctypes.Structure):
    """``struct llama_context_params`` as far as it is known, and room for more."""

    _fields_ = (*((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq",
                                                       "n_outputs_max", "n_outputs_max_per_seq")),
                *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type",
                                                      "pooling_type", "attention_type", "flash_attn_type")),
                *((name, ctypes.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
                                                      "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
                ("yarn_orig_ctx", ctypes.c_uint32), ("defrag_thold", ctypes.c_float), ("cb_eval", ctypes.c_void_p),
                ("cb_eval_user_data", ctypes.c_void_p), ("type_k", ctypes.c_int32), ("type_v", ctypes.c_int32),
                ("rest", ctypes.c_char * 256))


class Batch(ctypes.Structure):
    """``struct llama_batch``."""

    _fields_ = (("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
                ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
                ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)))


_SYMBOLS = {
    "llama_context_default_params": (ContextParams,),
    "llama_init_from_model": (ctypes.c_void_p, ctypes.c_void_p, ContextParams),
    "llama_free": (None, ctypes.c_void_p),
    "llama_batch_init": (Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (ctypes.c_int32, ctypes.c_void_p, Batch),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), ctypes.c_void_p),
    "llama_get_memory": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_memory_clear": (None, ctypes.c_void_p, ctypes.c_bool),
    "llama_model_size": (ctypes.c_uint64, ctypes.c_void_p),
}


class Model:
    """A GGUF file in llama.cpp, with a cache of keys and values in float32.

    Args:
        file: the file, or the first of its parts.
        length: tokens of a window.
    """

    def __init__(self, file: Path, length: int) -> None:
        lib = self._lib = llama()
        declare(lib, _SYMBOLS)
        params: ModelParams = lib.llama_model_default_params()
        params.use_extra_bufts = False
        with errors_logged() as errors:
            self._model = lib.llama_model_load_from_file(str(file).encode(), params)
            assert self._model, errors
            context = lib.llama_context_default_params()
            assert (context.n_batch, context.n_seq_max, context.rope_scaling_type, context.type_k) == (2048, 1, -1, 1)
            context.n_ctx = context.n_batch = context.n_ubatch = length
            context.n_outputs_max = context.n_outputs_max_per_seq = length
            context.n_threads = context.n_threads_batch = 1
            context.flash_attn_type = context.type_k = context.type_v = 0
            self._context = lib.llama_init_from_model(self._model, context)
            assert self._context, errors
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (tokens, vocabulary) at every position."""
        lib, count = self._lib, len(tokens)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(count, 0, 1)
        for position, token in enumerate(tokens):
            batch.token[position], batch.pos[position] = int(token), position
            batch.n_seq_id[position], batch.logits[position] = 1, 1
            batch.seq_id[position][0] = 0
        batch.n_tokens = count
        with errors_logged() as errors:
            assert lib.llama_decode(self._context, batch) == 0, errors
            found = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (count, self._vocabulary)).copy()
        lib.llama_batch_free(batch)
        return found
