// What Python sees. Tensors come as addresses: mm_engine_kernels/cpu has checked their shapes,
// dtypes and layout, and holds them while a call runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"
#include "pack.h"
#include "recording.h"
#include "thread_pool.h"

namespace nb = nanobind;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Work from which on other Python threads may run meanwhile. Below it they may not: to get the
// lock back from one that computes takes up to 5 ms, more than a small op itself.
constexpr int64_t LONG = int64_t{1} << 27;  // multiplications
constexpr int64_t PER_NUMBER = 32;  // multiplications that take as long as to read and write one

// Makes the call, or keeps it where a recording is on.
template <class F>
void perform(int64_t work, F&& call) {
    if (mm::Recording* recording = mm::Recording::current()) {
        recording->add(call);
    } else if (work < LONG) {
        call();
    } else {
        nb::gil_scoped_release release;
        call();
    }
}

// Raises IndexError unless all are from `lowest` on and below `end`.
void check_places(const int64_t* places, int64_t num, int64_t lowest, int64_t end) {
    for (int64_t i = 0; i < num; ++i)
        if (places[i] < lowest || places[i] >= end)
            throw std::out_of_range(
                "rows must be from " + std::to_string(lowest) + " to " + std::to_string(end - 1) +
                ", not " + std::to_string(places[i]) + ".");
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "C++ kernels for the CPU.";
    // A program may end while an `LLM` of its own is still there: nothing to warn its user of.
    nb::set_leak_warnings(false);
    m.def("isas", [] {
        int count;
        const mm::Isa* all = mm::runnable_isas(&count);
        std::vector<std::string> names;
        for (int i = 0; i < count; ++i) names.emplace_back(all[i].name);
        return names;
    });
    m.def("isa", [] { return std::string(mm::isa()); });
    m.def("use_isa", [](const std::string& name) { return mm::use_isa(name.c_str()); });
    m.def("num_threads", &mm::num_threads);
    m.def("set_num_threads", &mm::set_num_threads);
    m.def("num_asleep", &mm::num_asleep);
    m.def("copy", [](Address source, Address target, int64_t bytes) {
        perform(bytes * PER_NUMBER, [=] {
            std::memcpy(at<void>(target), at<const void>(source), bytes);
        });
    });
    nb::class_<mm::Recording>(m, "Recording")
        .def(nb::init<>())
        .def("start", &mm::Recording::start)
        .def("stop", &mm::Recording::stop)
        .def("run", &mm::Recording::run, nb::call_guard<nb::gil_scoped_release>())
        .def("__len__", &mm::Recording::size);
    m.def("packed_size", [](int64_t n, int64_t k, int dtype) {
        return mm::packed_size(n, k, static_cast<mm::DType>(dtype));
    });
    m.def(
        "pack", [](Address weight, int64_t stride, int64_t n, int64_t k, int dtype, Address out) {
            nb::gil_scoped_release release;
            mm::pack(
                at<const void>(weight), stride, n, k, static_cast<mm::DType>(dtype),
                at<void>(out));
        });
    m.def(
        "unpack_rows", [](Address packed, int64_t n, int64_t k, int dtype, Address rows,
                          int64_t count, Address out) {
            mm::unpack_rows(
                at<const void>(packed), n, k, static_cast<mm::DType>(dtype),
                at<const int64_t>(rows), count, at<void>(out));
        });
    m.def(
        "linear", [](Address x, Address packed, Address bias, Address residual, Address out,
                     int64_t rows, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride,
                     int dtype) {
            const mm::LinearArgs args{
                at<const void>(x), at<const void>(packed), at<const void>(bias),
                at<const void>(residual), at<void>(out), rows, n, k, x_stride, out_stride,
                static_cast<mm::DType>(dtype)};
            perform(rows * n * k, [args] { mm::ops().linear(args); });
        });
    m.def(
        "rms_norm", [](Address x, Address residual, Address weight, Address out, Address total,
                       int64_t rows, int64_t size, int64_t x_stride, int64_t residual_stride,
                       float eps, int dtype) {
            const mm::RmsNormArgs args{
                at<const void>(x), at<const void>(residual), at<const void>(weight),
                at<void>(out), at<void>(total), rows, size, x_stride, residual_stride, eps,
                static_cast<mm::DType>(dtype)};
            perform(rows * size * PER_NUMBER, [args] { mm::ops().rms_norm(args); });
        });
    m.def(
        "silu_mul", [](Address x, Address out, int64_t rows, int64_t size, int64_t stride,
                       int dtype) {
            const mm::SiluMulArgs args{
                at<const void>(x), at<void>(out), rows, size, stride,
                static_cast<mm::DType>(dtype)};
            perform(rows * size * PER_NUMBER, [args] { mm::ops().silu_mul(args); });
        });
    m.def(
        "rotary", [](Address x, Address cos, Address sin, Address out, int64_t tokens,
                     int64_t heads, int64_t half, int64_t token_stride, int64_t head_stride,
                     int64_t cos_stride, int64_t sin_stride, int dtype) {
            const mm::RotaryArgs args{
                at<const void>(x), at<const void>(cos), at<const void>(sin), at<void>(out),
                tokens, heads, half, token_stride, head_stride, cos_stride, sin_stride,
                static_cast<mm::DType>(dtype)};
            perform(tokens * heads * half * 2 * PER_NUMBER, [args] { mm::ops().rotary(args); });
        });
    m.def(
        "scatter", [](Address rows, Address out, Address places, int64_t num, int64_t size,
                      int64_t stride, int64_t block_size, int64_t block_stride, int64_t lowest,
                      int64_t num_places, int dtype, int out_dtype) {
            const mm::ScatterArgs args{
                at<const void>(rows), at<void>(out), at<const int64_t>(places), num, size,
                stride, block_size, block_stride, static_cast<mm::DType>(dtype),
                static_cast<mm::DType>(out_dtype)};
            perform(num * size * PER_NUMBER, [args, lowest, num_places] {
                check_places(args.places, args.num, lowest, num_places);
                mm::ops().scatter(args);
            });
        });
    m.def(
        "gather", [](Address table, Address rows, Address out, int64_t num, int64_t size,
                     int64_t stride, int64_t num_rows, int dtype, int out_dtype) {
            const mm::GatherArgs args{
                at<const void>(table), at<const int64_t>(rows), at<void>(out), num, size, stride,
                static_cast<mm::DType>(dtype), static_cast<mm::DType>(out_dtype)};
            perform(num * size * PER_NUMBER, [args, num_rows] {
                check_places(args.rows, args.num, 0, num_rows);
                mm::ops().gather(args);
            });
        });
    m.def(
        "largest", [](Address x, Address values, Address places, int64_t num, int64_t size,
                      int64_t stride, int dtype) {
            const mm::LargestArgs args{
                at<const void>(x), at<float>(values), at<int64_t>(places), num, size, stride,
                static_cast<mm::DType>(dtype)};
            perform(num * size * PER_NUMBER, [args] { mm::ops().largest(args); });
        });
    m.def(
        "sample", [](Address logits, Address uniform, Address temperature, Address top_k,
                     Address top_p, Address min_p, Address sampled, Address kept, int64_t num,
                     int64_t size, int64_t stride) {
            const mm::SampleArgs args{
                at<const float>(logits), at<const double>(uniform), at<const float>(temperature),
                at<const int64_t>(top_k), at<const float>(top_p), at<const float>(min_p),
                at<int64_t>(sampled), at<float>(kept), num, size, stride};
            perform(num * size * 8 * PER_NUMBER, [args] { mm::ops().sample(args); });
        });
    // keys, values: where they begin, and the strides of block, token and head; `work` is how many
    // multiplications it is about.
    using KeyValues = std::tuple<Address, int64_t, int64_t, int64_t>;
    m.def(
        "attention",
        [](Address query, int64_t query_row, int64_t query_head,
           const KeyValues& keys, const KeyValues& values, Address tables, int64_t table_stride,
           bool wide_table, int64_t block_size, Address query_starts, Address contexts,
           Address out, int64_t num_sequences, int64_t heads, int64_t kv_heads, int64_t dim,
           int64_t window, float scale, float softcap, bool causal, int dtype, int64_t work) {
            const auto strided = [](const KeyValues& t) {
                return mm::KeyValues{
                    at<const void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
            };
            mm::AttentionArgs args{};
            args.query = at<const void>(query);
            args.keys = strided(keys);
            args.values = strided(values);
            args.block_tables = at<const void>(tables);
            args.query_starts = at<const int32_t>(query_starts);
            args.contexts = at<const int32_t>(contexts);
            args.out = at<void>(out);
            args.num_sequences = num_sequences;
            args.heads = heads;
            args.kv_heads = kv_heads;
            args.dim = dim;
            args.block_size = block_size;
            args.table_stride = table_stride;
            args.query_row = query_row;
            args.query_head = query_head;
            args.window = window;
            args.scale = scale;
            args.softcap = softcap;
            args.wide_table = wide_table;
            args.causal = causal;
            args.dtype = static_cast<mm::DType>(dtype);
            perform(work, [args] { mm::ops().attention(args); });
        });
    m.def(
        "quantize_linear", [](Address weight, Address out, Address scales, int64_t n, int64_t k,
                              int64_t stride, int dtype, int bits) {
            const mm::QuantizeArgs args{
                at<const void>(weight), at<void>(out), at<void>(scales), n, k, stride,
                static_cast<mm::DType>(dtype), bits};
            nb::gil_scoped_release release;
            mm::ops().quantize_linear(args);
        });
    m.def(
        "linear_quantized", [](Address x, Address weight, Address scales, Address bias,
                               Address out, int64_t rows, int64_t n, int64_t k, int64_t x_stride,
                               int dtype, int bits) {
            const mm::QuantizedLinearArgs args{
                at<const void>(x), at<const void>(weight), at<const void>(scales),
                at<const void>(bias), at<void>(out), rows, n, k, x_stride,
                static_cast<mm::DType>(dtype), bits};
            perform(rows * n * k, [args] { mm::ops().linear_quantized(args); });
        });
}
