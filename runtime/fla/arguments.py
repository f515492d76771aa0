"""The arguments of flash-linear-attention's functions, described once, and docstrings of them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

_V_FIRST = "states are `[N,HV,V,K]`."
_ARGUMENTS = {
    "q": "queries, `[B,T,H,K]`.",
    "r": "queries, `[B,T,H,K]`.",
    "k": "keys, `[B,T,H,K]`.",
    "v": "values, `[B,T,HV,V]`.",
    "p": "keys that read what is erased, `[B,T,H,K]`.",
    "a": "keys that read the undecayed state, `[B,T,H,K]`.",
    "b": "keys with which what was read is written, `[B,T,H,K]`.",
    "w": "natural-log decays per key channel, `[B,T,H,K]`, at most 0.",
    "u": "bonus of the current token per head and key channel, `[H,K]`.",
    "g": "natural-log decays, `[B,T,HV]`, at most 0.",
    "g_gamma": "natural-log decays that are the same for all tokens, `[H]`, at most 0.",
    "gk": "natural-log decays per key channel, `[B,T,HV,K]`, at most 0.",
    "gv": "natural-log decays per value channel, `[B,T,HV,V]`, at most 0.",
    "beta": "step sizes, `[B,T,HV]`, 1 where it is None; or `[B,T,HV,V]`, one per value channel.",
    "s": "weights with which slots are written, `[B,T,H,M]`; logarithms of them where g is None.",
    "x": "what is added to the state, `[B,T,D]`.",
    "log_alpha": "natural-log decays of the state, `[B,T,HV]`, at most 0.",
    "log_mu": "natural-log decays of the momentum, `[B,T,HV]`, at most 0.",
    "eta": "step sizes of the momentum, `[B,T,HV]`; 1 where it is None.",
    "g_atk": "natural-log decays of the sum of squared keys, `[B,T,H]`, at most 0.",
    "beta_atk": "weights of that sum, `[B,T,H]`, at least 0.",
    "eps": "what is added to that sum before its logarithm is taken.",
    "log_atk_scale": "the logarithm of that sum at which keys stay as they are, `[H]` or a float; "
    "-0.2 where it is None.",
    "layer_idx": "the number of the layer, from 0.",
    "num_layers": "how many layers there are.",
    "num_householder": "n, the delta steps per token.",
    "scale": "factor of the output; None for K^-0.5.",
    "initial_state": "the state before the first token, `[N,HV,K,V]`; zero where it is None.",
    "initial_A_state": "the sum of squared keys before the first token, `[N,H,K]`; zero where it "
    "is None.",
    "output_final_state": "return the state after the last token too.",
    "normalize": "divide the output by what q recalls of the sum of keys; the state is then "
    "(S, z), z `[N,1,H,K]`.",
    "reverse": "go through each sequence from its last token to its first: the initial state is "
    "then that after the last token, the final state that before the first.",
    "use_qk_l2norm_in_kernel": "scale q and k (and p) to length 1 first.",
    "use_p_times_alpha": "let p read the decayed state, exp(log_alpha) p the old one.",
    "use_gate_in_kernel": "take g as raw: the log-decay is -exp(A_log) softplus(g + dt_bias), or "
    "with a lower_bound lower_bound sigmoid(exp(A_log) (g + dt_bias)).",
    "A_log": "logarithm of the rate of the raw gate per head, `[HV]`.",
    "dt_bias": "bias of the raw gate, `[HV]`, or `[HV*K]` where it is per key channel.",
    "use_beta_sigmoid_in_kernel": "take beta as logits of step sizes.",
    "allow_neg_eigval": "double step sizes that come as logits: they then reach 2.",
    "safe_gate": "promise that log-decays are at least lower_bound (-5 where it is None).",
    "lower_bound": "the least log-decay; see use_gate_in_kernel and safe_gate.",
    "state_v_first": _V_FIRST,
    "transpose_state_layout": _V_FIRST,
    "cu_seqlens": "int `[N+1]`, boundaries of N sequences packed along T; then B = 1.",
    "return_intermediate_states": "return as a last result the states before each chunk of "
    "chunk_size tokens (64 where it is None), `[B,NT,HV,K,V]` in the dtype of k; of packed "
    "sequences the chunks of each, one behind another.",
    "cp_context": "refused unless None: `group` of the library's recurrences splits sequences.",
}
# what arguments mean in some families
PER_KEY = "natural-log decays per key channel, `[B,T,HV,K]`, at most 0."
SLOTS = {
    "q": "queries, `[B,T,HQ,K]`, HQ a multiple of H.",
    "v": "values, `[B,T,H,V]`.",
    "g": "natural-log decays of the slots, `[B,T,H,M]`, at most 0; None: the slots are averages.",
    "initial_state": "the slots' keys `[N,H,K,M]` and values `[N,H,M,V]` before the first token.",
    "returns": "`(o, (keys, values))`: o `[B,T,HQ,V]`; the slots' keys `[N,H,K,M]` and values "
    "`[N,H,M,V]` after the last token, None where they were not asked for.",
}
MOMENTUM = {
    "p": "keys that read what is corrected, `[B,T,H,K]`; k where it is None.",
    "beta": "how far the momentum moves the state, `[B,T,HV]`.",
    "initial_state": "the state and the momentum before the first token, `[2,N,HV,K,V]`.",
    "returns": "`(o, final_state)`: o `[B,T,HV,V]` in the dtype of v; the final state and momentum "
    "`[2,N,HV,K,V]` in float32, or None where they were not asked for.",
}
PRECONDITIONED = {
    "x": "the most by which a key is multiplied, or divided.",
    "returns": "`(o, final_state, A_state)`: o `[B,T,HV,V]` in the dtype of v; the final state "
    "`[N,HV,K,V]` and sum of squared keys `[N,H,K]`, or None where they were not asked for.",
}
GDN2_GATES = {
    "g": PER_KEY,
    "b": "gates of what is erased per key channel, `[B,T,HV,K]`.",
    "w": "gates of what is written per value channel, `[B,T,HV,V]`.",
}
# what the peer takes as `chunk_size`, where it refuses other sizes
CHUNK_SIZES = {
    "chunk_delta_rule": (16, 32, 64),
    "chunk_gated_delta_rule": (16, 32, 64),
    "chunk_gdn2": (64,),
    "chunk_kda": (32, 64),
    "chunk_momentum_delta_rule": (16, 32, 64),
}
_HINTS = (
    "checkpoint_level",
    "chunk_indices",
    "chunk_size",
    "cu_seqlens_cpu",
    "disable_recompute",
    "max_num_seqs",
    "solve_tril_precision",
    "use_graph",
)
_RETURNS = (
    "`(o, final_state)`: o `[B,T,HV,V]` in the dtype of v; the final state `[N,HV,K,V]` in "
    "float32, or None where it was not asked for."
)
_REST = """
Raises:
    NotLowered: an argument asks for what is not offered.
    UnknownOperand: an argument that the function does not have.
    CallError: what every call of a recurrence raises of its operands."""


def is_per_token(name: str) -> bool:
    """Whether the argument `name` has a value for every token, by its shape."""
    return "`[B,T" in _ARGUMENTS.get(name, "")


def docstring(doc: str, parameters: Iterable[str], own: Mapping[str, str]) -> str:
    """The docstring of a function of these parameters; `own`: what means something else in it."""
    hints = dict.fromkeys(_HINTS, "a hint, which does not change the result.")
    known = {**_ARGUMENTS, **hints, **own}
    rows = [f"    {name}: {known[name]}" for name in parameters]
    returns = textwrap.wrap(own.get("returns", _RETURNS), 96, break_on_hyphens=False)
    returned = ["Returns:", *(f"    {line}" for line in returns)]
    return "\n".join([doc, "", "Args:", *rows, "", *returned, _REST])
