"""lib/llama.h without Python's care: a NULL where something must be is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_models

from llama._lib import ffi, lib
from llama.quant import Kind

SHAPE = small_models.config(vocab_size=50, dim=24, head_dim=6, max_seq_len=300, n_kv_heads=2)


def test_null_arguments_are_refused(tmp_path: Path) -> None:
    """What Python cannot pass, another caller of lib/llama.h may."""
    path = small_models.of_kind(tmp_path, SHAPE, Kind.F32)
    null, number = ffi.NULL, ffi.new("uint32_t *")
    model, session = ffi.new("llama_model **"), ffi.new("llama_session **")
    name, options = ffi.new("char[]", bytes(path)), ffi.new("llama_session_options *")
    params = ffi.new("llama_sampling *", {"top_p": 1, "typical_p": 1, "repetition_penalty": 1})
    token = ffi.new("int32_t *")
    options.kv_kind = -1
    lib.llama_close(null)
    lib.llama_session_close(null)
    assert lib.llama_open(name, model) == 0
    assert lib.llama_session_open(model[0], options, session) == 0
    batch = ffi.new("llama_batch *", {"n": 1})
    calls: list[tuple[Any, ...]] = [
        (lib.llama_open, null, model),
        (lib.llama_open, name, null),
        (lib.llama_verify, null, 0),
        (lib.llama_get_tensor, null, 0, ffi.new("llama_tensor *")),
        (lib.llama_get_tensor, model[0], 0, null),
        (lib.llama_get_meta, null, 0, ffi.new("llama_meta *")),
        (lib.llama_get_config, null, ffi.new("llama_config *")),
        (lib.llama_get_config, model[0], null),
        (lib.llama_get_tokenizer, null, ffi.new("uint8_t **"), ffi.new("size_t *")),
        (lib.llama_get_tokenizer, model[0], null, ffi.new("size_t *")),
        (lib.llama_read_rows, null, 0, 0, 1, ffi.new("float[24]")),
        (lib.llama_read_rows, model[0], 0, 0, 1, null),
        (lib.llama_quantize, model[0], 0, 0, 16, 3, null, 1, null, 544, ffi.new("llama_loss *")),
        (lib.llama_multiply, null, 0, 0, 16, 0, null, 0, ffi.new("float *"), 1, 1, null),
        (lib.llama_add_moments, null, 1, 1, 0, 1, ffi.new("float *")),
        (lib.llama_add_moments, ffi.new("float *"), 1, 1, 0, 1, null),
        (lib.llama_factor_moments, null, 1, 0.1, 1),
        (lib.llama_run_stage, null, ffi.new("llama_stage *")),
        (lib.llama_run_stage, session[0], null),
        (lib.llama_run_stage, session[0], ffi.new("llama_stage *")),
        (lib.llama_session_open, null, options, session),
        (lib.llama_session_open, model[0], null, session),
        (lib.llama_session_open, model[0], options, null),
        (lib.llama_get_session_info, null, ffi.new("llama_session_info *")),
        (lib.llama_get_session_info, session[0], null),
        (lib.llama_forward, null, batch, null),
        (lib.llama_forward, session[0], null, null),
        (lib.llama_forward, session[0], batch, null),
        (lib.llama_length, null, 0, number),
        (lib.llama_length, session[0], 0, null),
        (lib.llama_trim, null, 0, 0),
        (lib.llama_fork, null, 0, 1, 0),
        (lib.llama_slide, null, 0, 0, 0),
        (lib.llama_read_kv, null, 0, 0, 0, token, 0),
        (lib.llama_read_kv, session[0], 0, 0, 0, null, 0),
        (lib.llama_write_kv, null, 0, 0, 0, token, 0),
        (lib.llama_write_kv, session[0], 0, 0, 0, null, 0),
        (lib.llama_get_header, null, ffi.new("uint8_t **"), ffi.new("size_t *")),
        (lib.llama_get_header, model[0], null, ffi.new("size_t *")),
        (lib.llama_sample, null, 0, params, null, 0, 0, 0, 0, token),
        (lib.llama_sample_logits, null, 10, params, null, 0, 0, 0, 0, token),
        (lib.llama_sample_logits, ffi.new("float[10]"), 10, null, null, 0, 0, 0, 0, token),
        (lib.llama_sample_logits, ffi.new("float[10]"), 10, params, null, 1, 0, 0, 0, token),
        (lib.llama_sample_logits, ffi.new("float[10]"), 10, params, null, 0, 0, 0, 0, null),
        (lib.llama_logprobs, null, 0, 0, ffi.new("double *"), 0, null, null),
        (lib.llama_logprobs, session[0], 0, 0, null, 0, null, null),
        (lib.llama_logprobs, session[0], 0, 0, ffi.new("double *"), 1, null, null),
        (lib.llama_measure_bandwidth, 1, 0, null),
        (lib.llama_measure_peaks, 1, null, null, ffi.new("double *")),
        (lib.llama_measure_peaks, 1, null, ffi.new("double *"), null),
    ]
    for function, *arguments in calls:
        assert function(*arguments) == -1, function
        assert "NULL" in ffi.string(lib.llama_error()).decode(), function
    assert lib.llama_count_tensors(null) == lib.llama_count_meta(null) == 0
    # the model outlives llama_close for as long as its session does
    lib.llama_close(model[0])
    zero = ffi.new("int32_t[1]", [0])
    batch.tokens = batch.sequences = batch.positions = zero
    assert lib.llama_forward(session[0], batch, null) == 0
    lib.llama_session_close(session[0])
