"""The arguments of flash-linear-attention's functions, described once, and docstrings of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    "beta": "step sizes, `[B,T,HV]`; 1 where it is None.",
    "layer_idx": "the number of the layer, from 0.",
    "num_layers": "how many layers there are.",
    "num_householder": "n, the delta steps per token.",
    "scale": "factor of the output; None for K^-0.5.",
    "initial_state": "the state before the first token, `[N,HV,K,V]`; zero where it is None.",
    "output_final_state": "return the state after the last token too.",
    "normalize": "divide the output by what q recalls of the sum of keys; the state is then "
    "(S, z), z `[N,1,H,K]`.",
    "reverse": "refused unless False: a recurrence runs forward in time.",
    "use_qk_l2norm_in_kernel": "scale q and k (and p) to length 1 first.",
    "use_gate_in_kernel": "take g as raw: the log-decay is -exp(A_log) softplus(g + dt_bias), or "
    "with a lower_bound lower_bound sigmoid(exp(A_log) (g + dt_bias)).",
    "A_log": "logarithm of the rate of the raw gate per head, `[HV]`.",
    "dt_bias": "bias of the raw gate, `[HV]`, or `[HV*K]` where it is per key channel.",
    "use_beta_sigmoid_in_kernel": "take beta as logits of step sizes.",
    "allow_neg_eigval": "double step sizes that come as logits: they then reach 2.",
    "safe_gate": "promise that log-decays are at least lower_bound (-5 where it is None).",
    "lower_bound": "the least log-decay; see use_gate_in_kernel and safe_gate.",
    "state_v_first": "states are `[N,HV,V,K]`.",
    "cu_seqlens": "int `[N+1]`, boundaries of N sequences packed along T; then B = 1.",
    "return_intermediate_states": "refused unless False: the planner chooses what is stored.",
    "cp_context": "refused unless None: sequences are not split over devices.",
}
_HINTS = (
    "chunk_indices",
    "chunk_size",
    "cu_seqlens_cpu",
    "disable_recompute",
    "max_num_seqs",
    "use_graph",
)
_REST = """Returns:
    `(o, final_state)`: o `[B,T,HV,V]` in the dtype of v; the final state `[N,HV,K,V]` in float32,
    or None where it was not asked for.

Raises:
    NotLowered: an argument asks for what is not offered.
    UnknownOperand: an argument that the function does not have.
    CallError: what every call of a recurrence raises of its operands."""


def docstring(doc: str, parameters: Iterable[str], own: Mapping[str, str]) -> str:
    """The docstring of a function of these parameters; `own`: what means something else in it."""
    hints = dict.fromkeys(_HINTS, "a hint, which does not change the result.")
    known = {**_ARGUMENTS, **hints, **own}
    rows = [f"    {name}: {known[name]}" for name in parameters]
    return "\n".join([doc, "", "Args:", *rows, "", _REST])
