// Runs the gated delta rule from a library that chunkwise exported (K = 32, V = 48, float32), on two
// threads, and compares with the declared step, token by token. No Python, no compiler, no TVM:
// only libtvm_ffi, which loads the library and reports wrong shapes as errors.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

namespace ffi = tvm::ffi;

constexpr int64_t B = 2, T = 75, H = 2, HV = 4, K = 32, V = 48;

// A contiguous tensor over a vector's memory; the shape lives as long as this does.
template <typename Number>
struct Tensor {
  std::vector<Number> data;
  std::vector<int64_t> shape, strides;
  DLTensor view{};

  explicit Tensor(std::vector<int64_t> sizes) : shape(std::move(sizes)), strides(shape.size(), 1) {
    for (size_t d = shape.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * shape[d];
    data.resize(shape[0] * strides[0]);
    view.data = data.data();
    view.device = DLDevice{kDLCPU, 0};
    view.ndim = static_cast<int32_t>(shape.size());
    view.dtype = DLDataType{static_cast<uint8_t>(std::is_integral_v<Number> ? kDLInt : kDLFloat),
                            8 * sizeof(Number), 1};
    view.shape = shape.data();
    view.strides = strides.data();
  }
  Tensor(const Tensor&) = delete;
  DLTensor* operator&() { return &view; }
};

// What was declared: S = exp(g) S; S = S + beta k (v - k S); o = q S, for one batch and value head.
double largest_error(Tensor<float>& q, Tensor<float>& k, Tensor<float>& v, Tensor<float>& g,
                     Tensor<float>& beta, Tensor<float>& o, int64_t b, int64_t hv) {
  std::vector<double> state(K * V, 0.0);
  double worst = 0.0;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t row = b * T + t;
    const float* key = &k.data[(row * H + hv / (HV / H)) * K];
    const float* query = &q.data[(row * H + hv / (HV / H)) * K];
    const double decay = std::exp(static_cast<double>(g.data[row * HV + hv]));
    for (double& s : state) s *= decay;
    for (int64_t c = 0; c < V; ++c) {
      double recalled = 0.0, read = 0.0;
      for (int64_t i = 0; i < K; ++i) recalled += key[i] * state[i * V + c];
      const double written =
          beta.data[row * HV + hv] * (v.data[(row * HV + hv) * V + c] - recalled);
      for (int64_t i = 0; i < K; ++i) {
        state[i * V + c] += key[i] * written;
        read += query[i] * state[i * V + c];
      }
      worst = std::max(worst, std::abs(read - o.data[(row * HV + hv) * V + c]));
    }
  }
  return worst;
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s LIBRARY\n", argv[0]);
    return 2;
  }
  ffi::Module library = ffi::Module::LoadFromFile(argv[1]);
  ffi::Function scan = library->GetFunction("forward_scan").value();
  const auto scratch_size =
      library->GetFunction("forward_scan_scratch").value()().cast<int64_t>();

  Tensor<float> q({B, T, H, K}), k({B, T, H, K}), v({B, T, HV, V}), g({B, T, HV}),
      beta({B, T, HV}), o({B * T, HV, V}), none({0, HV, K, V}), last({B, HV, K, V});
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (Tensor<float>* x : {std::addressof(q), std::addressof(k), std::addressof(v), std::addressof(g), std::addressof(beta)})
    for (float& number : x->data) number = normal(random);
  for (float& number : k.data) number /= std::sqrt(static_cast<float>(K));
  for (float& number : g.data) number = -std::abs(number);
  for (float& number : beta.data) number = 1.0f / (1.0f + std::exp(-number));

  // one row per sequence: batch, first token in it, tokens, first token of all, first chunk of all
  const auto chunk = library->GetFunction("chunk").value()().cast<int64_t>();
  const int64_t chunks = (T + chunk - 1) / chunk;
  Tensor<int64_t> sequences({B, 5}), table({B * chunks, 2});
  for (int64_t b = 0; b < B; ++b) {
    const int64_t row[5] = {b, 0, T, b * T, b * chunks};
    std::copy(row, row + 5, &sequences.data[b * 5]);
    for (int64_t c = 0; c < chunks; ++c) {
      table.data[(b * chunks + c) * 2] = b;
      table.data[(b * chunks + c) * 2 + 1] = c;
    }
  }

  // work items are pairs of sequence and value head: half of them for each thread
  auto run = [&](int64_t begin, int64_t end) {
    Tensor<float> scratch({scratch_size});
    scan(&none, &g, &q, &k, &beta, &v, &o, &last, &sequences, &table, &scratch, HV, begin, end);
  };
  std::thread other(run, 0, B * HV / 2);
  run(B * HV / 2, B * HV);
  other.join();

  double worst = 0.0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t hv = 0; hv < HV; ++hv)
      worst = std::max(worst, largest_error(q, k, v, g, beta, o, b, hv));
  std::printf("largest error %.1e\n", worst);
  return worst < 1e-4 ? 0 : 1;
}
