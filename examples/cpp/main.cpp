// memory_layer INPUT_FOLDER OUTPUT_FOLDER [--device cpu|cuda] [--threads 1] [--topk 8]
//              [--activation identity|gelu|relu|silu] [--window n*n] [--offset 0] [--seed -1]
//              [--lr 0.01]
//
// Reads x, the parameters (memory_layer.h) and grad_y, each from NAME.npy, whose shapes are the
// layer's; runs forward, backward and a step of row-wise Adagrad on the table; writes y, indices,
// scores, the gradients (grad_NAME), and values and pre_values as they are after the step.
// A --seed shuffles the virtual indices (feistel); the expansion E is n*n / window.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "memory_layer.h"
#include "npy.h"

namespace {

struct Options {
  std::string input_folder, output_folder;
  std::map<std::string, std::string> named;

  std::string text(const std::string& name, const std::string& otherwise) const {
    const auto found = named.find(name);
    return found == named.end() ? otherwise : found->second;
  }
  int64_t integer(const std::string& name, int64_t otherwise) const {
    return named.count(name) == 0 ? otherwise : std::stoll(named.at(name));
  }
};

Options parse_options(int argc, char** argv) {
  Options options;
  std::vector<std::string> folders;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--", 0) != 0) {
      folders.push_back(argument);
    } else if (i + 1 < argc) {
      options.named[argument.substr(2)] = argv[++i];
    } else {
      throw std::runtime_error(argument + ": needs a value");
    }
  }
  if (folders.size() != 2) throw std::runtime_error("give an input and an output folder");
  options.input_folder = folders[0];
  options.output_folder = folders[1];
  return options;
}

ultramem::Activation parse_activation(const std::string& name) {
  const std::vector<std::string> names = {"identity", "gelu", "relu", "silu"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<ultramem::Activation>(i);
  }
  throw std::runtime_error("--activation: unknown: " + name);
}

// Arrays by name, each with its place on the device.
class Arrays {
 public:
  Arrays(Device& device, std::string input_folder, std::string output_folder)
      : device_(device),
        input_folder_(std::move(input_folder)),
        output_folder_(std::move(output_folder)) {}

  // Of a size 0 in `shape` any is right.
  const Array& read(const std::string& name, const std::vector<int64_t>& shape) {
    Array& array = arrays_[name] = read_npy(input_folder_ + "/" + name + ".npy");
    bool fits = array.shape.size() == shape.size() && array.dtype == arrays_.at("x").dtype;
    for (size_t i = 0; fits && i < shape.size(); ++i) {
      fits = array.shape[i] > 0 && (shape[i] == 0 || array.shape[i] == shape[i]);
    }
    if (!fits) {
      throw std::runtime_error(name + ": does not fit the shapes of x and keys, or x's dtype");
    }
    return array;
  }
  Buffer to_device(const std::string& name) {
    const Array& array = arrays_.at(name);
    Buffer buffer(device_, array.bytes.size());
    device_.copy_in(buffer.data(), array.bytes.data(), array.bytes.size());
    return buffer;
  }
  Buffer like(const std::string& name) { return Buffer(device_, arrays_.at(name).bytes.size()); }
  // A buffer shaped like an input.
  void write_like(const std::string& input, const std::string& name, const Buffer& buffer) {
    write(name, buffer, arrays_.at(input).dtype, arrays_.at(input).shape);
  }
  void write(const std::string& name, const Buffer& buffer, const std::string& dtype,
             const std::vector<int64_t>& shape) {
    Array array{dtype, shape, std::vector<char>(buffer.bytes())};
    device_.copy_out(array.bytes.data(), buffer.data(), buffer.bytes());
    write_npy(output_folder_ + "/" + name + ".npy", array);
  }

 private:
  Device& device_;
  std::string input_folder_, output_folder_;
  std::map<std::string, Array> arrays_;
};

LayerShape read_shape(Arrays& arrays, const Options& options) {
  const Array& x = arrays.read("x", {0, 0});
  const Array& keys = arrays.read("keys", {0, 2, 0, 0, 0});
  const Array& query_weight = arrays.read("query_weight", {0, 0});
  LayerShape shape{};
  shape.dtype = x.dtype == "<f8" ? ultramem::DType::kFloat64 : ultramem::DType::kFloat32;
  shape.num_tokens = x.shape[0];
  shape.d_model = x.shape[1];
  shape.num_heads = static_cast<int32_t>(keys.shape[0]);
  shape.tucker_rank = static_cast<int32_t>(keys.shape[2]);
  shape.num_keys = keys.shape[3];
  shape.key_dim = keys.shape[4];
  shape.num_queries =
      static_cast<int32_t>(query_weight.shape[0] / (2 * shape.num_heads * shape.key_dim));
  shape.num_cores = static_cast<int32_t>(arrays.read("cores", {0, 0, 0, 0}).shape[0]);
  const Array& values = arrays.read("values", {0, 0});
  shape.num_slots = values.shape[0];
  shape.value_dim = values.shape[1];
  shape.pre_value_dim = arrays.read("pre_values", {0, 0}).shape[1];
  shape.topk = static_cast<int32_t>(options.integer("topk", 8));
  shape.activation = parse_activation(options.text("activation", "identity"));

  ultramem::AddressingParams& addressing = shape.addressing;
  const int64_t num_virtual = shape.num_keys * shape.num_keys;
  addressing.num_slots = shape.num_slots;
  addressing.window = options.integer("window", num_virtual);
  addressing.offset = options.integer("offset", 0);
  addressing.expand = addressing.window > 0 ? num_virtual / addressing.window : 1;
  const int64_t seed = options.integer("seed", -1);
  if (seed >= 0) {
    addressing.shuffle = ultramem::Shuffle::kFeistel;
    addressing.num_keys = shape.num_keys;
    addressing.mixed_seed = ultramem::mix64(static_cast<uint64_t>(seed));
  }
  return shape;
}

using Field = std::pair<const char*, Buffer LayerParameters::*>;
const std::vector<Field> kFields = {
    {"query_weight", &LayerParameters::query_weight},
    {"query_norm", &LayerParameters::query_norm},
    {"keys", &LayerParameters::keys},
    {"key_norm", &LayerParameters::key_norm},
    {"cores", &LayerParameters::cores},
    {"pre_weight", &LayerParameters::pre_weight},
    {"value_weight", &LayerParameters::value_weight},
    {"values", &LayerParameters::values},
    {"pre_values", &LayerParameters::pre_values},
};

void run(const Options& options) {
  const std::string device_name = options.text("device", "cpu");
  if (device_name != "cpu" && device_name != "cuda") {
    throw std::runtime_error("--device: must be cpu or cuda, got " + device_name);
  }
  Device device(device_name == "cuda", static_cast<int>(options.integer("threads", 1)));
  Arrays arrays(device, options.input_folder, options.output_folder);
  const LayerShape shape = read_shape(arrays, options);
  if (device.is_cuda() && shape.dtype == ultramem::DType::kFloat64) {
    throw std::runtime_error("x: float64 is offered on the CPU only");
  }
  const int64_t Kd = shape.key_dim, H = shape.num_heads, R = shape.tucker_rank;
  arrays.read("query_norm", {Kd});
  arrays.read("key_norm", {Kd});
  arrays.read("query_weight", {shape.query_dim(), shape.d_model});
  arrays.read("keys", {H, 2, R, shape.num_keys, Kd});
  arrays.read("cores", {shape.num_cores, H, R, R});
  arrays.read("pre_weight", {shape.pre_value_dim, shape.d_model});
  arrays.read("value_weight", {shape.d_model, shape.value_dim});
  arrays.read("pre_values", {shape.num_slots, shape.pre_value_dim});
  arrays.read("grad_y", {shape.num_tokens, shape.d_model});

  LayerParameters parameters, gradients;
  for (const auto& [name, field] : kFields) {
    parameters.*field = arrays.to_device(name);
    gradients.*field = arrays.like(name);
  }
  const Buffer x = arrays.to_device("x"), grad_y = arrays.to_device("grad_y");
  const Buffer y = arrays.like("x"), grad_x = arrays.like("x");

  MemoryLayer layer(device, shape, parameters);
  layer.forward(x, y);
  layer.backward(x, grad_y, grad_x, gradients);

  const auto element = static_cast<size_t>(ultramem::element_size(shape.dtype));
  const double learning_rate = std::stod(options.text("lr", "0.01"));
  const auto update = [&](const Buffer& table, const Buffer& gradient, int64_t dim) {
    const Buffer row_sum(device, static_cast<size_t>(shape.num_slots) * element);
    const Buffer step(device, sizeof(float));
    adagrad_step(device, shape.dtype, shape.num_slots, dim, gradient, learning_rate, table, row_sum,
                 step);
  };
  update(parameters.values, gradients.values, shape.value_dim);
  update(parameters.pre_values, gradients.pre_values, shape.pre_value_dim);

  const int64_t T = shape.num_tokens, S = shape.num_selected();
  arrays.write_like("x", "y", y);
  arrays.write("indices", layer.indices(), "<i8", {T, S});
  arrays.write("scores", layer.scores(), shape.dtype == ultramem::DType::kFloat64 ? "<f8" : "<f4",
               {T, S, shape.num_cores});
  arrays.write_like("x", "grad_x", grad_x);
  for (const auto& [name, field] : kFields) {
    arrays.write_like(name, std::string("grad_") + name, gradients.*field);
  }
  arrays.write_like("values", "values", parameters.values);
  arrays.write_like("pre_values", "pre_values", parameters.pre_values);
  std::printf("ultramem %s, API %d, %s, on %s: %lld tokens, %lld slots each\n", ultramem::version(),
              static_cast<int>(ultramem::api_version()),
              ultramem::has_cuda_kernels() ? "with CUDA kernels" : "CPU only", device_name.c_str(),
              static_cast<long long>(T), static_cast<long long>(S));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse_options(argc, argv));
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "memory_layer: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
