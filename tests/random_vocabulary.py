"""The words of random recurrences: operands, their other names, patterns of expressions."""

SINGLE = {
    "Key": ("k", "q", "p", "a"),
    "Value": ("v", "z", "y"),
    "Scalar": ("b", "c", "s"),
    "HeadScalar": ("h", "d"),
    "HeadKey": ("u",),
    "HeadValue": ("r",),
}
# gates have operands of their own: what the rest of a step does to them is drawn too
GATES = {"Scalar": ("g", "f"), "Key": ("w", "e"), "HeadScalar": ("hg",), "HeadKey": ("hw",)}
TUPLES = {"Key": "ks", "Value": "vs", "Scalar": "bs"}
KIND_OF = {
    **{n: kind for table in (SINGLE, GATES) for kind, names in table.items() for n in names},
    **{n: f"tuple[{kind}, ...]" for kind, n in TUPLES.items()},
}
PARAMS = {"scale": ("float = 0.7", 0.7), "rate": ("float", 0.25)}
STATICS = {"power": "int = 2", "flag": "bool = True"}
# names that kernels use themselves, or Python, torch or Triton does
NAMES = (
    *(*"GTDULHAWXCKVNBijkx", "x_2", "e_G", "d", "S_next", "G_C", "w", "c", "tl", "torch", "F"),
    *("triton", "T_", "eps", "lanes", "rows", "chunk", "at", "float32", "dtype", "self", "step"),
    *("operands", "params", "valid", "exp_", "lambda_", "q0", "beta", "Ω", "m", "n", "pid"),
)

NUMBERS = (
    *("0.5", "scale", "2", "tanh(0.3)", "exp(-scale)", "scale / 3", "sqrt(2.0)", "-rate"),
    *("sigmoid(rate)", "log(1.5 + scale ** 2)", "maximum(scale, 0.2)", "scale * rate", "1 / 3"),
    *("(scale if flag else 0.1)", "1.0 / power", "softplus(-0.4)", "clamp(rate, 0.1, 0.2)"),
    *("log2(3.0)", "rsqrt(power)", "relu(scale - 2)", "abs(-0.3)", "log1p(rate)", "expm1(-0.5)"),
    *("silu(0.7)", "minimum(rate, scale)", "within(scale, 0.0, 2.0)", "logsigmoid(1.0)"),
)
OF_ONE = (
    *("tanh({})", "sigmoid({})", "softplus({})", "silu({})", "relu({})", "abs({})", "-{}"),
    *("exp(-abs({}))", "expm1(-abs({}))", "log1p(abs({}))", "log(1 + abs({}))", "{} ** 3"),
    *("log2(0.5 + {} ** 2)", "logsigmoid({})", "sqrt(0.1 + {} ** 2)", "rsqrt(1 + {} ** 2)"),
    *("clamp({}, -1.0, 0.7)", "clamp({}, None, 0.4)", "1 / (1 + {} ** 2)", "(1 - {})", "({} / 3)"),
    *("cos({})", "sin(2 * {})"),
    *(
        "{} ** -2 * 0",
        "(0.6 - {}) * 0.5",
        "within({}, -1e6, 1e6)",
        "(+{})",
        "(1 + abs({})) ** -0.5",
    ),
)
OF_TWO = (
    *("({0} + {1})", "({0} - {1})", "{0} * {1}", "{0} / (1 + abs({1}))", "maximum({0}, {1})"),
    *("minimum({0}, {1})", "{0} / (0.5 + {1} ** 2)", "{0} * sigmoid({1})", "({0} - -({1}))"),
    # what a printer must keep in parentheses
    *("({0} - ({1} - {0})) * 0.5", "{0} / ((1 + abs({1})) * (2 + abs({0})))", "-({0} - {1})"),
    *(
        "{0} / (2 / (1 + sigmoid({1})))",
        "({0} + {1}) * ({0} - {1})",
        "({0} * (1 / (1 + {1} ** 2)))",
    ),
    *("({0} / 3 / (1 + softplus({1})))", "(1 - ({0} - {1}) / 2)", "({1} - {0} * ({1} + {0}))"),
)
# factors of either sign, of one in (0, 1], of anything, and of an operand that is a gate
SIGNS = (
    *("-({0})", "({0}) * tanh({1})", "tanh({1})", "within({2}, -1.0, 1.0)", "cos({1})"),
    *("clamp({1}, -1.0, 1.0)", "(1 - 2 * sigmoid({1}))", "-({0}) * clamp({1}, -1.0, 0.5)"),
    *("({0}) * sin({1})", "-0.8", "-({0}) * within({2}, -1.0, 1.0)", "minimum(tanh({1}), {0})"),
)
OUTPUTS = (
    *("o", "tanh(o)", "o * sigmoid({v})", "o / (1 + abs(o))", "o + {s} * {v}", "silu(o)"),
    *("{s} * o - dot({k}, {k}) * {v}", "o * sum({v})", "maximum(o, {v})", "relu(o) + 0.1"),
    *("o / (1 + o ** 2)", "o + sum({k}) * {v}", "o * {n}", "o * tanh(0.3)", "log1p(abs(o))"),
    *("o / (0.1 + dot({k}, {k}))", "sqrt(1 + o * o)", "clamp(o, -2.0, 2.0)", "(o + {v}) * {n}"),
    *("o + 0.0 * {v} / (0.1 + dot({v}, {v}))", "minimum(o, {s})", "exp(-o ** 2)", "o * o", "-o"),
    *("l2norm({v}) * o", "softplus(o)", "o / sqrt(0.1 + sum({v} * {v}))", "within(o, -1e9, 1e9)"),
    *("expm1(-abs(o)) + {v}", "logsigmoid(o)", "rsqrt(1 + o ** 2)", "o * {s} / (1 + {s} ** 2)"),
)
# steps that have no meaning, no chunk form, or no lowering: each must be refused in words
REFUSED = (
    *("S = tanh(S)", "S = S * S", "S = S + outer(k, tanh(k @ S))", "S = S @ v", "S = S + 1.0"),
    *("S = exp(abs(s)) * S + outer(k, v)", "S = s * S + outer(k, v)", "S = S + outer(v, k)"),
    *("S = S + outer(k, v - S @ k)", "o = o / sum(o)", "o = o * sum(q @ S)", "o = S"),
    *("S = 0.0 * S + outer(k, v)", "S = S ** 2", "S = clamp(S, -1, 1)", "S = l2norm(S)", "o = q"),
    *("S = S - S + outer(k, v)", "S = S + outer(k @ S, v)", "S = k * v * S", "S = S if s else S"),
    *("S = S + outer(k, v) * clamp(s, 1, 0)", "S = s ** 1.5 * S", "o = o ** s", "o = o @ v"),
    *("S = sigmoid(w) * S * sigmoid(v)", "S = S * sigmoid(v) + outer(k, v)", "o = k.T", "o = o[0]"),
    *("S = S + b * outer(k, v - k @ S) - b * outer(p, p @ S)", "o = (S @ v) * k", "o = sum(S)"),
    *(
        "S = S + outer(k, v * (k @ S))",
        "S = S + outer(k, (k @ S) * (q @ S))",
        "S = exp(S)",
        "o = None",
    ),
    *("S = S + outer(k - S @ v, b * v)", "o = (q + S @ v) @ S", "o = dot(o, o) * v", "S = 2 * S"),
    *("S = (1 + b ** 2) * S", "S = S / 0.5", "o = exp(k) * o", "S = dot(S, k)"),
    *("S = maximum(S, S)", "S = within(S, 0, 1)", "S = S - outer(k, v @ S)", "o = o + S", "o = s"),
    *("o = (q @ S) @ S", "S = S + outer(k, sum(k @ S) * v)", "S = S + outer(k, o)", "S = S + o"),
    *(
        "S = S * exp(v) + outer(k, v)",
        "o = (S @ v) @ S",
        "S = k @ S",
        "o = float(s) * o",
        "o = q * s",
    ),
    *("S = S + outer(k, v / (k @ S))", "S = S + outer(k, maximum(k @ S, v))", "o = len(o) * o"),
)
